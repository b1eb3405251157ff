//! A node of QEMU's block graph served over NBD.

use std::{path::Path, time::Duration};

use qapi::Command;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::{
    net::UnixStream,
    time::{Instant, timeout_at},
};

use super::connection::Qmp;
use super::error::QmpError;

/// How long an export may take to go once its clients were cut off.
pub const EXPORT_DEADLINE: Duration = Duration::from_secs(30);
/// How long to wait for an event before the exports are asked for.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// Why a node is not exported.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// QEMU has one NBD server, and somebody else uses it.
    #[error("the NBD server of QEMU runs already: somebody else exports a disk with it")]
    ServerTaken,
    /// The command failed.
    #[error(transparent)]
    Qmp(#[from] QmpError),
}

commands! {
    QueryExports {} = "query-block-exports" -> Vec<Export>;
    StopServer {} = "nbd-server-stop" -> Value;
    EndExport<'a> { id: &'a str, mode: &'a str } = "block-export-del" -> Value;
}

#[derive(Deserialize)]
struct Export {
    id: String,
}

impl Qmp {
    /// Serves a node over NBD on a unix socket, for reading. The guest goes on using it. `export` names the export for its
    /// clients and for QEMU: letters, digits, `-`, `.` and `_`, a letter first.
    ///
    /// # Errors
    /// [`ExportError::ServerTaken`] if QEMU's NBD server runs already. Nothing is left of what failed.
    pub async fn export_node(&self, socket: &Path, node: &str, export: &str) -> Result<(), ExportError> {
        self.start_nbd_server(socket).await?;
        let added = self.add_export(node, export, false).await;
        if added.is_err() {
            self.execute(StopServer {}).await?;
        }
        Ok(added?)
    }

    /// Ends an export and the server that it was served by; clients are cut off. `socket` is where the server was started
    /// by [`Qmp::export_node`]: one of somebody else is left alone, as are other exports than this. No error if there is
    /// none.
    ///
    /// # Errors
    /// [`QmpError`]
    pub async fn end_export(&self, socket: &Path, export: &str) -> Result<(), QmpError> {
        self.remove_export(export).await?;
        self.end_nbd_server(socket).await
    }

    /// Stops the NBD server if it is the one that listens on this socket.
    ///
    /// # Errors
    /// [`QmpError`]
    pub async fn end_nbd_server(&self, socket: &Path) -> Result<(), QmpError> {
        // QEMU does not say where its server listens. What still answers there is ours.
        if UnixStream::connect(socket).await.is_ok() {
            self.execute(StopServer {}).await?;
        }
        Ok(())
    }

    /// Has QEMU's NBD server listen on a unix socket, for several exports.
    ///
    /// # Errors
    /// [`ExportError::ServerTaken`] if it runs already.
    pub async fn start_nbd_server(&self, socket: &Path) -> Result<(), ExportError> {
        let arguments = json!({ "addr": { "type": "unix", "data": { "path": socket } } });
        match self.execute_raw("nbd-server-start", arguments).await {
            // QEMU has no error class of its own for this, and has had these words since its version 1.3.
            Err(QmpError::Refused { desc, .. }) if desc.contains("already running") => {
                Err(ExportError::ServerTaken)
            }
            answer => Ok(answer.map(drop)?),
        }
    }

    /// Serves a node where the NBD server listens, under this name.
    ///
    /// # Errors
    /// [`QmpError`]
    pub async fn add_export(&self, node: &str, export: &str, writable: bool) -> Result<(), QmpError> {
        let arguments = json!({
            "type": "nbd", "id": export, "node-name": node, "name": export, "writable": writable,
        });
        self.execute_raw("block-export-add", arguments).await.map(drop)
    }

    /// The names of everything that is exported.
    ///
    /// # Errors
    /// [`QmpError`]
    pub async fn exports(&self) -> Result<Vec<String>, QmpError> {
        Ok(self.execute(QueryExports {}).await?.into_iter().map(|export| export.id).collect())
    }

    /// Removes an export, its clients cut off, and waits until it is gone. No error if there is none.
    pub(crate) async fn remove_export(&self, export: &str) -> Result<(), QmpError> {
        let mut events = self.events();
        match self.execute(EndExport { id: export, mode: "hard" }).await {
            Ok(_) => {}
            // Refused: there is none, or it goes already.
            Err(QmpError::Refused { .. }) if !self.has_export(export).await? => return Ok(()),
            Err(error) => return Err(error),
        }
        let deadline = Instant::now() + EXPORT_DEADLINE;
        while self.has_export(export).await? {
            if Instant::now() >= deadline {
                return Err(QmpError::Deadline { command: EndExport::NAME, after: EXPORT_DEADLINE });
            }
            // Any event, or none for a while: look again. A connection that has ended shows at the next command.
            drop(timeout_at(Instant::now() + LOOK_AGAIN, events.recv()).await);
        }
        Ok(())
    }

    async fn has_export(&self, export: &str) -> Result<bool, QmpError> {
        Ok(self.exports().await?.iter().any(|known| known == export))
    }
}
