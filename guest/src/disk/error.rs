//! Why a test disk cannot be used.

use std::io;

/// A test disk that cannot be used as planned.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiskError {
    /// No disk has this serial number.
    #[error("no disk with serial number {0:?}")]
    Missing(String),
    /// The regions of its roles are larger than the disk, or leave the last of them nothing.
    #[error("disk {serial}: {bytes} bytes are too few for its roles")]
    TooSmall {
        /// Its serial number.
        serial: String,
        /// Its size.
        bytes: u64,
    },
    /// Something that the kernel was asked for.
    #[error("disk {serial}: {what}: {source}")]
    System {
        /// Its serial number.
        serial: String,
        /// What it was.
        what: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

impl DiskError {
    pub(super) fn system(serial: &str, what: &'static str) -> impl FnOnce(io::Error) -> Self {
        let serial = serial.to_owned();
        move |source| Self::System { serial, what, source }
    }
}
