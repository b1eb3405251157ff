//! What can end a run early.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use qemu::QmpError;
use testbed::TestbedError;

/// Why a run did not come to its end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BenchError {
    /// Somebody asked for the end.
    #[error("interrupted")]
    Interrupted,
    /// The hosts, the network or a guest.
    #[error("the testbed failed")]
    Testbed(#[from] TestbedError),
    /// QEMU's monitor.
    #[error("QEMU's monitor failed")]
    Qmp(#[from] QmpError),
    /// A vmirror command failed.
    #[error("{command}: {message}")]
    Vmirror {
        /// The command.
        command: String,
        /// What it said.
        message: String,
    },
    /// A vmirror command printed something unexpected.
    #[error("{command} printed no document of the expected form")]
    Document {
        /// The command.
        command: String,
        /// What serde says.
        #[source]
        source: serde_json::Error,
    },
    /// QEMU's own migration did not complete.
    #[error("QEMU's own migration ended as {status:?}: {message}")]
    Baseline {
        /// QEMU's word.
        status: String,
        /// QEMU's reason.
        message: String,
    },
    /// Something did not happen in time.
    #[error("waited {waited:?} for {what}")]
    Timeout {
        /// What was waited for.
        what: String,
        /// How long.
        waited: Duration,
    },
    /// A file or a process of the benchmark itself.
    #[error("{}", path.display())]
    File {
        /// The file or program.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

impl BenchError {
    pub(crate) fn file(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { path, source }
    }

    /// The error with everything behind it, in one line.
    #[must_use]
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut next = std::error::Error::source(self);
        while let Some(source) = next {
            text.push_str(&format!(": {source}"));
            next = source.source();
        }
        text
    }
}
