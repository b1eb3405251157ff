//! What came of a cell: every trial, and the questions that are asked of them.

use serde::{Deserialize, Serialize};
use testbed::surroundings::Surroundings;

use crate::cell::{Cell, PAGE};
use crate::contender::Contender;
use crate::measure::{Beats, Spread};
use crate::record::{Miss, Sample};
use crate::throughput::Throughput;

/// What came of one cell.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CellRecord {
    /// The cell.
    #[serde(deserialize_with = "crate::cell::as_it_is")]
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
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
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
    /// Of a cell that nothing has come of yet.
    pub fn new(cell: &Cell, sitting: Sitting) -> Self {
        Self {
            cell: cell.clone(),
            sitting,
            description: cell.describe(),
            dirtied: None,
            unmigrated: None,
            trials: Vec::new(),
            faults: None,
            skipped: None,
            failure: None,
        }
    }

    /// What one contender did.
    pub fn by(&self, contender: Contender) -> impl Iterator<Item = &Trial> {
        self.trials.iter().filter(move |trial| trial.contender == contender)
    }

    /// The figures of those of its trials that came to their end.
    pub fn samples(&self, contender: Contender) -> impl Iterator<Item = &Sample> {
        self.by(contender).filter_map(|trial| trial.sample.as_ref())
    }

    /// What was measured of these.
    pub fn spread(&self, contender: Contender, measure: impl Fn(&Sample) -> Option<f64>) -> Option<Spread> {
        Spread::of(self.samples(contender).filter_map(measure))
    }

    /// The median of that.
    pub fn median(&self, contender: Contender, measure: impl Fn(&Sample) -> Option<f64>) -> Option<f64> {
        self.spread(contender, measure).map(|spread| spread.median)
    }

    /// The median of how fast its guests were.
    pub fn speed(&self, contender: Contender, speed: impl Fn(&Throughput) -> Option<f64>) -> Option<f64> {
        let speeds = self.by(contender).filter_map(|trial| speed(&trial.throughput));
        Spread::of(speeds).map(|spread| spread.median)
    }

    /// Why a contender did not come to its end, once at least.
    pub fn missed(&self, contender: Contender) -> Option<&Miss> {
        self.by(contender).find_map(|trial| trial.miss.as_ref())
    }

    /// The most memory that a contender took.
    pub fn most_overhead(&self, contender: Contender) -> Option<u64> {
        self.by(contender).filter_map(|trial| trial.overhead_bytes).max()
    }

    /// Whether its guest dirtied at least nine tenths of what it was to dirty.
    pub fn is_dirtied_as_asked(&self) -> bool {
        let asked = (self.cell.rate() * PAGE) as f64;
        asked == 0.0 || self.dirtied.is_some_and(|dirtied| dirtied >= 0.9 * asked)
    }
}

/// Contenders that were tried in these cells, in their usual order.
pub fn tried(cells: &[CellRecord]) -> impl Iterator<Item = Contender> {
    let tried = |contender: &Contender| cells.iter().any(|cell| cell.by(*contender).next().is_some());
    Contender::ALL.into_iter().filter(tried)
}
