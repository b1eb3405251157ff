//! `make bench`: a short comparison of vmirror with QEMU's own migration.

use std::process::ExitCode;

use clap::Parser;

/// Compares vmirror with QEMU's own migration, in a short run
#[derive(Debug, Parser)]
#[command(name = "bench", max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    settings: bench::Settings,
}

fn main() -> ExitCode {
    bench::program::main("bench", 2, &Cli::parse().settings)
}
