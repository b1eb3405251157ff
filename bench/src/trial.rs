//! The trials of one cell: two equal guests, and every contender in turn.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use testbed::guest_spec::{Nic, Userland};
use testbed::{AgentOptions, Client, Console, GuestSpec, Programs, Testbed, TestbedError, Wire};
use tokio::runtime::Handle;

use crate::baseline::{Setting, Twin};
use crate::cell::{Cell, DiskContent, Filling, Link};
use crate::contender::{Contender, turns};
use crate::measure::{Beats, with_heartbeats};
use crate::memory::{Memory, most_overhead};
use crate::mirrored::{self, NAME};
use crate::narrator::Narrator;
use crate::number::{bytes, ms};
use crate::record::{Miss, Moved, Sample};
use crate::surroundings::Surroundings;
use crate::throughput::{Throughput, Watch};
use crate::{BenchError, Interrupt, disks, present};

/// The name of the guest that QEMU moves itself.
const TWIN: &str = "twin";
/// How long the guests may take to boot and to fill their memory.
const BOOT: Duration = Duration::from_secs(300);
/// How long the client listens to a guest that is not moved, and how long a guest works before it is.
const UNMIGRATED: Duration = Duration::from_secs(2);
const WARM_UP: Duration = Duration::from_secs(1);
/// How long a disk that is written stays mirrored once it has been copied, before its guest is moved.
const HOLD: Duration = Duration::from_secs(4);
/// How much a guest checks of itself per second, in pages: 8 MiB, which leaves an emulated CPU to its workload.
const CHECK_RATE: u64 = 2048;
const ADDRESSES: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 88, 0, 10), Ipv4Addr::new(10, 88, 0, 11)];

/// What came of one cell.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CellRecord {
    /// The cell.
    pub cell: Cell,
    /// When and how it was tried.
    pub sitting: Sitting,
    /// The same in words.
    pub description: String,
    /// Bytes in pages that the guest really dirties per second while nothing else is done; an emulated CPU may not keep up with
    /// what it was asked for.
    pub dirtied: Option<f64>,
    /// Heartbeats of the guest before it was moved for the first time.
    pub unmigrated: Option<Beats>,
    /// Every trial, in order.
    pub trials: Vec<Trial>,
    /// Pages that vmirror's guest found wrong in itself.
    pub faults: Option<u64>,
    /// Why it was not tried: this machine lacks something that it needs.
    pub skipped: Option<String>,
    /// Why the cell did not come to its end.
    pub failure: Option<String>,
}

/// When and how a cell was tried: not all need be of one run of the benchmark.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sitting {
    /// When it began.
    pub started: String,
    /// How long it took, guests' boot and all, in milliseconds.
    pub took_ms: f64,
    /// How often each contender was to move its guest.
    pub runs: u32,
    /// How long one migration might take, in seconds.
    pub patience_s: u64,
    /// Who was to move a guest.
    pub contenders: Vec<Contender>,
    /// The machine and the programs.
    pub surroundings: Surroundings,
}

/// One attempt to move a guest.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Trial {
    /// By whom.
    pub contender: Contender,
    /// In which round.
    pub round: u32,
    /// The figures; none where it was not moved.
    pub sample: Option<Sample>,
    /// Why it was not moved.
    pub miss: Option<Miss>,
    /// How fast the guest was.
    pub throughput: Throughput,
    /// Memory that it took on the side where it took more, in bytes: of vmirror what its agent has beyond what it has when idle, of
    /// QEMU what its process has beyond the guest's RAM and what it had before.
    pub overhead_bytes: Option<u64>,
}

impl CellRecord {
    /// What one contender did.
    pub fn by(&self, contender: Contender) -> impl Iterator<Item = &Trial> {
        self.trials.iter().filter(move |trial| trial.contender == contender)
    }

    /// The figures of those of its trials that came to their end.
    pub fn samples(&self, contender: Contender) -> impl Iterator<Item = &Sample> {
        self.by(contender).filter_map(|trial| trial.sample.as_ref())
    }

    /// Whether its guest dirtied at least nine tenths of what it was to dirty.
    pub fn is_dirtied_as_asked(&self) -> bool {
        let asked = (self.cell.rate() * crate::cell::PAGE) as f64;
        asked == 0.0 || self.dirtied.is_some_and(|dirtied| dirtied >= 0.9 * asked)
    }
}

/// How a cell is tried.
#[derive(Clone, Debug)]
pub struct Trials<'a> {
    /// By whom.
    pub contenders: Vec<Contender>,
    /// How often by each.
    pub runs: u32,
    /// How long one migration may take.
    pub patience: Duration,
    /// The machine and the programs.
    pub surroundings: &'a Surroundings,
}

/// The hosts and what is on them.
struct Scene<'a> {
    twin: Option<Twin>,
    bed: Testbed,
    console: Console,
    cell: &'a Cell,
}

/// Tries a cell. What keeps it from coming to its end is in its record.
///
/// # Errors
/// [`BenchError::Interrupted`]
pub fn run(
    cell: &Cell,
    trials: &Trials<'_>,
    runtime: &Handle,
    interrupt: &Interrupt,
    narrator: &mut Narrator,
) -> Result<CellRecord, BenchError> {
    narrator.step(&format!("{}: {}", cell.name, cell.describe()));
    let began = Instant::now();
    let mut record = CellRecord {
        cell: cell.clone(),
        sitting: Sitting {
            started: jiff::Zoned::now().strftime("%Y-%m-%d %H:%M %Z").to_string(),
            took_ms: 0.0,
            runs: trials.runs,
            patience_s: trials.patience.as_secs(),
            contenders: trials.contenders.clone(),
            surroundings: trials.surroundings.now(),
        },
        description: cell.describe(),
        dirtied: None,
        unmigrated: None,
        trials: Vec::new(),
        faults: None,
        skipped: None,
        failure: None,
    };
    let room = cell.disk.map_or(Ok(()), disks::has_room);
    let userland = match room.and_then(|()| userland(cell).map_err(|error| error.to_string())) {
        Ok(userland) => userland,
        Err(why) => {
            narrator.result(&format!("SKIPPED: {why}"));
            record.skipped = Some(why);
            return Ok(record);
        }
    };
    match try_all(cell, userland, trials, runtime, interrupt, narrator, &mut record) {
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
    trials: &Trials<'_>,
    runtime: &Handle,
    interrupt: &Interrupt,
    narrator: &mut Narrator,
    record: &mut CellRecord,
) -> Result<(), BenchError> {
    let mut scene = Scene::set(cell, userland, runtime, interrupt)?;
    scene.look(interrupt, narrator, record)?;
    for round in 0..trials.runs {
        for contender in turns(&trials.contenders, round) {
            interrupt.check()?;
            // Who did not converge, or lost its guest, is not waited for again.
            let hopeless =
                |trial: &Trial| matches!(trial.miss, Some(Miss::NotConverged { .. } | Miss::Crashed));
            if record.by(contender).any(hopeless) {
                continue;
            }
            let trial = scene.attempt(contender, round, trials.patience, interrupt)?;
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
    record.faults = scene.console.status().map(|status| status.faults());
    Ok(())
}

fn in_words(trial: &Trial) -> String {
    let result = match (&trial.sample, &trial.miss) {
        (Some(sample), _) => present::in_words(sample),
        (None, Some(miss)) => present::missed(miss),
        (None, None) => "nothing".to_owned(),
    };
    let kept = trial.throughput.kept().map(|kept| format!(", guest at {:.0} %", kept * 100.0));
    format!("{}: {result}{}", trial.contender.name(), kept.unwrap_or_default())
}

impl<'a> Scene<'a> {
    fn set(
        cell: &'a Cell,
        userland: Option<PathBuf>,
        runtime: &Handle,
        interrupt: &Interrupt,
    ) -> Result<Self, BenchError> {
        let bed = Testbed::with(&Programs::find())?;
        for host in bed.hosts() {
            host.start_agent_with(&AgentOptions {
                local: cell.disk.is_some(),
                without_bpf: !cell.frames,
                ..AgentOptions::default()
            })?;
            host.add_tap(TWIN)?;
            if let Link::Mbit(mbit) = cell.link {
                bed.set_rate(host, Wire::Link, mbit * 1_000_000)?;
            }
        }
        bed.a().add_tap(NAME)?;
        let spec = |name: &str, number: u8| -> Result<GuestSpec, BenchError> {
            let image = disks::image(bed.a(), name);
            if let Some(disk) = cell.disk {
                disks::fill(&image, disk, interrupt)?;
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
                check_rate: Some(CHECK_RATE),
                userland: userland.clone().map(Userland::Shared),
                nic: Some(Nic::new(name, number)),
                // QEMU names its threads only when told to, and the twin's are told apart by name.
                extra: vec!["-name".into(), format!("{name},debug-threads=on")],
                ..GuestSpec::new(bed.a().serial(name))?
            })
        };
        let (spec, twin_spec) = (spec(NAME, 10)?, spec(TWIN, 11)?);
        mirrored::run(bed.a(), &spec)?;
        let twin = Twin::boot(bed.hosts(), &twin_spec, runtime, interrupt)?;
        let consoles = [&spec.serial, &twin_spec.serial].map(Console::new);
        interrupt.wait("the guests to boot", BOOT, || {
            let ready = consoles.iter().all(|console| console.is_ready() && console.status().is_some());
            Ok(ready.then_some(()))
        })?;
        let [console, _] = consoles;
        let scene = Self { twin: Some(twin), bed, console, cell };
        for guest in ADDRESSES {
            scene.rest(scene.client()?, guest)?;
        }
        Ok(scene)
    }

    fn client(&self) -> Result<&Client, BenchError> {
        self.bed.client().ok_or(BenchError::Testbed(TestbedError::NotRoot))
    }

    /// What is seen of the guest before anything is moved.
    fn look(
        &self,
        interrupt: &Interrupt,
        narrator: &mut Narrator,
        record: &mut CellRecord,
    ) -> Result<(), BenchError> {
        let client = self.client()?;
        self.work(client, ADDRESSES[0], interrupt)?;
        let before = client.status(ADDRESSES[0])?;
        let (_, beats) =
            with_heartbeats(Some(client), ADDRESSES[0], interrupt, || interrupt.sleep(UNMIGRATED))?;
        let after = client.status(ADDRESSES[0])?;
        self.rest(client, ADDRESSES[0])?;
        let ms_between = after.uptime_ms.saturating_sub(before.uptime_ms);
        let pages = after.writes.saturating_sub(before.writes);
        record.dirtied =
            (ms_between > 0).then(|| (pages * crate::cell::PAGE) as f64 / ms_between as f64 * 1e3);
        record.unmigrated = beats;
        narrator.result(&format!(
            "it dirties {} per second; longest heartbeat gap {}",
            bytes(record.dirtied.unwrap_or_default()),
            ms(beats.and_then(|beats| beats.gap_ms()).unwrap_or(f64::NAN)),
        ));
        Ok(())
    }

    /// Lets a guest do its work; the other one rests meanwhile, there are few CPUs.
    fn work(&self, client: &Client, guest: Ipv4Addr, interrupt: &Interrupt) -> Result<(), BenchError> {
        if !self.cell.is_busy() {
            return Ok(());
        }
        client.tell(guest, &format!("rate {}", self.cell.rate()))?;
        client.tell(guest, "resume")?;
        interrupt.sleep(WARM_UP)
    }

    fn rest(&self, client: &Client, guest: Ipv4Addr) -> Result<(), BenchError> {
        if self.cell.is_busy() {
            client.tell(guest, "rate 0")?;
            client.tell(guest, "pause")?;
        }
        Ok(())
    }

    /// How long a disk stays mirrored before its guest is moved.
    fn hold(&self) -> Duration {
        if self.cell.disk.is_some_and(|disk| disk.written) { HOLD } else { Duration::ZERO }
    }

    fn attempt(
        &mut self,
        contender: Contender,
        round: u32,
        patience: Duration,
        interrupt: &Interrupt,
    ) -> Result<Trial, BenchError> {
        let mut twin = self.twin.take();
        let trial = self.attempt_with(&mut twin, contender, round, patience, interrupt);
        self.twin = twin;
        trial
    }

    fn attempt_with(
        &self,
        twin: &mut Option<Twin>,
        contender: Contender,
        round: u32,
        patience: Duration,
        interrupt: &Interrupt,
    ) -> Result<Trial, BenchError> {
        let client = self.client()?;
        let own = contender == Contender::VMIRROR;
        let guest = ADDRESSES[usize::from(!own)];
        self.work(client, guest, interrupt)?;
        let boot_id = client.status(guest)?.boot_id;
        let watch = Watch::start(client, guest)?;
        let act = || match twin.as_mut() {
            _ if own => self.by_vmirror(round, patience, interrupt),
            Some(twin) => {
                let setting = Setting { method: contender.method, tls: contender.tls, hold: self.hold() };
                if let Some(disk) = self.cell.disk {
                    let to = &self.bed.hosts()[1 - twin.host()];
                    disks::clear(to, TWIN)?;
                    disks::make(&disks::image(to, TWIN), disk)?;
                }
                twin.migrate(self.bed.hosts(), setting, patience, interrupt)
            }
            None => Err(BenchError::Baseline { status: "none".into(), message: "the twin is gone".into() }),
        };
        let (moved, heartbeats) = with_heartbeats(Some(client), guest, interrupt, act)?;
        let survived = client.status(guest)?.boot_id == boot_id;
        let Moved { result, overhead_bytes } = moved;
        let (sample, miss) = match result {
            Ok(_) if !survived => (None, Some(Miss::Crashed)),
            Ok(sample) => (Some(Sample { round, heartbeats, ..sample }), None),
            Err(miss) => (None, Some(miss)),
        };
        let throughput = watch.around(sample.as_ref());
        let throughput = if self.cell.is_busy() { throughput } else { Throughput::default() };
        self.rest(client, guest)?;
        Ok(Trial { contender, round, sample, miss, throughput, overhead_bytes })
    }

    fn by_vmirror(&self, round: u32, patience: Duration, interrupt: &Interrupt) -> Result<Moved, BenchError> {
        let [a, b] = self.bed.hosts();
        let [from, to] = if round.is_multiple_of(2) { [a, b] } else { [b, a] };
        let agents = [from, to].map(Memory::of_agent);
        let deadline = format!("{}s", patience.as_secs());
        let (downtime, most) = self.cell.downtime_ms;
        let (downtime, most) = (format!("{downtime}ms"), format!("{most}ms"));
        let options = [
            "--on-diverge",
            self.cell.on_diverge,
            "--downtime",
            &downtime,
            "--max-downtime",
            &most,
            "--timeout",
            &deadline,
        ];
        // vmirror ends by itself at its deadline, and then some.
        let disk = self.cell.disk.map(|_| self.hold());
        let order = mirrored::Order { options: &options, disk, patience: patience * 2 };
        if disk.is_some() {
            disks::clear(to, NAME)?;
        }
        let sample = mirrored::migrate(from, to, &order, interrupt, |_| ())?;
        let overhead_bytes = most_overhead(&agents);
        let error = sample.report.as_ref().and_then(|report| report.error.as_ref());
        let result = match error {
            None => Ok(sample),
            Some(failure) => Err(Miss::Failed { message: failure.finding.message.clone() }),
        };
        Ok(Moved { result, overhead_bytes })
    }
}
