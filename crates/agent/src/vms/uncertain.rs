//! Machines in the middle of a hand-over whose end is not known: asked about until it is.

use std::path::PathBuf;
use std::time::Duration;

use host::Record;
use host::lifecycle::{self, Forgotten};
use migration::source::{self, Settled};
use migration::{Recovered, Resolution, ResolveError, When};
use ownership::{JournalError, Ownership, VmName};
use protocol::deadlines::ASK_AGAIN;

use super::{Entry, Silent, Vms, not_here};
use crate::api::types::{Decision, EventKind, Place, RemovalReason};
use crate::error::{AgentError, chain};
use crate::findings;

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

    /// Copies of this peer that are complete and may not run yet, left behind by a control connection that ended; and those that
    /// are not complete, and whose QEMU does not end. Others of it, which `concerns` tells, are still being served.
    pub fn doubt_copies_from(&self, peer: &str, concerns: impl Fn(&VmName) -> bool) {
        for record in self.host().journal.all().into_iter().filter(|record| concerns(&record.name)) {
            let waits =
                matches!(&record.ownership, Ownership::Incoming { from, ready: true, .. } if from == peer);
            let is_known = match self.entries().get(&record.name) {
                // It was in doubt as something that it is not any more.
                Some(Entry::Uncertain(doubted, _)) => doubted.claim() == record.claim(),
                entry => entry.is_some(),
            };
            if waits && !is_known {
                self.doubt(record);
                continue;
            }
            // It may have run, or not: only a person can tell.
            let unseen = record.resuming && record.arrived_from.as_deref() == Some(peer);
            if unseen && record.ownership == Ownership::Owner && !is_known {
                self.silent(record, "it was not seen to run here".to_owned());
                continue;
            }
            // One that was not complete is gone, unless its QEMU does not end.
            let from_there =
                matches!(&record.ownership, Ownership::Incoming { from, ready: false, .. } if from == peer);
            let lingers = self.host().lingering.why(&record.name).filter(|_| from_there && !is_known);
            if let Some(why) = lingers {
                self.silent(record, why.message);
            }
        }
    }

    async fn ask(&self, mut record: Record) {
        let name = record.name.clone();
        let (mut wait, longest) = ASK_AGAIN;
        loop {
            match source::settle(self.host(), &mut record).await {
                Ok(Settled::RunsThere) if record.supplies => match source::supply(self.host(), &record).await
                {
                    // Asked for the last time, and then let go of.
                    Ok(None) => {
                        source::supplied(self.host(), &mut record);
                        record.supplies = false;
                        continue;
                    }
                    Ok(Some(finding)) => {
                        tracing::error!(vm = %name, why = finding.message, "the VM is lost");
                        if self.is_forgotten(&record).await {
                            return self.drop_entry(&name, RemovalReason::Ended);
                        }
                    }
                    Err(failure) => {
                        tracing::info!(vm = %name, why = failure.finding.message, "it lacks memory that is here");
                    }
                },
                Ok(Settled::RunsThere) => {
                    tracing::info!(vm = %name, "settled: it runs at the destination");
                    if !self.is_forgotten(&record).await {
                        tokio::time::sleep(wait).await;
                        continue;
                    }
                    let (host, left) = (self.host().clone(), record.clone());
                    self.inner.tasks.spawn(async move { source::release(&host, &left).await });
                    self.tell(&name, EventKind::Settled { runs: Place::There });
                    self.drop_entry(&name, RemovalReason::Migrated);
                    if let Ownership::HandedOver { to, .. } = &record.ownership {
                        self.watch(&record, to);
                    }
                    return;
                }
                Ok(Settled::RunsHere) => {
                    tracing::info!(vm = %name, "settled: the destination will never run it");
                    self.found_again(&name, record, Place::Here).await;
                    return;
                }
                Ok(Settled::OtherKeeper) => {
                    tracing::error!(vm = %name, "the destination has another state directory than the one that took the VM; see where it runs, and use `vmirror resolve`");
                }
                Ok(Settled::UnknownThere | Settled::Unknown) => {
                    tracing::debug!(vm = %name, "not settled yet");
                    // Its QEMU there may wait for memory that is here, and answer nobody until it has that.
                    if record.supplies
                        && let Err(failure) = source::supply(self.host(), &record).await
                    {
                        tracing::debug!(vm = %name, why = failure.finding.message, "no memory is asked for");
                    }
                }
                Err(failure) => {
                    tracing::error!(vm = %name, why = failure.finding.message, "cannot be settled")
                }
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(longest);
        }
    }

    /// Ends and forgets a machine; false where a process of it may run on, and everything of it is kept.
    async fn is_forgotten(&self, record: &Record) -> bool {
        !matches!(lifecycle::forget(self.host(), record, None).await, Forgotten::Lingers(_))
    }

    /// What became of a machine that is this host's again, or is on record as that at last.
    async fn found_again(&self, name: &VmName, record: Record, runs: Place) {
        match migration::recover(self.host(), record, When::Later).await {
            Recovered::Running(vm) => {
                self.keep(*vm);
                self.tell(name, EventKind::Settled { runs });
            }
            Recovered::Silent(record, why) => self.silent(record, why),
            Recovered::Uncertain(record) => self.doubt(record),
            Recovered::Gone(_) => self.drop_entry(name, RemovalReason::Ended),
            Recovered::Replaced(_) => self.drop_entry(name, RemovalReason::Withdrawn),
        }
    }

    /// Keeps a machine of which the journal may say either that it is this host's or that it was given away, until it can be written. Its
    /// guest is paused meanwhile.
    pub(super) fn unsettled(&self, record: Record) {
        let name = record.name.clone();
        tracing::error!(vm = %name, "the journal cannot be written: the VM waits for that");
        let until = self.inner.closing.child_token();
        self.put(name.clone(), Entry::Uncertain(Box::new(record.clone()), until.clone()));
        let vms = self.clone();
        self.inner.tasks.spawn(async move {
            let work = async {
                let (mut wait, longest) = ASK_AGAIN;
                while vms.write_again(&name, &record).await.is_err() {
                    tokio::time::sleep(wait).await;
                    wait = (wait * 2).min(longest);
                }
            };
            tokio::select! {
                () = until.cancelled() => {}
                () = work => {}
            }
        });
    }

    async fn write_again(&self, name: &VmName, record: &Record) -> Result<(), JournalError> {
        self.host().journal.settle(name)?;
        tracing::info!(vm = %name, "the journal can be written again");
        self.found_again(name, record.clone(), Place::Here).await;
        Ok(())
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

    /// Does what a person has decided about a machine whose hand-over is uncertain. Returns the images here of a copy that was given up
    /// and was complete, which stay.
    ///
    /// # Errors
    /// [`AgentError::NotUncertain`] when there is nothing to decide, or why it could not be done.
    pub async fn resolve(
        &self,
        name: &VmName,
        decision: Decision,
        force: bool,
    ) -> Result<Vec<PathBuf>, AgentError> {
        self.open()?;
        let unseen = |silent: &Silent| silent.record.resuming && decision == Decision::GiveUp;
        let record = match self.take_silent_if(name, unseen) {
            Some(record) => record,
            None => self.take_doubt(name)?,
        };
        if record.ownership == Ownership::Owner && !record.resuming {
            return self.resolve_unsettled(name, record, decision).await.map(|()| Vec::new());
        }
        tracing::warn!(vm = %name, ?decision, force, "resolved by a person");
        let resolution = match decision {
            Decision::RunHere => Resolution::RunHere,
            Decision::GiveUp => Resolution::GiveUp,
        };
        match migration::resolve(self.host(), record.clone(), resolution, force).await {
            Ok(Some(vm)) => {
                self.keep(vm);
                self.tell(name, EventKind::Settled { runs: Place::Here });
                Ok(Vec::new())
            }
            Ok(None) => {
                self.drop_entry(name, RemovalReason::GivenUp);
                // As after one that was settled without a person.
                if let Ownership::HandedOver { to, .. } = &record.ownership {
                    self.watch(&record, to);
                    let (host, left) = (self.host().clone(), record.clone());
                    self.inner.tasks.spawn(async move { source::release(&host, &left).await });
                }
                Ok(self.host().left.complete_of(name))
            }
            Err(error) => {
                self.still_in_doubt(name, record, &error);
                Err(AgentError::Refused(findings::of_resolution(&error)))
            }
        }
    }

    /// The journal decides what there is, not who had the machine in doubt: it may have settled its fate meanwhile.
    fn still_in_doubt(&self, name: &VmName, doubted: Record, error: &ResolveError) {
        match self.host().journal.get(name) {
            Some(now) if now.claim() == doubted.claim() && now.ownership != Ownership::Owner => {
                self.doubt(now)
            }
            // It is this host's by the journal; unless it has arrived in the meantime, only its QEMU is missing.
            Some(now) if now.ownership == Ownership::Owner => {
                let waits =
                    matches!(self.entries().get(name), Some(Entry::Uncertain(..) | Entry::Silent(..)));
                if waits && now.resuming {
                    self.silent(now, chain(error));
                }
            }
            Some(now) => self.doubt(now),
            None => {
                if matches!(self.entries().get(name), Some(Entry::Uncertain(..))) {
                    self.drop_entry(name, RemovalReason::Withdrawn);
                }
            }
        }
    }

    /// Of a machine that only the journal keeps from running, nothing is to be decided but to try that again.
    async fn resolve_unsettled(
        &self,
        name: &VmName,
        record: Record,
        decision: Decision,
    ) -> Result<(), AgentError> {
        let refused = |finding| Err(AgentError::Refused(finding));
        match decision {
            Decision::GiveUp => {
                self.unsettled(record);
                refused(findings::unsettled(name, None))
            }
            Decision::RunHere => match self.write_again(name, &record).await {
                Ok(()) => Ok(()),
                Err(error) => {
                    self.unsettled(record);
                    refused(findings::unsettled(name, Some(&error)))
                }
            },
        }
    }

    /// The record in doubt; from now on nobody else goes after it.
    fn take_doubt(&self, name: &VmName) -> Result<Record, AgentError> {
        let entries = self.entries();
        match entries.get(name) {
            Some(Entry::Here(_)) | None if self.is_under_way(name, entries.get(name)) => {
                Err(AgentError::HandingOver(name.to_string()))
            }
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

    /// Whether a migration is still after the truth about a machine, here or at the other host, and nobody has it in doubt yet.
    fn is_under_way(&self, name: &VmName, entry: Option<&Entry>) -> bool {
        let session = match entry {
            Some(Entry::Here(here)) => here.session.as_ref().map(|active| active.id()),
            _ => None,
        };
        self.host().journal.get(name).is_some_and(|now| match &now.ownership {
            Ownership::HandedOver { .. } | Ownership::Incoming { ready: true, .. } => true,
            Ownership::Incoming { ready: false, .. } => false,
            // Offered: its copy is complete, or will be, and the hand-over may be being written down this very moment.
            Ownership::Owner => now.outgoing.iter().any(|copy| Some(copy.session) == session),
        })
    }
}
