//! The results as a document, in Markdown.

use std::fmt::Write as _;

use readable::{count, measured_ms as ms};

use crate::cell::Cell;
use crate::contender::Contender;
use crate::coverage;
use crate::goals::Goal;
use crate::measure::Spread;
use crate::record::Sample;
use crate::results::Results;
use crate::throughput::Throughput;
use crate::trial::{CellRecord, Sitting, Trial};

/// A figure that is plotted.
#[derive(Clone, Copy, Debug)]
pub struct PlottedFigure {
    /// Name of its file, without the ending.
    pub file: &'static str,
    /// What it is, with its unit.
    pub name: &'static str,
    /// Its value.
    pub value: fn(&Cell, &Sample) -> Option<f64>,
}

/// All that are plotted.
pub(crate) const FIGURES: [PlottedFigure; 5] = [
    PlottedFigure { file: "downtime", name: "downtime, ms", value: |_, sample| Some(sample.downtime_ms) },
    PlottedFigure { file: "gap", name: "longest heartbeat gap, ms", value: |_, sample| sample.gap_ms() },
    PlottedFigure { file: "total", name: "total time, s", value: |_, sample| Some(sample.total_ms / 1e3) },
    PlottedFigure {
        file: "bytes",
        name: "bytes on the link, MiB",
        value: |_, sample| Some(sample.link_bytes? as f64 / f64::from(1 << 20)),
    },
    PlottedFigure {
        file: "cpu",
        name: "CPU time of both sides, s per GiB of RAM",
        value: |cell, sample| Some(sample.cpu_ms() / 1e3 / gib(cell)),
    },
];

fn gib(cell: &Cell) -> f64 {
    cell.memory_mib as f64 / 1024.0
}

/// The document.
pub(crate) fn document(results: &Results) -> String {
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
    for figure in FIGURES {
        let _ = writeln!(text, "![{0}](benchmarks/{1}.svg)\n", figure.name, figure.file);
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

/// Contenders that were tried in a cell, in their usual order.
pub(crate) fn tried(cell: &CellRecord) -> impl Iterator<Item = Contender> {
    Contender::ALL.into_iter().filter(|contender| cell.by(*contender).next().is_some())
}

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
    for contender in tried(cell) {
        let mut values = row(cell, contender, columns);
        values.resize(columns.len() + 2, String::new());
        if cell.cell.disk.is_none() {
            let most = cell.by(contender).filter_map(|trial| trial.overhead_bytes).max();
            values.push(most.map_or_else(|| "-".to_owned(), |most| bytes(most as f64)));
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

/// A column of a cell's table: its head, what it shows of a migration, and how.
type Column = (&'static str, fn(&Cell, &Sample) -> Option<f64>, fn(f64) -> String);

const OF_MEMORY: [Column; 7] = [
    ("downtime", |_, sample| Some(sample.downtime_ms), ms),
    ("gap", |_, sample| sample.gap_ms(), ms),
    ("total", |_, sample| Some(sample.total_ms), ms),
    ("on the link", |_, sample| Some(sample.link_bytes? as f64), bytes),
    ("own count", |_, sample| Some(sample.sent_bytes as f64), bytes),
    ("CPU source, s/GiB", |cell, sample| Some(sample.cpu_source_ms / (1e3 * gib(cell))), seconds),
    ("CPU destination, s/GiB", |cell, sample| Some(sample.cpu_destination_ms / (1e3 * gib(cell))), seconds),
];

const OF_DISKS: [Column; 9] = [
    ("copying", |_, sample| Some(sample.disk?.took_ms()), ms),
    ("running there", |_, sample| Some(sample.until_running_ms), ms),
    ("total", |_, sample| Some(sample.total_ms), ms),
    ("on the link", |_, sample| Some(sample.link_bytes? as f64), bytes),
    ("CPU source, s", |_, sample| Some(sample.cpu_source_ms / 1e3), seconds),
    ("CPU destination, s", |_, sample| Some(sample.cpu_destination_ms / 1e3), seconds),
    ("downtime", |_, sample| Some(sample.downtime_ms), ms),
    ("disk, of it", |_, sample| crate::goals::pause_of_disks(sample), ms),
    ("gap", |_, sample| sample.gap_ms(), ms),
];

fn bytes(bytes: f64) -> String {
    readable::bytes(bytes as u64)
}

fn seconds(seconds: f64) -> String {
    format!("{seconds:.2}")
}

/// A contender's name and figures, or why it has none.
fn row(cell: &CellRecord, contender: Contender, columns: &[Column]) -> Vec<String> {
    let trials: Vec<&Trial> = cell.by(contender).collect();
    let samples: Vec<&Sample> = cell.samples(contender).collect();
    let name = match row_of(&trials, &samples, contender) {
        Ok(name) => name,
        Err(missed) => return vec![contender.name(), missed],
    };
    let mut row = vec![name];
    for (_, value, show) in columns {
        row.push(spread(Spread::of(samples.iter().filter_map(|sample| value(&cell.cell, sample))), *show));
    }
    let median = |value: &dyn Fn(&Throughput) -> Option<f64>, show: fn(f64) -> String| {
        let speeds = Spread::of(trials.iter().filter_map(|trial| value(&trial.throughput)));
        speeds.map_or_else(|| "-".to_owned(), |speeds| show(speeds.median))
    };
    row.push(if cell.cell.disk.is_some() {
        let speeds: [fn(&Throughput) -> Option<f64>; 4] =
            [|speed| speed.before, |speed| speed.during, |speed| speed.copied, |speed| speed.after];
        speeds.map(|speed| median(&speed, |blocks| count(blocks.round() as u64))).join(" / ")
    } else {
        let speeds: [fn(&Throughput) -> Option<f64>; 2] = [|speed| speed.during, |speed| speed.after];
        let part = |value: fn(&Throughput) -> Option<f64>| {
            let part = move |speed: &Throughput| {
                Some(value(speed)? / speed.before.filter(|before| *before > 0.0)? * 100.0)
            };
            median(&part, |percent| format!("{percent:.0} %"))
        };
        speeds.map(part).join(" / ")
    });
    row
}

/// How a contender's row begins, or why it has no figures.
fn row_of(trials: &[&Trial], samples: &[&Sample], contender: Contender) -> Result<String, String> {
    let missed = trials.iter().find_map(|trial| trial.miss.as_ref()).map(ToString::to_string);
    let name = contender.name();
    if samples.is_empty() {
        return Err(missed.unwrap_or_default());
    }
    Ok(match missed {
        Some(missed) => {
            let [done, tried] = [samples.len(), trials.len()].map(|number| count(number as u64));
            format!("{name} ({done} of {tried}; then: {missed})")
        }
        None => name,
    })
}

fn spread(spread: Option<Spread>, unit: fn(f64) -> String) -> String {
    match spread {
        None => "-".to_owned(),
        Some(Spread { median, count: 1, .. }) => unit(median),
        Some(Spread { median, least, most, .. }) => {
            format!("{} ({} to {})", unit(median), unit(least), unit(most))
        }
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
    fn a_cell_of_another_machine_says_so() {
        let mut results = results();
        results.surroundings.qemu = "10.0".into();
        results.surroundings.load = "7".into();
        assert!(document(&results).contains("Not like the others"));
    }
}
