//! What each subcommand does; one file per group.

mod agent;
mod cert;
mod follow;
mod history;
mod migrate;
mod vms;
mod watch;

use std::future::Future;

use session::Goal;

use crate::cli::{Cli, Command};
use crate::client::Client;
use crate::failure::{Exit, Failure};
use crate::output::Output;

/// Does what the command line asks for.
pub(crate) fn run(cli: Cli, output: &Output) -> Result<Exit, Failure> {
    match cli.command {
        Command::Agent { config } => agent::run(&config),
        Command::HoldLocks { .. } => agent::hold(),
        Command::Cert(command) => cert::run(&command, output),
        command => {
            let client = Client::new(&cli.socket)?;
            block_on(ask(&client, command, output))
        }
    }
}

/// What is done by asking the agent.
async fn ask(client: &Client, command: Command, output: &Output) -> Result<Exit, Failure> {
    match command {
        Command::Run { name, stale_disks, argv } => vms::run(client, name, argv, stale_disks, output).await,
        Command::Adopt { name, qmp } => vms::adopt(client, &name, &qmp, output).await,
        Command::List => vms::list(client, output).await,
        Command::Show { name } => vms::show(client, &name, output).await,
        Command::Stop { name, force } => vms::stop(client, &name, force, output).await,
        Command::Release { name, force } => vms::release(client, &name, force, output).await,
        Command::Forget { name } => vms::forget(client, &name, output).await,
        Command::ForgetImages { name, force } => vms::forget_images(client, &name, force, output).await,
        Command::Resolve { name, run_here, force, .. } => {
            vms::resolve(client, &name, run_here, force, output).await
        }
        Command::Check(asked) => migrate::check(client, asked, output).await,
        Command::Migrate(asked) => migrate::begin(client, Goal::Migrate, asked, false, output).await,
        Command::Mirror { migrate: asked, detach } => {
            migrate::begin(client, Goal::Mirror, asked, detach, output).await
        }
        Command::Switch { name } => migrate::switch(client, &name, output).await,
        Command::Cancel { name } => migrate::cancel(client, &name, output).await,
        Command::Verify { name } => migrate::verify(client, &name, output).await,
        Command::Status { name, watch: true } => watch::status_for_ever(client, name.as_ref(), output).await,
        Command::Status { name, watch: false } => watch::status(client, name.as_ref(), output).await,
        Command::Events { follow } => watch::events(client, follow, output).await,
        Command::History { vm, limit } => history::list(client, vm.as_ref(), limit, output).await,
        Command::Report { id, html } => history::report(client, &id, html.as_deref(), output).await,
        Command::Agent { .. } | Command::HoldLocks { .. } | Command::Cert(_) => Ok(Exit::Done),
    }
}

/// Runs a client on one thread: it only waits.
fn block_on<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| {
        Failure::new(Exit::Failed, "runtime", format!("no thread can be set up: {error}"), "see `ulimit -a`")
    })?;
    runtime.block_on(work)
}
