//! What was found, kept on disk as it comes, and the table of it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hasher as _};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use testbed::Programs;

use super::cell::{Cell, Fault, Kind, points};
use super::judge::{Outcome, Run};

/// The runs of one seed.
#[derive(Debug)]
pub struct Results {
    file: PathBuf,
    runs: Mutex<Vec<Run>>,
}

impl Results {
    /// Those in this directory: of a matrix that was interrupted, what was found before. Of the program as it is built now, for what
    /// another one does says nothing of this one.
    ///
    /// # Panics
    /// If they cannot be read or kept.
    #[must_use]
    pub fn open(directory: &Path, seed: u64) -> Results {
        fs::create_dir_all(directory).unwrap();
        let mut program = DefaultHasher::new();
        program.write(&fs::read(Programs::find().vmirror.unwrap()).unwrap());
        let file = directory.join(format!("{seed}-{:016x}.jsonl", program.finish()));
        let text = fs::read_to_string(&file).unwrap_or_default();
        let mut runs = Vec::<Run>::new();
        // A line that was being written is none; of a cell that was run again the last one counts.
        for run in text.lines().filter_map(|line| serde_json::from_str::<Run>(line).ok()) {
            runs.retain(|other| other.cell != run.cell);
            runs.push(run);
        }
        Results { file, runs: Mutex::new(runs) }
    }

    /// The cells that were run.
    #[must_use]
    pub fn runs(&self) -> Vec<Run> {
        self.runs.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether there is nothing more to find out about a cell.
    #[must_use]
    pub fn has(&self, cell: &Cell) -> bool {
        let name = cell.to_string();
        self.runs().iter().any(|run| run.cell == name && run.outcome == Outcome::Ok)
    }

    /// Keeps one.
    ///
    /// # Panics
    /// If it cannot be kept.
    pub fn add(&self, run: Run) {
        let mut runs = self.runs.lock().unwrap_or_else(PoisonError::into_inner);
        let mut file = File::options().create(true).append(true).open(&self.file).unwrap();
        writeln!(file, "{}", serde_json::to_string(&run).unwrap()).unwrap();
        runs.retain(|other| other.cell != run.cell);
        runs.push(run);
    }

    /// The document.
    #[must_use]
    pub fn document(&self, seed: u64) -> String {
        let runs = self.runs();
        let mut text = String::from(HEAD);
        let said = |program: &str, arguments: &[&str]| {
            let output = Command::new(program).args(arguments).output();
            let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
            text.unwrap_or_default().lines().next().unwrap_or_default().to_owned()
        };
        let qemu = Programs::find().qemu;
        let _ = writeln!(
            text,
            "Made on {} by `make matrix`, seed {seed}, {}, Linux {}.\n",
            said("date", &["-u", "+%F"]),
            said(&qemu.to_string_lossy(), &["--version"]),
            said("uname", &["-r"]),
        );
        let _ = writeln!(text, "## All\n\n{COLUMNS}\n{}", row("all", runs.iter()));
        for (kind, title) in [
            (Kind::Diskless, "Without a disk"),
            (Kind::Disk, "With a mirrored disk"),
            (Kind::PostCopy, "By post-copy"),
            (Kind::Private, "With private memory, as its user has started it"),
        ] {
            let of_kind: Vec<&Run> =
                runs.iter().filter(|run| run.cell.starts_with(&format!("{}/", kind.name()))).collect();
            if of_kind.is_empty() {
                continue;
            }
            let part = |run: &Run, place: usize, name: &str| run.cell.split('/').nth(place) == Some(name);
            let _ = writeln!(text, "## {title}\n\n{COLUMNS}");
            for fault in Fault::ALL {
                let of_fault = of_kind.iter().copied().filter(|run| part(run, 1, fault.name()));
                text.push_str(&row(fault.name(), of_fault));
            }
            let _ = writeln!(text, "\n{COLUMNS}");
            for point in points() {
                let of_point = of_kind.iter().copied().filter(|run| part(run, 2, point.name()));
                text.push_str(&row(point.name(), of_point));
            }
            let _ = writeln!(
                text,
                "\nOutcome of each fault at each point, there and back:\n\n{}",
                grid(&of_kind)
            );
        }
        let rules = runs.iter().filter_map(|run| run.rule.as_deref());
        let mut counted = BTreeMap::<&str, usize>::new();
        for rule in rules {
            *counted.entry(rule).or_default() += 1;
        }
        if !counted.is_empty() {
            text.push_str("## Lost with what was ended\n\n| rule | runs |\n| --- | --- |\n");
            for (rule, count) in counted {
                let _ = writeln!(text, "| {rule} | {count} |");
            }
        }
        let bad: Vec<&Run> = runs.iter().filter(|run| run.outcome != Outcome::Ok).collect();
        if !bad.is_empty() {
            text.push_str("\n## Not as promised\n\n");
            for run in bad {
                let detail: String = run.detail.chars().filter(|c| *c != '\n').take(300).collect();
                let _ = writeln!(text, "- `{}`: {:?}: {detail}", run.cell, run.outcome);
            }
        }
        text
    }
}

const HEAD: &str = "# Faults as a matrix

Without a disk every fault is done at every point of a migration, in both directions; with a mirrored disk, by post-copy, and with private memory, one in four of
these: each phase, and twelve points within the switch-over
(`crates/session/src/points.rs`), at which the agent is held until the fault has struck. Then what was killed is started again, as a service manager would, what
was cut is mended, and when all has settled it is judged who has run the guest, from outside by the CPU time of QEMU's threads on both hosts; whether the
guest has lost anything, by its own check of its memory and disk, asked for over its network; and what either host holds beside
what it should: processes, sockets, interfaces, descriptors, files in its run and RAM directories.

- **doubled**: both hosts have run the guest, at the same time or one after the other.
- **lost**: nobody has it, though what was ended did not take it along; or it has lost of its memory or disk.
- **leaks**: something is left over.
- **stuck**: it runs nowhere, and nothing leads out of that; or it cannot be reached.
- **by rule**: of those that are ok, the guest was lost with what was ended, as the table \"Crash by crash\" of [protocol.md](protocol.md#crash-by-crash) says.
- **by a person**: of those that are ok, somebody had to decide as [operations.md](operations.md#uncertain-vms) says.
- **longest**: time to settle, from when everything was put right, in seconds.

A cell is run again by its name: `make matrix CELL=diskless/kill-source-agent/handed-over/there`.

";

const COLUMNS: &str = "| | runs | ok | doubled | lost | leaks | stuck | by rule | by a person | longest |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |";

fn row<'a>(name: &str, runs: impl Iterator<Item = &'a Run>) -> String {
    let runs: Vec<&Run> = runs.collect();
    let count = |outcomes: &[Outcome]| runs.iter().filter(|run| outcomes.contains(&run.outcome)).count();
    let longest = runs.iter().map(|run| run.settled_ms).max().unwrap_or_default();
    format!(
        "| {name} | {} | {} | {} | {} | {} | {} | {} | {} | {:.1} |\n",
        runs.len(),
        count(&[Outcome::Ok]),
        count(&[Outcome::Doubled]),
        count(&[Outcome::Lost, Outcome::Damaged]),
        count(&[Outcome::Leak]),
        count(&[Outcome::Stuck]),
        runs.iter().filter(|run| run.rule.is_some()).count(),
        runs.iter().filter(|run| run.person).count(),
        longest as f64 / 1e3,
    )
}

/// A letter for each run: what it came to.
fn grid(runs: &[&Run]) -> String {
    let of = |cell: &str| runs.iter().find(|run| run.cell == cell);
    let kind = runs[0].cell.split('/').next().unwrap_or_default();
    let mut text = String::from("| |");
    for point in points() {
        let _ = write!(text, " {} |", point.name());
    }
    text.push_str("\n| --- |");
    text.push_str(&" --- |".repeat(points().len()));
    text.push('\n');
    for fault in Fault::ALL {
        let _ = write!(text, "| {} |", fault.name());
        for point in points() {
            let letters = ["there", "back"].map(|direction| {
                match of(&format!("{kind}/{}/{}/{direction}", fault.name(), point.name())) {
                    None => "·",
                    Some(run) => match run.outcome {
                        Outcome::Ok if run.rule.is_some() => "r",
                        Outcome::Ok => "✓",
                        Outcome::Doubled => "**2**",
                        Outcome::Lost => "**0**",
                        Outcome::Damaged => "**d**",
                        Outcome::Leak => "**l**",
                        Outcome::Stuck => "**s**",
                    },
                }
            });
            let _ = write!(text, " {} |", letters.concat());
        }
        text.push('\n');
    }
    text.push_str("\n✓ ok, r ok by rule, 2 doubled, 0 lost, d damaged, l leak, s stuck, · not run.\n");
    text
}
