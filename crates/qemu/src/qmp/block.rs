//! The commands that mirroring a disk needs: what the guest's drives are, a target, the copy job, an export to read from.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::time::timeout;

use super::{Qmp, QmpError};

/// Between looks at a job that is ending, where no event tells of it.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// Bytes that the copy job keeps apart as changed or not, and copies at the least.
const GRANULARITY: u64 = 64 << 10;

/// A drive of the guest that has a medium.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Drive {
    /// The block node that the guest's device uses.
    pub node: String,
    /// The file or block device.
    pub path: PathBuf,
    /// The image's format: `raw`, `qcow2`, ….
    pub format: String,
    /// Bytes, as the guest sees them.
    pub virtual_size: u64,
    /// Bytes in a cluster, of formats that have such.
    pub cluster_size: Option<u64>,
    /// The image that it is based on.
    pub backing: Option<PathBuf>,
    /// The format of that, where the image says it.
    pub backing_format: Option<String>,
    /// Whether the guest cannot write to it.
    pub read_only: bool,
}

/// How a copy job is begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sync {
    /// All that the guest sees.
    Full,
    /// What the top image has; the target is based on the same image.
    Top,
}

/// A copy job (`blockdev-mirror`), with the guest's writes forwarded before they are answered.
#[derive(Debug, Clone)]
pub struct MirrorJob {
    /// Its name.
    pub job: String,
    /// The node that the guest's device uses.
    pub node: String,
    /// The node to copy to.
    pub target: String,
    /// The name of the filter that is put above the guest's node while the job runs.
    pub filter: String,
    /// What is copied.
    pub sync: Sync,
}

/// How a job stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockJob {
    /// Its name.
    pub job: String,
    /// Everything is copied, and what the guest writes is written to both.
    pub ready: bool,
    /// Bytes done, of …
    pub offset: u64,
    /// … so many, which grow with what the guest writes.
    pub length: u64,
}

/// How a copy job ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JobEnd {
    /// As it was told to.
    Done,
    /// By an error, in QEMU's words.
    Failed(String),
}

/// Drives that can be told only in part are left out.
fn drive(answer: &Value) -> Option<Drive> {
    let inserted = answer.get("inserted")?;
    let image = inserted.get("image")?;
    let text = |value: &Value, key: &str| value.get(key).and_then(Value::as_str).map(str::to_owned);
    Some(Drive {
        node: text(inserted, "node-name")?,
        path: file_name(image.get("filename")?.as_str()?),
        format: text(image, "format")?,
        virtual_size: image.get("virtual-size").and_then(Value::as_u64)?,
        cluster_size: image.get("cluster-size").and_then(Value::as_u64),
        backing: text(image, "full-backing-filename").or_else(|| text(image, "backing-filename")).map(PathBuf::from),
        backing_format: text(image, "backing-filename-format"),
        read_only: inserted.get("ro").and_then(Value::as_bool).unwrap_or_default(),
    })
}

/// QEMU describes nodes that no plain name describes as `json:{…}`; the file is in there somewhere.
fn file_name(name: &str) -> PathBuf {
    let inner = |value: &Value| -> Option<String> {
        let mut at = value;
        loop {
            if let Some(name) = at.get("filename").and_then(Value::as_str) {
                return Some(name.to_owned());
            }
            at = at.get("file")?;
        }
    };
    let described = name.strip_prefix("json:").and_then(|text| serde_json::from_str::<Value>(text).ok());
    PathBuf::from(described.as_ref().and_then(inner).unwrap_or_else(|| name.to_owned()))
}

impl Qmp {
    /// The guest's drives that have a medium, pflash included.
    ///
    /// # Errors
    /// As every command here: [`QmpError`].
    pub async fn drives(&self) -> Result<Vec<Drive>, QmpError> {
        let drives = self.execute_raw("query-block", json!({})).await?;
        Ok(drives.as_array().into_iter().flatten().filter_map(drive).collect())
    }

    /// The names of all block nodes, sorted.
    ///
    /// # Errors
    /// [`QmpError`]
    pub async fn node_names(&self) -> Result<Vec<String>, QmpError> {
        let nodes = self.execute_raw("query-named-block-nodes", json!({ "flat": true })).await?;
        let name = |node: &Value| node.get("node-name").and_then(Value::as_str).map(str::to_owned);
        let mut names: Vec<String> = nodes.as_array().into_iter().flatten().filter_map(name).collect();
        names.sort();
        Ok(names)
    }

    /// Adds a node for a disk that is served over NBD on a unix socket. QEMU connects at once.
    ///
    /// # Errors
    /// [`QmpError::Refused`] where nobody serves it.
    pub async fn add_nbd_node(&self, node: &str, socket: &Path, export: &str) -> Result<(), QmpError> {
        let arguments = json!({
            "driver": "nbd", "node-name": node, "export": export, "discard": "unmap",
            "server": { "type": "unix", "path": socket },
        });
        self.execute_raw("blockdev-add", arguments).await.map(drop)
    }

    /// Removes a node. No error if there is none.
    ///
    /// # Errors
    /// [`QmpError::Refused`] where something uses it.
    pub async fn remove_node(&self, node: &str) -> Result<(), QmpError> {
        match self.execute_raw("blockdev-del", json!({ "node-name": node })).await {
            Err(QmpError::Refused { desc, .. }) if desc.contains("Failed to find node") => Ok(()),
            other => other.map(drop),
        }
    }

    /// Begins to copy a disk. An error of the target ends the job, and is none of the guest's.
    ///
    /// # Errors
    /// [`QmpError::Refused`] with the reason.
    pub async fn mirror_disk(&self, job: &MirrorJob) -> Result<(), QmpError> {
        let arguments = json!({
            "job-id": job.job, "device": job.node, "target": job.target, "filter-node-name": job.filter,
            "sync": match job.sync { Sync::Full => "full", Sync::Top => "top" },
            "copy-mode": "write-blocking", "granularity": GRANULARITY,
            "on-source-error": "report", "on-target-error": "report",
        });
        self.execute_raw("blockdev-mirror", arguments).await.map(drop)
    }

    /// The jobs that there are.
    ///
    /// # Errors
    /// [`QmpError`]
    pub async fn block_jobs(&self) -> Result<Vec<BlockJob>, QmpError> {
        let jobs = self.execute_raw("query-block-jobs", json!({})).await?;
        let number = |job: &Value, key: &str| job.get(key).and_then(Value::as_u64).unwrap_or_default();
        let job = |job: &Value| {
            Some(BlockJob {
                job: job.get("device")?.as_str()?.to_owned(),
                ready: job.get("ready").and_then(Value::as_bool).unwrap_or_default(),
                offset: number(job, "offset"),
                length: number(job, "len"),
            })
        };
        Ok(jobs.as_array().into_iter().flatten().filter_map(job).collect())
    }

    /// Ends a copy job, and leaves the guest's disk where it is. One that is ready first completes what it has begun, unless `at_once`.
    /// Returns when the job and its filter are gone. No error if there is no such job.
    ///
    /// # Errors
    /// [`QmpError`]; [`QmpError::Deadline`] where the job does not end.
    pub async fn end_mirror(&self, job: &str, at_once: bool, deadline: Duration) -> Result<JobEnd, QmpError> {
        let mut events = self.events();
        let begin = Instant::now();
        match self.execute_raw("block-job-cancel", json!({ "device": job, "force": at_once })).await {
            Err(QmpError::Refused { class, .. }) if class == "DeviceNotActive" => return Ok(JobEnd::Done),
            other => drop(other?),
        }
        let mut end = JobEnd::Done;
        while begin.elapsed() < deadline {
            match timeout(LOOK_AGAIN, events.recv()).await {
                Ok(Ok(event)) => {
                    let of = |key: &str| event.data.get(key).and_then(Value::as_str) == Some(job);
                    if let Some(failed) = failed(&event.data).filter(|_| of("device")) {
                        end = JobEnd::Failed(failed);
                    }
                    // The last thing that is heard of a job: by then its filter is out of the way.
                    let is_gone = event.data.get("status").and_then(Value::as_str) == Some("null");
                    if event.name == "JOB_STATUS_CHANGE" && of("id") && is_gone {
                        return Ok(end);
                    }
                }
                _ if self.block_jobs().await?.iter().all(|there| there.job != job) => return Ok(end),
                _ => {}
            }
        }
        Err(QmpError::Deadline { command: "block-job-cancel", after: deadline })
    }

    /// Has QEMU's one NBD server listen on a unix socket, for [`export_node`](Self::export_node).
    ///
    /// # Errors
    /// [`QmpError::Refused`] where it serves somebody already.
    pub async fn start_serving(&self, socket: &Path) -> Result<(), QmpError> {
        let address = json!({ "addr": { "type": "unix", "data": { "path": socket } } });
        self.execute_raw("nbd-server-start", address).await.map(drop)
    }

    /// Serves a node, to be read or written, under this name.
    ///
    /// # Errors
    /// [`QmpError`]
    pub async fn export_node(&self, node: &str, name: &str, writable: bool) -> Result<(), QmpError> {
        let arguments = json!({
            "type": "nbd", "id": name, "node-name": node, "name": name, "writable": writable,
        });
        self.execute_raw("block-export-add", arguments).await.map(drop)
    }

    /// The ids of everything that QEMU serves.
    ///
    /// # Errors
    /// [`QmpError`]
    pub async fn exports(&self) -> Result<Vec<String>, QmpError> {
        let exports = self.execute_raw("query-block-exports", json!({})).await?;
        let id = |export: &Value| export.get("id").and_then(Value::as_str).map(str::to_owned);
        Ok(exports.as_array().into_iter().flatten().filter_map(id).collect())
    }

    /// Ends QEMU's NBD server, with everything that it serves. No error if it does not serve.
    ///
    /// # Errors
    /// [`QmpError`]
    pub async fn stop_serving(&self) -> Result<(), QmpError> {
        match self.execute_raw("nbd-server-stop", json!({})).await {
            Err(QmpError::Refused { desc, .. }) if desc.contains("not running") => Ok(()),
            other => other.map(drop),
        }
    }
}

/// What a job's event says of its failure.
#[must_use]
pub fn failed(data: &Value) -> Option<String> {
    data.get("error").and_then(Value::as_str).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_behind_a_described_node_is_found() {
        let described = r#"json:{"driver": "qcow2", "file": {"driver": "file", "filename": "/d/a.qcow2"}}"#;
        assert_eq!(file_name(described), Path::new("/d/a.qcow2"));
        assert_eq!(file_name("/d/b"), Path::new("/d/b"));
    }

    #[test]
    fn drives_without_a_medium_are_left_out() {
        let empty = json!({ "device": "cd0", "removable": true });
        assert_eq!(drive(&empty), None);
        let full = json!({ "device": "", "inserted": { "node-name": "f1", "ro": false, "image": {
            "filename": "/d/top.qcow2", "format": "qcow2", "virtual-size": 1024, "cluster-size": 65536,
            "backing-filename": "base", "full-backing-filename": "/d/base", "backing-filename-format": "raw" } } });
        let drive = drive(&full).unwrap();
        assert_eq!((drive.node.as_str(), drive.virtual_size, drive.cluster_size), ("f1", 1024, Some(65536)));
        assert_eq!(drive.backing.as_deref(), Some(Path::new("/d/base")));
    }
}
