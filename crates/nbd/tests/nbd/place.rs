//! Where a server listens.

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;

use nbd::server::{Export, Server};

/// A socket in a directory of its own.
pub(crate) struct Place {
    _directory: tempfile::TempDir,
    pub(crate) socket: PathBuf,
}

pub(crate) fn place() -> Place {
    let directory = tempfile::tempdir().unwrap();
    Place { socket: directory.path().join("nbd"), _directory: directory }
}

impl Place {
    /// Serves it under the name `disk`.
    pub(crate) fn serve(&self, export: Arc<impl Export>) -> Server {
        Server::listen(UnixListener::bind(&self.socket).unwrap(), &self.socket, "disk", export).unwrap()
    }
}
