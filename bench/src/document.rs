//! The results as a document, in Markdown.

mod disk;

use std::fmt::Write as _;

use crate::cell::Cell;
use crate::contender::Contender;
use crate::coverage;
use crate::goals::Goal;
use crate::measure::Spread;
use crate::number::{bytes, count, ms};
use crate::record::Sample;
use crate::results::Results;
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
    PlottedFigure {
        file: "gap",
        name: "longest heartbeat gap, ms",
        value: |_, sample| sample.heartbeats.and_then(|beats| beats.gap_ms()),
    },
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
        let known = WHY_NOT.iter().find(|(case, _)| goal.case.starts_with(case));
        let why = known.map_or("not known yet.", |(_, why)| why);
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

/// Why goals are not reached, as far as that was found out: the beginning of a case, and the reason.
const WHY_NOT: [(&str, &str); 6] = [
    (
        "heartbeat gap",
        "a guest that is only paused for 11 ms, and not moved, is heard again 1 to 2 ms later. One that was moved by QEMU's own engine is not for 38 \
         ms beyond its downtime, and here for 36 ms with `--verify gate` and 41 ms with the proof, which shares two cores with it (medians of 8 each, \
         in turns): the guest is emulated, and its new QEMU has none of its code translated. With hardware virtualisation, which was not to be had, \
         it has not been measured. The frames of that time come late; none is lost.",
    ),
    (
        "bytes, Debian userland",
        "both hosts are one machine of two cores here, and the workers that compress share them with the receivers and an emulated guest. \
     Where CPU time holds up, level 1 of Zstandard moves the guest soonest, which is what `--compress auto` is for. With level 3 \
     throughout (`--compress zstd`) it was 159.8 MiB, 0.895. What was tried stands in [decision 0022](decisions/0022-streams-and-workers-overlap.md).",
    ),
    (
        "disk of 4 GiB, unshaped",
        "both hosts share two CPUs here, which are nearly all the time busy. QEMU's mirror neither encrypts nor hashes nor proves, and takes 2.5 s of \
         CPU for both sides together; vmirror takes 4.7 s, of it at the source 1.9 s for compressing, hashing and encrypting. It was 2.35 of \
         QEMU's time before copies were written around the page cache ([decision 0032](decisions/0032-copies-go-around-the-page-cache.md)).",
    ),
    (
        "bytes, disk half incompressible",
        "half of the content cannot be made smaller, and a quarter of the other half is left of that: 0.63 is what there is to be had.",
    ),
    (
        "downtime with a disk that is written",
        "what takes that time has not been found out. It is not what waits to be sent when the pause begins: less than 5 % of the downtime asked \
         for waits then, and when 8 MiB could it was the same.",
    ),
    (
        "downtime with a disk at rest",
        "the disk's own part of the pause is 3 ms. The rest comes later in it: until the destination is ready, and from the hand-over until \
         the machine runs. What takes that time has not been found out; in all it was 5 to 8 ms more in three sittings.",
    ),
];

const EXPLAINED: &str = "
## Cells

*Downtime*: from the guest's STOP at the source until it runs at the destination, both on the same clock. *Gap*: the longest time without an answer to 1,000
heartbeats per second, seen by a client on the guests' network. *Total*: vmirror's from the command to the end of clean-up and health watch, the start of the
destination's QEMU, encryption and proof included; QEMU's `total-time`, its destination being started before, until the source has sent everything: the guest may run there later. *On the link*: what left the source through its link,
counted by its network interface. *Own count*: vmirror's bytes of memory before encryption, QEMU's `transferred`. *CPU*: seconds for each GiB of guest RAM; vmirror's
of an agent, all that it does, QEMU's of its sending or loading threads. *Guest*: the speed of its workload while it is mirrored, and when it runs at the destination,
of what it was before. *Memory*: the most that was taken, on the side that took more: by an agent beyond what it has when idle; by a process of QEMU beyond the
guest's RAM and what it had before, an estimate from below that has translated code in it where guests are emulated.

Cells whose name begins with `disk` and that have one move a raw image with the guest, of each host's own file system, opened around the page cache
(`cache=none`), to where there is nothing yet. QEMU's contender is what libvirt does for storage that is not shared: `nbd-server-start` and a writable export at the
destination, of an image that was made before, `blockdev-add` and `blockdev-mirror` with `sync=full` and `copy-mode=write-blocking` at the source, and once that is ready its
own pre-copy without a limit of bandwidth, in whose pause the job ends (`pause-before-switchover`). **Nothing of QEMU's is encrypted there; everything of vmirror's
is**, and it is hashed and proved as well. *Copying* is from its beginning until everything was copied once. *Total* is from the command on for both; QEMU's ends when the
guest runs there. *Running there* leaves out what comes after that. *CPU* has in it, for both, all threads of QEMU that do not run the guest, the writes of a busy
guest included; vmirror's destination QEMU from its start on. A disk that is written stays mirrored for four seconds once it is copied; the guest's speed stands there
for both parts of it, and is of blocks of 4096 bytes written at random, four at once, around the guest's page cache.

";

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
    if cell.cell.disk.is_some() {
        return text + &disk::table(cell) + "\n";
    }
    text += "| | downtime | gap | total | on the link | own count | CPU source, s/GiB | CPU destination, s/GiB | guest, during / after | \
             memory |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n";
    for contender in tried(cell) {
        text += &row(cell, contender);
    }
    text + "\n"
}

fn row(cell: &CellRecord, contender: Contender) -> String {
    let trials: Vec<&Trial> = cell.by(contender).collect();
    let samples: Vec<&Sample> = cell.samples(contender).collect();
    let memory = trials.iter().filter_map(|trial| trial.overhead_bytes).max();
    let memory = memory.map_or_else(|| "-".to_owned(), |memory| bytes(memory as f64));
    let name = match row_of(&trials, &samples, contender) {
        Ok(name) => name,
        Err(missed) => return format!("| {} | {missed} | | | | | | | | {memory} |\n", contender.name()),
    };
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
    let seconds = |seconds: f64| format!("{seconds:.2}");
    let per_gib = 1e3 * gib(&cell.cell);
    format!(
        "| {name} | {} | {} | {} | {} | {} | {} | {} | {} / {} | {memory} |\n",
        show(&|sample| Some(sample.downtime_ms), ms),
        show(&|sample| sample.heartbeats.and_then(|beats| beats.gap_ms()), ms),
        show(&|sample| Some(sample.total_ms), ms),
        show(&|sample| Some(sample.link_bytes? as f64), bytes),
        show(&|sample| Some(sample.sent_bytes as f64), bytes),
        show(&|sample| Some(sample.cpu_source_ms / per_gib), seconds),
        show(&|sample| Some(sample.cpu_destination_ms / per_gib), seconds),
        speed(|trial| trial.throughput.during),
        speed(|trial| trial.throughput.after),
    )
}

/// How a contender's row begins, or why it has no figures.
fn row_of(trials: &[&Trial], samples: &[&Sample], contender: Contender) -> Result<String, String> {
    let missed = trials.iter().find_map(|trial| trial.miss.as_ref()).map(crate::present::missed);
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
        results.left_out = vec!["idle-4g"];
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
