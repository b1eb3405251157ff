//! The account that a migration gives of itself: progress while it goes on, the report at its end.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::time::{Duration, Instant, SystemTime};

use mirror::layout::PAGE_SIZE;
use mirror::memory::round::Flow;
use tokio::sync::watch;
use uuid::Uuid;

use super::disks::Disks;
use super::estimate::Advice;
use super::held::Controller;
use super::stop::Stop;
use finding::Stage;
use host::Host;
use host::Vm;
use session::options::Options;
use session::points::{self, Point};
use session::progress::{DiskProgress, Progress};
use session::report::{Memory, Network, Outcome, Pause, Phase, PhaseTime, Report, Verification};

/// How often progress is shown while a round is under way.
const SHOWN_EVERY: Duration = Duration::from_millis(250);

/// Shows what goes through while a round is under way. In the first, which is a copy of everything, it also says what is
/// left; later the estimate does.
pub(super) async fn follow(
    progress: &watch::Sender<Progress>,
    begin: Instant,
    flow: &Flow,
    first: bool,
) -> Infallible {
    let (began, before) = (Instant::now(), flow.raw_bytes());
    loop {
        tokio::time::sleep(SHOWN_EVERY).await;
        let raw_bytes = flow.raw_bytes();
        progress.send_modify(|progress| {
            progress.elapsed_ms = begin.elapsed().as_secs_f64() * 1e3;
            progress.raw_bytes = raw_bytes;
            progress.wire_bytes = flow.wire_bytes();
            if first {
                progress.remaining_bytes = progress.total_bytes.saturating_sub(raw_bytes);
                progress.throughput = (raw_bytes - before) as f64 / began.elapsed().as_secs_f64();
                progress.time_left_ms = (progress.throughput > 0.0)
                    .then(|| progress.remaining_bytes as f64 / progress.throughput * 1e3);
            }
        });
    }
}

/// How long disks take that are not copied, at the pace so far. None where nothing was copied yet.
fn until_copied(disks: &[DiskProgress], elapsed: Duration) -> Option<Duration> {
    let sum = |of: fn(&DiskProgress) -> u64| disks.iter().map(of).sum::<u64>() as f64;
    let gone_over = sum(|disk| disk.size - disk.remaining_bytes.min(disk.size));
    let pace = gone_over / elapsed.as_secs_f64().max(1e-3);
    (pace > 0.0).then(|| Duration::from_secs_f64((sum(|disk| disk.remaining_bytes) / pace).min(1e6)))
}

impl Controller {
    pub(super) async fn enter(&mut self, phase: Phase) {
        let now = self.begin.elapsed().as_secs_f64() * 1e3;
        if let Some(last) = self.report.phases.last_mut() {
            last.duration_ms = now - last.start_ms;
        }
        self.report.phases.push(PhaseTime { name: phase, start_ms: now, duration_ms: 0.0 });
        self.progress.send_modify(|progress| {
            progress.phase = phase;
            progress.elapsed_ms = now;
            progress.destination.clone_from(&self.report.destination);
        });
        points::reach(Point::Phase(phase)).await;
    }

    /// Shows where things stand.
    pub(super) fn publish(&self, advice: Option<Advice>) {
        let Some(rounds) = &self.held.rounds else { return };
        let estimate = &rounds.estimate;
        let predicted = estimate.downtime();
        let warning = (advice == Some(Advice::DoesNotConverge)).then(|| match self.not_converged() {
            Stop::Failed(finding) => finding.message,
            _ => String::new(),
        });
        let disks = self.held.disks.as_ref().map(Disks::progress).unwrap_or_default();
        let copied = self.held.disks.as_ref().is_none_or(Disks::are_copied);
        let time_left =
            if copied { estimate.time_left() } else { until_copied(&disks, self.begin.elapsed()) };
        self.progress.send_modify(|progress| {
            progress.disks = disks;
            progress.elapsed_ms = self.begin.elapsed().as_secs_f64() * 1e3;
            progress.rounds = u32::try_from(rounds.report.len()).unwrap_or(u32::MAX);
            progress.total_bytes = rounds.totals.pages * PAGE_SIZE as u64;
            progress.remaining_bytes = (estimate.remaining() as u64).next_multiple_of(PAGE_SIZE as u64);
            progress.raw_bytes = rounds.totals.raw_bytes;
            progress.wire_bytes = rounds.totals.wire_bytes;
            progress.throughput = estimate.throughput;
            progress.dirty_rate = estimate.dirty_rate;
            progress.predicted_downtime_ms = predicted.map(|downtime| downtime.as_secs_f64() * 1e3);
            progress.time_left_ms = time_left.map(|left| left.as_secs_f64() * 1e3);
            progress.in_sync = copied && matches!(advice, Some(Advice::Switch | Advice::SwitchWithinLimit));
            progress.verification = rounds.verification();
            progress.warning = warning;
        });
    }

    pub(super) fn close(&mut self, outcome: Outcome, stop: Option<Stop>) {
        self.report.outcome = outcome;
        let destination = &self.report.destination;
        self.report.error = stop.map(|stop| stop.of(destination).into_failure(Stage::Failed));
    }

    pub(super) fn finish_report(&mut self) {
        let now = self.begin.elapsed().as_secs_f64() * 1e3;
        if let Some(last) = self.report.phases.last_mut() {
            last.duration_ms = now - last.start_ms;
        }
        self.report.total_ms = now;
        let entered: BTreeSet<_> = self.report.phases.iter().map(|phase| phase.name.name()).collect();
        tracing::info!(
            vm = %self.vm.record.name,
            outcome = ?self.report.outcome,
            total_ms = self.report.total_ms,
            downtime_ms = self.report.downtime_ms,
            ?entered,
            "migration ended"
        );
    }
}

/// A report of which nothing but the names is known yet.
pub(super) fn blank(id: Uuid, host: &Host, vm: &Vm, to: &str, options: &Options) -> Report {
    let started = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Report {
        id: id.to_string(),
        vm: vm.record.name.to_string(),
        source: host.name.clone(),
        destination: to.to_owned(),
        started_unix_ms: u64::try_from(started.as_millis()).unwrap_or(u64::MAX),
        engine: options.engine.name().to_owned(),
        outcome: Outcome::Failed,
        error: None,
        total_ms: 0.0,
        downtime_ms: 0.0,
        downtime_asked_ms: options.downtime.as_secs_f64() * 1e3,
        downtime_predicted_ms: 0.0,
        pause: Pause::default(),
        tracking_hold_ms: 0.0,
        phases: Vec::new(),
        rounds: Vec::new(),
        memory: Memory { page_size: PAGE_SIZE as u64, ..Memory::default() },
        disks: Vec::new(),
        network: Network::default(),
        device_state_bytes: 0,
        verification: Verification::default(),
        health: None,
        post_copy: None,
        throttle: None,
        quiesced: None,
    }
}
