//! `vmirror agent`: the daemon in the foreground.

use std::io::IsTerminal as _;
use std::path::Path;
use std::time::Duration;

use agent::error::chain;
use agent::{Config, ConfigError, Daemon, Keeper, LockError, StartError};
use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

use crate::failure::{Exit, Failure};

/// How long the word that the agent is ready waits until its VMs are found again.
const FOUND: Duration = Duration::from_secs(5);

/// Which messages are logged: `error`, `info` (the usual), `agent=debug,link=trace`, …
const LOG: &str = "VMIRROR_LOG";

/// The command that a process is started with which keeps images locked.
const HOLD: &str = "hold-locks";

/// Holds what it was started with open until it is killed.
pub(super) fn hold() -> ! {
    loop {
        std::thread::park();
    }
}

pub(super) fn run(config: &Path) -> Result<Exit, Failure> {
    log()?;
    let mut config = Config::load(config).map_err(|error| {
        let hint = match &error {
            ConfigError::Read { .. } => "name the agent's configuration with --config",
            ConfigError::UnknownKey { .. } => "correct or remove it",
            ConfigError::NotYet { .. } => "remove it",
            ConfigError::Missing { .. } => "add it",
            _ => "correct it",
        };
        Failure::refused("configuration", chain(&error), hint)
    })?;
    // This very program, whatever has taken its place by then.
    config.keeper = Some(Keeper { program: "/proc/self/exe".into(), arguments: vec![HOLD.to_owned()] });
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.map_err(|error| {
        Failure::refused("runtime", format!("no threads can be set up: {error}"), "see `ulimit -a`")
    })?;
    runtime.block_on(serve(config))
}

async fn serve(config: Config) -> Result<Exit, Failure> {
    // Before anything is opened: a signal that comes while starting must end it as gracefully as later.
    let signals = |error: std::io::Error| {
        Failure::refused("signals", format!("signals cannot be listened for: {error}"), "see `ulimit -a`")
    };
    let mut terminate = signal(SignalKind::terminate()).map_err(signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(signals)?;
    let end = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    agent::raise_descriptor_limit();
    let name = config.name.clone();
    let daemon = Daemon::start(config)
        .await
        .map_err(|error| Failure::refused(kind(&error), chain(&error), hint(&error)))?;
    for problem in daemon.problems() {
        eprintln!("vmirror agent {name}: {}; {}", problem.message, problem.hint);
    }
    let ready = format!("vmirror agent {name} ready: link {}, api {}", daemon.link(), daemon.api().display());
    let vms = daemon.vms().clone();
    tokio::spawn(async move {
        // It is served before; who starts an agent waits for this line, and finds the VMs then, but for those whose QEMU hangs.
        let _ = tokio::time::timeout(FOUND, vms.found()).await;
        // On stderr whatever is logged.
        eprintln!("{ready}");
        tell_service_manager(NotifyState::Ready);
    });
    let end = async {
        end.await;
        tell_service_manager(NotifyState::Stopping);
    };
    daemon.run(end).await;
    Ok(Exit::Done)
}

/// A unit of `Type=notify` counts as started from then on, and what is ordered after it comes then: VMs, whose images are locked here
/// if they have left.
fn tell_service_manager(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::warn!(%error, "the service manager cannot be told");
    }
}

fn kind(error: &StartError) -> &'static str {
    match error {
        StartError::Lock(LockError::Held { .. }) => "agent-running",
        StartError::Identity(_) | StartError::Name { .. } | StartError::Endpoint(_) => "certificates",
        StartError::Listen { .. } | StartError::Api { .. } => "listen",
        _ => "start",
    }
}

fn hint(error: &StartError) -> &'static str {
    match error {
        StartError::Lock(LockError::Held { .. }) => {
            "stop that one first, or give this one a state_dir and an api of its own"
        }
        StartError::Identity(_) | StartError::Endpoint(_) => {
            "make them with `vmirror cert init` and `vmirror cert issue`"
        }
        StartError::Name { .. } => "correct `name`, or issue a certificate of that name",
        StartError::Listen { .. } => "choose an address of this host and a free port for `listen`",
        StartError::Api { .. } => "choose another path for `api`",
        StartError::RamDir(_) => "choose a tmpfs that is mounted, such as /dev/shm",
        StartError::RamFiles(error) => host::guest_ram::hint(error),
        StartError::Journal { .. } => "look after it, or move it out of state_dir",
        _ => "choose directories that this user may write to",
    }
}

fn log() -> Result<(), Failure> {
    let wanted = std::env::var(LOG).unwrap_or_else(|_| "info".to_owned());
    let filter = EnvFilter::try_new(&wanted).map_err(|error| {
        Failure::refused(
            "log-filter",
            format!("{LOG}={wanted:?} is no filter: {error}"),
            "try info, or agent=debug",
        )
    })?;
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colours).init();
    Ok(())
}
