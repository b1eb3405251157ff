//! The twin: an equal guest in plain QEMU processes, moved by QEMU's own pre-copy migration.

use std::net::{IpAddr, TcpListener};
use std::time::{Duration, Instant, SystemTime};

use qemu::qmp::MigrationState;
use qemu::{Event, Qmp};
use serde_json::{Value, json};
use testbed::{GuestSpec, Host, RunningGuest, cpu};
use tokio::runtime::Handle;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::TryRecvError;

use crate::measure::{ThreadWatch, ms};
use crate::record::{Method, QemuReport, Sample};
use crate::{BenchError, Interrupt};

/// How long QEMU may take to open its monitor.
const MONITOR: Duration = Duration::from_secs(30);
/// How long a migration may take.
const PATIENCE: Duration = Duration::from_secs(120);
/// Bytes per second that are no limit: a tebibyte.
const UNLIMITED: u64 = 1 << 40;

/// The twin, on the host where it runs.
#[derive(Debug)]
pub struct Twin {
    // The monitor before the process: it is closed before QEMU is killed.
    qmp: Qmp,
    guest: RunningGuest,
    spec: GuestSpec,
    host: usize,
    runtime: Handle,
}

impl Twin {
    /// Boots it on the first of two hosts.
    ///
    /// # Errors
    /// Where QEMU does not start or its monitor does not answer.
    pub fn boot(
        hosts: &[Host; 2],
        spec: &GuestSpec,
        runtime: &Handle,
        interrupt: &Interrupt,
    ) -> Result<Self, BenchError> {
        Self::start(hosts, 0, spec, &[], runtime, interrupt)
    }

    fn start(
        hosts: &[Host; 2],
        host: usize,
        spec: &GuestSpec,
        more: &[&str],
        runtime: &Handle,
        interrupt: &Interrupt,
    ) -> Result<Self, BenchError> {
        let socket = hosts[host].directory().join("twin.qmp");
        let mut spec = GuestSpec { qmp: Some(socket.clone()), ..spec.clone() };
        let own = spec.clone();
        spec.extra.extend(more.iter().map(|&word| word.to_owned()));
        // A socket of an earlier QEMU would be connected to in vain.
        let _ = std::fs::remove_file(&socket);
        let mut guest = hosts[host].boot(&spec)?;
        let qmp =
            interrupt.wait("QEMU's monitor", MONITOR, || match runtime.block_on(Qmp::connect(&socket)) {
                Ok(qmp) => Ok(Some(qmp)),
                Err(error) => guest.exit_status().map_or(Ok(None), |_| Err(error.into())),
            })?;
        Ok(Self { qmp, guest, spec: own, host, runtime: runtime.clone() })
    }

    /// QEMU's process.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.guest.pid()
    }

    /// Which of the two hosts it is on.
    #[must_use]
    pub fn host(&self) -> usize {
        self.host
    }

    /// Moves it to the other host, as QEMU does by default or tuned, and measures what that takes.
    ///
    /// # Errors
    /// [`BenchError::Baseline`] where QEMU does not complete it; whatever else keeps it from being done.
    pub fn migrate(
        self,
        hosts: &[Host; 2],
        method: Method,
        interrupt: &Interrupt,
    ) -> Result<(Self, Sample), BenchError> {
        let (from, to) = (&hosts[self.host], &hosts[1 - self.host]);
        let incoming = ["-incoming", "defer"];
        let there = Self::start(hosts, 1 - self.host, &self.spec, &incoming, &self.runtime, interrupt)?;
        let uri = format!("tcp:{}:{}", to.listen().ip(), free_port(to)?);
        let parameters = match method {
            Method::QemuTuned => json!({ "max-bandwidth": UNLIMITED }),
            Method::QemuDefault | Method::Vmirror => json!({}),
        };
        // Without this capability QEMU does not tell how its migration goes.
        self.runtime.block_on(self.qmp.set_capabilities(&[("events", true)]))?;
        self.runtime.block_on(self.qmp.set_parameters(parameters.clone()))?;

        let main = there.pid();
        let loading = move || -> Duration {
            cpu::thread_times(main)
                .into_iter()
                .filter(|thread| thread.thread == main || thread.name.starts_with("mig/dst"))
                .map(|thread| thread.time)
                .sum()
        };
        let before = loading();
        self.runtime.block_on(there.qmp.migrate_incoming(&uri))?;
        let mut here_events = Events(self.qmp.events());
        let mut there_events = Events(there.qmp.events());
        let sending = ThreadWatch::start(self.pid(), sends)?;
        let began = SystemTime::now();
        self.runtime.block_on(self.qmp.migrate(&uri))?;
        let stopped = here_events.ended(&self.qmp, &self.runtime, interrupt)?;
        let resumed = there_events.first("RESUME", interrupt)?;
        let cpu_source = sending.stop();
        let cpu_destination = loading().saturating_sub(before);

        let state = self.runtime.block_on(self.qmp.query_migrate())?;
        let since = |from: SystemTime, to: SystemTime| ms(to.duration_since(from).unwrap_or_default());
        let sample = Sample {
            method,
            round: 0,
            from: from.name().to_owned(),
            to: to.name().to_owned(),
            total_ms: state.total_ms.unwrap_or_default() as f64,
            until_running_ms: since(began, resumed),
            downtime_ms: since(stopped, resumed),
            cpu_source_ms: ms(cpu_source),
            cpu_destination_ms: ms(cpu_destination),
            sent_bytes: state.ram["transferred"].as_u64().unwrap_or_default(),
            heartbeats: None,
            report: None,
            qemu: Some(report(&state, parameters)),
        };
        Ok((there, sample))
    }
}

fn report(state: &MigrationState, settings: Value) -> QemuReport {
    QemuReport {
        total_ms: state.total_ms.unwrap_or_default() as f64,
        downtime_ms: state.downtime_ms.unwrap_or_default() as f64,
        setup_ms: state.setup_ms.map(|time| time as f64),
        ram: state.ram.clone(),
        settings,
    }
}

/// Whether a thread of QEMU sends a migration: `live_migration` up to QEMU 8.2, `mig/src/…` later.
fn sends(name: &str) -> bool {
    name == "live_migration" || name.starts_with("mig/src")
}

/// A port that is free on a host now.
fn free_port(host: &Host) -> Result<u16, BenchError> {
    let address: IpAddr = host.listen().ip();
    let bound =
        host.on_network(|| TcpListener::bind((address, 0)).and_then(|listener| listener.local_addr()))?;
    Ok(bound.map_err(BenchError::file("port"))?.port())
}

/// What QEMU tells, while it is waited for.
struct Events(Receiver<Event>);

impl Events {
    /// The next event, waited for in small steps so that an interruption is noticed.
    fn next(&mut self, what: &str, interrupt: &Interrupt, since: Instant) -> Result<Event, BenchError> {
        loop {
            match self.0.try_recv() {
                Ok(event) => return Ok(event),
                Err(TryRecvError::Lagged(_)) => {}
                Err(TryRecvError::Closed) => {
                    return Err(BenchError::Baseline {
                        status: "gone".into(),
                        message: "QEMU has ended".into(),
                    });
                }
                Err(TryRecvError::Empty) if since.elapsed() > PATIENCE => {
                    return Err(BenchError::Timeout { what: what.to_owned(), waited: since.elapsed() });
                }
                // What is measured comes from the events' own time stamps, not from when they are read.
                Err(TryRecvError::Empty) => interrupt.sleep(Duration::from_millis(5))?,
            }
        }
    }

    /// Waits for an event and gives back when QEMU says that it was.
    fn first(&mut self, name: &str, interrupt: &Interrupt) -> Result<SystemTime, BenchError> {
        let since = Instant::now();
        loop {
            let event = self.next(name, interrupt, since)?;
            if event.name == name {
                return Ok(event.timestamp);
            }
        }
    }

    /// Waits for the end of the migration and gives back when the guest was stopped for it.
    fn ended(
        &mut self,
        qmp: &Qmp,
        runtime: &Handle,
        interrupt: &Interrupt,
    ) -> Result<SystemTime, BenchError> {
        let since = Instant::now();
        let mut stopped = None;
        loop {
            let event = self.next("QEMU's own migration", interrupt, since)?;
            match (event.name.as_str(), event.data["status"].as_str()) {
                ("STOP", _) => stopped = Some(event.timestamp),
                ("MIGRATION", Some("completed")) => {
                    let missing = || BenchError::Baseline {
                        status: "completed".into(),
                        message: "without having stopped the guest".into(),
                    };
                    return stopped.ok_or_else(missing);
                }
                ("MIGRATION", Some(status @ ("failed" | "cancelled"))) => {
                    let message = runtime.block_on(qmp.query_migrate())?.error.unwrap_or_default();
                    return Err(BenchError::Baseline { status: status.to_owned(), message });
                }
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sending_threads_of_every_version_are_known() {
        for name in ["live_migration", "mig/src/main", "mig/src/send_0"] {
            assert!(sends(name), "{name}");
        }
        for name in ["qemu-system-x86", "CPU 0/TCG", "mig/dst/recv_0", "call_rcu"] {
            assert!(!sends(name), "{name}");
        }
    }
}
