//! Migrations that this host is the source of, from the command until the history has the report.

use std::sync::Arc;
use std::time::{Duration, Instant};

use finding::{Failure, Finding, Stage};
use ownership::VmName;
use session::{Outcome, Phase, Progress, Report, Session};
use tokio::sync::watch;
use uuid::Uuid;

use crate::api::types::EventKind;
use crate::events::{Events, unix_ms};

/// Least time between two progress events of one session on the host's stream of events.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);

/// A migration under way.
#[derive(Debug)]
pub struct Active {
    /// The machine.
    pub vm: VmName,
    /// The destination's address.
    pub to: String,
    /// The controller's handle.
    pub session: Session,
    /// Set once the history has the report and the list of machines is true again, which is later than when
    /// the controller reports: who waits for this can ask for either at once.
    ended: watch::Sender<Option<Arc<Report>>>,
}

impl Active {
    /// Wraps a session that was just begun.
    #[must_use]
    pub fn new(vm: VmName, to: String, session: Session) -> Active {
        Active { vm, to, session, ended: watch::Sender::new(None) }
    }

    /// Its identity.
    #[must_use]
    pub fn id(&self) -> Uuid {
        self.session.id
    }

    /// A way to wait for the report.
    #[must_use]
    pub fn ended(&self) -> watch::Receiver<Option<Arc<Report>>> {
        self.ended.subscribe()
    }

    /// Lets everybody who waits have the report.
    pub(crate) fn end(&self, report: Arc<Report>) {
        self.ended.send_replace(Some(report));
    }

    /// Tells of phases and progress until the controller has ended, and returns its report, or one made here
    /// should it have vanished without.
    pub(crate) async fn follow(&self, events: &Events) -> Arc<Report> {
        let mut progress = self.session.progress();
        let mut phase = None;
        let mut told = Instant::now();
        let finished = self.session.finished();
        tokio::pin!(finished);
        loop {
            let now = progress.borrow_and_update().clone();
            self.tell(events, &now, &mut phase, &mut told);
            tokio::select! {
                report = &mut finished => {
                    let last = progress.borrow_and_update().clone();
                    self.tell(events, &last, &mut phase, &mut told);
                    return report.unwrap_or_else(|_| Arc::new(vanished(&last)));
                }
                changed = progress.changed() => if changed.is_err() {
                    let last = progress.borrow().clone();
                    return finished.await.unwrap_or_else(|_| Arc::new(vanished(&last)));
                }
            }
        }
    }

    fn tell(&self, events: &Events, now: &Progress, phase: &mut Option<Phase>, told: &mut Instant) {
        let vm = Some(self.vm.as_ref());
        if *phase != Some(now.phase) {
            *phase = Some(now.phase);
            events.tell(vm, EventKind::PhaseEntered { session: self.id(), phase: now.phase });
        }
        if told.elapsed() >= PROGRESS_EVERY {
            *told = Instant::now();
            events.tell(vm, EventKind::Progress { progress: Box::new(now.clone()) });
        }
    }
}

/// The report of a controller that ended without one, from what was last seen of it. The machine's journal
/// record, not this, decides where it runs.
fn vanished(last: &Progress) -> Report {
    let finding = Finding::new(
        "controller-vanished",
        format!("the migration of {} ended in {} without a report", last.vm, last.phase.name()),
        "see the agent's log for a panic, and `vmirror show` for the state of the VM",
    );
    let elapsed = Duration::from_secs_f64((last.elapsed_ms / 1e3).max(0.0));
    Report {
        id: last.id.clone(),
        vm: last.vm.clone(),
        source: last.source.clone(),
        destination: last.destination.clone(),
        started_unix_ms: unix_ms().saturating_sub(u64::try_from(elapsed.as_millis()).unwrap_or(0)),
        engine: "mirror".to_owned(),
        outcome: Outcome::Failed,
        error: Some(Failure { stage: Stage::Failed, finding, more: Vec::new() }),
        total_ms: last.elapsed_ms,
        downtime_ms: 0.0,
        downtime_asked_ms: 0.0,
        downtime_predicted_ms: 0.0,
        pause: session::report::Pause::default(),
        tracking_hold_ms: 0.0,
        phases: Vec::new(),
        rounds: Vec::new(),
        memory: session::report::Memory {
            raw_bytes: last.raw_bytes,
            wire_bytes: last.wire_bytes,
            ..session::report::Memory::default()
        },
        disks: Vec::new(),
        network: session::report::Network::default(),
        device_state_bytes: 0,
        verification: last.verification.clone(),
        health: None,
        post_copy: None,
        throttle: None,
        quiesced: None,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Where a migration might be when its controller vanishes.
    pub(crate) fn progress(id: &str) -> Progress {
        Progress {
            id: id.to_owned(),
            vm: "web1".to_owned(),
            source: "host-a".to_owned(),
            destination: "host-b".to_owned(),
            goal: session::Goal::Migrate,
            phase: Phase::Synchronize,
            elapsed_ms: 1500.0,
            rounds: 2,
            total_bytes: 1 << 29,
            remaining_bytes: 1 << 20,
            raw_bytes: 1 << 28,
            wire_bytes: 1 << 27,
            throughput: 1e9,
            dirty_rate: 1e6,
            predicted_downtime_ms: Some(4.0),
            time_left_ms: None,
            in_sync: false,
            verification: session::report::Verification::default(),
            warning: None,
            throttle: 0.0,
            disks: Vec::new(),
        }
    }

    /// A report of a migration that completed.
    pub(crate) fn report(id: &str) -> Report {
        Report { outcome: Outcome::Completed, error: None, downtime_ms: 7.5, ..vanished(&progress(id)) }
    }

    #[test]
    fn a_controller_that_vanished_is_reported_as_failed_with_what_was_seen() {
        let report = vanished(&progress("a1"));
        assert_eq!(report.outcome, Outcome::Failed);
        assert_eq!(report.memory.wire_bytes, 1 << 27);
        let failure = report.error.unwrap();
        assert_eq!(failure.finding.kind, "controller-vanished");
        assert!(failure.finding.message.contains("synchronize"), "{}", failure.finding.message);
    }
}
