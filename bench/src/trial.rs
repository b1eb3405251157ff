//! The trials of one cell: two equal guests, and every contender in turn.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use readable::{bytes, measured_ms as ms};
use testbed::guest_spec::{Ram, Userland};
use testbed::memory::{Memory, most_overhead};
use testbed::{AgentOptions, Client, GuestSpec, Host, Programs, Testbed, TestbedError, Wire};

use crate::baseline::Setting;
use crate::cell::{Cell, DiskContent, Filling, Link, PAGE};
use crate::contender::{Contender, turns};
use crate::error::BenchError;
use crate::measure::with_heartbeats;
use crate::mirrored::{self, NAME};
use crate::narrator::Narrator;
use crate::outcome::{CellRecord, Sitting, Trial};
use crate::record::{Miss, Moved, Sample};
use crate::run::Run;
use crate::scene::{self, ADDRESSES, Scene, TWIN};
use crate::throughput::{self, Throughput};
use crate::{disks, present};

/// How long the client listens to a guest that is not moved, and how long a guest works before it is.
const UNMIGRATED: Duration = Duration::from_secs(2);
const WARM_UP: Duration = Duration::from_secs(1);
/// How long a disk that is written stays mirrored once it has been copied, before its guest is moved.
const HOLD: Duration = Duration::from_secs(4);

/// A cell's guests, and what they are to do.
struct Stage<'a> {
    scene: Scene,
    cell: &'a Cell,
    /// vmirror's guest.
    spec: GuestSpec,
    /// That guest has been moved, and its memory is a file.
    moved: bool,
}

/// Tries a cell. What keeps it from coming to its end is in its record.
pub fn run(
    cell: &Cell,
    sitting: &Sitting,
    run: &Run,
    narrator: &mut Narrator,
) -> Result<CellRecord, BenchError> {
    narrator.step(&format!("{}: {}", cell.name, cell.describe()));
    let began = Instant::now();
    let started = jiff::Zoned::now().strftime("%Y-%m-%d %H:%M %Z").to_string();
    let sitting = Sitting { started, surroundings: sitting.surroundings.now(), ..sitting.clone() };
    let mut record = CellRecord::new(cell, sitting);
    let room = cell.disk.map_or(Ok(()), disks::has_room);
    let userland = match room.and_then(|()| userland(cell).map_err(|error| error.to_string())) {
        Ok(userland) => userland,
        Err(why) => {
            narrator.result(&format!("SKIPPED: {why}"));
            record.skipped = Some(why);
            return Ok(record);
        }
    };
    match try_all(cell, userland, run, narrator, &mut record) {
        Err(BenchError::Interrupted) => return Err(BenchError::Interrupted),
        Err(error) => {
            narrator.result(&error.chain());
            record.failure = Some(error.chain());
        }
        Ok(()) => {}
    }
    record.sitting.took_ms = began.elapsed().as_secs_f64() * 1e3;
    Ok(record)
}

/// The disk that the guests of a cell boot, if they boot one.
fn userland(cell: &Cell) -> Result<Option<PathBuf>, TestbedError> {
    let disk = cell.disk.is_some_and(|disk| disk.content == DiskContent::Debian);
    let booted = cell.content == Filling::Userland;
    // A disk of its content needs it just as well.
    let image = (booted || disk).then(testbed::programs::userland).transpose()?;
    Ok(image.filter(|_| booted))
}

fn try_all(
    cell: &Cell,
    userland: Option<PathBuf>,
    run: &Run,
    narrator: &mut Narrator,
    record: &mut CellRecord,
) -> Result<(), BenchError> {
    let mut stage = Stage::set(cell, userland, run)?;
    stage.look(narrator, record)?;
    let Sitting { runs, patience_s, contenders, .. } = record.sitting.clone();
    for round in 0..runs {
        for contender in turns(&contenders, round) {
            run.check()?;
            // Who did not converge, or lost its guest, is not waited for again.
            let hopeless =
                |trial: &Trial| matches!(trial.miss, Some(Miss::NotConverged { .. } | Miss::Crashed));
            if record.by(contender).any(hopeless) {
                continue;
            }
            let trial = stage.attempt(contender, round, Duration::from_secs(patience_s))?;
            narrator.result(&in_words(&trial));
            let stuck = contender == Contender::VMIRROR && trial.miss.is_some();
            record.trials.push(trial);
            if stuck {
                // It is not known where the guest is, if anything went wrong. No goal is reached in a cell where vmirror has
                // not made all its runs.
                return Ok(());
            }
        }
    }
    record.faults = stage.scene.console.status().map(|status| status.faults());
    Ok(())
}

fn in_words(trial: &Trial) -> String {
    let result = match (&trial.sample, &trial.miss) {
        (Some(sample), _) => present::in_words(sample),
        (None, Some(miss)) => miss.to_string(),
        (None, None) => "nothing".to_owned(),
    };
    let kept = trial.throughput.kept().map(|kept| format!(", guest at {:.0} %", kept * 100.0));
    format!("{}: {result}{}", trial.contender.name(), kept.unwrap_or_default())
}

impl<'a> Stage<'a> {
    fn set(cell: &'a Cell, userland: Option<PathBuf>, run: &Run) -> Result<Self, BenchError> {
        let bed = Testbed::with(&Programs::find())?;
        let (local, without_bpf) = (cell.disk.is_some(), !cell.frames);
        scene::prepare(&bed, &AgentOptions { local, without_bpf, ..AgentOptions::default() }, true)?;
        if let Link::Mbit(mbit) = cell.link {
            for host in bed.hosts() {
                bed.set_rate(host, Wire::Link, mbit * 1_000_000)?;
            }
        }
        let spec = |name| -> Result<GuestSpec, BenchError> {
            let image = disks::image(bed.a(), name);
            if let Some(disk) = cell.disk {
                disks::fill(&image, disk, run)?;
            }
            // Under an agent it lies at the same place on both hosts.
            let image = if name == NAME {
                bed.a().local_dir().join(image.file_name().unwrap_or_default())
            } else {
                image
            };
            Ok(GuestSpec {
                disks: cell.disk.map(|disk| disks::attached(disk, image)).into_iter().collect(),
                memory_mib: cell.memory_mib,
                fill_mib: cell.fill_mib(),
                working_set_mib: Some(cell.working_set_mib()),
                rate: 0,
                pattern: cell.pattern(),
                content: Some(cell.page_content()),
                userland: userland.clone().map(Userland::Shared),
                ..scene::spec(&bed, name, true)?
            })
        };
        let (mut spec, twin_spec) = (spec(NAME)?, spec(TWIN)?);
        if cell.private_ram {
            spec.ram = Ram::Private;
            spec.qmp = Some(bed.a().directory().join("own.qmp"));
            spec.extra.push("-daemonize".into());
        }
        let scene = Scene::boot(bed, &spec, Some(&twin_spec), run, |_| ())?;
        let stage = Self { scene, cell, spec, moved: false };
        for guest in ADDRESSES {
            stage.rest(stage.client()?, guest)?;
        }
        Ok(stage)
    }

    fn client(&self) -> Result<&Client, BenchError> {
        self.scene.bed.client().ok_or(BenchError::Testbed(TestbedError::NotRoot))
    }

    /// What is seen of the guest before anything is moved.
    fn look(&self, narrator: &mut Narrator, record: &mut CellRecord) -> Result<(), BenchError> {
        let client = self.client()?;
        self.work(client, ADDRESSES[0])?;
        let before = client.status(ADDRESSES[0])?;
        let beats = self.scene.unmigrated(UNMIGRATED)?;
        let after = client.status(ADDRESSES[0])?;
        self.rest(client, ADDRESSES[0])?;
        let ms_between = after.uptime_ms.saturating_sub(before.uptime_ms);
        let pages = after.writes.saturating_sub(before.writes);
        record.dirtied = (ms_between > 0).then(|| (pages * PAGE) as f64 / ms_between as f64 * 1e3);
        record.unmigrated = beats;
        narrator.result(&format!(
            "it dirties {} per second; longest heartbeat gap {}",
            bytes(record.dirtied.unwrap_or_default() as u64),
            ms(beats.and_then(|beats| beats.gap_ms()).unwrap_or(f64::NAN)),
        ));
        Ok(())
    }

    /// Lets a guest do its work; the other one rests meanwhile, there are few CPUs.
    fn work(&self, client: &Client, guest: Ipv4Addr) -> Result<(), BenchError> {
        if !self.cell.is_busy() {
            return Ok(());
        }
        client.tell(guest, &format!("rate {}", self.cell.rate()))?;
        client.tell(guest, "resume")?;
        self.scene.run.sleep(WARM_UP)
    }

    fn rest(&self, client: &Client, guest: Ipv4Addr) -> Result<(), BenchError> {
        if self.cell.is_busy() {
            client.tell(guest, "rate 0")?;
            client.tell(guest, "pause")?;
        }
        Ok(())
    }

    /// Has a guest with private memory at the first host again, if that was moved.
    fn renew(&mut self) -> Result<(), BenchError> {
        if !(self.cell.private_ram && std::mem::take(&mut self.moved)) {
            return Ok(());
        }
        let boot_id = self.client()?.status(ADDRESSES[0])?.boot_id;
        mirrored::stop(self.scene.bed.b())?;
        mirrored::start(self.scene.bed.a(), &self.spec)?;
        let client = self.client()?;
        self.scene.run.wait("another guest to boot", scene::BOOT, || {
            // Its port answers once its memory is filled.
            let is_new = client.status(ADDRESSES[0]).is_ok_and(|status| status.boot_id != boot_id);
            Ok(is_new.then_some(()))
        })?;
        self.rest(self.client()?, ADDRESSES[0])
    }

    /// How long a disk stays mirrored before its guest is moved.
    fn hold(&self) -> Duration {
        if self.cell.disk.is_some_and(|disk| disk.written) { HOLD } else { Duration::ZERO }
    }

    fn attempt(&mut self, contender: Contender, round: u32, patience: Duration) -> Result<Trial, BenchError> {
        let (own, cell) = (contender == Contender::VMIRROR, self.cell);
        let run = self.scene.run.clone();
        let guest = ADDRESSES[usize::from(!own)];
        if own {
            self.renew()?;
            self.moved = true;
        }
        self.work(self.client()?, guest)?;
        let boot_id = self.client()?.status(guest)?.boot_id;
        let watch = throughput::watch(self.client()?, guest)?;
        let setting = Setting { method: contender.method, tls: contender.tls, hold: self.hold() };
        let Scene { twin, bed, .. } = &mut self.scene;
        let act = || {
            if own {
                let round = if cell.private_ram { 0 } else { round };
                return by_vmirror(cell, scene::hosts(bed, round), setting.hold, patience, &run);
            }
            let twin = twin.as_mut().ok_or_else(|| BenchError::baseline("none", "the twin is gone"))?;
            if let Some(disk) = cell.disk {
                let to = &bed.hosts()[1 - twin.host()];
                disks::clear(to, TWIN)?;
                disks::make(&disks::image(to, TWIN), disk)?;
            }
            twin.migrate(bed.hosts(), setting, patience)
        };
        let (moved, heartbeats) = with_heartbeats(bed.client(), guest, &run, act)?;
        let survived = self.client()?.status(guest)?.boot_id == boot_id;
        let Moved { result, overhead_bytes } = moved;
        let (sample, miss) = match result {
            Ok(_) if !survived => (None, Some(Miss::Crashed)),
            Ok(sample) => (Some(Sample { round, heartbeats, ..sample }), None),
            Err(miss) => (None, Some(miss)),
        };
        let words = watch.stop();
        let throughput = match &sample {
            Some(sample) if cell.is_busy() => throughput::around(&words, sample),
            _ => Throughput::default(),
        };
        self.rest(self.client()?, guest)?;
        Ok(Trial { contender, round, sample, miss, throughput, overhead_bytes })
    }
}

fn by_vmirror(
    cell: &Cell,
    [from, to]: [&Host; 2],
    hold: Duration,
    patience: Duration,
    run: &Run,
) -> Result<Moved, BenchError> {
    let agents = [from, to].map(Memory::of_agent);
    let (downtime, most) = cell.downtime_ms;
    let [downtime, most] = [downtime, most].map(|limit| format!("{limit}ms"));
    let deadline = format!("{}s", patience.as_secs());
    let options = [
        "--on-diverge",
        &cell.on_diverge,
        "--downtime",
        &downtime,
        "--max-downtime",
        &most,
        "--timeout",
        &deadline,
    ];
    // vmirror ends by itself at its deadline, and then some.
    let disk = cell.disk.map(|_| hold);
    let order = mirrored::Order { options: &options, disk, patience: patience * 2 };
    if disk.is_some() {
        disks::clear(to, NAME)?;
    }
    let sample = mirrored::migrate(from, to, &order, run, |_| ())?;
    let overhead_bytes = most_overhead(&agents);
    let error = sample.report.as_ref().and_then(|report| report.error.as_ref());
    let result = match error {
        None => Ok(sample),
        Some(failure) => Err(Miss::Failed { message: failure.finding.message.clone() }),
    };
    Ok(Moved { result, overhead_bytes })
}
