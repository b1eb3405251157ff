//! Goals about what a guest's network notices, held against QEMU's own migration.

use readable::{count, measured_ms as ms};

use super::judged::{Case, Goal, find};
use crate::contender::Contender;
use crate::outcome::CellRecord;
use crate::record::Sample;

const OWN: Contender = Contender::VMIRROR;
const DEFAULT: Contender = Contender::DEFAULT;

/// Each of them.
pub(super) fn of(cells: &[CellRecord]) -> Vec<Goal> {
    let case = |name| Case::of(cells, name, "idle-zero");
    vec![
        frames_lost(case("frames lost, idle, unshaped")),
        gap(case("heartbeat gap, idle, unshaped")),
        added_downtime(case("downtime with frames carried, unshaped")),
    ]
}

/// Of 1,000 frames per second, and as many answers.
fn frames_lost(case: Case<'_>) -> Goal {
    case.goal("none in all runs", |cell| {
        let lost = |contender| {
            let beats = cell.samples(contender).filter_map(|sample| sample.heartbeats);
            beats.map(|beats| beats.lost).reduce(|sum, lost| sum + lost)
        };
        let own = lost(OWN)?;
        let qemu = match lost(DEFAULT) {
            Some(qemu) => format!("QEMU {}", count(qemu)),
            None => format!("QEMU: {}", cell.missed(DEFAULT)?),
        };
        Some((format!("{}; {qemu}", count(own)), own == 0))
    })
}

/// How much longer than its downtime a guest is not heard.
fn gap(case: Case<'_>) -> Goal {
    const LIMIT_MS: f64 = 3.0;
    case.goal(format!("≤ downtime + {LIMIT_MS} ms"), |cell| {
        let beyond = |sample: &Sample| Some(Sample::GAP(sample)? - sample.downtime_ms);
        let own = cell.median(OWN, beyond)?;
        let qemu = cell.median(DEFAULT, beyond);
        let qemu = qemu.map_or_else(String::new, |qemu| format!("; QEMU: its downtime + {}", ms(qemu)));
        Some((format!("downtime + {}{qemu}", ms(own)), own <= LIMIT_MS))
    })
}

/// What it costs to carry frames.
fn added_downtime(case: Case<'_>) -> Goal {
    const LIMIT_MS: f64 = 2.0;
    let others = find(case.cells, "idle-zero-no-frames");
    case.goal(format!("carrying frames adds ≤ {LIMIT_MS} ms"), |cell| {
        let [with, without] = [cell, others?].map(|cell| cell.median(OWN, Sample::DOWNTIME));
        let (with, without) = (with?, without?);
        let added = with - without;
        Some((format!("{} with, {} without: {added:+.1} ms", ms(with), ms(without)), added <= LIMIT_MS))
    })
}
