//! The demo: one guest of vmirror's and its twin, shown on a terminal and as a page.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser as _;

use crate::course::{self, Course};
use crate::error::BenchError;
use crate::figures::{self, Figure};
use crate::narrator::Narrator;
use crate::present::{self, Paint};
use crate::record::Record;
use crate::settings::Settings;
use crate::{file, page};

/// `make demo`: run, show, write, exit.
pub fn main() -> ExitCode {
    let settings = Settings::parse();
    crate::run::Run::main(|run| {
        settings.validate().map_err(BenchError::Usage)?;
        let mut narrator = Narrator::new();
        let paint = Paint(narrator.colours());
        print!("{}", present::opening(paint));
        let mut course = Course::default();
        let ended = course::run(&settings, run, &mut narrator, &mut course);
        let record = &mut course.record;
        record.took_ms = narrator.elapsed_ms();
        record.failure = ended.as_ref().err().map(BenchError::chain);
        record.steps = narrator.into_steps();
        let figures = figures::of(record);
        print!("{}", present::summary(record, &figures, paint));
        let directory = settings.out.unwrap_or_else(|| testbed::programs::target().join("demo"));
        let files = write(&directory, &course, &figures)?;
        println!("  {}\n", files.map(|file| file.display().to_string()).join("\n  "));
        match ended {
            Err(BenchError::Interrupted) => Err(BenchError::Interrupted),
            // It has been shown.
            _ => Ok(course.record.succeeded()),
        }
    })
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
    file::write(&files[0], &file::json(&document)?)?;
    file::write(&files[1], &page::page(course, figures))?;
    Ok(files)
}
