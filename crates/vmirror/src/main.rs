//! The `vmirror` command: the agent, and the client of the local agent's API.

mod cli;
mod client;
mod commands;
mod failure;
mod html;
mod live;
mod output;
mod summary;
mod table;

use std::process::ExitCode;

use clap::Parser as _;

use crate::cli::Cli;
use crate::failure::Failure;
use crate::output::Output;

fn main() -> ExitCode {
    // Before the command line is understood, whether it asks for JSON can only be looked for.
    let wants_json = std::env::args().take_while(|arg| arg != "--").any(|arg| arg == "--json");
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) if !error.use_stderr() => {
            // Help and version were asked for.
            output::print(&error.render().ansi().to_string());
            return ExitCode::SUCCESS;
        }
        Err(error) => return Output::new(wants_json, false).failed(&Failure::usage(&error)),
    };
    let output = Output::new(cli.json, cli.quiet);
    match commands::run(cli, &output) {
        Ok(exit) => exit.into(),
        Err(failure) => output.failed(&failure),
    }
}
