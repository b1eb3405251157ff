//! Whatever fails, and at whatever point of a migration: one runs, none is lost, nothing is left over.
//!
//! `SEED=N` chooses the seed, which is said; `CELL=…` runs only what has that at the beginning of its name, `LANES=N` so many at once.

use std::path::PathBuf;

use end_to_end::matrix::{Cell, Fault, Kind, Outcome, Results, points, work};
use testbed::programs::target;
use testbed::root_or_skip;

const SEED: u64 = 14;
const LANES: usize = 2;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap())
}

/// Runs cells, and asserts that all are as they should be.
fn run(cells: &[Cell], directory: PathBuf) -> Results {
    let seed = number("SEED").unwrap_or(SEED);
    let lanes = number("LANES").map_or(LANES, |lanes| lanes as usize);
    eprintln!("{} cells, seed {seed}", cells.len());
    let results = Results::open(&directory, seed);
    work(cells, seed, lanes, &results, &directory.join("logs"));
    results
}

fn assert_ok(results: &Results) {
    let bad: Vec<String> = results
        .runs()
        .into_iter()
        .filter(|run| run.outcome != Outcome::Ok)
        .map(|run| format!("{}: {:?}: {}", run.cell, run.outcome, run.detail))
        .collect();
    assert!(bad.is_empty(), "not as promised:\n{}", bad.join("\n"));
}

#[test]
fn the_matrix_is_whole_and_the_sample_has_each_fault_and_point() {
    let all = Cell::all();
    assert!(all.len() >= 500, "{}", all.len());
    let sample = Cell::sample();
    assert_eq!(sample.len(), 40);
    for fault in Fault::ALL {
        assert!(sample.iter().any(|cell| cell.fault == fault), "{fault:?}");
    }
    for point in points() {
        assert!(sample.iter().any(|cell| cell.point == point), "{point:?}");
        for kind in Kind::ALL {
            assert!(all.iter().any(|cell| cell.point == point && cell.kind == kind), "{point:?} {kind:?}");
        }
    }
    let private = Cell::sample_of_private_memory();
    for fault in Fault::ALL {
        assert!(private.iter().any(|cell| cell.fault == fault), "{fault:?}");
    }
    assert!(all.iter().all(|cell| Cell::named(&cell.to_string()) == Some(*cell)));
}

#[test]
fn forty_faults_leave_one_that_runs_and_nothing_else() {
    if !root_or_skip("a fault at each of forty points") {
        return;
    }
    let directory = target().join("matrix/sample");
    let _ = std::fs::remove_dir_all(&directory);
    assert_ok(&run(&Cell::sample(), directory));
}

#[test]
fn each_fault_leaves_one_that_runs_of_a_guest_with_private_memory() {
    if !root_or_skip("each fault, of a guest with private memory") {
        return;
    }
    let directory = target().join("matrix/private");
    let _ = std::fs::remove_dir_all(&directory);
    assert_ok(&run(&Cell::sample_of_private_memory(), directory));
}

/// Goes on where it was interrupted, as long as what has failed has been kept; `target/matrix` has the results and the logs. With `TABLE=FILE`
/// writes the document.
#[test]
#[ignore = "takes more than an hour"]
fn no_fault_at_any_point_makes_two_or_none() {
    if !root_or_skip("the matrix of faults") {
        return;
    }
    let wanted = std::env::var("CELL").unwrap_or_default();
    let cells: Vec<Cell> =
        Cell::all().into_iter().filter(|cell| cell.to_string().starts_with(&wanted)).collect();
    let directory = target().join("matrix");
    let results = run(&cells, directory);
    if let Some(table) = std::env::var_os("TABLE") {
        std::fs::write(table, results.document(number("SEED").unwrap_or(SEED))).unwrap();
    }
    assert_ok(&results);
}
