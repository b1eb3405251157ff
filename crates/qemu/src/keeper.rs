//! A process that does nothing but keep files open: with them, their locks outlive who has taken them.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::detach;
use crate::process::{Process, ProcessError};

/// Why there is no such process.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeeperError {
    /// It could not be started.
    #[error("cannot start {program}")]
    Start {
        /// The program.
        program: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It cannot be looked at.
    #[error(transparent)]
    Process(#[from] ProcessError),
}

/// Starts a program that waits for ever, detached like a VM, with these files open. `record` is told its process before it becomes the
/// program.
///
/// # Errors
/// [`KeeperError`]; nothing runs then.
pub async fn keep_open(
    mut command: Command,
    files: Vec<OwnedFd>,
    record: impl FnOnce(&Process),
) -> Result<Process, KeeperError> {
    let program = command.get_program().to_string_lossy().into_owned();
    command.current_dir("/").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let known = |pid| {
        let process = Process::of_pid(pid, Path::new(""))?;
        record(&process);
        Ok::<_, ProcessError>(process)
    };
    match detach::spawn(command, files, None, known).await {
        Ok(known) => Ok(known?.1),
        Err(source) => Err(KeeperError::Start { program, source }),
    }
}
