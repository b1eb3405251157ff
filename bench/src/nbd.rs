//! QEMU's own storage migration, step by step as libvirt has it: the destination exports its disk over the network, the source
//! mirrors its own into that, and lets go of it once the guest is paused.

use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use qemu::Qmp;
use qemu::qmp::MirrorEnd;
use serde_json::json;
use tokio::runtime::Handle;

use crate::baseline::Events;
use crate::{BenchError, Interrupt};

/// Names of the job, and of the node that it writes to.
const JOB: &str = "mirror";
const TARGET: &str = "target";

/// A disk that is being mirrored.
#[derive(Debug)]
pub(crate) struct NbdMirror {
    runtime: Handle,
}

impl NbdMirror {
    /// Begins to mirror a node into the node of the same name of the other QEMU, which listens there for it.
    ///
    /// # Errors
    /// What QEMU says.
    pub(crate) fn begin(
        here: &Qmp,
        there: &Qmp,
        node: &str,
        listen: SocketAddr,
        runtime: &Handle,
    ) -> Result<Self, BenchError> {
        let (host, port) = (listen.ip().to_string(), listen.port().to_string());
        let server = json!({ "addr": { "type": "inet", "data": { "host": host, "port": port } } });
        let export = json!({ "type": "nbd", "id": node, "node-name": node, "name": node, "writable": true });
        let target = json!({ "driver": "nbd", "node-name": TARGET, "export": node, "discard": "unmap",
                             "server": { "type": "inet", "host": host, "port": port } });
        let mirror = json!({ "job-id": JOB, "device": node, "target": TARGET, "sync": "full",
                             "copy-mode": "write-blocking", "on-target-error": "report" });
        runtime.block_on(async {
            there.execute_raw("nbd-server-start", server).await?;
            there.execute_raw("block-export-add", export).await?;
            here.execute_raw("blockdev-add", target).await?;
            here.execute_raw("blockdev-mirror", mirror).await
        })?;
        Ok(Self { runtime: runtime.clone() })
    }

    /// Waits until everything has been copied once; gives back when that was.
    ///
    /// # Errors
    /// [`BenchError::Timeout`], [`BenchError::Baseline`] where the job has failed, [`BenchError::Interrupted`].
    pub(crate) fn copied(
        &self,
        events: &mut Events,
        patience: Duration,
        interrupt: &Interrupt,
    ) -> Result<SystemTime, BenchError> {
        let event = events.wait("QEMU's disk to be copied", patience, interrupt, |event| {
            event.data["device"] == JOB
                && matches!(event.name.as_str(), "BLOCK_JOB_READY" | "BLOCK_JOB_COMPLETED")
        })?;
        if event.name == "BLOCK_JOB_READY" {
            return Ok(event.timestamp);
        }
        let message = event.data["error"].as_str().unwrap_or("its job ended by itself");
        Err(BenchError::Baseline { status: event.name, message: message.to_owned() })
    }

    /// The guest is paused: ends the job with both disks equal, and lets go of the destination's.
    ///
    /// # Errors
    /// What QEMU says; [`BenchError::Baseline`] where the disks are not equal.
    pub(crate) fn end(&self, here: &Qmp, there: &Qmp) -> Result<(), BenchError> {
        self.runtime.block_on(async {
            match here.end_mirror(JOB, false).await? {
                MirrorEnd::Synchronised => {}
                other => {
                    let (status, message) = ("not mirrored".to_owned(), format!("{other:?}"));
                    return Err(BenchError::Baseline { status, message });
                }
            }
            here.remove_node(TARGET).await?;
            there.execute_raw("nbd-server-stop", json!({})).await?;
            Ok(())
        })
    }

    /// Gives it up. The guest goes on with its own disk.
    ///
    /// # Errors
    /// What QEMU says.
    pub(crate) fn give_up(&self, here: &Qmp) -> Result<(), BenchError> {
        self.runtime.block_on(async {
            here.end_mirror(JOB, true).await?;
            here.remove_node(TARGET).await
        })?;
        Ok(())
    }
}
