//! One agent per state directory and per API socket: a lock that ends with the process, however it ends.

use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

/// A lock that is held until this is dropped or the process ends.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

/// Why the lock is not ours.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LockError {
    /// Another agent has it.
    #[error("another agent{} holds {}", pid.as_ref().map(|pid| format!(" (process {pid})")).unwrap_or_default(), path.display())]
    Held {
        /// The lock file.
        path: PathBuf,
        /// Who it says holds it.
        pid: Option<u32>,
    },
    /// The lock file cannot be made.
    #[error("cannot lock {}", path.display())]
    Io {
        /// The lock file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Takes the lock of `path`, a file that is made for it and stays: removing it would let two agents hold locks
/// on two files of one name.
///
/// # Errors
/// [`LockError::Held`] when another process has it.
pub(crate) fn take(path: &Path) -> Result<Lock, LockError> {
    let failed = |source| LockError::Io { path: path.to_owned(), source };
    let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path);
    let mut file = open.map_err(failed)?;
    // Who can open it can hold the lock, and keep an agent from starting; earlier versions let others.
    file.set_permissions(Permissions::from_mode(0o600)).map_err(failed)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let mut pid = String::new();
            let pid = file.read_to_string(&mut pid).ok().and_then(|_| pid.trim().parse().ok());
            return Err(LockError::Held { path: path.to_owned(), pid });
        }
        Err(errno) => return Err(failed(errno.into())),
    }
    // Whose lock it is, for the message to the one who comes second; the lock itself does not depend on it, and the disk may be full.
    if let Err(error) = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id())) {
        tracing::warn!(%error, file = %path.display(), "cannot be told whose lock this is");
    }
    Ok(Lock { _file: file })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_agent_is_told_who_is_first_and_comes_in_after_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent.lock");
        let first = take(&path).unwrap();
        match take(&path).unwrap_err() {
            LockError::Held { pid, .. } => assert_eq!(pid, Some(std::process::id())),
            other => panic!("{other}"),
        }
        drop(first);
        take(&path).unwrap();
    }
}
