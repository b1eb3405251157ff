//! The hand-over and what follows it; and the way back where there is none.

use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::join;
use tokio::time::timeout;

use mirror::storage::source::DiskProof;
use qemu::QmpError;

use super::disks::{Disks, NOT_RESUMED, Uncleared};
use super::earlier;
use super::health;
use super::held::Controller;
use super::network::Network;
use super::peer::{about, violation};
use super::resume::{leave_stopped, resume_here, unmark};
use super::rounds::Rounds;
use super::settlement::{Settled, abandon, settle};
use super::stop::{Stop, nothing_held};
use super::switch::{Prepared, VM_ENDED, VM_PAUSED};
use finding::{Finding, chain, kind};
use host::Record;
use host::hooks::{self, Hook};
use host::images;
use host::lifecycle;
use host::settings;
use ownership::Outgoing;
use ownership::{Effect, Event, Why, Withdrawal};
use protocol::deadlines::{CANCEL, HEALTH, RUNNING, SETTLE_PAUSE, SETTLE_TRIES};
use protocol::wire::{Reply, Request};
use session::options::{Engine, Verify};
use session::points::{self, Point};
use session::report::{self, Counted, Health, Outcome, Pause, Phase, Verdict};

/// A destination that says within this time that the machine runs is waited for alone: a process started meanwhile would lengthen the pause.
const AT_ONCE: Duration = Duration::from_millis(100);

/// Whether it has ended because somebody else has stopped the guest.
fn was_stopped(stop: &Stop) -> bool {
    matches!(stop, Stop::Failed(finding) if finding.kind == VM_PAUSED)
}

/// Whether it has ended because the guest has switched itself off.
fn has_shut_down(stop: &Stop) -> bool {
    matches!(stop, Stop::Failed(finding) if finding.kind == VM_ENDED)
}

/// Whether it has ended because another program migrates the machine: neither that nor the guest's pause is ours to end.
fn migrated_by_others(stop: &Stop) -> bool {
    matches!(stop, Stop::Failed(finding) if finding.kind == kind::MIGRATES_ALREADY)
}

/// The journal has failed twice: a later start may find that the machine was given away, or not.
const UNSETTLED: &str = "journal";

/// A machine that stands, while another program migrates it.
fn left_paused() -> Finding {
    Finding::new(
        kind::MIGRATES_ALREADY,
        "another program has migrated the VM, or does, while it was paused to be handed over: it is left paused",
        "see where it runs; only if that is nowhere, let it run here again (QMP `cont`)",
    )
}

fn other_keeper(destination: &str) -> Finding {
    Finding::new(
        "other-state",
        format!(
            "{destination} says that it has no copy of the VM, but its state directory is not the one that took it: the VM may run there, or have run"
        ),
        "see whether its QEMU runs there; bring the state directory back, or use `vmirror resolve`",
    )
}

/// What a pause has cost beside the last pages: they travel while devices are saved, so only what they take longer is theirs.
fn cost(pause: &Pause) -> Duration {
    let pages = (pause.last_round_ms - pause.device_state_ms).max(0.0);
    Duration::from_secs_f64((pause.running_ms - pages).max(0.0) / 1e3)
}

impl Controller {
    /// From here on a complete copy may wait at the destination, and a pause is ours. On record before such a copy can exist: after a crash
    /// here, somebody must tell that it is worthless. And, where QEMU migrates, not before it is set up: what is on record as ours is resumed after a crash, and
    /// until then somebody else's migration may be what has paused the guest, and have it run elsewhere.
    pub(super) fn offer(&mut self) -> Result<(), Stop> {
        let destination = self.destination()?;
        let (to, address) = (destination.name().to_owned(), destination.address().to_owned());
        let event = Event::Offered { session: self.id, to, address };
        match self.host.journal.on(&mut self.vm.record, event, |_| {})?.first() {
            Some(Effect::Refuse(Why::CopiesLeft)) => {
                let left: Vec<&str> = self.vm.record.outgoing.iter().map(Outgoing::whose).collect();
                Err(Stop::Failed(earlier::copies_left(&self.vm.record.name, &left)))
            }
            Some(Effect::Refuse(_)) => Err(nothing_held()),
            _ => Ok(()),
        }
    }

    /// The two-step change of ownership. From the journal's entry on the machine is not this host's any more.
    pub(super) async fn hand_over(&mut self, prepared: Prepared) -> Result<(), Stop> {
        let Prepared { paused_at, pause, device_state_bytes, supplying, mut devices } = prepared;
        self.report.pause = pause;
        self.report.device_state_bytes = device_state_bytes;
        let since = || paused_at.elapsed().as_secs_f64() * 1e3;
        let destination = self.held.destination.as_mut().ok_or_else(nothing_held)?;
        // While the journal is written the destination's firewall is told.
        let known = self.held.network.as_ref().map(Network::known).unwrap_or_default();
        destination.tell_known(known).await?;
        points::reach(Point::ReadyHeard).await;
        let event = Event::HandedOver {
            session: self.id,
            to: destination.name().to_owned(),
            address: destination.address().to_owned(),
            keeper: self.keeper,
            supplies: supplying.is_some(),
        };
        self.held.supplying = supplying;
        if let Some(devices) = &mut devices {
            // What was left out of the copy is only there.
            let complete = self.held.supplying.is_none();
            devices.may_leave(&self.vm.qmp, complete).await?;
        }
        let mirrored: Vec<PathBuf> =
            self.held.disks.iter().flat_map(Disks::paths).map(Path::to_owned).collect();
        // From here on they are older than the machine's disks, whoever finds that on record.
        let left = |now: &mut Record| now.left_behind = mirrored;
        if let Err(e) = self.host.journal.on(&mut self.vm.record, event, left) {
            // What could not be written may be on the disk all the same. Only when it is overwritten is the machine
            // certainly this host's.
            return Err(match self.host.journal.settle(&self.vm.record.name) {
                Ok(()) => e.into(),
                Err(_) => Stop::Uncertain(Finding::new(
                    UNSETTLED,
                    chain(&e),
                    "the VM is paused; see to the disk of state_dir: it runs on as soon as that can be written",
                )),
            });
        }
        points::reach(Point::HandedOver).await;
        self.report.pause.handed_over_ms = since();
        let commit = about(&self.id, &self.vm.record);
        let running = async {
            destination.send(Request::Commit(commit)).await?;
            match destination.receive().await? {
                Reply::Running(_) => Ok(()),
                other => Err(violation(&format!("said {other} instead of running the VM"))),
            }
        };
        let told = {
            let mut running = pin!(running);
            match timeout(AT_ONCE, &mut running).await {
                Ok(told) => Ok(told),
                // Its images are not to be this agent's alone for as long as a late answer takes.
                Err(_) => {
                    let late = timeout(RUNNING - AT_ONCE, running);
                    join!(late, self.host.fence.post(&self.vm.record.name)).0
                }
            }
        };
        let heard = matches!(told, Ok(Ok(())));
        if !heard {
            tracing::warn!(vm = %self.vm.record.name, ?told, "no word that the VM runs at the destination");
            self.held.destination = None;
            self.settle_record();
            self.host.fence.post(&self.vm.record.name).await;
            self.settle().await?;
        }
        points::reach(Point::RunningHeard).await;
        self.report.pause.running_ms = since();
        if let Some(network) = &self.held.network {
            network.has_gone();
        }
        self.report.downtime_ms = since();
        // Its images are kept from others whatever becomes of this agent.
        self.host.fence.post(&self.vm.record.name).await;
        if heard && self.options.engine == Engine::Mirror {
            self.host.switch_cost.measured(cost(&self.report.pause));
        }
        if heard {
            self.settle_record();
        }
        Ok(())
    }

    /// Not even a journal that loses its newer half may say that the machine is here: who was not heard may run it for as long as nobody
    /// answers.
    fn settle_record(&self) {
        if let Err(e) = self.host.journal.settle(&self.vm.record.name) {
            tracing::error!(vm = %self.vm.record.name, error = chain(&e), "the journal cannot be written");
        }
    }

    /// Asks the destination again and again what became of the machine.
    pub(super) async fn settle(&mut self) -> Result<(), Stop> {
        for _ in 0..SETTLE_TRIES {
            match settle(&self.host, &mut self.vm.record).await {
                Ok(Settled::RunsThere) => return Ok(()),
                Ok(Settled::RunsHere) => {
                    // It never will there.
                    let message = "the destination lost its copy at the hand-over";
                    return Err(Stop::Failed(Finding::new(
                        "copy-lost",
                        message,
                        "see the destination's log",
                    )));
                }
                Ok(Settled::Unknown | Settled::UnknownThere) => {
                    tokio::time::sleep(SETTLE_PAUSE).await;
                }
                Ok(Settled::OtherKeeper) => {
                    return Err(Stop::Uncertain(other_keeper(&self.report.destination)));
                }
                Err(failure) => return Err(Stop::Uncertain(failure.finding)),
            }
        }
        let message = format!(
            "the VM was handed over to {} and nothing was heard of it since",
            self.report.destination
        );
        Err(Stop::Uncertain(Finding::new(
            "uncertain",
            message,
            "when the link is back this settles itself; otherwise see where it runs and use `vmirror resolve`",
        )))
    }

    /// The machine runs at the destination: prove, give everything back, hear how it does.
    pub(super) async fn after_hand_over(&mut self) {
        if !self.post_copy {
            self.progress.send_modify(|progress| progress.remaining_bytes = 0);
        }
        self.enter(Phase::Resume).await;
        let supplied = self.supply_rest().await;
        // What was not supplied is in no ledger: where nobody said that all was, there is nothing to prove.
        self.report_disks();
        let whole = self.report.post_copy.as_ref().is_none_or(|late| late.counted != Counted::Nothing);
        let proved = if whole { self.prove().await.and(supplied) } else { supplied };
        self.enter(Phase::CleanUp).await;
        self.clean_up().await;
        self.enter(Phase::Complete).await;
        let health = self.health().await;
        match proved.and(health) {
            Ok(()) => self.close(Outcome::Completed, None),
            // It runs there, and something about it needs a person's eye.
            Err(stop) => self.close(Outcome::Uncertain, Some(stop)),
        }
        self.release().await;
    }

    /// The frozen RAM of the source against what the destination was given.
    pub(super) async fn prove(&mut self) -> Result<(), Stop> {
        if self.options.verify == Verify::Gate {
            return Ok(());
        }
        let Some(rounds) = &mut self.held.rounds else { return Ok(()) };
        // It runs there by now: whatever fails here is for a person to look at.
        let uncertain = |stop| match stop {
            Stop::Failed(finding) => Stop::Uncertain(finding),
            stop => stop,
        };
        let disks = match &self.held.disks {
            Some(disks) => {
                let (journal, record) = (&self.host.journal, &mut self.vm.record);
                let proved = disks.prove(|process| {
                    Ok(journal.amend(record, |now| now.made.storage_daemon = Some(process.clone()))?)
                });
                proved.await.map_err(uncertain)?
            }
            None => DiskProof::default(),
        };
        let proof = match rounds.prove().await {
            Ok(proof) => proof,
            Err(Stop::Failed(finding)) => return Err(Stop::Uncertain(finding)),
            Err(stop) => return Err(stop),
        };
        let verification = &mut self.report.verification;
        verification.proof_pages = proof.pages;
        verification.mismatches = proof.mismatches;
        verification.proof_blocks = disks.blocks;
        verification.mismatched_blocks = disks.mismatches;
        let equal = proof.mismatches == 0 && disks.mismatches == 0;
        verification.proof = if equal { Verdict::Match } else { Verdict::Mismatch };
        if equal {
            return Ok(());
        }
        if proof.mismatches == 0 {
            let message =
                format!("{} blocks of the VM's disks at the source are not what was sent", disks.mismatches);
            return Err(Stop::Uncertain(Finding::new(
                "proof",
                message,
                "do not trust the VM; report this with the agents' logs",
            )));
        }
        let message = format!(
            "{} pages of the VM's memory changed at the source without being tracked, the first is page {}",
            proof.mismatches,
            proof.examples.first().map_or(0, |page| page.0),
        );
        Err(Stop::Uncertain(Finding::new(
            "proof",
            message,
            "do not trust the VM; report this with the agents' logs",
        )))
    }

    /// What was read of the disks, and what that took.
    fn report_disks(&mut self) {
        if let Some(disks) = self.held.disks.take() {
            self.report_flows(&disks);
            self.held.disks = Some(disks);
        }
    }

    fn report_flows(&mut self, disks: &Disks) {
        for (path, flow) in disks.flows() {
            let name = path.display().to_string();
            for disk in self.report.disks.iter_mut().filter(|disk| disk.name == name) {
                (disk.raw_bytes, disk.wire_bytes) = (flow.raw_bytes, flow.wire_bytes);
            }
        }
    }

    /// The source gives everything back: tracking, QEMU, files, taps, its record.
    pub(super) async fn clean_up(&mut self) {
        self.end_rounds().await;
        self.end_relay().await;
        if let Some(network) = self.held.network.take() {
            self.report.network = network.finish(self.host.forwards.has(self.id)).await;
        }
        self.report.network.forwarding = self
            .host
            .forwards
            .with(self.id)
            .map(|forward| report::Forwarding { to: forward.remote(), interfaces: forward.interfaces() });
        if let Some(disks) = self.held.disks.take() {
            disks.end().await;
        }
        if self.host.hooks.directory.is_some() {
            let down = hooks::run(&self.host, Hook::Down, &self.vm.record, false).await;
            self.report.network.problems.extend(down.err());
            self.amend(|now| now.made.hooked_down = true);
        }
        if !lifecycle::forget(&self.host, &self.vm.record, Some(&self.vm.qmp)).await.is_done() {
            // It stays on record as handed over, and the agent goes after it. The destination has to remember for as long.
            self.held.keeps = true;
        }
    }

    /// Puts on record what nothing depends on at once.
    fn amend(&mut self, amend: impl FnOnce(&mut Record)) {
        if let Err(e) = self.host.journal.amend(&mut self.vm.record, amend) {
            tracing::error!(vm = %self.vm.record.name, error = chain(&e), "the journal cannot be written");
        }
    }

    fn happened(&mut self, event: Event, also: impl FnOnce(&mut Record)) {
        if let Err(e) = self.host.journal.on(&mut self.vm.record, event, also) {
            tracing::error!(vm = %self.vm.record.name, error = chain(&e), "the journal cannot be written");
        }
    }

    /// What came for a guest that stays reaches it, before anything that takes longer.
    async fn reconnect(&mut self) {
        if let Some(network) = self.held.network.take() {
            network.has_stayed().await;
        }
    }

    /// How the machine does at its new place.
    pub(super) async fn health(&mut self) -> Result<(), Stop> {
        let Some(destination) = &mut self.held.destination else { return Ok(()) };
        let heard = timeout(HEALTH, async {
            loop {
                if let Reply::Health(health) = destination.receive().await? {
                    return Ok::<_, Stop>(health);
                }
            }
        });
        let health = match heard.await {
            Ok(Ok(health)) => health,
            other => {
                // It was said to run; that nothing more was heard is worth a word and no alarm.
                tracing::warn!(vm = %self.vm.record.name, ?other, "nothing was heard of the VM's health");
                return Ok(());
            }
        };
        self.report.network.frames_dropped =
            self.report.network.frames_dropped.saturating_add(health.frames_dropped);
        self.report.network.problems.extend(health.problems.iter().cloned().map(Into::into));
        self.report.health = Some(Health {
            watched_ms: health.watched_ms,
            vcpus: health.vcpus,
            vcpus_progressing: health.progressing,
        });
        health::judge(&health).map_err(|what| {
            let message = format!("the VM was resumed at the destination and {what}");
            Stop::Uncertain(Finding::new("unhealthy", message, "see the VM at the destination"))
        })
    }

    /// Has the machine run here again. QEMU is to have its images, and nobody else before it.
    async fn resume(&self) -> Result<(), Stop> {
        let (fence, name, qmp) = (&self.host.fence, &self.vm.record.name, &self.vm.qmp);
        let alone = self.vm.record.saves_devices_alone();
        let resumed = fence.hand_to(name, || resume_here(qmp, alone)).await;
        resumed.map_err(|e| self.not_resumed(&e))
    }

    fn not_resumed(&self, error: &QmpError) -> Stop {
        let socket = self.vm.record.qmp_socket.display();
        Stop::Uncertain(Finding::new(
            NOT_RESUMED,
            format!("the VM is still this host's, but could not be resumed: {}", chain(error)),
            format!("see its log; the agent tries again, by its QMP socket {socket}"),
        ))
    }

    /// The machine stays. It runs again first; then everything is given back, here and there.
    pub(super) async fn undo(&mut self, stop: Stop) {
        let mut stop = stop;
        self.let_go();
        let left_stopped = self.held.rounds.as_ref().map(Rounds::left_stopped);
        let mut resumed = true;
        if self.held.qemu {
            if let Some(rounds) = &self.held.rounds {
                rounds.abort();
            }
            if let Some(relay) = &self.held.relay {
                relay.abort();
            }
            let alone = self.vm.record.saves_devices_alone();
            if alone && migrated_by_others(&stop) {
                // Neither that migration nor the pause is ours to end any more.
                stop = Stop::Uncertain(left_paused());
            } else if was_stopped(&stop) || alone && has_shut_down(&stop) {
                // By somebody else while QEMU sent, or by itself: it stays so.
                let leave = || leave_stopped(&self.vm.qmp, alone);
                if let Err(e) = self.host.fence.hand_to(&self.vm.record.name, leave).await {
                    (resumed, stop) = (false, self.not_resumed(&e));
                }
            } else if let Err(why) = self.resume().await {
                (resumed, stop) = (false, why);
            }
        }
        if self.vm.record.saves_devices_alone() && resumed {
            unmark(&self.vm.qmp).await;
        }
        if self.held.configured {
            self.reconnect().await;
        }
        // What it is set to tells the next agent whose migration it is that it finds, if it has not been let run.
        if self.held.configured && resumed {
            settings::give_back(&self.host.journal, &mut self.vm.record, &self.vm.qmp).await;
        }
        self.reconnect().await;
        self.end_preparing().await;
        if let Some(rounds) = &self.held.rounds {
            // Nothing is taken for the streams any more, so a copy job waits for nothing.
            rounds.abort();
        }
        self.end_rounds().await;
        if self.held.clears {
            // On record before the guest is stopped for that. Where the record cannot be written, jobs that stay are worse.
            let pauses = super::disks::has_jobs(&self.vm.qmp).await;
            self.amend(|now| now.pauses |= pauses);
            let read = self.disk_places().read();
            match super::disks::clear(&self.vm.qmp, &read).await {
                Ok(()) => {}
                Err(Uncleared::There(e)) => {
                    tracing::error!(error = chain(&e), "QEMU keeps a copy job of ours")
                }
                Err(Uncleared::Stopped(e)) => (resumed, stop) = (false, self.not_resumed(&e)),
            }
        }
        if matches!(&stop, Stop::Failed(finding) if finding.kind == NOT_RESUMED)
            && let Err(why) = self.resume().await
        {
            (resumed, stop) = (false, why);
        }
        if let Some(disks) = self.held.disks.take() {
            self.report_flows(&disks);
            disks.end().await;
        }
        self.end_relay().await;
        // A scan that was under way has ended by now.
        if left_stopped.is_some_and(|stopped| stopped.load(Ordering::Relaxed))
            && let Err(why) = self.resume().await
        {
            (resumed, stop) = (false, why);
        }
        // One that could not be resumed is resumed by the next agent that finds this on record.
        if resumed {
            self.happened(Event::Resumed, |now| now.pauses = false);
            // It has its images, whatever is kept of an earlier stay.
            self.host.fence.taken(images::written(&self.vm.spec).iter().map(PathBuf::as_path));
            self.host.fence.take_again(&self.vm.record.name).await;
        }
        self.host.forwards.undo(self.id).await;
        let told = match &mut self.held.destination {
            Some(destination) => {
                destination.cancel(about(&self.id, &self.vm.record), CANCEL).await == Withdrawal::Done
            }
            // It was not heard, and said on another connection that the machine may run here.
            None => false,
        };
        match self.vm.record.outgoing.iter().find(|outgoing| outgoing.session == self.id).cloned() {
            // One that could not be resumed is not forgotten to have been paused by us: that is on record beside it.
            Some(outgoing) if told => {
                self.happened(Event::Withdrawn { session: outgoing.session }, |_| {});
            }
            // Stays on record until the destination has heard it, even by an agent that is started anew.
            Some(outgoing) => abandon(&self.host, &self.vm.record, outgoing),
            None => {}
        }
        let outcome = match stop {
            Stop::Cancelled => Outcome::Cancelled,
            Stop::Uncertain(_) => Outcome::Uncertain,
            Stop::Refused(_) | Stop::Failed(_) => Outcome::Failed,
        };
        self.close(outcome, Some(stop));
        self.release().await;
    }
}
