//! What of all that was asked for is covered, and what is not.

use std::fmt::Write as _;

use crate::cell::{Cell, Dirtying, Filling, Link, Order};
use crate::trial::CellRecord;

/// A value of one of the things that vary.
struct Asked {
    what: &'static str,
    value: &'static str,
    has: fn(&Cell) -> bool,
}

const fn asked(what: &'static str, value: &'static str, has: fn(&Cell) -> bool) -> Asked {
    Asked { what, value, has }
}

/// As the content is called in `results.json`.
fn content_is(cell: &Cell, name: &str) -> bool {
    serde_json::to_value(cell.content).is_ok_and(|content| content == name)
}

fn dirties(cell: &Cell, percent: u64) -> bool {
    cell.dirtying == Dirtying::OfLink(percent)
}

fn in_order(cell: &Cell, order: Order) -> bool {
    cell.dirtying != Dirtying::Idle && cell.order == order
}

const ASKED: [Asked; 19] = [
    asked("guest", "512 MiB", |cell| cell.memory_mib == 512),
    asked("guest", "1 GiB", |cell| cell.memory_mib == 1024),
    asked("guest", "4 GiB", |cell| cell.memory_mib == 4096),
    asked("content", "incompressible", |cell| cell.content == Filling::Incompressible),
    asked("content", "booted Debian userland", |cell| content_is(cell, "userland")),
    asked("content", "mostly zero", |cell| cell.content == Filling::MostlyZero),
    asked("dirtying", "idle", |cell| cell.dirtying == Dirtying::Idle),
    asked("dirtying", "25 % of the link", |cell| dirties(cell, 25)),
    asked("dirtying", "75 % of the link", |cell| dirties(cell, 75)),
    asked("dirtying", "150 % of the link", |cell| dirties(cell, 150)),
    asked("dirtying", "400 % of the link", |cell| dirties(cell, 400)),
    asked("pattern", "random pages", |cell| in_order(cell, Order::Random)),
    asked("pattern", "small counters", |cell| in_order(cell, Order::Counters)),
    asked("pattern", "streaming", |cell| in_order(cell, Order::Streaming)),
    asked("link", "1 Gbit/s", |cell| cell.link == Link::Mbit(1000)),
    asked("link", "10 Gbit/s", |cell| cell.link == Link::Mbit(10_000)),
    asked("link", "unshaped", |cell| cell.link == Link::Unshaped),
    asked("disk that moves", "idle", |cell| cell.disk.is_some_and(|disk| !disk.written)),
    asked("disk that moves", "written as fast as it goes", |cell| cell.disk.is_some_and(|disk| disk.written)),
];

/// Without disks: 3 guests, 3 contents and 3 links, idle or in 4 rates of 3 patterns.
const PRODUCT: usize = 3 * 3 * 3 * (1 + 4 * 3);

const LEFT_OUT: &str = "\
What is left out, and why:

- Dirtying on an unshaped link: it has no rate to be a part of. 150 % and 400 % of 10 Gbit/s: an emulated guest cannot write as much. It cannot write four
  times 1 Gbit/s of incompressible pages either, so that is measured of 200 Mbit/s.
- Most sizes and contents together with dirtying: a migration sends what is there once, which the idle cells show by size and by content, and then what is
  written again, which does not depend on what lies beside it. One cell each, with 512 MiB and with 4 GiB, would show it if that were wrong.
- 4 GiB on a link of 1 Gbit/s: minutes for each migration, for what 1 GiB shows in a quarter of the time.
- Disks together with busy memory, several disks, and images of other formats than raw: they move by the same ways, and are tested, not timed.
";

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
    for Asked { what, value, has } in &ASKED {
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
    cells.iter().map(|cell| cell.name).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contender::Contender;

    #[test]
    fn every_value_that_was_asked_for_has_its_cell() {
        let cells = Cell::all();
        for Asked { what, value, has } in &ASKED {
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
        let text = section(&[crate::goals::tests::record("idle-512m", &[(Contender::VMIRROR, 1.0)])]);
        assert!(text.contains("| guest | 512 MiB | idle-512m |"), "{text}");
        assert!(text.contains("| guest | 4 GiB | *not measured:* idle-4g, counters-25-4g |"), "{text}");
        assert!(text.contains("not measured here: idle, idle-4g, "), "{text}");
    }
}
