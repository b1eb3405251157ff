//! What can end a run early.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use qemu::QmpError;
use testbed::TestbedError;

/// Why a run did not come to its end.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// Somebody asked for the end.
    #[error("interrupted")]
    Interrupted,
    /// Something was asked for that there is not.
    #[error("{0}")]
    Usage(String),
    /// The hosts, the network or a guest.
    #[error("the testbed failed")]
    Testbed(#[from] TestbedError),
    /// QEMU's monitor.
    #[error("QEMU's monitor failed")]
    Qmp(#[from] QmpError),
    /// A vmirror command failed.
    #[error("{command}: {message}")]
    Vmirror { command: String, message: String },
    /// A vmirror command printed something unexpected.
    #[error("{command} printed no document of the expected form")]
    Document {
        command: String,
        /// What serde says.
        #[source]
        source: serde_json::Error,
    },
    /// QEMU's own migration did not complete.
    #[error("QEMU's own migration ended as {status:?}: {message}")]
    Baseline { status: String, message: String },
    /// Something did not happen in time.
    #[error("waited {waited:?} for {what}")]
    Timeout { what: String, waited: Duration },
    /// A file or a process of the benchmark itself.
    #[error("{}", path.display())]
    File {
        /// The file or program.
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl BenchError {
    pub fn file(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { path, source }
    }

    /// What should have been a document of some form is none.
    pub fn document(command: impl Into<String>) -> impl FnOnce(serde_json::Error) -> Self {
        let command = command.into();
        move |source| Self::Document { command, source }
    }

    /// QEMU's own migration did not complete.
    pub fn baseline(status: &str, message: impl Into<String>) -> Self {
        Self::Baseline { status: status.to_owned(), message: message.into() }
    }

    /// The error with everything behind it, in one line.
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
