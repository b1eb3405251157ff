//! Everything that the benchmark measured, in one or several sittings: what `results.json` holds.

use std::path::{Path, PathBuf};

use micro::Engine;
use serde::Serialize;
use serde_json::Value;
use testbed::surroundings::Surroundings;

use crate::cell::Cell;
use crate::error::BenchError;
use crate::file;
use crate::goals::{self, Goal};
use crate::outcome::CellRecord;

/// What was measured. Each cell knows in which sitting; what is said here is of the last one.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Results {
    /// When it began.
    pub started: String,
    /// How long it took, in milliseconds.
    pub took_ms: f64,
    /// The command.
    pub command: String,
    /// The machine and the programs.
    pub surroundings: Surroundings,
    /// What the engine sends through a cable; none where that was not measured.
    pub engine: Option<Engine>,
    /// Cells that were to be tried and were not, for want of time.
    pub left_out: Vec<String>,
    /// The cells.
    pub cells: Vec<CellRecord>,
    /// The goals.
    pub goals: Vec<Goal>,
}

/// The cells of earlier sittings.
#[derive(Debug, Default)]
pub struct Kept {
    /// Those that are still what they were.
    pub cells: Vec<CellRecord>,
    /// Names of those that cannot be kept, because such a cell is now another, or recorded otherwise.
    pub dropped: Vec<String>,
}

impl Kept {
    /// From a directory that [`Results::write`] has written to, or nothing.
    pub fn read(directory: &Path) -> Result<Self, BenchError> {
        let path = json_in(directory);
        let Some(mut value) = file::read::<Value>(&path)? else { return Ok(Self::default()) };
        let mut kept = Self::default();
        for cell in value["cells"].as_array_mut().into_iter().flatten() {
            let name = cell["cell"]["name"].as_str().unwrap_or("without a name").to_owned();
            match serde_json::from_value(cell.take()) {
                Ok(record) => kept.cells.push(record),
                Err(_) => kept.dropped.push(name),
            }
        }
        Ok(kept)
    }
}

impl Results {
    /// Adds a cell, in the place of what there was of it before.
    pub fn take(&mut self, record: CellRecord) {
        self.cells.retain(|other| other.cell.name != record.cell.name);
        self.cells.push(record);
        let all = Cell::all();
        self.cells.sort_by_key(|record| all.iter().position(|cell| cell.name == record.cell.name));
    }

    /// Judges the goals by the cells.
    pub fn judge(&mut self) {
        self.goals = goals::of(&self.cells, self.engine.as_ref());
    }

    /// Whether there was one of these cells to try, every one of them came to its end, and no guest found a page of its own wrong.
    pub fn succeeded(&self, names: &[&str]) -> bool {
        let sound = |name: &&str| {
            let record = self.cells.iter().find(|record| record.cell.name == *name);
            record.is_some_and(|record| record.failure.is_none() && record.faults == Some(0))
        };
        let skipped = |name: &&&str| {
            self.cells.iter().any(|record| record.cell.name == **name && record.skipped.is_some())
        };
        let mut tried = names.iter().filter(|name| !skipped(name)).peekable();
        tried.peek().is_some() && tried.all(sound)
    }

    /// Writes `benchmarks/results.json` into a directory.
    pub fn write(&self, directory: &Path) -> Result<PathBuf, BenchError> {
        let path = json_in(directory);
        file::write(&path, &without_checkout(&file::json(self)?))?;
        Ok(path)
    }
}

/// Paths in the checkout, told from there: the results are kept in it, and where it lies is nobody's business.
fn without_checkout(text: &str) -> String {
    let target = testbed::programs::target();
    let checkout = target.parent().unwrap_or(&target);
    text.replace(&format!("{}/", checkout.display()), "")
}

fn json_in(directory: &Path) -> PathBuf {
    directory.join("benchmarks/results.json")
}

#[cfg(test)]
pub(crate) mod tests {
    use std::fs;

    use super::*;
    use crate::contender::Contender;
    use crate::fixtures::{cell, miss};
    use crate::record::Miss;

    /// One cell, in which QEMU did not converge.
    pub(crate) fn results() -> Results {
        let own = Contender::VMIRROR;
        let mut idle = cell("idle", &[(own, 8.0), (own, 9.0), (Contender::DEFAULT, 40.0)]);
        miss(&mut idle, 2, Miss::NotConverged { after_ms: 60_000.0 });
        Results {
            started: "today".into(),
            took_ms: 120_000.0,
            command: "make bench".into(),
            cells: vec![idle],
            ..Results::default()
        }
    }

    #[test]
    fn where_the_checkout_lies_is_not_told() {
        let image = testbed::programs::target().join("userland/root.img");
        assert_eq!(
            without_checkout(&format!("{:?}", image.display().to_string())),
            "\"target/userland/root.img\""
        );
    }

    #[test]
    fn a_guest_with_a_wrong_page_fails_the_run() {
        let mut results = results();
        assert!(results.succeeded(&["idle"]));
        assert!(!results.succeeded(&["idle", "idle-4g"]));
        assert!(!results.succeeded(&[]));
        results.cells[0].faults = Some(1);
        assert!(!results.succeeded(&["idle"]));
    }

    #[test]
    fn a_cell_that_was_skipped_fails_no_run_that_has_others() {
        let mut results = results();
        let mut skipped = cell("idle-debian", &[]);
        (skipped.skipped, skipped.faults) = (Some("no network".into()), None);
        results.take(skipped);
        assert!(results.succeeded(&["idle", "idle-debian"]));
        assert!(!results.succeeded(&["idle-debian"]));
    }

    #[test]
    fn a_later_sitting_replaces_its_cells_and_keeps_the_others() {
        let directory = std::env::temp_dir().join(format!("vmirror-bench-results-{}", std::process::id()));
        assert!(Kept::read(&directory).unwrap().cells.is_empty());
        let mut first = results();
        first.take(cell("idle-512m", &[(Contender::VMIRROR, 7.0)]));
        first.write(&directory).unwrap();

        let kept = Kept::read(&directory).unwrap();
        assert_eq!((kept.cells.len(), kept.dropped.len()), (2, 0));
        let mut second = Results { cells: kept.cells, ..results() };
        let mut again = cell("idle", &[(Contender::VMIRROR, 5.0)]);
        again.sitting.started = "tomorrow".into();
        second.take(again);
        let seen: Vec<_> = second
            .cells
            .iter()
            .map(|cell| (cell.cell.name.as_str(), cell.sitting.started.as_str()))
            .collect();
        assert_eq!(seen, [("idle", "tomorrow"), ("idle-512m", "today")]);

        let path = json_in(&directory);
        let changed =
            fs::read_to_string(&path).unwrap().replace("\"memory_mib\": 512", "\"memory_mib\": 500");
        fs::write(&path, changed).unwrap();
        let kept = Kept::read(&directory).unwrap();
        assert_eq!((kept.cells.len(), kept.dropped), (1, vec!["idle-512m".to_owned()]));
        fs::write(&path, "{").unwrap();
        assert!(Kept::read(&directory).is_err());
        fs::remove_dir_all(&directory).unwrap();
    }
}
