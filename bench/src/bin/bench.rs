//! `make bench`: vmirror and QEMU's own migration, side by side.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use bench::cell::{Cell, Contender};
use bench::narrator::Narrator;
use bench::results::Results;
use bench::surroundings::Surroundings;
use bench::trial::{self, Trials};
use bench::{BenchError, Interrupt};
use clap::Parser;

/// Compares vmirror with QEMU's own migration
#[derive(Debug, Parser)]
#[command(name = "bench", max_term_width = 100)]
struct Cli {
    /// The short form: few cells, few contenders, under ten minutes
    #[arg(long)]
    quick: bool,
    /// Only this cell; can be given again
    #[arg(long = "cell", value_name = "NAME")]
    cells: Vec<String>,
    /// Migrations by each contender in each cell [default: 5, or 3 with --quick]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: Option<u32>,
    /// After how many seconds a migration is given up as not converging [default: 300, or 30 with --quick]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(5..=86_400))]
    patience: Option<u64>,
    /// Where benchmarks.md and benchmarks/ go [default: target/bench]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// List the cells
    #[arg(long)]
    list: bool,
}

/// Exit status of a program that was interrupted, as a shell has it for SIGINT.
const INTERRUPTED: u8 = 130;
/// Exit status after bad usage.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let cli = Cli::parse();
    if cli.list {
        for cell in Cell::all() {
            println!("{:22}{}", cell.name, cell.describe());
        }
        return ExitCode::SUCCESS;
    }
    let cells = match chosen(&cli) {
        Ok(cells) => cells,
        Err(words) => {
            eprintln!("error: {words}");
            return USAGE.into();
        }
    };
    match run(&cli, &cells) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(BenchError::Interrupted) => INTERRUPTED.into(),
        Err(error) => {
            eprintln!("error: {}", error.chain());
            ExitCode::FAILURE
        }
    }
}

/// The cells to try.
fn chosen(cli: &Cli) -> Result<Vec<Cell>, String> {
    let all = Cell::all();
    if let Some(unknown) = cli.cells.iter().find(|name| all.iter().all(|cell| cell.name != **name)) {
        return Err(format!("no cell is named {unknown}; `bench --list` lists them"));
    }
    let fits = |cell: &Cell| {
        if cli.cells.is_empty() {
            !cli.quick || cell.quick
        } else {
            cli.cells.iter().any(|name| name == cell.name)
        }
    };
    Ok(all.into_iter().filter(fits).collect())
}

fn run(cli: &Cli, cells: &[Cell]) -> Result<bool, BenchError> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let runtime = runtime.map_err(|source| BenchError::File { path: "runtime".into(), source })?;
    let interrupt = runtime.block_on(async { Interrupt::catch() }).unwrap_or_else(|error| {
        eprintln!("warning: signals cannot be caught, an interrupted run is cleaned up by the next: {error}");
        Interrupt::default()
    });
    let mut narrator = Narrator::new();
    let patience = cli.patience.unwrap_or(if cli.quick { 30 } else { 300 });
    let trials = Trials {
        contenders: if cli.quick { &Contender::QUICK } else { &Contender::ALL },
        runs: cli.runs.unwrap_or(if cli.quick { 3 } else { 5 }),
        patience: Duration::from_secs(patience),
    };
    let words: Vec<String> = std::env::args().skip(1).collect();
    let mut results = Results {
        started: jiff::Zoned::now().strftime("%Y-%m-%d %H:%M %Z").to_string(),
        took_ms: 0.0,
        command: format!("bench {}", words.join(" ")).trim_end().to_owned(),
        runs: trials.runs,
        patience_s: patience,
        surroundings: Surroundings::find(&testbed::Programs::find()),
        cells: Vec::new(),
        goals: Vec::new(),
    };
    let directory = cli.out.clone().unwrap_or_else(|| testbed::programs::target().join("bench"));
    let mut document = None;
    for cell in cells {
        let tried = trial::run(cell, &trials, runtime.handle(), &interrupt, &mut narrator);
        let ended = tried.map(|record| results.cells.push(record));
        results.took_ms = narrator.elapsed_ms();
        results.judge();
        // After every cell: what was measured is not lost when the next one is interrupted.
        document = Some(results.write(&directory)?);
        ended?;
    }
    println!();
    for goal in &results.goals {
        let mark = match goal.reached {
            Some(true) => "reached",
            Some(false) => "NOT REACHED",
            None => "",
        };
        println!("{:52}{:60}{mark}", goal.case, goal.measured);
    }
    if let Some(document) = document {
        println!("\n  {}", document.display());
    }
    Ok(results.succeeded())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn an_unknown_cell_is_refused_by_name() {
        Cli::command().debug_assert();
        let cli = |line: &[&str]| Cli::try_parse_from([&["bench"], line].concat()).unwrap();
        assert!(chosen(&cli(&["--cell", "nonsense"])).unwrap_err().contains("nonsense"));
        let named = chosen(&cli(&["--cell", "idle", "--cell", "random-75"])).unwrap();
        assert_eq!(named.len(), 2);
        assert!(chosen(&cli(&["--quick"])).unwrap().len() < chosen(&cli(&[])).unwrap().len());
        assert!(Cli::try_parse_from(["bench", "--runs", "0"]).is_err());
    }
}
