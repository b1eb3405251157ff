//! Hooks: programs of the operator's that make a network follow a machine, where it is more than taps on a bridge.
//!
//! A hook is run with the agent's rights. Like sudo and cron, the agent runs nothing that others could have put there.

mod run;

use std::fmt::Write as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;
use std::{fs, io};

use humantime_serde::re::humantime::format_duration;
use rustix::process::{Pid, Signal};
use serde::Serialize;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::unix::pipe;
use tokio::process::{Child, ChildStdin, Command};
use uuid::Uuid;

use finding::{Finding, chain};
use ownership::VmName;

pub use run::run;

/// Shortest deadline that can be configured: less is not enough to start a shell on a busy host.
pub const MIN_DEADLINE: Duration = Duration::from_millis(100);
/// Longest deadline that can be configured.
pub const MAX_DEADLINE: Duration = Duration::from_secs(600);

/// Version of the document that hooks are given.
const VERSION: u32 = 1;
/// What is kept of a hook's output: its last bytes.
const KEPT: usize = 4096;
/// What a pipe holds at most unless somebody enlarges it (pipe(7)): so much can be unread when a hook ends.
const PIPE: usize = 64 << 10;
/// Longest line of a hook's output in a message, in characters.
const LONGEST_LINE: usize = 300;
/// How long a hook that was killed may take to be gone; one that waits for a device may take for ever.
const KILLED: Duration = Duration::from_secs(1);
/// For an agent without a `PATH` of its own.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Where this host's hooks are, and how long each may take: the `[hooks]` table of the agent's configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hooks {
    /// The directory; none, and no hook is run.
    pub directory: Option<PathBuf>,
    /// How long one may take.
    pub deadline: Duration,
}

impl Default for Hooks {
    fn default() -> Hooks {
        Hooks { directory: None, deadline: Duration::from_secs(10) }
    }
}

/// A moment at which a program of the operator's is run, if there is one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// `network-prepare`, at the destination: the machine's interfaces are made, its QEMU is not started yet. Also in a
    /// rehearsal. If it fails, nothing is migrated.
    Prepare,
    /// `network-up`, at the destination: the machine is about to run here, and does not yet. If it fails, the machine stays
    /// where it is.
    Up,
    /// `network-redirect`, at the destination: the machine runs here.
    Redirect,
    /// `network-down`, where the machine is given up: at the source when it has gone, at the destination when a copy is
    /// thrown away. There it undoes [`Hook::Prepare`], whether or not that was successful.
    Down,
}

impl Hook {
    /// The name of its file.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Hook::Prepare => "network-prepare",
            Hook::Up => "network-up",
            Hook::Redirect => "network-redirect",
            Hook::Down => "network-down",
        }
    }
}

/// Which side of a migration a host is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// The machine comes from here.
    Source,
    /// It goes to here.
    Destination,
}

/// What a hook is told.
#[derive(Debug, Clone, Serialize)]
pub struct HookContext<'a> {
    /// The machine.
    pub vm: &'a VmName,
    /// Name of this host's agent.
    pub host: &'a str,
    /// Name of the other one.
    pub peer: &'a str,
    /// The migration.
    pub session: Uuid,
    /// Which side this host is on.
    pub side: Side,
    /// Nothing will be migrated: `vmirror check`.
    pub rehearsal: bool,
    /// The machine's interfaces on this host.
    pub interfaces: &'a [HookInterface],
}

/// An interface, as a hook is told of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HookInterface {
    /// Id of QEMU's back end.
    pub netdev: String,
    /// Name of the tap.
    pub ifname: String,
    /// Address of the guest's card, where it is known.
    pub mac: Option<String>,
    /// The bridge that the tap is a port of.
    pub bridge: Option<String>,
    /// In bytes.
    pub mtu: u32,
}

/// The document on a hook's standard input.
#[derive(Serialize)]
struct Document<'a> {
    version: u32,
    hook: &'static str,
    #[serde(flatten)]
    context: &'a HookContext<'a>,
}

/// Why a hook was not run, or not successfully.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HookError {
    /// The directory, the hook, or what it leads to, cannot be looked at.
    #[error("cannot look at {} for hooks", path.display())]
    Look {
        /// What.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It is no file.
    #[error("hook {} is not a file", .0.display())]
    NotFile(PathBuf),
    /// It is not executable.
    #[error("hook {} is not executable", .0.display())]
    NotExecutable(PathBuf),
    /// Others may have written it.
    #[error("hook {} is refused: {} can be written by its group or by others", hook.display(), path.display())]
    Writable {
        /// The hook.
        hook: PathBuf,
        /// It, or its directory.
        path: PathBuf,
    },
    /// It is somebody else's.
    #[error("hook {} is refused: {} belongs to user {owner}, not to root or the agent's user", hook.display(), path.display())]
    Owner {
        /// The hook.
        hook: PathBuf,
        /// It, or its directory.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
    },
    /// The system does not run it.
    #[error("cannot run hook {}", hook.display())]
    Start {
        /// The hook.
        hook: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It has failed.
    #[error("hook {} has ended with {}{}", hook.display(), ended(*status), quoted(last_line))]
    Failed {
        /// The hook.
        hook: PathBuf,
        /// How it ended.
        status: ExitStatus,
        /// The last line that it printed.
        last_line: String,
    },
    /// It took too long, and was killed with everything that it had started.
    #[error("hook {} has not ended within {} and was killed{}", hook.display(), format_duration(*deadline), quoted(last_line))]
    Overdue {
        /// The hook.
        hook: PathBuf,
        /// How long it could have taken.
        deadline: Duration,
        /// The last line that it printed.
        last_line: String,
    },
}

fn ended(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => status.to_string(),
    }
}

fn quoted(line: &str) -> String {
    if line.is_empty() { ", and printed nothing".to_owned() } else { format!(": {line}") }
}

impl HookError {
    /// What it comes to for an operator, who may be at the other host.
    #[must_use]
    pub fn finding(&self, host: &str) -> Finding {
        let hint = match self {
            HookError::Look { .. } => {
                format!(
                    "see `directory` in [hooks] of {host}'s configuration, and that the agent may read it"
                )
            }
            HookError::NotFile(hook) => format!("make {} an executable file, or remove it", hook.display()),
            HookError::NotExecutable(hook) => format!("`chmod +x {}`, or remove it", hook.display()),
            HookError::Writable { path, .. } => {
                format!("see that it is what it should be, then `chmod go-w {}`", path.display())
            }
            HookError::Owner { path, .. } => {
                format!("see that it is what it should be, then `chown root {}`", path.display())
            }
            HookError::Start { .. } => {
                "its first line must name an interpreter that is there, such as #!/bin/sh".to_owned()
            }
            HookError::Failed { .. } => {
                format!("see to what it complains of; the log of {host}'s agent has more of what it printed")
            }
            HookError::Overdue { .. } => {
                format!("see what it waits for, or raise `deadline` in [hooks] of {host}'s configuration")
            }
        };
        Finding::new("hook-failed", format!("{host}: {}", chain(self)), hint)
    }
}

impl Hooks {
    /// Runs a hook and waits until it has ended. Nothing is done where this host has none for that moment.
    ///
    /// # Errors
    /// [`HookError`], with everything that the hook had started in its process group killed where it took too long; the
    /// same is done when this is dropped. What a hook that ends leaves running is left running.
    pub async fn run(&self, hook: Hook, context: &HookContext<'_>) -> Result<(), HookError> {
        let Some(program) = self.find(hook)? else { return Ok(()) };
        let refused = |source| HookError::Start { hook: program.clone(), source };
        let document = Document { version: VERSION, hook: hook.name(), context };
        let document = serde_json::to_vec(&document).map_err(|e| refused(e.into()))?;

        let (mut running, stdin, mut output) = start(&program, hook).map_err(refused)?;
        let ended = tokio::time::timeout(self.deadline, async {
            let talk = async {
                tokio::join!(feed(stdin, &document), output.follow());
                std::future::pending().await
            };
            // Its own end counts: something that it left running may have its standard input and output for ever.
            tokio::select! {
                status = running.0.wait() => status,
                never = talk => never,
            }
        })
        .await;
        if ended.is_err() {
            running.kill();
            let _ = tokio::time::timeout(KILLED, running.0.wait()).await;
        }
        output.take_rest();

        let vm = context.vm;
        let last_line = output.last_line();
        let result = match ended {
            Ok(Ok(status)) if status.success() => Ok(()),
            Ok(Ok(status)) => Err(HookError::Failed { hook: program, status, last_line }),
            Ok(Err(source)) => Err(HookError::Start { hook: program, source }),
            Err(_) => Err(HookError::Overdue { hook: program, deadline: self.deadline, last_line }),
        };
        let printed = output.text();
        match &result {
            Ok(()) => tracing::debug!(%vm, hook = hook.name(), printed, "a hook has run"),
            Err(error) => tracing::warn!(%vm, printed, "{}", chain(error)),
        }
        result
    }

    /// Why one of them could not even be started; none where all could that there are.
    pub fn examine(&self) -> Option<HookError> {
        [Hook::Prepare, Hook::Up, Hook::Redirect, Hook::Down]
            .into_iter()
            .find_map(|hook| self.find(hook).err())
    }

    /// The program of a hook, if there is one.
    fn find(&self, hook: Hook) -> Result<Option<PathBuf>, HookError> {
        let Some(directory) = &self.directory else { return Ok(None) };
        let looked = |path: &Path| {
            let path = path.to_owned();
            move |source| HookError::Look { path, source }
        };
        // A directory that is configured and not there (not mounted, misspelt) is not the same as none.
        let directory = fs::canonicalize(directory).map_err(looked(directory))?;
        let program = directory.join(hook.name());
        match fs::symlink_metadata(&program) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            found => found.map_err(looked(&program))?,
        };
        let file = fs::canonicalize(&program).map_err(looked(&program))?;
        let metadata = fs::metadata(&file).map_err(looked(&file))?;
        if !metadata.is_file() {
            return Err(HookError::NotFile(program));
        }
        // A link in the directory may lead to a file in another, which must be as safe.
        for path in [Some(&*directory), file.parent(), Some(&*file)].into_iter().flatten() {
            trusted(&program, path, &fs::metadata(path).map_err(looked(path))?)?;
        }
        if metadata.permissions().mode() & 0o111 == 0 {
            return Err(HookError::NotExecutable(program));
        }
        Ok(Some(program))
    }
}

/// Whether nobody but root and the agent's user could have written something.
fn trusted(hook: &Path, path: &Path, metadata: &fs::Metadata) -> Result<(), HookError> {
    let owner = metadata.uid();
    if owner != 0 && owner != rustix::process::geteuid().as_raw() {
        return Err(HookError::Owner { hook: hook.to_owned(), path: path.to_owned(), owner });
    }
    if metadata.permissions().mode() & 0o022 != 0 {
        return Err(HookError::Writable { hook: hook.to_owned(), path: path.to_owned() });
    }
    Ok(())
}

/// A hook that runs, in a process group of its own.
struct Running(Child);

impl Running {
    /// Kills it and everything that it has started. While it has not been waited for, its group's number is nobody else's.
    fn kill(&self) {
        let group = self.0.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        if let Some(group) = group {
            // It fails where there is nothing left to kill.
            let _ = rustix::process::kill_process_group(group, Signal::KILL);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
    }
}

fn start(program: &Path, hook: Hook) -> io::Result<(Running, Option<ChildStdin>, Output)> {
    // One pipe for both, so that the last line is the last.
    let (reader, writer) = io::pipe()?;
    let mut command = Command::new(program);
    command
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_else(|| PATH.into()))
        .env("LANG", "C.UTF-8")
        .env("VMIRROR_HOOK", hook.name())
        .current_dir("/")
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(writer.try_clone()?)
        .stderr(writer)
        .kill_on_drop(true);
    let output = Output { pipe: pipe::Receiver::from_owned_fd(reader.into())?, last: Vec::new() };
    let mut child = command.spawn()?;
    let stdin = child.stdin.take();
    Ok((Running(child), stdin, output))
}

/// Gives a hook its document, and then the end of its standard input. One that does not want it is free not to read it.
async fn feed(stdin: Option<ChildStdin>, document: &[u8]) {
    if let Some(mut stdin) = stdin {
        let _ = stdin.write_all(document).await;
    }
}

/// What a hook prints.
struct Output {
    pipe: pipe::Receiver,
    /// The last [`KEPT`] bytes.
    last: Vec<u8>,
}

impl Output {
    /// Reads until nobody can print any more.
    async fn follow(&mut self) {
        let mut some = [0; KEPT];
        while let Ok(n @ 1..) = self.pipe.read(&mut some).await {
            self.keep(some.get(..n).unwrap_or_default());
        }
    }

    /// Reads what a hook that has ended had printed by then. Something that it left running may go on for ever.
    fn take_rest(&mut self) {
        let mut some = [0; KEPT];
        for _ in 0..PIPE / KEPT {
            let Ok(n @ 1..) = rustix::io::read(&self.pipe, &mut some) else { return };
            self.keep(some.get(..n).unwrap_or_default());
        }
    }

    fn keep(&mut self, more: &[u8]) {
        self.last.extend_from_slice(more);
        self.last.drain(..self.last.len().saturating_sub(KEPT));
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.last).trim().to_owned()
    }

    /// The last line that has something in it, fit for a terminal.
    fn last_line(&self) -> String {
        let text = self.text();
        let line = text.lines().next_back().unwrap_or_default().trim();
        let mut fit = String::new();
        for c in line.chars().take(LONGEST_LINE) {
            if c.is_control() {
                // Writing to a string does not fail.
                let _ = write!(fit, "{}", c.escape_default());
            } else {
                fit.push(c);
            }
        }
        if line.chars().nth(LONGEST_LINE).is_some() {
            fit.push('…');
        }
        fit
    }
}

#[cfg(test)]
mod tests;
