//! Starting a QEMU that outlives its starter.
//!
//! QEMU gets a session of its own, no terminal, and its output in a file; no pipe ties it to the starter, so it runs
//! on when that ends or is killed. While the starter lives, a task of its reaps QEMU; after that, init does. Under
//! systemd the starter's unit needs `KillMode=process` for the same reason.

use std::{
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use tokio::sync::watch;

use crate::{
    Spec, User, detach, log,
    process::{Process, ProcessError},
    qmp::{Qmp, QmpError},
};

/// How long QEMU may take until its QMP answers. Reserving a terabyte of RAM takes a minute or two.
pub const START_DEADLINE: Duration = Duration::from_secs(300);
/// How long to wait between looks at a QEMU that starts. One without devices answers after some 50 ms.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// Why a QEMU was not started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LaunchError {
    /// The command line has no QMP on a unix socket, so nothing could be said to it.
    #[error("the command line has no QMP on a unix socket")]
    NoQmp,
    /// The log cannot be written.
    #[error("cannot open the log {}", log.display())]
    Log {
        /// The file.
        log: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The binary cannot be run.
    #[error("cannot run {}", binary.display())]
    Run {
        /// The binary.
        binary: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// QEMU ended before its QMP answered.
    #[error("QEMU has ended ({status}): {output}")]
    Ended {
        /// Its exit status.
        status: ExitStatus,
        /// Its last words.
        output: String,
    },
    /// QEMU runs but its QMP does not answer in time; it was killed.
    #[error("QEMU did not answer within {after:?} and was killed: {output}")]
    Silent {
        /// How long was waited.
        after: Duration,
        /// Its last words.
        output: String,
        /// What the last attempt to connect gave.
        #[source]
        source: QmpError,
    },
    /// Another process listens on the QMP socket.
    #[error("process {pid} serves the QMP socket {}, not the QEMU that was started", socket.display())]
    OtherServer {
        /// The socket.
        socket: PathBuf,
        /// Who listens.
        pid: u32,
    },
    /// The new process cannot be looked at.
    #[error("the QEMU that was started cannot be looked at")]
    Process(#[from] ProcessError),
    /// The new process could not be put on record, and was not let go on.
    #[error("the QEMU that was to be started cannot be put on record")]
    Unrecorded(#[source] NotRecorded),
}

/// Why a process could not be put on record.
pub type NotRecorded = Box<dyn std::error::Error + Send + Sync>;

/// Where, and as whom, a QEMU is started.
#[derive(Debug, Clone, Copy, Default)]
pub struct Launch<'a> {
    /// Where it looks for files without a directory; this process's own where there is none.
    pub directory: Option<&'a Path>,
    /// As whom it runs; as this process's own user where there is none.
    pub user: Option<&'a User>,
}

/// Starts QEMU detached, with its output (and a serial console on stdio) appended to `log`, and waits until its QMP
/// answers. Must run inside a tokio runtime. QEMU has the descriptors, under the numbers that they have here.
///
/// `record` puts the process on record before it has done anything: whoever comes after a starter that was killed
/// finds it there.
///
/// # Errors
/// With QEMU's own last words if it gave up. No process is left behind, even if the future is dropped.
pub async fn launch(
    spec: &Spec,
    log: &Path,
    place: Launch<'_>,
    descriptors: Vec<OwnedFd>,
    record: impl FnOnce(&Process) -> Result<(), NotRecorded>,
) -> Result<Process, LaunchError> {
    let Launch { directory, user } = place;
    let socket =
        spec.own_qmp_socket().or_else(|| spec.qmp_sockets().into_iter().next()).ok_or(LaunchError::NoQmp)?;
    let mut command = std::process::Command::new(spec.binary());
    command.args(&spec.to_argv()[1..]);
    if let Some(directory) = directory {
        command.current_dir(directory);
    }
    start(command, &socket, log, user, descriptors, record).await
}

/// Starts a program of QEMU's that has its QMP on `socket`, as [`launch`] does.
pub(crate) async fn start(
    mut command: std::process::Command,
    socket: &Path,
    log: &Path,
    user: Option<&User>,
    descriptors: Vec<OwnedFd>,
    record: impl FnOnce(&Process) -> Result<(), NotRecorded>,
) -> Result<Process, LaunchError> {
    let log_failed = |source| LaunchError::Log { log: log.to_owned(), source };
    let output = log::open(log).map_err(log_failed)?;
    let begin = output.metadata().map_err(log_failed)?.len();
    let binary = PathBuf::from(command.get_program());
    command.stdin(Stdio::null()).stdout(output.try_clone().map_err(log_failed)?).stderr(output);
    let known = |pid| -> Result<KillOnDrop, LaunchError> {
        let process = Process::of_pid(pid, socket)?;
        record(&process).map_err(LaunchError::Unrecorded)?;
        Ok(KillOnDrop(Some(process)))
    };
    let spawned = detach::spawn(command, descriptors, user, known).await;
    let (mut child, mut unless_ready) = spawned.map_err(|source| LaunchError::Run { binary, source })??;
    let pid = child.id().unwrap_or_default();
    let (ended, mut end) = watch::channel(None);
    tokio::spawn(async move {
        match child.wait().await {
            Ok(status) => drop(ended.send(Some(status))),
            Err(error) => tracing::warn!(%error, pid, "cannot wait for QEMU"),
        }
    });
    let answered = tokio::select! {
        answered = wait_for_qmp(socket, pid) => answered,
        Ok(status) = async { end.wait_for(Option::is_some).await.map(|status| *status) } => {
            unless_ready.0 = None;
            let status = status.expect("the wait was for a status");
            return Err(LaunchError::Ended { status, output: log::last_words_since(log, begin) });
        }
    };
    match answered {
        Ok(()) => unless_ready.0.take().ok_or(LaunchError::NoQmp),
        Err(LaunchError::Silent { after, source, .. }) => {
            Err(LaunchError::Silent { after, source, output: log::last_words_since(log, begin) })
        }
        Err(error) => Err(error),
    }
}

async fn wait_for_qmp(socket: &Path, pid: u32) -> Result<(), LaunchError> {
    let end = tokio::time::Instant::now() + START_DEADLINE;
    loop {
        let error = match Qmp::connect(socket).await {
            Ok(qmp) => match qmp.peer() {
                // A left-over QEMU of the same name could still be listening until ours has replaced its socket.
                Some(other) if other != pid => {
                    LaunchError::OtherServer { socket: socket.to_owned(), pid: other }
                }
                _ => return Ok(()),
            },
            Err(source) => LaunchError::Silent { after: START_DEADLINE, output: String::new(), source },
        };
        if tokio::time::Instant::now() >= end {
            return Err(error);
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

/// Kills a QEMU that nobody will know of.
pub(crate) struct KillOnDrop(pub(crate) Option<Process>);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        if let Some(process) = &self.0 {
            let killed = process.kill().was_sent();
            tracing::info!(pid = process.pid, killed, "a QEMU whose start failed was ended");
        }
    }
}
