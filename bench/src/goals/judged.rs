//! One goal: what is to be reached, and what came of it.

use serde::{Deserialize, Serialize};

use crate::contender::Contender;
use crate::outcome::CellRecord;

/// A goal, and what came of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Goal {
    /// The case.
    pub case: String,
    /// What was to be reached.
    pub goal: String,
    /// What was measured.
    pub measured: String,
    /// Whether it is reached; none where it was not measured.
    pub reached: Option<bool>,
}

/// What was measured, in words, and whether that is what was to be reached; none where it was not measured.
pub type Found = Option<(String, bool)>;

/// A case, and the cell in which it is looked for.
pub struct Case<'a> {
    /// Its name.
    pub name: &'a str,
    /// All cells, for what compares two.
    pub cells: &'a [CellRecord],
    /// Its own; none where that was not tried.
    pub cell: Option<&'a CellRecord>,
}

impl<'a> Case<'a> {
    /// That of a cell's name.
    pub fn of(cells: &'a [CellRecord], name: &'a str, cell: &str) -> Self {
        Self { name, cells, cell: find(cells, cell) }
    }

    /// Judges it. What is found counts only where every run of vmirror came to its end, and where its guest dirtied what it was
    /// to dirty and found nothing wrong in itself afterwards.
    pub fn goal(self, goal: impl Into<String>, found: impl FnOnce(&CellRecord) -> Found) -> Goal {
        Goal::new(self.name, goal, self.cell.and_then(|cell| if_sound(cell, found(cell))))
    }
}

impl Goal {
    /// Of a case that is no cell's.
    pub fn new(case: &str, goal: impl Into<String>, found: Found) -> Self {
        let (measured, reached) = found.unzip();
        let measured = measured.unwrap_or_else(|| "not measured".to_owned());
        Self { case: case.to_owned(), goal: goal.into(), measured, reached }
    }
}

/// The cell of that name.
pub fn find<'a>(cells: &'a [CellRecord], name: &str) -> Option<&'a CellRecord> {
    cells.iter().find(|record| record.cell.name == name)
}

fn if_sound(cell: &CellRecord, found: Found) -> Found {
    let tried = cell.by(Contender::VMIRROR).count();
    let (done, asked) = (cell.samples(Contender::VMIRROR).count(), cell.sitting.runs);
    let runs = match cell.missed(Contender::VMIRROR) {
        Some(missed) => format!("{done} of {asked} runs, then: {missed}"),
        None => format!("{done} of {asked} runs"),
    };
    let Some((measured, reached)) = found else { return (tried > done).then_some((runs, false)) };
    let wrong = match cell.faults {
        Some(0) if cell.is_dirtied_as_asked() => "",
        Some(0) => "; its guest dirtied less than asked",
        Some(_) => "; its guest found wrong pages",
        None => "; its guest was not asked afterwards",
    };
    let sound = done == asked as usize && done == tried && wrong.is_empty();
    Some((format!("{measured}; {runs}{wrong}"), reached && sound))
}
