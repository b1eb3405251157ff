//! Engine `qemu`: QEMU's own migration stream, with guest RAM and all, relayed over the link.
//!
//! QEMU at the source sends to a socket of this agent, the first data stream carries it, and the destination's agent feeds it to the
//! QEMU there. When to pause is QEMU's decision, by the downtime it is allowed; everything else is as with the mirror: reservation,
//! journal, two-step hand-over, clean-up, report. What cannot be had is verification: QEMU's stream has no check of its content.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use link::{AbortHandle, DataSender};
use mirror::device::source::DeviceSource;
use mirror::layout::PAGE_SIZE;
use qemu::qmp::MigrationState;
use serde_json::json;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::capabilities::THROTTLES;
use super::held::Controller;
use super::peer::violation;
use super::stop::{Stop, nothing_held};
use super::switch::{self, Prepared};
use finding::Finding;
use host::paths::Paths;
use protocol::deadlines::{PATIENCE, UNTIL_PAUSED};
use protocol::wire::{Reply, Request, Sums};
use session::options::OnDiverge;
use session::report::{Pause, Phase, Round};

/// How often QEMU is asked how far it is.
const LOOK: Duration = Duration::from_millis(250);
/// For how long passes over memory must not have become shorter before more downtime is allowed, or with `--on-diverge fail` the
/// migration is given up.
const DIVERGED: Duration = Duration::from_secs(5);
/// A pass that leaves less than so much of the shortest before is progress.
const SHORTER: f64 = 0.9;
/// Bytes that are read from QEMU at a time.
const PIECE: usize = 256 << 10;
/// QEMU's own limit of `downtime-limit`, in milliseconds (`MAX_MIGRATE_DOWNTIME`).
const MOST_DOWNTIME_MS: u64 = 2_000_000;

/// QEMU's stream on its way, and what QEMU was told for it.
pub(super) struct Relay {
    carrying: Option<JoinHandle<io::Result<()>>>,
    abort: AbortHandle,
    wire_bytes: Arc<AtomicU64>,
    passes: Passes,
    /// Removes the socket when dropped.
    _device: DeviceSource,
}

/// QEMU's passes over memory.
#[derive(Debug, Default)]
struct Passes {
    rounds: Vec<Round>,
    /// At the beginning of the pass under way: when, and the figures of QEMU that are sums.
    began: Option<(Instant, Figures)>,
    /// The fewest bytes that a pass had before it, and when that was found.
    least: Option<(u64, Instant)>,
    last: Figures,
}

/// What QEMU says about RAM; bytes unless a name says otherwise.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Figures {
    syncs: u64,
    total: u64,
    remaining: u64,
    zero_pages: u64,
    normal_pages: u64,
    transferred: u64,
    dirty_pages_per_second: u64,
    mbps: f64,
}

impl Figures {
    fn of(state: &MigrationState) -> Figures {
        let number = |name: &str| state.ram[name].as_u64().unwrap_or_default();
        Figures {
            syncs: number("dirty-sync-count"),
            total: number("total"),
            remaining: number("remaining"),
            zero_pages: number("duplicate"),
            normal_pages: number("normal"),
            transferred: number("transferred"),
            dirty_pages_per_second: number("dirty-pages-rate"),
            mbps: state.ram["mbps"].as_f64().unwrap_or_default(),
        }
    }

    fn raw_bytes(&self) -> u64 {
        (self.zero_pages + self.normal_pages) * PAGE_SIZE as u64
    }
}

impl Passes {
    /// Takes in how far QEMU is.
    fn learn(&mut self, now: Figures, at: Instant) {
        let begun = now.syncs > self.last.syncs || self.began.is_none();
        if begun {
            self.end(now, at);
            self.began = Some((at, now));
            let shorter = |least: u64| now.remaining as f64 <= least as f64 * SHORTER;
            if self.least.is_none_or(|(least, _)| shorter(least)) {
                self.least = Some((now.remaining, at));
            }
        }
        self.last = now;
    }

    /// The pass under way has ended.
    fn end(&mut self, now: Figures, at: Instant) {
        let Some((began, before)) = self.began.take() else { return };
        self.rounds.push(Round {
            n: u32::try_from(self.rounds.len()).unwrap_or(u32::MAX),
            dirty_pages: before.remaining.div_ceil(PAGE_SIZE as u64),
            zero: now.zero_pages.saturating_sub(before.zero_pages),
            plain: now.normal_pages.saturating_sub(before.normal_pages),
            raw_bytes: now.raw_bytes().saturating_sub(before.raw_bytes()),
            wire_bytes: now.transferred.saturating_sub(before.transferred),
            duration_ms: (at - began).as_secs_f64() * 1e3,
            ..Round::default()
        });
    }

    /// For how long passes have not become shorter.
    fn stuck_for(&self, at: Instant) -> Duration {
        self.least.map_or(Duration::ZERO, |(_, since)| at - since)
    }
}

impl Controller {
    /// Every phase from the preparation on by QEMU's own stream.
    pub(super) async fn by_qemu(&mut self) -> Result<Prepared, Stop> {
        self.enter(Phase::Prepare).await;
        self.raise_tunnels().await?;
        let mut events = self.vm.qmp.events();
        let asked = Instant::now();
        self.begin_relay().await?;
        self.enter(Phase::Synchronize).await;
        let mut paused = Box::pin(switch::paused(&mut events, asked));
        let paused_at = self.until_paused(&mut paused).await?;
        drop(paused);
        // There is no ledger to settle doubts against.
        self.enter(Phase::Verify).await;
        self.enter(Phase::SwitchOver).await;
        let limit = self.options.max_downtime + PATIENCE;
        let complete = self.complete_relay(&mut events, paused_at);
        let pause = timeout(limit, complete).await.map_err(|_| switch::too_long(limit))??;
        Ok(Prepared { paused_at, pause, device_state_bytes: 0, supplying: None, devices: None })
    }

    /// Has QEMU begin to send, and this agent to carry.
    async fn begin_relay(&mut self) -> Result<(), Stop> {
        let qmp = self.vm.qmp.clone();
        let failed = |e: &dyn std::error::Error| {
            Stop::because("qemu-stream", e, "see to the source agent's run_dir and limits")
        };
        let socket = Paths::of(&self.host, &self.vm.record.name).device;
        let address = self.destination()?.address().to_owned();
        let (endpoint, session) = (self.host.endpoint.clone(), self.id);
        let bandwidth = Arc::clone(&self.commands.bandwidth);
        let opened = tokio::task::spawn_blocking(move || endpoint.open_data(&address, session, 0, bandwidth));
        let opened = opened.await.map_err(|e| failed(&e))?;
        let sender =
            opened.map_err(|e| Stop::because("data-stream", &e, "see the log of the destination's agent"))?;
        let abort = sender.abort_handle().map_err(|e| failed(&e))?;
        // An agent that was killed here has left its socket; this one has the name to itself.
        let _ = std::fs::remove_file(&socket);
        let mut device = DeviceSource::listen(&socket).map_err(|e| failed(&e))?;
        switch::may_migrate(&qmp).await?;
        self.held.configured = true;
        let mut on = vec!["pause-before-switchover", "events"];
        if self.options.on_diverge == OnDiverge::Throttle {
            on.push(THROTTLES);
        }
        let told = json!({ "downtime-limit": downtime_ms(self.options.downtime) });
        self.set_up_qemu(&on, told).await?;
        self.offer()?;
        // From here on nobody else can begin one with other settings unseen: QEMU migrates once at a time.
        switch::may_migrate(&qmp).await?;
        switch::begin(&qmp, &device.uri(), &mut self.held.qemu).await?;
        let stream = timeout(UNTIL_PAUSED, device.accept()).await;
        let stream = stream.map_err(|e| failed(&e))?.map_err(|e| failed(&e))?;
        let wire_bytes = Arc::new(AtomicU64::new(0));
        let sent = Arc::clone(&wire_bytes);
        let carrying = Some(tokio::task::spawn_blocking(move || carry(stream, sender, &sent)));
        let passes = Passes::default();
        self.held.relay = Some(Relay { carrying, abort, wire_bytes, passes, _device: device });
        Ok(())
    }

    /// Watches until QEMU has paused the guest. Returns when that was.
    async fn until_paused(
        &mut self,
        paused: &mut (impl Future<Output = Result<Instant, Stop>> + Unpin),
    ) -> Result<Instant, Stop> {
        let qmp = self.vm.qmp.clone();
        let deadline = self.begin + self.options.timeout;
        let mut allowed = self.options.downtime;
        let mut look = tokio::time::interval(LOOK);
        loop {
            let destination = self.held.destination.as_mut().ok_or_else(nothing_held)?;
            tokio::select! {
                biased;
                paused = &mut *paused => return paused,
                reply = destination.receive() => {
                    return Err(violation(&format!("said {:?} while it should listen", reply?)));
                }
                _ = look.tick() => {}
            }
            while let Ok(answer) = self.commands.verify.try_recv() {
                let message = "QEMU's own stream cannot be verified";
                let _ = answer.send(Err(Finding::new("engine", message, "migrate with --engine mirror")));
            }
            let state = qmp.query_migrate().await.map_err(Stop::qemu)?;
            self.watch(&state)?;
            let status = qmp.status().await.map_err(Stop::qemu)?;
            if status.status == "paused" {
                return Err(switch::was_paused(&status.status));
            }
            let now = Instant::now();
            let relay = self.held.relay.as_mut().ok_or_else(nothing_held)?;
            if relay.passes.stuck_for(now) >= DIVERGED {
                if allowed < self.options.max_downtime {
                    allowed = self.options.max_downtime;
                    qmp.set_parameters(json!({ "downtime-limit": downtime_ms(allowed) }))
                        .await
                        .map_err(Stop::qemu)?;
                    relay.passes.least = None;
                } else if self.options.on_diverge == OnDiverge::Fail {
                    return Err(self.qemu_not_converged(&state));
                }
            }
            if now >= deadline {
                return Err(self.qemu_not_converged(&state));
            }
        }
    }

    /// Shows how far QEMU is, and keeps it for the report.
    fn watch(&mut self, state: &MigrationState) -> Result<(), Stop> {
        let figures = Figures::of(state);
        let relay = self.held.relay.as_mut().ok_or_else(nothing_held)?;
        relay.passes.learn(figures, Instant::now());
        let rounds = u32::try_from(relay.passes.rounds.len()).unwrap_or(u32::MAX);
        let wire_bytes = relay.wire_bytes.load(Ordering::Relaxed);
        let predicted = state.expected_downtime_ms.map(|ms| ms as f64);
        if let Some(predicted) = predicted {
            self.report.downtime_predicted_ms = predicted;
        }
        let throughput = figures.mbps * 1e6 / 8.0;
        let dirty_rate = (figures.dirty_pages_per_second * PAGE_SIZE as u64) as f64;
        self.progress.send_modify(|progress| {
            progress.elapsed_ms = self.begin.elapsed().as_secs_f64() * 1e3;
            progress.rounds = rounds;
            progress.total_bytes = figures.total;
            progress.remaining_bytes = figures.remaining;
            progress.raw_bytes = figures.raw_bytes();
            progress.wire_bytes = wire_bytes;
            progress.throughput = throughput;
            progress.dirty_rate = dirty_rate;
            progress.predicted_downtime_ms = predicted.filter(|_| rounds > 0);
            progress.time_left_ms =
                (throughput > dirty_rate).then(|| figures.remaining as f64 / (throughput - dirty_rate) * 1e3);
            progress.throttle = state.throttle_percent.unwrap_or_default() as f64 / 100.0;
        });
        Ok(())
    }

    fn qemu_not_converged(&self, state: &MigrationState) -> Stop {
        let figures = Figures::of(state);
        if figures.syncs < 2 {
            return self.out_of_time();
        }
        let message = format!(
            "the guest dirties {:.0} MiB/s and QEMU sends {:.0} MiB/s: a downtime of {:?} cannot be had",
            (figures.dirty_pages_per_second * PAGE_SIZE as u64) as f64 / f64::from(1 << 20),
            figures.mbps * 1e6 / 8.0 / f64::from(1 << 20),
            self.options.max_downtime,
        );
        let hint = "raise --bandwidth, --max-downtime or --timeout, or migrate with --engine mirror";
        Stop::Failed(Finding::new("not-converged", message, hint))
    }

    /// The guest is paused: the rest of the stream, until the destination has loaded it.
    async fn complete_relay(
        &mut self,
        events: &mut tokio::sync::broadcast::Receiver<qemu::Event>,
        paused_at: Instant,
    ) -> Result<Pause, Stop> {
        let since = || paused_at.elapsed().as_secs_f64() * 1e3;
        let mut pause = Pause { stopped_ms: since(), ..Pause::default() };
        self.vm.qmp.migrate_continue().await.map_err(Stop::qemu)?;
        let relay = self.held.relay.as_mut().ok_or_else(nothing_held)?;
        let carrying = relay.carrying.as_mut().ok_or_else(nothing_held)?;
        let carried = carrying.await;
        relay.carrying = None;
        let broken = |e: &dyn std::error::Error| {
            Stop::because("data-stream", e, "see to the network between the hosts")
        };
        carried.map_err(|e| broken(&e))?.map_err(|e| broken(&e))?;
        switch::saved(events).await?;
        (pause.device_state_ms, pause.last_round_ms) = (since(), since());
        let state = self.vm.qmp.query_migrate().await.map_err(Stop::qemu)?;
        self.watch(&state)?;
        let destination = self.destination()?;
        pause.gate_ms = since();
        destination.send(Request::Load(Sums::new(0, &[], 0))).await?;
        match destination.receive().await? {
            Reply::Ready(_) => {}
            other => return Err(violation(&format!("said {other} instead of being ready"))),
        }
        pause.ready_ms = since();
        Ok(pause)
    }

    /// Ends the relay and keeps its figures for the report.
    pub(super) async fn end_relay(&mut self) {
        let Some(mut relay) = self.held.relay.take() else { return };
        relay.abort.abort();
        if let Some(carrying) = relay.carrying.take() {
            let _ = carrying.await;
        }
        let last = relay.passes.last;
        relay.passes.end(last, Instant::now());
        self.report.rounds = relay.passes.rounds;
        self.report.memory.raw_bytes = last.raw_bytes();
        self.report.memory.wire_bytes = relay.wire_bytes.load(Ordering::Relaxed);
    }
}

impl Relay {
    /// Ends what blocks on the stream.
    pub(super) fn abort(&self) {
        self.abort.abort();
    }
}

/// Carries QEMU's stream to its end.
fn carry(mut from: UnixStream, mut to: DataSender, sent: &AtomicU64) -> io::Result<()> {
    let mut piece = vec![0; PIECE];
    loop {
        match from.read(&mut piece)? {
            0 => return to.shutdown(),
            read => {
                to.write_all(&piece[..read])?;
                sent.fetch_add(read as u64, Ordering::Relaxed);
            }
        }
    }
}

fn downtime_ms(downtime: Duration) -> u64 {
    u64::try_from(downtime.as_millis()).unwrap_or(MOST_DOWNTIME_MS).clamp(1, MOST_DOWNTIME_MS)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(syncs: u64, remaining: u64, normal_pages: u64) -> Figures {
        Figures {
            syncs,
            remaining,
            normal_pages,
            total: 1 << 30,
            transferred: normal_pages * 4104,
            ..Figures::default()
        }
    }

    #[test]
    fn a_round_is_what_lies_between_two_synchronisations() {
        let begin = Instant::now();
        let after = |seconds| begin + Duration::from_secs(seconds);
        let mut passes = Passes::default();
        for (seconds, figures) in [
            (0, at(1, 4096 * 1000, 0)),
            (1, at(1, 4096 * 500, 500)),
            (2, at(2, 4096 * 100, 1000)),
            (3, at(2, 4096 * 40, 1060)),
        ] {
            passes.learn(figures, after(seconds));
        }
        passes.end(passes.last, after(4));
        let told: Vec<_> =
            passes.rounds.iter().map(|r| (r.n, r.dirty_pages, r.plain, r.duration_ms)).collect();
        assert_eq!(told, [(0, 1000, 1000, 2000.0), (1, 100, 60, 2000.0)]);
    }

    #[test]
    fn passes_that_do_not_become_shorter_are_noticed() {
        let begin = Instant::now();
        let after = |seconds| begin + Duration::from_secs(seconds);
        let mut passes = Passes::default();
        passes.learn(at(1, 1000, 0), after(0));
        passes.learn(at(2, 500, 0), after(3));
        assert_eq!(passes.stuck_for(after(4)), Duration::from_secs(1));
        passes.learn(at(3, 490, 0), after(6));
        assert_eq!(passes.stuck_for(after(9)), Duration::from_secs(6), "a little less is no progress");
        passes.learn(at(4, 400, 0), after(10));
        assert_eq!(passes.stuck_for(after(10)), Duration::ZERO);
    }

    #[test]
    fn the_downtime_is_one_that_qemu_takes() {
        assert_eq!(downtime_ms(Duration::from_micros(1)), 1);
        assert_eq!(downtime_ms(Duration::from_millis(50)), 50);
        assert_eq!(downtime_ms(Duration::MAX), MOST_DOWNTIME_MS);
    }
}
