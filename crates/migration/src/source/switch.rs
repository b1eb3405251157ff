//! The switch-over, up to the hand-over: pause, last pages, device state, gate.
//!
//! Until [`Ownership::HandedOver`](ownership::Ownership) is in the journal every failure leads back: the machine runs on here. After it, none does
//! by itself.

use std::time::{Duration, Instant, SystemTime};

use mirror::memory::round::Guest;
use qemu::{Event, Qmp, QmpError};
use tokio::sync::broadcast;
use tokio::time::timeout;

use super::devices::Devices;
use super::disks::Disks;
use super::network::Network;
use super::peer::{Destination, violation};
use super::resume::is_over;
use super::rounds::Rounds;
use super::stop::Stop;
use super::supplying::{Streams, Supplying};
use finding::{Finding, kind};
use host::Fence;
use ownership::VmName;
use protocol::deadlines::{PATIENCE, UNTIL_PAUSED};
use protocol::wire::{Nothing, Reply, Request};
use session::options::{Options, Verify};
use session::points::{self, Point};
use session::report::Pause;

/// Somebody else has stopped the guest.
pub(super) const VM_PAUSED: &str = "vm-paused";
/// The guest has switched itself off.
pub(super) const VM_ENDED: &str = "vm-ended";

/// So many scans before the pause, with that after it, tell which pages are hot.
const SCANS_FOR_HEAT: u32 = 3;
/// With post-copy, hot pages are sent during the pause for at most so long: each is one that the guest would fault at and wait for
/// as soon as it runs, one after the other.
const HOT_WITHIN: Duration = Duration::from_millis(20);

/// A guest that is paused, its copy complete and loaded at the destination.
pub(super) struct Prepared {
    /// When the guest stopped, on this host's clock.
    pub(super) paused_at: Instant,
    /// Where the time went so far.
    pub(super) pause: Pause,
    /// Bytes of QEMU's stream.
    pub(super) device_state_bytes: u64,
    /// What was left out of the copy, where it was: what is asked for is supplied already.
    pub(super) supplying: Option<Supplying>,
    /// How its devices were saved.
    pub(super) devices: Option<Devices>,
}

/// What keeps others from the disks of the machine once QEMU gives them up.
#[derive(Clone, Copy)]
pub(super) struct Fencing<'a> {
    pub(super) fence: &'a Fence,
    pub(super) vm: &'a VmName,
}

/// Pauses the guest and brings the copy to where the destination can resume it.
#[expect(clippy::too_many_arguments, reason = "what it is done with, one thing each")]
pub(super) async fn prepare(
    qmp: &Qmp,
    (rounds, (disks, fencing), network): (
        &mut Rounds,
        (&mut Option<Disks>, Fencing<'_>),
        &mut Option<Network>,
    ),
    destination: &mut Destination,
    mut devices: Devices,
    options: &Options,
    streams: Option<Streams>,
    told: &mut bool,
    (about_to_pause, paused_for_good): (impl FnOnce() -> Result<(), Stop>, impl FnOnce()),
) -> Result<Prepared, Stop> {
    may_migrate(qmp).await?;
    if streams.is_some() {
        // Most of what will be missing is given up while the guest still runs. Once that is done scans follow soon upon each
        // other, and show what it writes all the time.
        for _ in 0..SCANS_FOR_HEAT {
            rounds.withhold(destination).await?;
        }
    }
    if let Some(network) = &mut *network {
        network.divert().await;
    }
    about_to_pause()?;
    let paused_at = devices.pause(qmp, destination.sender(), told).await?;
    paused_for_good();
    if let Some(network) = &mut *network {
        network.is_paused();
    }
    points::reach(Point::Paused).await;
    let limit = options.max_downtime + PATIENCE;
    let pausing = Pausing { qmp, paused_at, options, disks, fencing };
    let work = timeout(limit, pausing.finish(rounds, destination, &mut devices, streams));
    let look = async {
        if let Some(network) = network {
            network.look_again().await;
        }
    };
    let (worked, ()) = tokio::join!(work, look);
    let (pause, device_state_bytes, supplying) = worked.map_err(|_| too_long(limit))??;
    Ok(Prepared { paused_at, pause, device_state_bytes, supplying, devices: Some(devices) })
}

/// A guest that has just been paused.
struct Pausing<'a> {
    qmp: &'a Qmp,
    paused_at: Instant,
    options: &'a Options,
    disks: &'a mut Option<Disks>,
    fencing: Fencing<'a>,
}

impl Pausing<'_> {
    fn since(&self) -> f64 {
        self.paused_at.elapsed().as_secs_f64() * 1e3
    }

    /// Everything between the pause and the destination's word that it is ready.
    async fn finish(
        mut self,
        rounds: &mut Rounds,
        destination: &mut Destination,
        devices: &mut Devices,
        streams: Option<Streams>,
    ) -> Result<(Pause, u64, Option<Supplying>), Stop> {
        let mut pause = Pause { stopped_ms: self.since(), ..Pause::default() };
        destination.send(Request::HoldDevices(Nothing {})).await?;
        let (device_state_bytes, sound) = match &streams {
            None => self.complete(rounds, destination, devices, &mut pause).await?,
            Some(_) => (self.leave_out(rounds, destination, devices, &mut pause).await?, true),
        };
        devices.is_untouched(self.qmp).await?;
        points::reach(Point::Sent).await;
        pause.gate_ms = self.since();
        // A copy that changes by itself while nothing writes to it is not trusted, even if it could be mended.
        let (equal, certain) = (rounds.equal, rounds.is_certain());
        let Some(sums) = rounds.sums.clone().filter(|_| sound && equal && certain) else {
            tracing::warn!(sound, equal, certain, "the gate does not open");
            return Err(Stop::Failed(Finding::new(
                kind::GATE,
                "the copy is not equal to the original",
                "the VM runs on here; migrate again, and if it recurs test the memory of both hosts",
            )));
        };
        // QEMU there may ask for memory already while it loads its devices.
        let supplying =
            streams.map(|streams| streams.supply(|urgent, bulk| rounds.supply(None, urgent, bulk)));
        let supplying = supplying.transpose()?;
        if let Some(supplying) = &supplying {
            supplying.answer(destination);
        }
        destination.send(Request::Load(sums)).await?;
        points::reach(Point::LoadSaid).await;
        match destination.receive().await? {
            Reply::Ready(_) => {}
            other => return Err(violation(&format!("said {other} instead of being ready"))),
        }
        pause.ready_ms = self.since();
        Ok((pause, device_state_bytes, supplying))
    }

    /// Completes the copy. Returns the bytes of device state, and whether the copy stayed as it was sent.
    async fn complete(
        &mut self,
        rounds: &mut Rounds,
        destination: &mut Destination,
        devices: &mut Devices,
        pause: &mut Pause,
    ) -> Result<(u64, bool), Stop> {
        // Saving devices and sending the last pages need different things: they go on together. What saving writes to
        // guest RAM after the scan is found by the next one.
        let (paused_at, options, sender) = (self.paused_at, self.options, destination.sender());
        let since = || paused_at.elapsed().as_secs_f64() * 1e3;
        let send = async {
            rounds.round(destination, Guest::Paused).await?;
            Ok::<_, Stop>(since())
        };
        let saved = if let Some(disks) = self.disks.as_mut() {
            // With its devices QEMU gives its images up, and some can be read through it only. So first everything is heard of them
            // that there is to be heard, which the barrier of the round sees to, and settled.
            let ((), sent) = tokio::try_join!(disks.end_jobs(self.qmp), send)?;
            pause.last_round_ms = sent;
            rounds.settle_checks().await?;
            self.detach_disks(pause).await?;
            (devices.save(self.qmp, &sender).await?, since())
        } else {
            let save = async { Ok::<_, Stop>((devices.save(self.qmp, &sender).await?, since())) };
            let (saved, sent) = tokio::try_join!(save, send)?;
            pause.last_round_ms = sent;
            saved
        };
        pause.device_state_ms = saved.1;
        let mut sound = !rounds.repairs_due();
        if options.verify == Verify::Strict {
            sound &= rounds.is_read_back_equal(destination).await?;
        }
        rounds.round(destination, Guest::Paused).await?;
        Ok((saved.0, sound))
    }

    /// Leaves out of the copy what the destination does not have, but for what the guest will want at once. Returns the bytes of
    /// device state.
    async fn leave_out(
        &mut self,
        rounds: &mut Rounds,
        destination: &mut Destination,
        devices: &mut Devices,
        pause: &mut Pause,
    ) -> Result<u64, Stop> {
        let time = HOT_WITHIN.min(self.options.downtime / 2);
        if let Some(disks) = self.disks.as_mut() {
            // As above.
            disks.end_jobs(self.qmp).await?;
            rounds.withhold_cold(destination, time).await?;
            rounds.settle_checks().await?;
            self.detach_disks(pause).await?;
        }
        let device_state_bytes = devices.save(self.qmp, &destination.sender()).await?;
        pause.device_state_ms = self.since();
        rounds.withhold_cold(destination, time).await?;
        pause.last_round_ms = self.since();
        Ok(device_state_bytes)
    }

    /// Nothing is read of the disks any more, and QEMU's block graph is what it was. From here on nobody else opens them: QEMU, which
    /// asks for no more than it has, notices nothing of that until it gives them up.
    async fn detach_disks(&mut self, pause: &mut Pause) -> Result<(), Stop> {
        if let Some(disks) = &mut self.disks {
            disks.detach(self.qmp).await?;
            self.fencing.fence.hold(self.fencing.vm, disks.paths());
            pause.disks_ms = self.since();
        }
        Ok(())
    }
}

pub(super) fn never_paused() -> Stop {
    let message = format!("QEMU did not pause the guest within {UNTIL_PAUSED:?}");
    Stop::Failed(Finding::new("pause", message, "see the VM's log on the source"))
}

/// The guest was paused for so long.
pub(super) fn too_long(limit: Duration) -> Stop {
    let message = format!("the guest was paused for {limit:?} without its copy being ready");
    Stop::Failed(Finding::new("switch-over-too-long", message, "see the logs of both agents"))
}

/// Whether the guest runs and nobody migrates it. Somebody else may have by another monitor: that is neither cancelled nor
/// undone.
pub(super) async fn may_migrate(qmp: &Qmp) -> Result<(), Stop> {
    let status = qmp.status().await.map_err(Stop::qemu)?;
    if !status.running {
        return Err(was_paused(&status.status));
    }
    let migration = qmp.query_migrate().await.map_err(Stop::qemu)?.status;
    match migration.filter(|status| !is_over(status)) {
        None => Ok(()),
        Some(status) => Err(Stop::Failed(Finding::new(
            kind::MIGRATES_ALREADY,
            format!("another program migrates the VM: QEMU says {status}"),
            "wait for it, or end it there; then migrate again",
        ))),
    }
}

/// Has QEMU begin. `told` is whether it may have: only what QEMU has refused has certainly not begun.
pub(super) async fn begin(qmp: &Qmp, uri: &str, told: &mut bool) -> Result<(), Stop> {
    *told = true;
    qmp.migrate(uri).await.map_err(|error| {
        *told = !matches!(error, QmpError::Refused { .. });
        Stop::qemu(error)
    })
}

/// The machine does not run, though it did when its migration began.
pub(super) fn was_paused(status: &str) -> Stop {
    let message = format!("the VM is {status} since somebody paused it");
    Stop::Failed(Finding::new(VM_PAUSED, message, "migrate the VM when it runs again"))
}

pub(super) fn has_shut_down() -> Stop {
    Stop::Failed(Finding::new(VM_ENDED, "the guest has shut down", "start the VM again"))
}

/// Waits until QEMU has paused the guest for the switch-over. Returns when that was.
pub(super) async fn paused(events: &mut broadcast::Receiver<Event>, asked: Instant) -> Result<Instant, Stop> {
    let mut stopped = asked;
    loop {
        let event = next(events).await?;
        match (event.name.as_str(), event.data.get("status").and_then(|status| status.as_str())) {
            ("STOP", _) => stopped = instant_of(&event, asked),
            ("MIGRATION", Some("pre-switchover")) => return Ok(stopped),
            ("MIGRATION", Some(status @ ("failed" | "cancelled" | "completed"))) => {
                return Err(not_migrated(status));
            }
            _ => {}
        }
    }
}

/// Waits until QEMU has saved everything.
pub(super) async fn saved(events: &mut broadcast::Receiver<Event>) -> Result<(), Stop> {
    loop {
        let event = next(events).await?;
        match (event.name.as_str(), event.data.get("status").and_then(|status| status.as_str())) {
            ("MIGRATION", Some("completed")) => return Ok(()),
            ("MIGRATION", Some(status @ ("failed" | "cancelled"))) => return Err(not_migrated(status)),
            _ => {}
        }
    }
}

fn not_migrated(status: &str) -> Stop {
    let message = format!("QEMU's stream {status}");
    Stop::Failed(Finding::new("device-state", message, "see the VM's log on the source"))
}

async fn next(events: &mut broadcast::Receiver<Event>) -> Result<Event, Stop> {
    loop {
        match events.recv().await {
            Ok(event) if event.name == "SHUTDOWN" => {
                return Err(has_shut_down());
            }
            Ok(event) => return Ok(event),
            Err(broadcast::error::RecvError::Lagged(_)) => {}
            Err(broadcast::error::RecvError::Closed) => {
                return Err(Stop::Failed(Finding::new("qemu-gone", "QEMU has ended", "see the VM's log")));
            }
        }
    }
}

/// When QEMU says that the event was. Its stamp is of the same host's clock; where that clock was set in between, the
/// event is taken to be as old as it can be: the downtime is never less than the truth.
pub(super) fn instant_of(event: &Event, asked: Instant) -> Instant {
    let age = SystemTime::now().duration_since(event.timestamp).ok();
    let at = age.and_then(|age| Instant::now().checked_sub(age));
    at.filter(|at| (asked..=event.received).contains(at)).unwrap_or(asked)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(timestamp: SystemTime) -> Event {
        Event {
            name: "STOP".into(),
            timestamp,
            received: Instant::now(),
            data: serde_json::Value::Null,
            ours: false,
        }
    }

    #[test]
    fn a_clock_that_was_set_never_makes_the_downtime_less_than_the_truth() {
        let asked = Instant::now() - Duration::from_millis(100);
        let stamped = |age_ms: i64| {
            let age = Duration::from_millis(age_ms.unsigned_abs());
            let now = SystemTime::now();
            event(if age_ms < 0 { now + age } else { now - age })
        };
        let at = instant_of(&stamped(50), asked);
        assert!(at > asked && at < Instant::now() - Duration::from_millis(49), "the stamp is believed");
        for age in [-5000, 5000, 101_000] {
            assert_eq!(instant_of(&stamped(age), asked), asked, "{age} ms");
        }
    }
}
