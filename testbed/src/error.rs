//! What can go wrong with a testbed.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// An error of the testbed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TestbedError {
    /// Namespaces need root.
    #[error("a testbed of network namespaces needs root")]
    NotRoot,
    /// A program that the testbed needs could not be started.
    #[error("cannot run {program}")]
    Start {
        /// The program.
        program: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A program that the testbed needs failed.
    #[error("{command}: {message}")]
    Tool {
        /// The command line.
        command: String,
        /// What it said.
        message: String,
    },
    /// A monitor does not answer.
    #[error("QMP {command}: no answer")]
    Monitor {
        /// The command.
        command: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A file or directory of the testbed.
    #[error("{path}")]
    File {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A file that set-up should have made is not there.
    #[error("{path} is missing: run `make setup` first")]
    NotSetUp {
        /// The file.
        path: PathBuf,
    },
    /// A file that this machine need not have, as set-up may be unable to make it.
    #[error("{path} is not there: {why}")]
    Unavailable {
        /// The file.
        path: PathBuf,
        /// The last that set-up said.
        why: String,
    },
    /// Something did not happen in time.
    #[error("waited {waited:?} for {what}; the last that was heard: {last}")]
    Timeout {
        /// What was waited for.
        what: String,
        /// How long.
        waited: Duration,
        /// The end of the log that would tell why.
        last: String,
    },
    /// A process ended that should be running.
    #[error("{what} ended ({status}); the last that was heard: {last}")]
    Ended {
        /// The process.
        what: String,
        /// Its exit status.
        status: String,
        /// The end of its log.
        last: String,
    },
    /// The client could not talk to the guest.
    #[error("network")]
    Network(#[source] io::Error),
    /// The guest answered something that is no status.
    #[error("the guest answered {0:?}")]
    Answer(String),
    /// The old-kernel filter could not be built.
    #[error("system call filter")]
    Filter(#[from] seccompiler::BackendError),
}

impl TestbedError {
    pub(crate) fn file(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { path, source }
    }
}
