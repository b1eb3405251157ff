//! What of all that was asked for is covered, and what is not.

use std::fmt::Write as _;

use crate::cell::{Cell, Dirtying, Filling, Link, Order};
use crate::outcome::CellRecord;

fn dirties(cell: &Cell, percent: u64) -> bool {
    cell.dirtying == Dirtying::OfLink(percent)
}

fn in_order(cell: &Cell, order: Order) -> bool {
    cell.dirtying != Dirtying::Idle && cell.order == order
}

/// What varies, one of its values, and which cells have it.
type Asked = (&'static str, &'static str, fn(&Cell) -> bool);

const ASKED: [Asked; 19] = [
    ("guest", "512 MiB", |cell| cell.memory_mib == 512),
    ("guest", "1 GiB", |cell| cell.memory_mib == 1024),
    ("guest", "4 GiB", |cell| cell.memory_mib == 4096),
    ("content", "incompressible", |cell| cell.content == Filling::Incompressible),
    ("content", "booted Debian userland", |cell| cell.content == Filling::Userland),
    ("content", "mostly zero", |cell| cell.content == Filling::MostlyZero),
    ("dirtying", "idle", |cell| cell.dirtying == Dirtying::Idle),
    ("dirtying", "25 % of the link", |cell| dirties(cell, 25)),
    ("dirtying", "75 % of the link", |cell| dirties(cell, 75)),
    ("dirtying", "150 % of the link", |cell| dirties(cell, 150)),
    ("dirtying", "400 % of the link", |cell| dirties(cell, 400)),
    ("pattern", "random pages", |cell| in_order(cell, Order::Random)),
    ("pattern", "small counters", |cell| in_order(cell, Order::Counters)),
    ("pattern", "streaming", |cell| in_order(cell, Order::Streaming)),
    ("link", "1 Gbit/s", |cell| cell.link == Link::Mbit(1000)),
    ("link", "10 Gbit/s", |cell| cell.link == Link::Mbit(10_000)),
    ("link", "unshaped", |cell| cell.link == Link::Unshaped),
    ("disk that moves", "idle", |cell| cell.disk.is_some_and(|disk| !disk.written)),
    ("disk that moves", "written as fast as it goes", |cell| cell.disk.is_some_and(|disk| disk.written)),
];

/// Without disks: 3 guests, 3 contents and 3 links, idle or in 4 rates of 3 patterns.
const PRODUCT: usize = 3 * 3 * 3 * (1 + 4 * 3);

const LEFT_OUT: &str = include_str!("document/left-out.md");

/// The document's section about it.
pub(crate) fn section(records: &[CellRecord]) -> String {
    let cells = Cell::all();
    let tried = |record: &CellRecord, cell: &Cell| record.cell.name == cell.name && !record.trials.is_empty();
    let measured = |cell: &&Cell| records.iter().any(|record| tried(record, cell));
    let mut text = format!(
        "## What is covered\n\nThe product of everything below, disks left out, has {PRODUCT} cells; all of them, five times by each contender, \
         would take weeks. Of these each value is tried at least once, while the others stay: 1 GiB, incompressible, and an \
         unshaped link for idle guests, 1 Gbit/s for others.\n\n| | value | cells |\n| --- | --- | --- |\n"
    );
    for (what, value, has) in &ASKED {
        let (here, missing): (Vec<&Cell>, Vec<&Cell>) =
            cells.iter().filter(|cell| has(cell)).partition(measured);
        let cells = match (here.is_empty(), missing.is_empty()) {
            (true, true) => "none".to_owned(),
            (true, false) => format!("*not measured:* {}", names(&missing)),
            (false, _) => names(&here),
        };
        let _ = writeln!(text, "| {what} | {value} | {cells} |");
    }
    let _ = write!(text, "\n{LEFT_OUT}");
    let missing: Vec<&Cell> = cells.iter().filter(|cell| !measured(cell)).collect();
    if !missing.is_empty() {
        let _ = writeln!(text, "\nCells that there are, but not measured here: {}.", names(&missing));
    }
    text
}

fn names(cells: &[&Cell]) -> String {
    cells.iter().map(|cell| cell.name.as_str()).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contender::Contender;

    #[test]
    fn every_value_that_was_asked_for_has_its_cell() {
        let cells = Cell::all();
        for (what, value, has) in &ASKED {
            // The userland is an image that not every machine can make.
            let none = cells.iter().filter(|cell| has(cell)).count() == 0;
            assert!(!none || *value == "booted Debian userland", "{what} {value}");
        }
        let at =
            |percent, mbit| cells.iter().any(|cell| dirties(cell, percent) && cell.link == Link::Mbit(mbit));
        assert!(at(25, 10_000) && at(25, 1000) && at(400, 1000));
        for memory_mib in [512, 4096] {
            let dirtied = |cell: &Cell| cell.memory_mib == memory_mib && cell.dirtying != Dirtying::Idle;
            assert!(cells.iter().any(dirtied), "{memory_mib}");
        }
    }

    #[test]
    fn what_was_not_measured_is_named() {
        let text = section(&[crate::fixtures::cell("idle-512m", &[(Contender::VMIRROR, 1.0)])]);
        assert!(text.contains("| guest | 512 MiB | idle-512m |"), "{text}");
        assert!(text.contains("| guest | 4 GiB | *not measured:* idle-4g, counters-25-4g |"), "{text}");
        assert!(text.contains("not measured here: idle, idle-4g, "), "{text}");
    }
}
