//! Why the source's side of a mirror ends, wherever it is found out.

use std::io;

use dirty_tracker::ScanError;

use super::RamError;

/// Why the source's side of a mirror ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// The tracker could not say what was written.
    #[error("the scan for written pages failed")]
    Scan(#[source] ScanError),
    /// Guest RAM could not be read.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// A data stream broke.
    #[error("data stream {stream} broke")]
    Stream {
        /// Number of the stream.
        stream: u16,
        /// How.
        #[source]
        source: io::Error,
    },
    /// No thread could be started.
    #[error("no thread could be started")]
    Thread(#[source] io::Error),
    /// A worker is gone, after an error that was reported before.
    #[error("a worker of the mirror has already ended")]
    Ended,
}
