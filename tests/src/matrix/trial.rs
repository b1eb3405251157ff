//! One cell, from the migration that it is about to what has come of it.

use std::fs::{self, File};
use std::sync::Arc;
use std::time::{Duration, Instant};

use testbed::BadDisk;

use super::cell::{Cell, Direction};
use super::judge::{Judge, Outcome, Run};
use super::lane::{Lane, NAME};
use super::side::Side;
use super::strike::Strike;
use crate::{PATIENCE, UnderWay};

/// How long a migration may take to come to a point.
const TO_POINT: Duration = PATIENCE;

impl Lane {
    /// Runs a cell: the guest is brought to where it begins, and what comes of it is judged.
    pub fn run(&mut self, cell: &Cell, seed: u64) -> Run {
        let from = match cell.direction {
            Direction::There => Side::A,
            Direction::Back => Side::B,
        };
        if let Err(why) = self.bring_to(from) {
            return Run::not_begun(cell, seed, &why);
        }
        let strike = Strike::new(cell, seed);
        let pair = Arc::clone(&self.pair);
        self.forget_console();
        self.watch.anew(from);
        let held =
            self.points[if cell.point.is_destinations() { from.other() } else { from } as usize].clone();
        File::create(held.join(cell.point.name())).unwrap();
        let reached = held.join(format!("{}.reached", cell.point.name()));
        let start = Instant::now();
        let migration = loop {
            let migration =
                pair.begin(NAME, pair.host(from), pair.host(from.other()), self.migrate_options());
            while !reached.exists() && !migration.has_ended() && start.elapsed() <= TO_POINT {
                std::thread::sleep(Duration::from_millis(5));
            }
            if reached.exists() {
                break migration;
            }
            let said = migration.has_ended().then(|| migration.ended());
            // Earlier strikes have made switch-overs look slow. The agent forgets half of that each time it tells so.
            let looks_slow = said
                .as_ref()
                .is_some_and(|said| said.stdout.contains("a switch-over away from this host takes"));
            if !looks_slow || start.elapsed() > TO_POINT {
                let _ = fs::remove_file(held.join(cell.point.name()));
                return Run::not_begun(cell, seed, &format!("it never came to the point: {said:?}"));
            }
        };
        strike.strike(self, from, || drop(fs::remove_file(&reached)));
        let mut run = self.judge(cell, seed, from, &migration);
        if migration.has_ended() {
            run.heard(&migration.ended());
        }
        for shim in &self.shims {
            shim.set_clock(0).unwrap();
            shim.set_disk(BadDisk::Sound).unwrap();
        }
        run
    }

    fn judge(&mut self, cell: &Cell, seed: u64, from: Side, migration: &UnderWay<'_>) -> Run {
        let run = Judge::new(self, cell, from, migration).judge();
        match (run.outcome, run.at) {
            (Outcome::Ok, Some(at)) => {
                if let Some(living) = &mut self.living {
                    living.at = at;
                }
            }
            _ => self.living = None,
        }
        Run { cell: cell.to_string(), seed, ..run }
    }
}
