//! What a QEMU tells, as long as somebody waits for it.

use std::time::{Duration, Instant, SystemTime};

use qemu::{Event, Qmp};
use serde_json::json;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;

use crate::error::BenchError;
use crate::run::Run;

/// How long what follows the end of a migration may take.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long an event is waited for before the wait looks whether it is to end.
const STEP: Duration = Duration::from_millis(5);

/// What QEMU tells, while it is waited for.
#[derive(Debug)]
pub struct Events {
    heard: Receiver<Event>,
    run: Run,
}

impl Events {
    /// What a QEMU tells from now on.
    pub fn of(qmp: &Qmp, run: &Run) -> Self {
        Self { heard: qmp.events(), run: run.clone() }
    }

    /// The next event; none after a short wait without one.
    fn poll(&mut self, what: &str, since: Instant, patience: Duration) -> Result<Option<Event>, BenchError> {
        loop {
            self.run.check()?;
            let heard = &mut self.heard;
            match self.run.block_on(async { tokio::time::timeout(STEP, heard.recv()).await }) {
                Ok(Ok(event)) => return Ok(Some(event)),
                Ok(Err(RecvError::Lagged(_))) => {}
                Ok(Err(RecvError::Closed)) => {
                    return Err(BenchError::baseline("gone", "QEMU has ended"));
                }
                Err(_) if since.elapsed() > patience => {
                    return Err(BenchError::Timeout { what: what.to_owned(), waited: since.elapsed() });
                }
                Err(_) => return Ok(None),
            }
        }
    }

    /// Waits for an event that fits.
    pub fn wait(
        &mut self,
        what: &str,
        patience: Duration,
        fits: impl Fn(&Event) -> bool,
    ) -> Result<Event, BenchError> {
        let since = Instant::now();
        loop {
            if let Some(event) = self.poll(what, since, patience)?.filter(|event| fits(event)) {
                return Ok(event);
            }
        }
    }

    /// Waits for an event and gives back when QEMU says that it was.
    pub fn first(&mut self, name: &str) -> Result<SystemTime, BenchError> {
        Ok(self.wait(name, PATIENCE, |event| event.name == name)?.timestamp)
    }

    /// Waits for the end of the migration and gives back when the guest was stopped for it. Post-copy is begun when all
    /// has been sent once; disks are let go of when the guest is paused.
    pub fn ended(
        &mut self,
        qmp: &Qmp,
        mut post_copy: bool,
        let_go: impl Fn() -> Result<(), BenchError>,
        patience: Duration,
    ) -> Result<SystemTime, BenchError> {
        let since = Instant::now();
        let run = self.run.clone();
        let mut stopped = None;
        loop {
            if post_copy {
                let state = run.block_on(qmp.query_migrate())?;
                // The bitmap is fetched for the second time when the first pass is over.
                if state.ram["dirty-sync-count"].as_u64() >= Some(2) {
                    // Refused where it has just ended without.
                    let _ = run.block_on(qmp.execute_raw("migrate-start-postcopy", json!({})));
                    post_copy = false;
                }
            }
            let Some(event) = self.poll("QEMU's own migration", since, patience)? else {
                continue;
            };
            match (event.name.as_str(), event.data["status"].as_str()) {
                ("STOP", _) => stopped = Some(event.timestamp),
                ("MIGRATION", Some("pre-switchover")) => {
                    let_go()?;
                    run.block_on(qmp.migrate_continue())?;
                }
                ("MIGRATION", Some("completed")) => {
                    let missing = || BenchError::baseline("completed", "without having stopped the guest");
                    return stopped.ok_or_else(missing);
                }
                ("MIGRATION", Some(status @ ("failed" | "cancelled"))) => {
                    let message = run.block_on(qmp.query_migrate())?.error.unwrap_or_default();
                    return Err(BenchError::baseline(status, message));
                }
                _ => {}
            }
        }
    }
}
