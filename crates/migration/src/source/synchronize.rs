//! Synchronise and verify: rounds until the switch-over may begin, and every doubt settled.

use std::time::{Duration, Instant};

use mirror::layout::PAGE_SIZE;
use mirror::memory::round::Guest;
use tokio::sync::{broadcast, oneshot};

use super::disks::Disks;
use super::estimate::Advice;
use super::held::Controller;
use super::stop::{Stop, nothing_held};
use crate::hardware::Hardware;
use finding::Finding;
use session::options::{Goal, OnDiverge};
use session::report::{Verdict, Verification};

/// Between the rounds of a mirror that is in sync and stays so.
const STANDING: Duration = Duration::from_millis(100);
/// Between the rounds of a guest that is slowed.
const SLOWED: Duration = Duration::from_millis(5);
/// Between those of a guest that is stopped for each, while its disks are copied.
const COPYING: Duration = Duration::from_secs(1);
/// A deadline for what has none.
const FAR: Duration = Duration::from_secs(86_400);
/// With `--on-diverge fail`, how long rounds must not have shrunk: a guest's busy moment is not the end of its migration.
const DIVERGED: Duration = Duration::from_secs(5);
/// A guest that dirties so much of what can be sent in the same time outruns the mirror: rounds would hardly shrink.
const OUTRUN: f64 = 0.9;
/// Fewer pages than this say nothing of how fast they can be sent.
const OUTRUN_PAGES: u64 = 256;
/// Rounds that may be needed to settle what the audit has put in doubt.
const SETTLING_ROUNDS: usize = 8;

impl Controller {
    /// Rounds, until the switch-over may begin: when the predicted downtime is low enough, or for a standing mirror when
    /// it is ordered.
    pub(super) async fn synchronize(&mut self) -> Result<(), Stop> {
        let mut events = self.vm.qmp.events();
        // A round may take long; a machine that ends meanwhile ends it.
        let mut watch = self.vm.qmp.events();
        let timeout_at = self.begin + self.options.timeout;
        let mut ordered_at = None;
        let mut diverged_at = None;
        loop {
            let deadline = match self.goal {
                Goal::Migrate => Some(timeout_at),
                Goal::Mirror => ordered_at.map(|at: Instant| at + self.options.timeout),
            };
            let late = tokio::time::sleep_until(deadline.unwrap_or_else(|| Instant::now() + FAR).into());
            let stopped = tokio::select! {
                done = self.round(Guest::Running) => {
                    done?;
                    None
                }
                stop = ended(&mut watch) => Some(stop),
                () = late, if deadline.is_some() => Some(self.out_of_time()),
            };
            if let Some(stop) = stopped {
                return Err(stop);
            }
            if self.observe(&mut events)? {
                self.audit_after_balloon().await?;
            }
            let advice = self.rounds()?.estimate.advice(&self.options);
            let copied = self.disks_are_ready().await?;
            self.publish(Some(advice));
            while let Ok(answer) = self.commands.verify.try_recv() {
                self.full_audit(answer).await?;
            }
            let switching = self.goal == Goal::Migrate || self.commands.switch.is_cancelled();
            if self.goal == Goal::Mirror && switching {
                ordered_at.get_or_insert_with(Instant::now);
            }
            let ready = copied && matches!(advice, Advice::Switch | Advice::SwitchWithinLimit);
            if switching && ready && self.disks_are_drained()? {
                if !self.devices_are_ready().await? {
                    continue;
                }
                return Ok(());
            }
            let post_copy = copied && switching && self.options.on_diverge == OnDiverge::PostCopy;
            if post_copy && self.is_outrun(advice).await? && self.disks_are_drained()? {
                tracing::info!(vm = %self.vm.record.name, "the guest outruns the mirror: post-copy");
                self.post_copy = true;
                return Ok(());
            }
            if switching && copied && advice == Advice::DoesNotConverge && self.is_out_of_reach()? {
                // However slow the guest: nothing that is done about memory makes the rest of a switch-over shorter.
                self.host.switch_cost.doubt();
                return Err(self.not_converged());
            }
            if switching && copied && advice == Advice::DoesNotConverge {
                let since = *diverged_at.get_or_insert_with(Instant::now);
                match self.options.on_diverge {
                    OnDiverge::Throttle => self.slow_down().await?,
                    OnDiverge::Fail if since.elapsed() >= DIVERGED => return Err(self.not_converged()),
                    OnDiverge::Fail | OnDiverge::PostCopy => {}
                }
            } else if advice != Advice::DoesNotConverge {
                diverged_at = None;
            }
            if switching && deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Err(self.out_of_time());
            }
            if !copied {
                // Rounds without end would only take from the disks' share of the link, and stop a guest that must be for each scan.
                let quiesced = self.rounds()?.quiesced.is_some();
                self.stand(&mut events, if quiesced { COPYING } else { STANDING }).await?;
            } else if !switching && ready {
                self.stand(&mut events, STANDING).await?;
            } else if advice == Advice::DoesNotConverge && self.held.throttling.is_none() {
                // More rounds at once would not help; the guest's next quiet moment might.
                tokio::time::sleep(STANDING).await;
            } else if self.held.throttling.is_some() {
                // Rounds of a guest that is all but stopped take no time, and say no more when they are more.
                tokio::time::sleep(SLOWED).await;
            }
        }
    }

    /// Whether the downtime that was asked for cannot be had whatever the guest does.
    fn is_out_of_reach(&mut self) -> Result<bool, Stop> {
        Ok(self.rounds()?.estimate.fixed > self.options.max_downtime)
    }

    /// Whether the disks are copied, and before a switch-over all but equal. What is not certain is settled then, so that little is left
    /// for the pause.
    async fn disks_are_ready(&mut self) -> Result<bool, Stop> {
        let Some(disks) = &mut self.held.disks else { return Ok(true) };
        if !disks.is_copied(&self.vm.qmp).await? {
            return Ok(false);
        }
        let switching = self.goal == Goal::Migrate || self.commands.switch.is_cancelled();
        if !switching {
            // A mirror that stands settles little by little: to read what the guest writes again and again would only slow it.
            self.held.while_connected(Disks::mend).await?;
            return Ok(true);
        }
        let begin = Instant::now();
        let settled = self.held.while_connected(Disks::settle_some).await?;
        let (took, longest) = (begin.elapsed(), self.options.max_downtime);
        let Some(disks) = &mut self.held.disks else { return Ok(true) };
        Ok(disks.is_settled(settled, took, longest))
    }

    /// Whether a pause would begin with little that was written to disks and has not gone: that goes before the last pages.
    fn disks_are_drained(&mut self) -> Result<bool, Stop> {
        let rate = self.rounds()?.estimate.wire_rate.unwrap_or(f64::INFINITY);
        let downtime = self.options.downtime;
        Ok(self.held.disks.as_ref().is_none_or(|disks| disks.is_drained(rate, downtime)))
    }

    /// Whether the guest dirties its memory faster than it can be sent: seen from the rounds, or at once after the first,
    /// which is one pass over all of it, from what the guest does in a short while.
    async fn is_outrun(&mut self, advice: Advice) -> Result<bool, Stop> {
        if advice == Advice::DoesNotConverge {
            return Ok(true);
        }
        let (destination, rounds) = self.held.both().ok_or_else(nothing_held)?;
        let [first] = &rounds.report[..] else { return Ok(false) };
        let sent = (first.plain * PAGE_SIZE as u64) as f64;
        if first.plain < OUTRUN_PAGES {
            return Ok(false);
        }
        let rate = sent / (first.duration_ms / 1e3).max(1e-6);
        let dirty_rate = rounds.dirty_rate_now(destination).await?;
        tracing::info!(
            dirty_rate,
            rate,
            "how fast the guest dirties memory, and how fast the first pass went"
        );
        Ok(dirty_rate > rate * OUTRUN)
    }

    /// The time for a round is over. Before two rounds are done, that is all that can be said.
    pub(super) fn out_of_time(&self) -> Stop {
        if self.held.disks.as_ref().is_some_and(|disks| !disks.are_copied()) {
            let message = format!("the disks were not copied within {:?}", self.options.timeout);
            return Stop::Failed(Finding::new(
                "timeout",
                message,
                "raise --timeout or --bandwidth, or see to the link",
            ));
        }
        if let Some(blocks) = self.held.disks.as_ref().and_then(Disks::unsettled) {
            let message = format!(
                "the guest writes to its disks faster than they are made equal: {blocks} blocks were left, which a downtime of {:?} has no time for",
                self.options.max_downtime
            );
            let hint = "raise --max-downtime, or migrate when the guest is less busy";
            return Stop::Failed(Finding::new("not-converged", message, hint));
        }
        if self.held.rounds.as_ref().is_some_and(|rounds| rounds.estimate.downtime().is_some()) {
            return self.not_converged();
        }
        let message = format!("the memory was not copied within {:?}", self.options.timeout);
        Stop::Failed(Finding::new("timeout", message, "raise --timeout or --bandwidth, or see to the link"))
    }

    pub(super) fn not_converged(&self) -> Stop {
        let estimate = self.held.rounds.as_ref().map(|rounds| rounds.estimate.clone()).unwrap_or_default();
        if estimate.fixed > self.options.max_downtime {
            let message = format!(
                "a switch-over away from this host takes {:.1?} beside any memory: a downtime of {:?} cannot be had",
                estimate.fixed, self.options.max_downtime,
            );
            return Stop::Failed(Finding::new("not-converged", message, "raise --max-downtime"));
        }
        let mib = |bytes: f64| bytes / f64::from(1 << 20);
        let message = format!(
            "the guest dirties {:.0} MiB/s and {:.0} MiB/s can be sent: a downtime of {:?} cannot be had, {:.1?} was predicted",
            mib(estimate.dirty_rate),
            mib(estimate.throughput),
            self.options.max_downtime,
            estimate.downtime().unwrap_or_default(),
        );
        Stop::Failed(Finding::new(
            "not-converged",
            message,
            "raise --bandwidth, --max-downtime or --timeout, or migrate when the guest is less busy",
        ))
    }

    /// Waits until it is time for the next round of a standing mirror, or until something is ordered.
    pub(super) async fn stand(
        &mut self,
        events: &mut broadcast::Receiver<qemu::Event>,
        time: Duration,
    ) -> Result<(), Stop> {
        let wake = Instant::now() + time;
        let switch = self.commands.switch.clone();
        loop {
            let Some((destination, rounds)) = self.held.both() else { return Err(nothing_held()) };
            tokio::select! {
                () = tokio::time::sleep_until(wake.into()) => return Ok(()),
                () = switch.cancelled() => return Ok(()),
                Some(answer) = self.commands.verify.recv() => return self.full_audit(answer).await,
                reply = destination.receive() => rounds.note(reply?)?,
                event = events.recv() => {
                    let balloon = event.as_ref().is_ok_and(|event| event.name == "BALLOON_CHANGE");
                    seen(event)?;
                    if balloon {
                        return self.audit_after_balloon().await;
                    }
                }
            }
        }
    }

    /// A balloon punches holes behind pages, which the tracking does not see where a page was protected: what differs
    /// from the ledger is found by comparing everything.
    pub(super) async fn audit_after_balloon(&mut self) -> Result<(), Stop> {
        let (destination, rounds) = self.held.both().ok_or_else(nothing_held)?;
        rounds.audit(destination).await?;
        self.settle_doubts().await
    }

    /// Takes in what QEMU has said since the last look. Returns whether the balloon has changed.
    pub(super) fn observe(&mut self, events: &mut broadcast::Receiver<qemu::Event>) -> Result<bool, Stop> {
        use broadcast::error::{RecvError, TryRecvError};
        let mut balloon = false;
        loop {
            match events.try_recv() {
                Ok(event) => {
                    balloon |= event.name == "BALLOON_CHANGE";
                    seen(Ok(event))?;
                }
                Err(TryRecvError::Empty) => return Ok(balloon),
                Err(TryRecvError::Lagged(_)) => {}
                Err(TryRecvError::Closed) => return seen(Err(RecvError::Closed)).map(|()| false),
            }
        }
    }

    /// `vmirror verify`: both sides compare everything, what differs is repaired, and the answer says what was found.
    pub(super) async fn full_audit(
        &mut self,
        answer: oneshot::Sender<Result<Verification, Finding>>,
    ) -> Result<(), Stop> {
        if self.held.disks.is_some() {
            self.held.while_connected(Disks::settle).await?;
            self.round(Guest::Running).await?;
        }
        let before = self.rounds()?.verification();
        let (destination, rounds) = self.held.both().ok_or_else(nothing_held)?;
        rounds.read_back(destination).await?;
        rounds.audit(destination).await?;
        let blocks = self.held.while_connected(Disks::audit).await?;
        self.settle_doubts().await?;
        let after = self.rounds()?.verification();
        let gate = if self.rounds()?.equal { Verdict::Match } else { Verdict::Mismatch };
        let found = Verification {
            // Partly as the destination counts, which need not count upwards.
            audited_pages: after.audited_pages.saturating_sub(before.audited_pages),
            repaired_pages: after.repaired_pages.saturating_sub(before.repaired_pages),
            audited_blocks: after.audited_blocks.saturating_sub(before.audited_blocks).saturating_add(blocks),
            repaired_blocks: after.repaired_blocks.saturating_sub(before.repaired_blocks),
            gate,
            ..Verification::default()
        };
        let _ = answer.send(Ok(found));
        Ok(())
    }

    /// Rounds until every doubt that the audit has raised is settled.
    pub(super) async fn settle_doubts(&mut self) -> Result<(), Stop> {
        // One round at the least: the doubts are told apart by what the next scan says.
        for _ in 0..SETTLING_ROUNDS {
            self.held.while_connected(Disks::settle).await?;
            self.round(Guest::Running).await?;
            if !self.rounds()?.in_doubt() {
                break;
            }
        }
        Ok(())
    }

    /// What the audit has put in doubt is settled before the guest is paused. The destination has a machine with the devices and
    /// disks of the beginning, and no others.
    pub(super) async fn verify(&mut self) -> Result<(), Stop> {
        let now = Hardware::of(&self.vm.qmp).await.map_err(Stop::qemu)?;
        if let Some(change) = self.hardware.as_ref().and_then(|before| before.changed_to(&now)) {
            return Err(Stop::Failed(change));
        }
        if self.rounds()?.in_doubt() {
            self.settle_doubts().await?;
        }
        self.publish(None);
        Ok(())
    }
}

/// Waits until the machine has ended, or cannot be mirrored any more.
async fn ended(events: &mut broadcast::Receiver<qemu::Event>) -> Stop {
    loop {
        if let Err(stop) = seen(events.recv().await) {
            return stop;
        }
    }
}

/// What an event of QEMU means for a mirror. A guest that reboots is mirrored on.
fn seen(event: Result<qemu::Event, broadcast::error::RecvError>) -> Result<(), Stop> {
    let ended = |kind: &str, message: String| {
        Err(Stop::Failed(Finding::new(kind, message, "migrate the VM when it runs again")))
    };
    match event {
        Ok(event) if event.ours => Ok(()),
        Ok(event) => match event.name.as_str() {
            "SHUTDOWN" => ended("vm-ended", "the guest has shut down".to_owned()),
            "GUEST_PANICKED" => ended("vm-panicked", "the guest has panicked".to_owned()),
            "STOP" => ended("vm-paused", "the VM was paused by somebody else".to_owned()),
            _ => Ok(()),
        },
        Err(broadcast::error::RecvError::Lagged(_)) => Ok(()),
        Err(broadcast::error::RecvError::Closed) => ended("qemu-gone", "QEMU has ended".to_owned()),
    }
}
