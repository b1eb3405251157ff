//! Work on test disks, whose outcome the guest knows: it tells what a move of its storage lost, tore or misplaced.
//!
//! A disk is known by its serial number, whatever its name or place; what is done with it says its [plan]. There are three
//! kinds of work: [blocks] that say what they are, a [journal] whose records are acknowledged to the network once they are
//! on the disk, and [files] in an ext4. All of them keep in memory what the disk must hold, and compare it with what is read
//! around the page cache: with what the disk really holds.

pub mod block;
pub mod blocks;
pub mod device;
mod error;
pub mod files;
pub mod gate;
pub mod journal;
pub mod plan;
pub mod tally;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

pub use error::DiskError;
pub use plan::{Io, Plan, Role, Work};
pub use tally::{DiskStatus, Fault, Faults, Verdict};

use blocks::Blocks;
use device::Device;
use files::Files;
use gate::Gate;
use journal::{Acknowledged, Journal};
use tally::Tally;

use crate::pace::{Pace, TICK};

/// All test disks of a guest, and what is done with them.
#[derive(Debug)]
pub struct Disks {
    jobs: Vec<Job>,
    shared: Shared,
    /// Held through a full check: a second one would only read the same again.
    checking: Mutex<()>,
}

/// What the jobs have in common.
#[derive(Debug)]
struct Shared {
    gate: Gate,
    tally: Tally,
    acknowledged: Acknowledged,
}

#[derive(Debug)]
enum Job {
    Blocks(Blocks),
    Journal(Journal),
    Files(Files),
}

/// A thread to be: it never ends.
pub struct Worker {
    /// What to call it.
    pub name: String,
    /// What it does.
    pub run: Box<dyn FnOnce() + Send>,
}

impl Disks {
    /// Finds the disks of these plans and makes them ready. Journals and file systems that a former boot left are checked.
    ///
    /// # Errors
    /// Where a disk is missing, too small, or has no file system where one is planned.
    pub fn open(
        plans: &[Plan],
        boot: u64,
        tell: impl Fn(&str) + Send + Sync + 'static,
    ) -> Result<Self, DiskError> {
        let shared =
            Shared { gate: Gate::default(), tally: Tally::new(tell), acknowledged: Acknowledged::default() };
        let mut jobs = Vec::new();
        for plan in plans {
            let device = Arc::new(Device::find(&plan.serial)?);
            for (role, region) in device.regions(&plan.roles)? {
                let device = Arc::clone(&device);
                jobs.push(match role.work {
                    Work::Blocks { pattern, io, rate, depth, check_rate } => {
                        let pace = blocks::Pace { rate, depth, check_rate };
                        Job::Blocks(Blocks::new(device, region, boot, pattern, io, pace))
                    }
                    Work::Journal { rate } => Job::Journal(Journal::open(
                        device,
                        region,
                        rate,
                        &shared.tally,
                        &shared.acknowledged,
                    )?),
                    Work::Ext4 { rate } => Job::Files(Files::mount(&device, boot, rate, &shared.tally)?),
                });
            }
        }
        Ok(Self { jobs, shared, checking: Mutex::new(()) })
    }

    /// The threads that do the work.
    pub fn workers(self: &Arc<Self>) -> Vec<Worker> {
        let mut workers = Vec::new();
        for index in 0..self.jobs.len() {
            let mut add = |kind: &str, rate: u64, step: fn(&Job, &Shared)| {
                let disks = Arc::clone(self);
                let run =
                    move || keep_pace(&disks.shared.gate, rate, || step(&disks.jobs[index], &disks.shared));
                workers.push(Worker { name: format!("disk-{kind}{index}"), run: Box::new(run) });
            };
            match &self.jobs[index] {
                Job::Blocks(blocks) => {
                    let blocks::Pace { rate, depth, check_rate } = blocks.pace();
                    // Each has its share, and none a share of nothing: that would be without limit.
                    for _ in 0..depth {
                        add("write", rate.div_ceil(u64::from(depth)), Job::step);
                    }
                    add("read", check_rate, Job::look);
                }
                Job::Journal(journal) => add("journal", journal.rate(), Job::step),
                Job::Files(files) => add("files", files.rate(), Job::step),
            }
        }
        workers
    }

    /// The numbers that the journals have acknowledged.
    pub fn acknowledged(&self) -> &Acknowledged {
        &self.shared.acknowledged
    }

    /// What became of the disks so far; none where there are none.
    pub fn status(&self) -> Option<DiskStatus> {
        (!self.jobs.is_empty()).then(|| DiskStatus {
            acknowledged: self.shared.acknowledged.all(),
            quiet: self.shared.gate.is_closed(),
            ..self.shared.tally.status()
        })
    }

    /// Has the disks left alone for now, or no longer.
    pub fn pause(&self, paused: bool) {
        self.shared.gate.pause(paused);
    }

    /// Reads everything back that was written, around the page cache, while the work goes on.
    pub fn check(&self) -> Verdict {
        let _one = self.checking.lock().unwrap_or_else(PoisonError::into_inner);
        let mut verdict = Verdict::default();
        for job in &self.jobs {
            match job {
                Job::Blocks(blocks) => blocks.check_all(&self.shared.tally, &mut verdict),
                Job::Journal(journal) => journal.check(&self.shared.tally, &mut verdict),
                Job::Files(files) => files.check_all(&self.shared.tally, &mut verdict),
            }
        }
        verdict.acknowledged = self.shared.acknowledged.all();
        verdict
    }

    /// Ends the work for good, and leaves the disks with all that was written, their file systems unmounted.
    ///
    /// # Errors
    /// Where a file system cannot be unmounted. What a disk refuses to take is a fault that is counted.
    pub fn quiet(&self) -> Result<(), DiskError> {
        self.shared.gate.close();
        for job in &self.jobs {
            match job {
                Job::Blocks(blocks) => blocks.settle(&self.shared.tally),
                // Every record was brought to the disk when it was written.
                Job::Journal(_) => {}
                Job::Files(files) => files.unmount()?,
            }
        }
        Ok(())
    }
}

impl Job {
    fn step(&self, shared: &Shared) {
        match self {
            Self::Blocks(blocks) => blocks.write_next(&shared.tally),
            Self::Journal(journal) => journal.append(&shared.tally, &shared.acknowledged),
            Self::Files(files) => files.step(&shared.tally),
        }
    }

    /// Only blocks have somebody who reads while others write; the other jobs check as they go.
    fn look(&self, shared: &Shared) {
        if let Self::Blocks(blocks) = self {
            blocks.check_one(&shared.tally);
        }
    }
}

/// Does something at a rate per second, 0 being as fast as it goes, for as long as the gate lets it.
fn keep_pace(gate: &Gate, rate: u64, step: impl Fn()) -> ! {
    let mut pace = Pace::from(Instant::now());
    loop {
        let due = if rate == 0 { u64::MAX } else { pace.due(Instant::now(), rate) };
        for _ in 0..due {
            let Some(_inside) = gate.enter() else { break };
            step();
        }
        std::thread::sleep(TICK);
    }
}
