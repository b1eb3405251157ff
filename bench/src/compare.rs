//! `make bench`: vmirror and QEMU's own migration, side by side.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use testbed::surroundings::Surroundings;

use crate::budget::{self, Budget};
use crate::cell::Cell;
use crate::contender::Contender;
use crate::error::BenchError;
use crate::narrator::Narrator;
use crate::outcome::Sitting;
use crate::results::{Kept, Results};
use crate::run::Run;
use crate::trial;
use crate::{document, file};

/// All of it takes hours; what follows has every goal and every cell.
const SITTINGS: &str = include_str!("compare/sittings.txt").trim_ascii_end();

/// Compares vmirror with QEMU's own migration
#[derive(Debug, Parser)]
#[command(name = "bench", max_term_width = 100, after_help = SITTINGS)]
struct Cli {
    /// The short form: few cells, few contenders, under ten minutes
    #[arg(long)]
    quick: bool,
    /// Only this cell; can be given again
    #[arg(long = "cell", value_name = "NAME", value_parser = cell_named)]
    cells: Vec<Cell>,
    /// Only this contender; can be given again. vmirror and those that a goal compares it with make a goal's figures
    #[arg(long = "contender", value_name = "NAME", value_parser = contender_named)]
    contenders: Vec<Contender>,
    /// Migrations by each contender in each cell [default: 5, or 3 with --quick]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: Option<u32>,
    /// After how many seconds a migration is given up as not converging [default: 300, or 30 with --quick]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(5..=86_400))]
    patience: Option<u64>,
    /// Begin no cell that would not be done so many minutes after the beginning [default: none, or 9 with --quick]
    #[arg(long, value_name = "MINUTES", value_parser = clap::value_parser!(u64).range(1..=10_000))]
    budget: Option<u64>,
    /// Where benchmarks.md and benchmarks/ go [default: target/bench, or target/bench-quick]. Cells that are there already stay as
    /// they are, but for those that are tried now: these are replaced, with all their contenders
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Keep no cells of earlier
    #[arg(long)]
    fresh: bool,
    /// List the cells and the contenders
    #[arg(long)]
    list: bool,
}

/// The budget of the short form: under ten minutes, with some to spare for a cell that takes longer than was guessed.
const QUICK_MINUTES: u64 = 9;

/// `make bench`.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    if cli.list {
        for cell in Cell::all() {
            println!("{:22}{}", cell.name, cell.describe());
        }
        println!();
        for contender in Contender::ALL {
            println!("{:22}{}", contender.key(), contender.name());
        }
        return ExitCode::SUCCESS;
    }
    Run::main(|run| compare(&cli, run))
}

fn cell_named(name: &str) -> Result<Cell, String> {
    let named = Cell::all().into_iter().find(|cell| cell.name == name);
    named.ok_or_else(|| "there is no such cell; `bench --list` lists them".to_owned())
}

fn contender_named(name: &str) -> Result<Contender, String> {
    let named = Contender::ALL.into_iter().find(|contender| contender.key() == name);
    named.ok_or_else(|| "there is no such contender; `bench --list` lists them".to_owned())
}

/// The cells to try, in their usual order.
fn chosen(cli: &Cli) -> Vec<Cell> {
    let fits =
        |cell: &Cell| if cli.cells.is_empty() { !cli.quick || cell.quick } else { cli.cells.contains(cell) };
    Cell::all().into_iter().filter(fits).collect()
}

/// How a cell is tried.
fn sitting(cli: &Cli, cell: &Cell, surroundings: &Surroundings) -> Sitting {
    let is_tried: &dyn Fn(&Contender) -> bool = match (cli.contenders.is_empty(), cli.quick) {
        (false, _) => &|contender| cli.contenders.contains(contender),
        (true, true) => &|contender| Contender::quick(cell).contains(contender),
        (true, false) => &|_| true,
    };
    let (runs, patience_s) = if cli.quick { (3, 30) } else { (5, 300) };
    Sitting {
        contenders: Contender::ALL.into_iter().filter(|one| one.fits(cell) && is_tried(one)).collect(),
        runs: cli.runs.unwrap_or(runs),
        patience_s: cli.patience.unwrap_or(patience_s),
        surroundings: surroundings.clone(),
        ..Sitting::default()
    }
}

fn compare(cli: &Cli, run: &Run) -> Result<bool, BenchError> {
    let cells = chosen(cli);
    let mut narrator = Narrator::new();
    let minutes = cli.budget.or(cli.quick.then_some(QUICK_MINUTES));
    let mut budget = Budget::new(minutes.map(|minutes| Duration::from_secs(minutes * 60)));
    let target = testbed::programs::target();
    let usual = target.join(if cli.quick { "bench-quick" } else { "bench" });
    let directory = cli.out.clone().unwrap_or(usual);
    let kept = if cli.fresh { Kept::default() } else { Kept::read(&directory)? };
    if !kept.dropped.is_empty() {
        println!("not kept, being other cells now or recorded otherwise: {}\n", kept.dropped.join(", "));
    }
    let surroundings = Surroundings::find(&testbed::Programs::find());
    let words: Vec<String> = std::env::args().skip(1).collect();
    let mut results = Results {
        started: jiff::Zoned::now().strftime("%Y-%m-%d %H:%M %Z").to_string(),
        command: format!("bench {}", words.join(" ")).trim_end().to_owned(),
        surroundings: surroundings.clone(),
        engine: file::read(&target.join(micro::FILE))?,
        cells: kept.cells,
        ..Results::default()
    };
    let sitting = |cell: &Cell| sitting(cli, cell, &surroundings);
    let all: Duration = cells.iter().map(|cell| budget::estimate(cell, &sitting(cell))).sum();
    narrator.step(&format!("{} cells, about {:.0} minutes", cells.len(), all.as_secs_f64() / 60.0));
    let mut document = None;
    let mut tried = Vec::new();
    for cell in &cells {
        let sitting = sitting(cell);
        if !budget.has_room_for(cell, &sitting) {
            narrator.step(&format!("{}: left out, there is no time for it", cell.name));
            results.left_out.push(cell.name.clone());
        } else {
            let record = trial::run(cell, &sitting, run, &mut narrator)?;
            budget.learn(cell, &sitting, Duration::from_secs_f64(record.sitting.took_ms / 1e3));
            results.take(record);
            tried.push(cell.name.as_str());
        }
        results.took_ms = narrator.elapsed_ms();
        results.judge();
        // After every cell: what was measured is not lost when the next one is interrupted.
        document = Some(document::write(&results, &directory)?);
    }
    show(&results);
    if let Some(document) = document {
        println!("\n  {}", document.display());
    }
    Ok(results.succeeded(&tried))
}

/// The goals, on the terminal.
fn show(results: &Results) {
    println!();
    for goal in &results.goals {
        let mark = match goal.reached {
            Some(true) => "reached",
            Some(false) => "NOT REACHED",
            None => "-",
        };
        println!("{mark:12}{}: {}\n{:12}{}", goal.case, goal.goal, "", goal.measured);
    }
    if !results.left_out.is_empty() {
        println!("\nleft out for want of time: {}", results.left_out.join(", "));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    fn cli(line: &[&str]) -> Result<Cli, String> {
        Cli::try_parse_from([&["bench"], line].concat()).map_err(|error| error.to_string())
    }

    #[test]
    fn what_is_unknown_is_refused_by_name() {
        Cli::command().debug_assert();
        assert!(cli(&["--cell", "nonsense"]).unwrap_err().contains("nonsense"));
        assert!(cli(&["--contender", "nobody"]).unwrap_err().contains("nobody"));
        assert!(cli(&["--runs", "0"]).is_err());
    }

    #[test]
    fn cells_are_those_named_or_all_or_those_of_the_short_form() {
        let chosen = |line: &[&str]| chosen(&cli(line).unwrap()).len();
        // Those that the help tells of, too.
        let told = SITTINGS.split("--cell ").skip(1).filter_map(|rest| rest.split_whitespace().next());
        let told: Vec<&str> = told.flat_map(|name| ["--cell", name]).collect();
        assert_eq!(chosen(&told), Cell::all().len());
        assert_eq!(chosen(&["--cell", "idle", "--cell", "random-75"]), 2);
        assert!(chosen(&["--quick"]) < chosen(&[]));
    }

    #[test]
    fn contenders_are_those_named_or_all_or_those_of_the_short_form() {
        let (idle, surroundings) = (&Cell::all()[0], Surroundings::default());
        let of = |line: &[&str]| sitting(&cli(line).unwrap(), idle, &surroundings).contenders.len();
        let named = ["--contender", "qemu-tuned-tls", "--contender", "vmirror"];
        assert_eq!((of(&[]), of(&named), of(&["--quick"])), (Contender::ALL.len() - 1, 2, 6));
    }
}
