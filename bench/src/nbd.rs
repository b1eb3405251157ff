//! QEMU's own storage migration, step by step as libvirt has it: the destination exports its disk over the network, the source
//! mirrors its own into that, and lets go of it once the guest is paused.

use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use qemu::Qmp;
use qemu::qmp::MirrorEnd;
use serde_json::json;

use crate::error::BenchError;
use crate::events::Events;
use crate::run::Run;

/// Names of the job, and of the node that it writes to.
const JOB: &str = "mirror";
const TARGET: &str = "target";

/// A disk that is being mirrored from one QEMU to another.
#[derive(Debug)]
pub struct NbdMirror<'a> {
    here: &'a Qmp,
    there: &'a Qmp,
    run: &'a Run,
}

impl<'a> NbdMirror<'a> {
    /// Begins to mirror a node into the node of the same name of the other QEMU, which listens there for it.
    pub fn begin(
        here: &'a Qmp,
        there: &'a Qmp,
        run: &'a Run,
        node: &str,
        listen: SocketAddr,
    ) -> Result<Self, BenchError> {
        let (host, port) = (listen.ip().to_string(), listen.port().to_string());
        let server = json!({ "addr": { "type": "inet", "data": { "host": host, "port": port } } });
        let export = json!({ "type": "nbd", "id": node, "node-name": node, "name": node, "writable": true });
        let target = json!({ "driver": "nbd", "node-name": TARGET, "export": node, "discard": "unmap",
                             "server": { "type": "inet", "host": host, "port": port } });
        let mirror = json!({ "job-id": JOB, "device": node, "target": TARGET, "sync": "full",
                             "copy-mode": "write-blocking", "on-target-error": "report" });
        run.block_on(async {
            there.execute_raw("nbd-server-start", server).await?;
            there.execute_raw("block-export-add", export).await?;
            here.execute_raw("blockdev-add", target).await?;
            here.execute_raw("blockdev-mirror", mirror).await
        })?;
        Ok(Self { here, there, run })
    }

    /// Waits until everything has been copied once; gives back when that was.
    pub fn copied(&self, events: &mut Events, patience: Duration) -> Result<SystemTime, BenchError> {
        let event = events.wait("QEMU's disk to be copied", patience, |event| {
            event.data["device"] == JOB
                && matches!(event.name.as_str(), "BLOCK_JOB_READY" | "BLOCK_JOB_COMPLETED")
        })?;
        if event.name == "BLOCK_JOB_READY" {
            return Ok(event.timestamp);
        }
        let message = event.data["error"].as_str().unwrap_or("its job ended by itself");
        Err(BenchError::baseline(&event.name, message))
    }

    /// The guest is paused: ends the job with both disks equal, and lets go of the destination's.
    pub fn end(&self) -> Result<(), BenchError> {
        self.run.block_on(async {
            match self.here.end_mirror(JOB, false).await? {
                MirrorEnd::Synchronised => {}
                other => return Err(BenchError::baseline("not mirrored", format!("{other:?}"))),
            }
            self.here.remove_node(TARGET).await?;
            self.there.execute_raw("nbd-server-stop", json!({})).await?;
            Ok(())
        })
    }

    /// Gives it up. The guest goes on with its own disk.
    pub fn give_up(&self) -> Result<(), BenchError> {
        self.run.block_on(async {
            self.here.end_mirror(JOB, true).await?;
            self.here.remove_node(TARGET).await
        })?;
        Ok(())
    }
}
