//! The results as a document, in Markdown.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use readable::{count, measured_ms as ms};

use crate::cell::Cell;
use crate::contender::Contender;
use crate::error::BenchError;
use crate::goals::Goal;
use crate::measure::{Spread, bytes};
use crate::outcome::{self, CellRecord, Sitting};
use crate::plot;
use crate::record::{Measure, Sample};
use crate::results::Results;
use crate::throughput::Throughput;
use crate::{coverage, file};

/// Writes the document `benchmarks.md`, and beside it in `benchmarks/` the plots and `results.json`.
pub fn write(results: &Results, directory: &Path) -> Result<PathBuf, BenchError> {
    let json = results.write(directory)?;
    for plotted in plot::ALL {
        let path = json.with_file_name(format!("{}.svg", plotted.0));
        file::write(&path, &plot::dots(plotted, &results.cells)?)?;
    }
    let path = directory.join("benchmarks.md");
    file::write(&path, &document(results))?;
    Ok(path)
}

fn document(results: &Results) -> String {
    let mut text = format!(
        "# Benchmarks\n\nMade by `{}`, begun {}, {:.0} minutes. Cells may be of several sittings; each says when it was measured, with \
         how many runs, and after how long a migration was given up as not converged. In each run every contender moves its guest \
         once, in turns whose order changes with each run. Figures are medians, with the smallest and the largest in brackets.\n\n\
         {} Load at the start {}.\n",
        results.command,
        results.started,
        results.took_ms / 6e4,
        results.surroundings.describe(),
        results.surroundings.load,
    );
    if !results.left_out.is_empty() {
        let names = results.left_out.join(", ");
        let _ = writeln!(text, "\n**Not tried, for want of time: {names}.**");
    }
    text += "\n## Goals\n\nA goal is reached only where vmirror made all its runs, each to its end, and its guest dirtied what \
             it was to dirty and found nothing wrong in itself afterwards.\n\n| case | goal | measured | |\n| --- | --- | --- | --- |\n";
    for Goal { case, goal, measured, reached } in &results.goals {
        let mark = match reached {
            Some(true) => "reached",
            Some(false) => "**not reached**",
            None => "-",
        };
        let _ = writeln!(text, "| {case} | {goal} | {measured} | {mark} |");
    }
    for goal in results.goals.iter().filter(|goal| goal.reached == Some(false)) {
        let mut known = WHY_NOT.lines().filter_map(|line| line.split_once(": "));
        let why =
            known.find(|(case, _)| goal.case.starts_with(case)).map_or("not known yet.", |(_, why)| why);
        let _ = writeln!(text, "\nWhy not: *{}*: {why}", goal.case);
    }
    text += "\n## Figures\n\n";
    for (file, name, ..) in plot::ALL {
        let _ = writeln!(text, "![{name}](benchmarks/{file}.svg)\n");
    }
    text += &coverage::section(&results.cells);
    text += EXPLAINED;
    for cell in &results.cells {
        text += &table(cell, results);
    }
    text
}

/// Why goals are not reached, as far as that was found out: in each line the beginning of a case, and the reason.
const WHY_NOT: &str = include_str!("document/why-not.txt");
/// What the cells' tables say.
const EXPLAINED: &str = include_str!("document/explained.md");

fn sitting(sitting: &Sitting, results: &Results) -> String {
    let Sitting { started, runs, patience_s, surroundings, .. } = sitting;
    let elsewhere = if surroundings.same(&results.surroundings) {
        String::new()
    } else {
        format!(" Not like the others: {}", surroundings.describe())
    };
    format!(
        "Measured {started}, {runs} run{}, given up after {patience_s} s, load {}.{elsewhere}",
        if *runs == 1 { "" } else { "s" },
        surroundings.load
    )
}

fn table(cell: &CellRecord, results: &Results) -> String {
    let mut text = format!("### {}\n\n{}", cell.cell.name, cell.description);
    if let Some(dirtied) = cell.dirtied.filter(|dirtied| *dirtied > 0.0) {
        let _ = write!(text, "; it really dirties {} per second", bytes(dirtied));
    }
    if let Some(gap) = cell.unmigrated.and_then(|beats| beats.gap_ms()) {
        let _ = write!(text, "; not migrated, the longest heartbeat gap is {}", ms(gap));
    }
    let _ = writeln!(text, ". {}\n", sitting(&cell.sitting, results));
    if let Some(why) = &cell.skipped {
        return text + &format!("**Skipped: {why}**\n\n");
    }
    if let Some(failure) = &cell.failure {
        let _ = writeln!(text, "**It did not come to its end: {failure}**\n");
    }
    let (columns, work) = match cell.cell.disk {
        Some(_) => (&OF_DISKS[..], "blocks written per second: before / copying / copied / after"),
        None => (&OF_MEMORY[..], "guest, during / after"),
    };
    let mut heads: Vec<&str> = [""].into_iter().chain(columns.iter().map(|column| column.0)).collect();
    heads.push(work);
    heads.extend(cell.cell.disk.is_none().then_some("memory"));
    text += &line(&heads);
    text += &line(&vec!["---"; heads.len()]);
    for contender in outcome::tried(std::slice::from_ref(cell)) {
        let mut values = row(cell, contender, columns);
        values.resize(columns.len() + 2, String::new());
        if cell.cell.disk.is_none() {
            values.push(cell.most_overhead(contender).map_or_else(|| "-".to_owned(), readable::bytes));
        }
        text += &line(&values);
    }
    text + "\n"
}

/// A line of a table.
fn line<T: AsRef<str>>(cells: &[T]) -> String {
    let cell = |text: &str| if text.is_empty() { " |".to_owned() } else { format!(" {text} |") };
    format!("|{}\n", cells.iter().map(|text| cell(text.as_ref())).collect::<String>())
}

/// A column of a cell's table: its head, what it shows of migrations, and how.
type Column = (&'static str, Measure, fn(&Cell, f64) -> String);

const TIME: fn(&Cell, f64) -> String = |_, time| ms(time);
const BYTES: fn(&Cell, f64) -> String = |_, number| bytes(number);
const SECONDS: fn(&Cell, f64) -> String = |_, time| format!("{:.2}", time / 1e3);
const PER_GIB: fn(&Cell, f64) -> String = |cell, time| format!("{:.2}", time / 1e3 / cell.gib());

const OF_MEMORY: [Column; 7] = [
    ("downtime", Sample::DOWNTIME, TIME),
    ("gap", Sample::GAP, TIME),
    ("total", Sample::TOTAL, TIME),
    ("on the link", Sample::LINK_BYTES, BYTES),
    ("own count", Sample::SENT_BYTES, BYTES),
    ("CPU source, s/GiB", Sample::CPU_SOURCE, PER_GIB),
    ("CPU destination, s/GiB", Sample::CPU_DESTINATION, PER_GIB),
];

const OF_DISKS: [Column; 9] = [
    ("copying", Sample::COPYING, TIME),
    ("running there", Sample::UNTIL_RUNNING, TIME),
    ("total", Sample::TOTAL, TIME),
    ("on the link", Sample::LINK_BYTES, BYTES),
    ("CPU source, s", Sample::CPU_SOURCE, SECONDS),
    ("CPU destination, s", Sample::CPU_DESTINATION, SECONDS),
    ("downtime", Sample::DOWNTIME, TIME),
    ("disk, of it", Sample::PAUSE_OF_DISKS, TIME),
    ("gap", Sample::GAP, TIME),
];

/// A contender's name and figures, or why it has none.
fn row(cell: &CellRecord, contender: Contender, columns: &[Column]) -> Vec<String> {
    let name = match name_of(cell, contender) {
        Ok(name) => name,
        Err(missed) => return vec![contender.name(), missed],
    };
    let figure = |(_, measure, show): &Column| {
        let show = |number| show(&cell.cell, number);
        match cell.spread(contender, measure) {
            None => "-".to_owned(),
            Some(Spread { median, count: 1, .. }) => show(median),
            Some(Spread { median, least, most, .. }) => {
                format!("{} ({} to {})", show(median), show(least), show(most))
            }
        }
    };
    let speed = |value: &dyn Fn(&Throughput) -> Option<f64>, show: fn(f64) -> String| {
        cell.speed(contender, value).map_or_else(|| "-".to_owned(), show)
    };
    let work = if cell.cell.disk.is_some() {
        let speeds: [fn(&Throughput) -> Option<f64>; 4] =
            [|speed| speed.before, |speed| speed.during, |speed| speed.copied, |speed| speed.after];
        speeds.map(|value| speed(&value, |blocks| count(blocks.round() as u64))).join(" / ")
    } else {
        let speeds: [fn(&Throughput) -> Option<f64>; 2] = [|speed| speed.during, |speed| speed.after];
        let part = |value: fn(&Throughput) -> Option<f64>| {
            let part = move |speed: &Throughput| speed.part(value(speed)?);
            speed(&part, |part| format!("{:.0} %", part * 100.0))
        };
        speeds.map(part).join(" / ")
    };
    [name].into_iter().chain(columns.iter().map(figure)).chain([work]).collect()
}

/// How a contender's row begins, or why it has no figures.
fn name_of(cell: &CellRecord, contender: Contender) -> Result<String, String> {
    let missed = cell.missed(contender).map(ToString::to_string);
    let [done, tried] = [cell.samples(contender).count(), cell.by(contender).count()];
    match missed {
        missed if done == 0 => Err(missed.unwrap_or_default()),
        Some(missed) => {
            let [done, tried] = [done, tried].map(|number| count(number as u64));
            Ok(format!("{} ({done} of {tried}; then: {missed})", contender.name()))
        }
        None => Ok(contender.name()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::tests::results;

    #[test]
    fn the_document_tells_who_did_not_come_to_an_end() {
        let mut results = results();
        results.left_out = vec!["idle-4g".into()];
        results.judge();
        let text = document(&results);
        for part in [
            "| vmirror, TLS | 8.50 ms (8.00 ms to 9.00 ms) | ",
            "| QEMU, defaults | not converged in 60.00 s | | | | | | | | 100.0 MiB |",
            "| idle, unshaped | downtime ≤ 10 ms, ≤ 0.4 of QEMU's default | 8.50 ms; QEMU: not converged in 60.00 s; 2 of 2 runs | \
             reached |",
            "| 0.70 (0.70 to 0.70) | 0.70 (0.70 to 0.70) |",
            "| 310.0 MiB (310.0 MiB to 310.0 MiB) | 300.0 MiB (300.0 MiB to 300.0 MiB) |",
            "Measured today, 2 runs, given up after 60 s",
            "**Not tried, for want of time: idle-4g.**",
            "![downtime, ms](benchmarks/downtime.svg)",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert!(!text.contains("Not like the others"));
    }

    #[test]
    fn a_goal_that_is_not_reached_says_why() {
        let mut results = results();
        results.judge();
        assert!(!document(&results).contains("Why not"));
        let bytes = results.goals.iter_mut().find(|goal| goal.case.starts_with("bytes")).unwrap();
        bytes.reached = Some(false);
        assert!(document(&results).contains("Why not: *bytes, Debian userland, 1 Gbit/s*: both hosts"));
    }

    #[test]
    fn a_cell_that_was_skipped_says_why() {
        let mut results = results();
        results.cells[0].skipped = Some("no network".into());
        assert!(document(&results).contains("\n\n**Skipped: no network**\n"));
    }

    #[test]
    fn a_cell_of_another_machine_says_so() {
        let mut results = results();
        results.surroundings.qemu = "10.0".into();
        results.surroundings.load = "7".into();
        assert!(document(&results).contains("Not like the others"));
    }
}
