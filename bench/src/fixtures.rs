//! What tests look at: runs with round numbers.

use crate::cell::{Cell, PAGE};
use crate::contender::Contender;
use crate::outcome::{CellRecord, Sitting, Trial};
use crate::record::{Miss, Record, Sample};
use crate::throughput::Throughput;

/// A demo of two rounds.
pub fn run() -> Record {
    serde_json::from_str(include_str!("fixtures/record.json")).unwrap()
}

/// A cell in which these contenders had these downtimes.
pub fn cell(name: &str, downtimes: &[(Contender, f64)]) -> CellRecord {
    let cell = Cell::named(name);
    let trial = |&(contender, downtime_ms): &(Contender, f64)| Trial {
        contender,
        round: 0,
        sample: Some(Sample { downtime_ms, ..run().samples.swap_remove(0) }),
        miss: None,
        throughput: Throughput { before: Some(100.0), during: Some(96.0), copied: None, after: None },
        overhead_bytes: Some(100 << 20),
    };
    let runs = downtimes.iter().filter(|(contender, _)| *contender == Contender::VMIRROR).count();
    let sitting = Sitting {
        started: "today".into(),
        took_ms: 60_000.0,
        runs: u32::try_from(runs).unwrap(),
        patience_s: 60,
        contenders: Contender::ALL.to_vec(),
        ..Sitting::default()
    };
    CellRecord {
        dirtied: Some((cell.rate() * PAGE) as f64),
        trials: downtimes.iter().map(trial).collect(),
        faults: Some(0),
        ..CellRecord::new(&cell, sitting)
    }
}

/// The figures of a cell's trial, to change them.
pub fn sample(cell: &mut CellRecord, trial: usize) -> &mut Sample {
    cell.trials[trial].sample.as_mut().unwrap()
}

/// Takes the figures of a cell's trial.
pub fn miss(cell: &mut CellRecord, trial: usize, why: Miss) {
    (cell.trials[trial].sample, cell.trials[trial].miss) = (None, Some(why));
}
