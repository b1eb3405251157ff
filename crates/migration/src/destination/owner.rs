//! From a copy that is ready to a machine of this host: the commit, and the settlement of one that was not heard of.

use std::sync::Arc;
use std::time::Duration;

use qemu::{Qmp, Spec};
use tokio::sync::broadcast::error::RecvError;
use tokio::time::timeout;
use uuid::Uuid;

use super::network::{self, Interfaces, Known};
use super::{End, FIRST_WORD, Source, failed, no_copy, qemu_gone};
use crate::failure::{Finding, chain};
use crate::health;
use crate::hooks::Hook;
use crate::host::Host;
use crate::lifecycle;
use crate::occasion;
use crate::vm::{Ownership, Record, Vm};
use crate::wire::{self, Reply, Request as Asked, ToDestination};
/// How long after the watch over a machine's health the hook that turns the network is waited for, before the source is told.
const REDIRECT: Duration = Duration::from_secs(8);
/// How long a QEMU that was killed may take to be gone.
const KILL: Duration = Duration::from_secs(5);

impl Source {
    /// The copy is ready. From here on only the source's word, or a person's, decides what becomes of it.
    pub(super) async fn await_commit(
        &mut self,
        record: Record,
        spec: Spec,
        qmp: Qmp,
        arrived: &(impl Fn(Vm) + Send),
    ) -> Result<(), End> {
        let mut events = qmp.events();
        if let Err(finding) = occasion::run(&self.host, Hook::Up, &record, false).await {
            lifecycle::forget(&self.host, &record, Some(&qmp)).await;
            return Err(End::Failed(vec![finding]));
        }
        self.reply(Reply::Ready(wire::Nothing {})).await?;
        tracing::info!(vm = %record.name, "the copy is ready, and waits for the source's word");
        let mut interfaces = match self.interfaces.take() {
            Some(looked_for) => looked_for.await.ok(),
            None => None,
        };
        let mut known = Known::default();
        loop {
            let asked = tokio::select! {
                asked = self.receiver.receive::<ToDestination>() => asked?.request,
                event = events.recv() => {
                    if let Err(RecvError::Closed) = event {
                        // It has never run, and never will.
                        lifecycle::forget(&self.host, &record, None).await;
                        return Err(qemu_gone());
                    }
                    continue;
                }
            };
            match asked {
                Some(Asked::Commit(commit))
                    if Some(commit.generation) == record.generation.checked_add(1) =>
                {
                    let network = interfaces.take().map(|interfaces| (interfaces, known.neighbours));
                    return self.become_owner(&record, spec, qmp, network, arrived).await;
                }
                Some(Asked::Known(part)) => known.take(part, &self.host, &record.name).await,
                Some(Asked::Cancel(_)) => {
                    known.forget().await;
                    lifecycle::forget(&self.host, &record, Some(&qmp)).await;
                    return Err(End::Cancelled);
                }
                // Nothing else decides, so nothing else is followed; the copy waits on.
                other => tracing::warn!(vm = %record.name, ?other, "unexpected while ready"),
            }
        }
    }

    /// The source has given the machine away: it is this host's, and runs.
    ///
    /// `Running` is said only when QEMU runs the machine. Where it cannot, the copy is ended, and only when that is
    /// certain is the source told that there is none, which lets it run the machine itself.
    async fn become_owner(
        &mut self,
        ready: &Record,
        spec: Spec,
        qmp: Qmp,
        network: Option<(Interfaces, Vec<wire::Neighbour>)>,
        arrived: &(impl Fn(Vm) + Send),
    ) -> Result<(), End> {
        let host = Arc::clone(&self.host);
        let deciding = host.journal.decide(&ready.name).await;
        // Somebody else may have decided since: a person, or the source on another connection.
        let Some(mut record) = host.journal.get(&ready.name).filter(|now| now.arrived_by == ready.arrived_by)
        else {
            return Err(no_copy(ready.name.as_ref()));
        };
        match record.ownership {
            Ownership::Incoming { ready: true, .. } => {
                record.ownership = Ownership::Owner;
                record.generation = record.generation.saturating_add(1);
                record.resuming = true;
                lifecycle::own_disks(&host, &mut record);
                // Before anything runs: after a crash this host knows that the machine is its own, and resumes it.
                host.journal.update(&record).map_err(|e| failed("journal", &e))?;
            }
            Ownership::Owner if record.resuming => {}
            Ownership::Owner | Ownership::HandedOver { .. } => {
                return self.reply(Reply::Running(wire::Running::default())).await;
            }
            Ownership::Incoming { .. } => return Err(no_copy(ready.name.as_ref())),
        }
        // What the guest sends while its interfaces are down is lost.
        let resumed = match network {
            Some((mut interfaces, neighbours)) => {
                interfaces.hold_back(&self.frames);
                lifecycle::raise_taps(&record).await;
                let play = async { interfaces.are_up(&self.frames, &neighbours) };
                tokio::join!(qmp.cont(), play).0
            }
            None => {
                lifecycle::raise_taps(&record).await;
                qmp.cont().await
            }
        };
        if let Err(e) = resumed {
            // The images are a copy's again, if it goes back.
            record.made.images.clone_from(&ready.made.images);
            return Err(self.give_back(record, &qmp, &e).await);
        }
        self.reply(Reply::Running(wire::Running::default())).await.unwrap_or_else(|e| {
            tracing::warn!(vm = %record.name, ?e, "the source could not be told that its VM runs here");
        });
        record.resuming = false;
        if let Err(e) = host.journal.update(&record) {
            tracing::error!(vm = %record.name, error = chain(&e), "the journal still says that the VM is resuming");
        }
        drop(deciding);
        tracing::info!(vm = %record.name, from = %self.peer, "a VM has arrived and runs");
        let process = record.process.clone();
        let has_network = !spec.nics().is_empty();
        let owned = record.clone();
        host.neighbourhood.listen(&record, &spec);
        arrived(Vm { record, spec, qmp: qmp.clone() });
        if has_network && let Err(e) = qmp.announce_self().await {
            tracing::warn!(error = chain(&e), "QEMU did not announce the VM's new place");
        }
        let redirect = network::redirect(Arc::clone(&host), owned.clone());
        let watch = async {
            if let Some(session) = ready.arrived_by {
                if let Some(tail) = self.host.post_copies.get(session) {
                    tail.monitor(qmp.clone());
                }
                self.supplied(session).await?;
            }
            Ok::<_, End>(health::watch(&qmp, process.as_ref()).await)
        };
        let watched = watch.await;
        let played = std::mem::take(&mut self.frames).finish().await;
        tracing::info!(vm = %ready.name, played.delivered, played.dropped, "what was on its way to the VM has reached it");
        let told = match watched {
            Ok(health) => {
                let redirected = timeout(REDIRECT, redirect).await;
                let problem =
                    redirected.map_or_else(|_| Some(still_redirecting(&host)), |ended| ended.ok()?.err());
                let problems = problem.into_iter().map(Into::into).collect();
                let frames_dropped = played.dropped;
                self.reply(Reply::Health(wire::Health { problems, frames_dropped, ..health })).await
            }
            Err(end) => Err(end),
        };
        network::is_home(&host, &owned).await;
        told?;
        // The source closes when it has given everything back.
        let _ = timeout(FIRST_WORD, self.receiver.receive::<ToDestination>()).await;
        Ok(())
    }

    /// The machine is on record as this host's, but QEMU does not resume it. Ends the copy, and if it is certain that
    /// it has not run and cannot run any more, says that there is none.
    async fn give_back(&self, mut record: Record, qmp: &Qmp, error: &qemu::QmpError) -> End {
        if matches!(qmp.status().await, Ok(state) if state.running) {
            // It runs after all; the source asks again and hears so.
            return failed("not-resumed", error);
        }
        let ended = match &record.process {
            Some(process) => {
                process.kill();
                process.wait_for_end(KILL).await
            }
            None => false,
        };
        if !ended {
            return failed("not-resumed", error);
        }
        // A copy again, and not one that has departed: the source may have it back.
        let session = record.arrived_by.unwrap_or_default();
        record.ownership = Ownership::Incoming { session, from: self.peer.name.clone(), ready: false };
        if let Err(e) = self.host.journal.update(&record) {
            return failed("journal", &e);
        }
        lifecycle::forget_decided(&self.host, &record, None).await;
        tracing::error!(vm = %record.name, error = chain(error), "a VM could not be resumed here and goes back");
        no_copy(record.name.as_ref())
    }

    /// A source that has handed a machine over, and does not know what became of it, asks again.
    pub(super) async fn settle(
        &mut self,
        commit: &wire::Commit,
        arrived: &(impl Fn(Vm) + Send),
    ) -> Result<(), End> {
        if Uuid::from_slice(&commit.session).is_ok_and(|session| self.host.journal.has_departed(session)) {
            // It has run here, and has since moved on or ended. It is not the source's any more.
            return self.reply(Reply::Running(wire::Running::default())).await;
        }
        let Some((record, session)) = self.meant(commit) else { return Err(no_copy(&commit.name)) };
        let from_here = match &record.ownership {
            Ownership::Incoming { from, ready: true, .. } => {
                *from == self.peer.name && Some(commit.generation) == record.generation.checked_add(1)
            }
            Ownership::Incoming { .. } => false,
            Ownership::Owner if record.resuming => true,
            // It has run here, whatever became of it since.
            Ownership::Owner | Ownership::HandedOver { .. } => {
                return self.reply(Reply::Running(wire::Running::default())).await;
            }
        };
        if !from_here {
            return Err(no_copy(&commit.name));
        }
        let spec = Spec::parse(&record.argv).map_err(|e| failed("journal", &e))?;
        match Qmp::connect(&record.qmp_socket).await {
            Ok(qmp) => {
                tracing::info!(vm = %record.name, %session, "the source settles a hand-over: the VM is ours");
                let neighbours = self.host.neighbourhood.known(&record, &spec);
                let network = Some((Interfaces::to_announce(&record, &spec), neighbours));
                self.become_owner(&record, spec, qmp, network, arrived).await
            }
            // A ready copy whose QEMU is gone has never run.
            Err(_) if !record.process.as_ref().is_some_and(qemu::Process::exists) => {
                let never_ran = matches!(record.ownership, Ownership::Incoming { .. });
                if never_ran && lifecycle::forget(&self.host, &record, None).await {
                    return Err(no_copy(&commit.name));
                }
                Err(qemu_gone())
            }
            Err(e) => Err(failed("qemu", &e)),
        }
    }

    /// A source that has kept its machine wants no copy left here.
    pub(super) async fn abandon(&mut self, commit: &wire::Commit) -> Result<(), End> {
        match self.meant(commit) {
            Some((record, session)) if matches!(&record.ownership, Ownership::Incoming { session: s, from, .. } if *s == session && *from == self.peer.name) =>
            {
                lifecycle::forget(&self.host, &record, None).await;
                Err(End::Cancelled)
            }
            Some((record, session)) if record.arrived_by == Some(session) => {
                self.reply(Reply::Running(wire::Running::default())).await
            }
            // It has run here and has left since, or never was here.
            _ if Uuid::from_slice(&commit.session).is_ok_and(|id| self.host.journal.has_departed(id)) => {
                self.reply(Reply::Running(wire::Running::default())).await
            }
            _ => Err(End::Cancelled),
        }
    }

    pub(super) fn meant(&self, commit: &wire::Commit) -> Option<(Record, Uuid)> {
        let session = Uuid::from_slice(&commit.session).ok()?;
        let record = self.host.journal.get(&commit.name.parse().ok()?)?;
        let from_peer = record.arrived_from.as_ref() == Some(&self.peer.name);
        (record.arrived_by == Some(session) && from_peer).then_some((record, session))
    }
}

fn still_redirecting(host: &Host) -> Finding {
    Finding::new(
        "hook-slow",
        format!("hook network-redirect on {} has not ended yet", host.name),
        "see the log of that agent for how it ends",
    )
}
