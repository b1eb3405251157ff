//! Everything that a run of the benchmark measured: what `results.json` holds, and the same as a document with plots.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::BenchError;
use crate::cell::Contender;
use crate::goals::{self, Goal};
use crate::measure::Spread;
use crate::number::{bytes, count, ms};
use crate::plot;
use crate::record::Sample;
use crate::surroundings::Surroundings;
use crate::trial::{CellRecord, Trial};

/// A run of the benchmark.
#[derive(Clone, Debug, Serialize)]
pub struct Results {
    /// When it began.
    pub started: String,
    /// How long it took, in milliseconds.
    pub took_ms: f64,
    /// The command.
    pub command: String,
    /// Migrations by each contender in each cell.
    pub runs: u32,
    /// How long one migration might take, in seconds.
    pub patience_s: u64,
    /// The machine and the programs.
    pub surroundings: Surroundings,
    /// The cells.
    pub cells: Vec<CellRecord>,
    /// The goals.
    pub goals: Vec<Goal>,
}

impl Results {
    /// Judges the goals by the cells.
    pub fn judge(&mut self) {
        self.goals = goals::of(&self.cells);
    }

    /// Whether there were cells to try, every one of them came to its end, and no guest found a page of its own wrong.
    #[must_use]
    pub fn succeeded(&self) -> bool {
        let mut tried = self.cells.iter().filter(|cell| cell.skipped.is_none()).peekable();
        tried.peek().is_some() && tried.all(|cell| cell.failure.is_none() && cell.faults == Some(0))
    }

    /// Writes the document `benchmarks.md`, and beside it in `benchmarks/` the plots and `results.json`.
    ///
    /// # Errors
    /// Where a file cannot be written.
    pub fn write(&self, directory: &Path) -> Result<PathBuf, BenchError> {
        let files = directory.join("benchmarks");
        fs::create_dir_all(&files).map_err(BenchError::file(&files))?;
        let write = |path: PathBuf, text: String| fs::write(&path, text).map_err(BenchError::file(&path));
        let json = serde_json::to_string_pretty(self)
            .map_err(|source| BenchError::Document { command: "the run".into(), source })?;
        write(files.join("results.json"), json + "\n")?;
        for figure in FIGURES {
            write(files.join(format!("{}.svg", figure.file)), plot::bars(figure, &self.cells)?)?;
        }
        let document = directory.join("benchmarks.md");
        write(document.clone(), self.document())?;
        Ok(document)
    }

    fn document(&self) -> String {
        let Surroundings { cpu, cpus, memory_mib, kernel, vmirror, qemu, load } = &self.surroundings;
        let mut text = format!(
            "# Benchmarks\n\nMade by `{}` on {}, in {:.0} minutes; {} runs for each contender in each cell, in turns, medians \
             with the smallest and the largest in brackets. Given up as not converged after {} s.\n\n{cpus} CPUs ({cpu}), \
             {memory_mib} MiB, Linux {kernel}, load {load} at the start; vmirror {vmirror}, QEMU {qemu}. Guests run under TCG: an \
             emulated vCPU shares the CPUs with whoever moves it.\n\n",
            self.command,
            self.started,
            self.took_ms / 6e4,
            self.runs,
            self.patience_s,
        );
        text += "## Goals\n\n| case | goal | measured | |\n| --- | --- | --- | --- |\n";
        for Goal { case, goal, measured, reached } in &self.goals {
            let mark = match reached {
                Some(true) => "reached",
                Some(false) => "**not reached**",
                None => "-",
            };
            let _ = writeln!(text, "| {case} | {goal} | {measured} | {mark} |");
        }
        text += "\n## Figures\n\n";
        for figure in FIGURES {
            let _ = writeln!(text, "![{0}](benchmarks/{1}.svg)\n", figure.name, figure.file);
        }
        text += EXPLAINED;
        for cell in &self.cells {
            text += &table(cell);
        }
        text
    }
}

const EXPLAINED: &str = "\
## Cells

*Downtime*: from the guest's STOP at the source until it runs at the destination, both on the same clock. *Gap*: the longest time without an answer to 1,000
heartbeats per second, seen by a client on the guests' network. *Total*: vmirror's from the command to the end of clean-up and health watch, the start of the
destination's QEMU, encryption and proof included; QEMU's `total-time`, its destination being started before. *CPU*: both sides, for each GiB of guest RAM; vmirror's of
both agents, all that they do, QEMU's of its sending and loading threads. *Guest*: the speed of its workload while it is mirrored, and when it runs at the destination, of what
it was before. *Memory*: what an agent takes at most beyond what it has when idle.

";

/// A figure that is plotted.
#[derive(Clone, Copy, Debug)]
pub struct PlottedFigure {
    /// Name of its file, without the ending.
    pub file: &'static str,
    /// What it is, with its unit.
    pub name: &'static str,
    /// Its value.
    pub value: fn(&Sample) -> Option<f64>,
}

const FIGURES: [PlottedFigure; 4] = [
    PlottedFigure { file: "downtime", name: "downtime, ms", value: |sample| Some(sample.downtime_ms) },
    PlottedFigure {
        file: "gap",
        name: "longest heartbeat gap, ms",
        value: |sample| sample.heartbeats.and_then(|beats| beats.gap_ms()),
    },
    PlottedFigure { file: "total", name: "total time, s", value: |sample| Some(sample.total_ms / 1e3) },
    PlottedFigure {
        file: "bytes",
        name: "memory sent, MiB",
        value: |sample| Some(sample.sent_bytes as f64 / f64::from(1 << 20)),
    },
];

/// Contenders that were tried in a cell, in their usual order.
pub(crate) fn tried(cell: &CellRecord) -> impl Iterator<Item = Contender> {
    Contender::ALL.into_iter().filter(|contender| cell.by(*contender).next().is_some())
}

fn table(cell: &CellRecord) -> String {
    let mut text = format!("### {}\n\n{}", cell.cell.name, cell.description);
    if let Some(dirtied) = cell.dirtied.filter(|dirtied| *dirtied > 0.0) {
        let _ = write!(text, "; it really dirties {} per second", bytes(dirtied));
    }
    if let Some(gap) = cell.unmigrated.and_then(|beats| beats.gap_ms()) {
        let _ = write!(text, "; not migrated, the longest heartbeat gap is {}", ms(gap));
    }
    text += ".\n\n";
    if let Some(why) = &cell.skipped {
        return text + &format!("**Skipped: {why}**\n\n");
    }
    if let Some(failure) = &cell.failure {
        let _ = writeln!(text, "**It did not come to its end: {failure}**\n");
    }
    text += "| | downtime | gap | total | sent | CPU per GiB | guest, during / after | memory |\n\
             | --- | --- | --- | --- | --- | --- | --- | --- |\n";
    let gib = cell.cell.memory_mib as f64 / 1024.0;
    for contender in tried(cell) {
        let trials: Vec<&Trial> = cell.by(contender).collect();
        let samples: Vec<&Sample> = cell.samples(contender).collect();
        let missed = trials.iter().find_map(|trial| trial.miss.as_ref()).map(crate::present::missed);
        if samples.is_empty() {
            let _ = writeln!(text, "| {} | {} | | | | | | |", contender.name(), missed.unwrap_or_default());
            continue;
        }
        let show = |value: &dyn Fn(&Sample) -> Option<f64>, unit: fn(f64) -> String| {
            spread(Spread::of(samples.iter().filter_map(|sample| value(sample))), unit)
        };
        let speed = |value: fn(&Trial) -> Option<f64>| {
            let parts = trials.iter().filter_map(|trial| {
                let before = trial.throughput.before.filter(|before| *before > 0.0)?;
                Some(value(trial)? / before * 100.0)
            });
            Spread::of(parts).map_or_else(|| "-".to_owned(), |spread| format!("{:.0} %", spread.median))
        };
        let memory = trials.iter().filter_map(|trial| trial.overhead_bytes).max();
        let mut name = contender.name();
        if samples.len() < trials.len() {
            let _ = write!(name, " ({} of {})", count(samples.len() as u64), count(trials.len() as u64));
        }
        let _ = writeln!(
            text,
            "| {name} | {} | {} | {} | {} | {} | {} / {} | {} |",
            show(&|sample| Some(sample.downtime_ms), ms),
            show(&|sample| sample.heartbeats.and_then(|beats| beats.gap_ms()), ms),
            show(&|sample| Some(sample.total_ms), ms),
            Spread::of(samples.iter().map(|sample| sample.sent_bytes as f64))
                .map_or_else(String::new, |spread| bytes(spread.median)),
            show(&|sample| Some(sample.cpu_ms() / gib), ms),
            speed(|trial| trial.throughput.during),
            speed(|trial| trial.throughput.after),
            memory.map_or_else(String::new, |memory| bytes(memory as f64)),
        );
    }
    text + "\n"
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
    use crate::record::{Method, Miss};

    fn results() -> Results {
        let default = Contender::plain(Method::QemuDefault);
        let mut cell = crate::goals::tests::record(
            "idle",
            &[(Contender::VMIRROR, 8.0), (Contender::VMIRROR, 9.0), (default, 40.0)],
        );
        let last = cell.trials.last_mut().unwrap();
        (last.sample, last.miss) = (None, Some(Miss::NotConverged { after_ms: 60_000.0 }));
        Results {
            started: "today".into(),
            took_ms: 120_000.0,
            command: "make bench".into(),
            runs: 2,
            patience_s: 60,
            surroundings: Surroundings::default(),
            cells: vec![cell],
            goals: Vec::new(),
        }
    }

    #[test]
    fn the_document_tells_who_did_not_come_to_an_end() {
        let mut results = results();
        results.judge();
        let text = results.document();
        for part in [
            "| vmirror, TLS | 8.50 ms (8.00 ms to 9.00 ms) | ",
            "| QEMU, defaults | not converged in 60.00 s | | | | | | |",
            "| idle, unshaped | downtime ≤ 10 ms, ≤ 0.4 of QEMU's default | 8.50 ms; QEMU: not converged in 60.00 s | reached |",
            "![downtime, ms](benchmarks/downtime.svg)",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }

    #[test]
    fn a_cell_that_was_skipped_says_why_and_fails_no_run_that_has_others() {
        let mut results = results();
        let mut skipped = crate::goals::tests::record("idle-debian", &[]);
        (skipped.skipped, skipped.faults) = (Some("no network".into()), None);
        results.cells.push(skipped);
        assert!(results.succeeded());
        assert!(results.document().contains("\n\n**Skipped: no network**\n"));
        results.cells.remove(0);
        assert!(!results.succeeded());
    }

    #[test]
    fn a_guest_with_a_wrong_page_fails_the_run() {
        let mut results = results();
        assert!(results.succeeded());
        results.cells[0].faults = Some(1);
        assert!(!results.succeeded());
        results.cells.clear();
        assert!(!results.succeeded());
    }
}
