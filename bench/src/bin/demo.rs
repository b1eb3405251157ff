//! `make demo`: a real guest moves to another host and back while its client watches, measured beside QEMU's own migration.

use std::process::ExitCode;

use clap::Parser;

/// Boots a real guest, migrates it live between two hosts and back, and measures that beside QEMU's own migration
#[derive(Debug, Parser)]
#[command(name = "demo", max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    settings: bench::Settings,
}

fn main() -> ExitCode {
    bench::program::main("demo", 4, &Cli::parse().settings)
}
