//! What the two programs have in common: run, show, write, exit.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use crate::course::{self, Course};
use crate::figures::{self, Figure};
use crate::narrator::Narrator;
use crate::present::{self, Paint};
use crate::{BenchError, Interrupt, Record, Settings, page};

/// Exit status of a program that was interrupted, as a shell has it for SIGINT.
const INTERRUPTED: u8 = 130;
/// Exit status after bad usage.
const USAGE: u8 = 2;

/// Runs with that many rounds, unless chosen otherwise, and leaves its files in `target/NAME`.
#[must_use]
pub fn main(name: &str, rounds: u32, settings: &Settings) -> ExitCode {
    if let Err(words) = settings.validate() {
        eprintln!("error: {words}");
        return USAGE.into();
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: no runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let interrupt = runtime.block_on(async { Interrupt::catch() }).unwrap_or_else(|error| {
        eprintln!("warning: signals cannot be caught, an interrupted run is cleaned up by the next: {error}");
        Interrupt::default()
    });
    let mut narrator = Narrator::new();
    let paint = Paint(narrator.colours());
    print!("{}", present::opening(paint));
    let mut course = Course::default();
    let rounds = settings.runs.unwrap_or(rounds);
    let ended = course::run(settings, rounds, runtime.handle(), &interrupt, &mut narrator, &mut course);
    let record = &mut course.record;
    record.took_ms = narrator.elapsed_ms();
    record.failure = ended.as_ref().err().map(BenchError::chain);
    record.steps = narrator.into_steps();
    let figures = figures::of(record);
    print!("{}", present::summary(record, &figures, paint));

    let directory = settings.out.clone().unwrap_or_else(|| testbed::programs::target().join(name));
    match write(&directory, &course, &figures) {
        Ok(files) => println!("  {}\n", files.map(|file| file.display().to_string()).join("\n  ")),
        Err(error) => {
            eprintln!("error: {}", error.chain());
            return ExitCode::FAILURE;
        }
    }
    match ended {
        Err(BenchError::Interrupted) => INTERRUPTED.into(),
        _ if course.record.succeeded() => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

/// What `report.json` holds.
#[derive(serde::Serialize)]
struct Document<'a> {
    #[serde(flatten)]
    record: &'a Record,
    figures: &'a [Figure],
}

fn write(directory: &Path, course: &Course, figures: &[Figure]) -> Result<[PathBuf; 2], BenchError> {
    let files = ["report.json", "report.html"].map(|name| directory.join(name));
    let document = Document { record: &course.record, figures };
    let json = serde_json::to_string_pretty(&document)
        .map_err(|source| BenchError::Document { command: "the run".into(), source })?;
    fs::create_dir_all(directory).map_err(BenchError::file(directory))?;
    fs::write(&files[0], json + "\n").map_err(BenchError::file(&files[0]))?;
    fs::write(&files[1], page::page(course, figures)).map_err(BenchError::file(&files[1]))?;
    Ok(files)
}
