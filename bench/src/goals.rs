//! The goals, held against what was measured. Every goal is judged by medians, and a ratio only within one cell, whose
//! contenders took turns. None is reached where vmirror has not made all the runs it was to make, each to its end.

mod disks;
mod judged;
mod memory;
mod network;
#[cfg(test)]
mod tests;

pub use judged::Goal;

use micro::Engine;

use crate::outcome::CellRecord;

/// Each goal.
pub fn of(cells: &[CellRecord], engine: Option<&Engine>) -> Vec<Goal> {
    [memory::of(cells, engine), disks::of(cells), network::of(cells)].concat()
}
