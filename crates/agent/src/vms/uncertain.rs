//! Machines in the middle of a hand-over whose end is not known: asked about until it is.

use std::time::Duration;

use migration::lifecycle::{self, Resolution};
use migration::source::{self, Settled};
use migration::{Ownership, Record, VmName};

use super::{Entry, Vms, not_here};
use crate::api::types::{Decision, EventKind, Place, RemovalReason};
use crate::error::{AgentError, chain};
use crate::findings;

/// First and longest wait between two questions to the destination.
const ASK_AGAIN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// How often to look whether the source has decided about a copy that waits here.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

impl Vms {
    /// Keeps a machine whose hand-over is uncertain, and goes after the truth. Given away: the destination is asked.
    /// Received: the source asks us, and what it decides is seen in the journal.
    pub(super) fn doubt(&self, record: Record) {
        let name = record.name.clone();
        tracing::warn!(vm = %name, ownership = ?record.ownership, "it is not certain where it should run");
        let until = self.inner.closing.child_token();
        self.put(name, Entry::Uncertain(Box::new(record.clone()), until.clone()));
        let vms = self.clone();
        self.inner.tasks.spawn(async move {
            let work = async {
                match record.ownership {
                    Ownership::HandedOver { .. } => vms.ask(record).await,
                    Ownership::Incoming { .. } | Ownership::Owner => vms.wait(&record).await,
                }
            };
            tokio::select! {
                () = until.cancelled() => {}
                () = work => {}
            }
        });
    }

    /// Copies of this peer that are complete and may not run yet, left behind by a control connection that ended.
    pub fn doubt_copies_from(&self, peer: &str) {
        for record in self.host().journal.all() {
            let waits =
                matches!(&record.ownership, Ownership::Incoming { from, ready: true, .. } if from == peer);
            if waits && !self.entries().contains_key(&record.name) {
                self.doubt(record);
            }
        }
    }

    async fn ask(&self, mut record: Record) {
        let name = record.name.clone();
        let (mut wait, longest) = ASK_AGAIN;
        loop {
            match source::settle(self.host(), &record).await {
                Ok(Settled::RunsThere) if record.supplies => match source::supply(self.host(), &record).await
                {
                    // Asked for the last time, and then let go of.
                    Ok(None) => {
                        record.supplies = false;
                        continue;
                    }
                    Ok(Some(finding)) => {
                        tracing::error!(vm = %name, why = finding.message, "the VM is lost");
                        lifecycle::forget(self.host(), &record, None).await;
                        return self.drop_entry(&name, RemovalReason::Ended);
                    }
                    Err(failure) => {
                        tracing::info!(vm = %name, why = failure.finding.message, "it lacks memory that is here");
                    }
                },
                Ok(Settled::RunsThere) => {
                    tracing::info!(vm = %name, "settled: it runs at the destination");
                    lifecycle::forget(self.host(), &record, None).await;
                    self.tell(&name, EventKind::Settled { runs: Place::There });
                    return self.drop_entry(&name, RemovalReason::Migrated);
                }
                Ok(Settled::RunsHere) => {
                    tracing::info!(vm = %name, "settled: the destination will never run it");
                    if self.run_here(&name, record.clone()).await.is_ok() {
                        return;
                    }
                }
                Ok(Settled::Unknown) => tracing::debug!(vm = %name, "not settled yet"),
                Err(failure) => {
                    tracing::error!(vm = %name, why = failure.finding.message, "cannot be settled")
                }
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(longest);
        }
    }

    /// Waits until the source has taken its copy back. When it has let it run, it has arrived, and this is not
    /// waited for any more.
    async fn wait(&self, record: &Record) {
        while self.host().journal.get(&record.name).is_some_and(|now| now.ownership == record.ownership) {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        // The name may be another migration's by now; what is told here is the end of this one's doubt.
        let still_here = |now: Record| now.arrived_by == record.arrived_by;
        let doubted = matches!(
            self.entries().get(&record.name),
            Some(Entry::Uncertain(doubted, _)) if doubted.arrived_by == record.arrived_by
        );
        if doubted && !self.host().journal.get(&record.name).is_some_and(still_here) {
            self.drop_entry(&record.name, RemovalReason::Withdrawn);
        }
    }

    /// Does what a person has decided about a machine whose hand-over is uncertain.
    ///
    /// # Errors
    /// [`AgentError::NotUncertain`] when there is nothing to decide, or why it could not be done.
    pub async fn resolve(&self, name: &VmName, decision: Decision) -> Result<(), AgentError> {
        self.open()?;
        let record = self.take_doubt(name)?;
        if decision == Decision::GiveUp && record.supplies {
            self.doubt(record);
            return Err(AgentError::Refused(findings::supplies(name)));
        }
        tracing::warn!(vm = %name, ?decision, "resolved by a person");
        match decision {
            Decision::RunHere => self.run_here(name, record).await,
            Decision::GiveUp => {
                lifecycle::forget(self.host(), &record, None).await;
                self.drop_entry(name, RemovalReason::GivenUp);
                Ok(())
            }
        }
    }

    /// Runs a machine here that is known to run nowhere else.
    async fn run_here(&self, name: &VmName, record: Record) -> Result<(), AgentError> {
        match lifecycle::resolve(self.host(), record.clone(), Resolution::RunHere).await {
            Ok(Some(vm)) => {
                self.keep(vm);
                self.tell(name, EventKind::Settled { runs: Place::Here });
                Ok(())
            }
            Ok(None) => {
                self.drop_entry(name, RemovalReason::GivenUp);
                Ok(())
            }
            Err(error) => {
                // The journal may say already that it is this host's; then only its QEMU is missing.
                match self.host().journal.get(name) {
                    Some(now) if now.ownership == Ownership::Owner => self.silent(now, chain(&error)),
                    _ => self.doubt(record),
                }
                Err(AgentError::Refused(findings::of_run(&error)))
            }
        }
    }

    /// The record in doubt; from now on nobody else goes after it.
    fn take_doubt(&self, name: &VmName) -> Result<Record, AgentError> {
        let entries = self.entries();
        match entries.get(name) {
            Some(Entry::Uncertain(record, asking)) => {
                if asking.is_cancelled() {
                    return Err(AgentError::Held { vm: name.to_string(), doing: "resolved" });
                }
                asking.cancel();
                Ok(Record::clone(record))
            }
            Some(entry) => Err(not_here(name, entry)),
            None => {
                drop(entries);
                Err(self.unknown(name))
            }
        }
    }
}
