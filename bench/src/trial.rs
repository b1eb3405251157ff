//! The trials of one cell: two equal guests, and every contender in turn.

use std::fs;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;
use testbed::guest_spec::Nic;
use testbed::{Client, Console, GuestSpec, Host, Programs, Testbed, TestbedError, Wire};
use tokio::runtime::Handle;

use crate::baseline::{Setting, Twin};
use crate::cell::{Cell, Contender, Dirtying, Filling, Link};
use crate::measure::{Beats, with_heartbeats};
use crate::mirrored::{self, NAME};
use crate::narrator::Narrator;
use crate::number::{bytes, ms};
use crate::record::{Miss, Sample};
use crate::throughput::{Throughput, Watch};
use crate::{BenchError, Interrupt, present};

/// The name of the guest that QEMU moves itself.
const TWIN: &str = "twin";
/// How long the guests may take to boot and to fill their memory.
const BOOT: Duration = Duration::from_secs(300);
/// How long the client listens to a guest that is not moved, and how long a guest works before it is.
const UNMIGRATED: Duration = Duration::from_secs(2);
const WARM_UP: Duration = Duration::from_secs(1);
/// How much a guest checks of itself per second, in pages: 8 MiB, which leaves an emulated CPU to its workload.
const CHECK_RATE: u64 = 2048;
const ADDRESSES: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 88, 0, 10), Ipv4Addr::new(10, 88, 0, 11)];

/// What came of one cell.
#[derive(Clone, Debug, Serialize)]
pub struct CellRecord {
    /// The cell.
    pub cell: Cell,
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

/// One attempt to move a guest.
#[derive(Clone, Debug, Serialize)]
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
    /// Memory that vmirror took on the side where it took more, beyond what its agent has when idle, in bytes.
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
}

/// How a cell is tried.
#[derive(Clone, Debug)]
pub struct Trials<'a> {
    /// By whom.
    pub contenders: &'a [Contender],
    /// How often by each.
    pub runs: u32,
    /// How long one migration may take.
    pub patience: Duration,
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
    let mut record = CellRecord {
        cell: cell.clone(),
        description: cell.describe(),
        dirtied: None,
        unmigrated: None,
        trials: Vec::new(),
        faults: None,
        skipped: None,
        failure: None,
    };
    let userland = match userland(cell) {
        Ok(userland) => userland,
        Err(error) => {
            let why = error.to_string();
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
    Ok(record)
}

/// The disk that the guests of a cell boot, if they boot one.
fn userland(cell: &Cell) -> Result<Option<PathBuf>, TestbedError> {
    (cell.content == Filling::Userland).then(testbed::programs::userland).transpose()
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
        for contender in turns(trials.contenders, round) {
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
                // It is not known where the guest is, if anything went wrong.
                return Ok(());
            }
        }
    }
    record.faults = scene.console.status().map(|status| status.faults());
    Ok(())
}

/// Who goes when: each goes first as often as any other.
fn turns(contenders: &[Contender], round: u32) -> Vec<Contender> {
    let mut turns = contenders.to_vec();
    let first = round as usize % turns.len().max(1);
    turns.rotate_left(first);
    turns
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
            host.start_agent()?;
            host.add_tap(TWIN)?;
            if let Link::Mbit(mbit) = cell.link {
                bed.set_rate(host, Wire::Link, mbit * 1_000_000)?;
            }
        }
        bed.a().add_tap(NAME)?;
        let spec = |name: &str, number: u8| -> Result<GuestSpec, BenchError> {
            Ok(GuestSpec {
                memory_mib: cell.memory_mib,
                fill_mib: cell.fill_mib(),
                working_set_mib: Some(cell.working_set_mib()),
                rate: 0,
                pattern: cell.pattern(),
                content: Some(cell.page_content()),
                check_rate: Some(CHECK_RATE),
                userland: userland.clone(),
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
        Ok(Self { twin: Some(twin), bed, console, cell })
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
        record.dirtied = (ms_between > 0).then(|| (pages * 4096) as f64 / ms_between as f64 * 1e3);
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
        if self.cell.dirtying == Dirtying::Idle {
            return Ok(());
        }
        client.tell(guest, &format!("rate {}", self.cell.rate()))?;
        interrupt.sleep(WARM_UP)
    }

    fn rest(&self, client: &Client, guest: Ipv4Addr) -> Result<(), BenchError> {
        if self.cell.dirtying != Dirtying::Idle {
            client.tell(guest, "rate 0")?;
        }
        Ok(())
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
        let mut overhead_bytes = None;
        let act = || match twin.as_mut() {
            _ if own => {
                let (moved, overhead) = self.by_vmirror(round, patience, interrupt)?;
                overhead_bytes = overhead;
                Ok(moved)
            }
            Some(twin) => {
                let setting = Setting { method: contender.method, tls: contender.tls };
                twin.migrate(self.bed.hosts(), setting, patience, interrupt)
            }
            None => Err(BenchError::Baseline { status: "none".into(), message: "the twin is gone".into() }),
        };
        let (moved, heartbeats) = with_heartbeats(Some(client), guest, interrupt, act)?;
        let survived = client.status(guest)?.boot_id == boot_id;
        let (sample, miss) = match moved {
            Ok(_) if !survived => (None, Some(Miss::Crashed)),
            Ok(sample) => (Some(Sample { round, heartbeats, ..sample }), None),
            Err(miss) => (None, Some(miss)),
        };
        let throughput = watch.around(sample.as_ref());
        let throughput =
            if self.cell.dirtying == Dirtying::Idle { Throughput::default() } else { throughput };
        self.rest(client, guest)?;
        Ok(Trial { contender, round, sample, miss, throughput, overhead_bytes })
    }

    fn by_vmirror(
        &self,
        round: u32,
        patience: Duration,
        interrupt: &Interrupt,
    ) -> Result<(Result<Sample, Miss>, Option<u64>), BenchError> {
        let [a, b] = self.bed.hosts();
        let [from, to] = if round.is_multiple_of(2) { [a, b] } else { [b, a] };
        let agents = [from, to].map(Memory::of);
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
        let sample = mirrored::migrate(from, to, &options, patience * 2, interrupt, |_| ())?;
        let overhead = agents.iter().filter_map(|agent| agent.as_ref()?.overhead()).max();
        let error = sample.report.as_ref().and_then(|report| report.error.as_ref());
        let moved = match error {
            None => Ok(sample),
            Some(failure) => Err(Miss::Failed { message: failure.finding.message.clone() }),
        };
        Ok((moved, overhead))
    }
}

/// The memory of an agent, from a time on.
struct Memory {
    pid: i32,
    idle_bytes: u64,
}

impl Memory {
    /// From now on. None where the system does not tell.
    fn of(host: &Host) -> Option<Self> {
        let pid = host.agent_pid()?;
        let idle_bytes = status_bytes(pid, "VmRSS")?;
        // 5: the most that was resident begins anew (proc_pid_clear_refs(5)).
        fs::write(format!("/proc/{pid}/clear_refs"), "5").ok()?;
        Some(Self { pid, idle_bytes })
    }

    /// The most since then, beyond what there was.
    fn overhead(&self) -> Option<u64> {
        Some(status_bytes(self.pid, "VmHWM")?.saturating_sub(self.idle_bytes))
    }
}

/// A size in a process's status.
fn status_bytes(pid: i32, name: &str) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_contender_goes_first_once() {
        let firsts: Vec<Contender> = (0..8).map(|round| turns(&Contender::ALL, round)[0]).collect();
        assert_eq!(firsts, Contender::ALL);
        assert!(turns(&[], 3).is_empty());
    }

    #[test]
    fn the_memory_of_a_process_is_found() {
        let own = std::process::id().cast_signed();
        assert!(status_bytes(own, "VmHWM").unwrap() >= 1 << 20);
        assert_eq!(status_bytes(own, "VmNonsense"), None);
    }
}
