//! Cells run on several lanes at once.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use super::cell::{Cell, Direction, Kind};
use super::judge::{Outcome, Run};
use super::lane::Lane;
use super::results::Results;
use crate::Side;

/// A cell that could not be begun is tried so often: the guest may have been left in the way by the one before.
const TRIES: usize = 3;

/// Runs those of the cells that are not among the results yet, on so many lanes, and keeps the logs of those that are not ok below
/// `logs`.
///
/// # Panics
/// If a thread cannot be had.
pub fn work(cells: &[Cell], seed: u64, lanes: usize, results: &Results, logs: &Path) {
    for kind in Kind::ALL {
        let cells: Vec<Cell> =
            cells.iter().filter(|cell| cell.kind == kind && !results.has(cell)).copied().collect();
        let left = Mutex::new(cells);
        std::thread::scope(|threads| {
            for _ in 0..lanes {
                threads.spawn(|| lane(kind, &left, seed, results, logs));
            }
        });
    }
}

/// Takes one cell after the other, those first that begin where the guest is.
fn lane(kind: Kind, left: &Mutex<Vec<Cell>>, seed: u64, results: &Results, logs: &Path) {
    let mut lane: Option<Lane> = None;
    loop {
        let at = lane.as_ref().and_then(Lane::guest_at);
        let Some(cell) = take(&mut left.lock().unwrap_or_else(PoisonError::into_inner), at) else { return };
        let begun = Instant::now();
        for attempt in 1..=TRIES {
            let mut running = match lane.take() {
                Some(lane) => lane,
                None => Lane::new(kind).unwrap(),
            };
            // Whatever the tests share fails by panicking.
            let run = catch_unwind(AssertUnwindSafe(|| running.run(&cell, seed)));
            let run = run.unwrap_or_else(|panic| {
                let text = panic.downcast_ref::<String>().cloned();
                let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
                Run::not_begun(&cell, seed, &text.unwrap_or_default())
            });
            let detail: String = run.detail.chars().take(400).collect();
            eprintln!(
                "{cell} seed {seed}: {:?}{}{} settled in {:.1} s, {:.1} s in all {detail}",
                run.outcome,
                run.rule.as_ref().map(|rule| format!(" ({rule})")).unwrap_or_default(),
                if run.person { ", by a person," } else { "" },
                run.settled_ms as f64 / 1e3,
                begun.elapsed().as_secs_f64(),
            );
            if run.outcome == Outcome::Ok {
                lane = Some(running);
                results.add(run);
                break;
            }
            keep(&running, &run, logs);
            if !run.is_not_begun() || attempt == TRIES {
                results.add(run);
                break;
            }
        }
    }
}

fn take(left: &mut Vec<Cell>, at: Option<Side>) -> Option<Cell> {
    let begins_here = |cell: &Cell| match at {
        Some(Side::A) => cell.direction == Direction::There,
        Some(Side::B) => cell.direction == Direction::Back,
        None => true,
    };
    let place = left.iter().position(begins_here).or(if left.is_empty() { None } else { Some(0) })?;
    Some(left.remove(place))
}

/// Keeps what tells of a run that was not as it should be.
fn keep(lane: &Lane, run: &Run, logs: &Path) {
    let directory = logs.join(run.cell.replace('/', "_"));
    let _ = fs::create_dir_all(&directory);
    let _ = fs::write(directory.join("run.json"), serde_json::to_string_pretty(run).unwrap_or_default());
    let _ = fs::copy(lane.pair().a().serial(super::lane::NAME), directory.join("console"));
    for host in [lane.pair().a(), lane.pair().b()] {
        let _ = fs::copy(host.agent_log(), directory.join(format!("{}.log", host.name())));
        let list = crate::vmirror(host, &["list", "--json"]);
        let _ = fs::write(directory.join(format!("{}.list", host.name())), list.stdout);
    }
}
