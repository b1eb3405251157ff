//! QEMU's storage daemon: images of formats that only QEMU knows, made and served without a machine.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::process::Command;

use crate::detach::detach;
use crate::process::{Process, ProcessError};
use crate::qmp::{Qmp, QmpError};

/// The program's name.
const PROGRAM: &str = "qemu-storage-daemon";
/// How long it may take until it answers; between looks.
const START: Duration = Duration::from_secs(10);
const LOOK_AGAIN: Duration = Duration::from_millis(2);
/// How long making an image may take: all of its room may be written.
const CREATE: Duration = Duration::from_secs(600);
/// How long it may take to end.
const END: Duration = Duration::from_secs(30);
const KILL: Duration = Duration::from_secs(5);

/// Why the storage daemon is of no use.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StorageDaemonError {
    /// It cannot be run.
    #[error("cannot run {PROGRAM}, which images other than raw need")]
    Run(#[source] io::Error),
    /// It cannot be looked at.
    #[error("the {PROGRAM} that was started cannot be looked at")]
    Process(#[from] ProcessError),
    /// It does not answer.
    #[error("the {PROGRAM} that was started does not answer")]
    Qmp(#[from] QmpError),
    /// An image cannot be made.
    #[error("image {} cannot be made: {why}", path.display())]
    Create {
        /// The image.
        path: PathBuf,
        /// In its words.
        why: String,
    },
    /// It does not end.
    #[error("{PROGRAM} does not end")]
    Stuck,
}

/// An image to be made.
#[derive(Debug, Clone)]
pub struct NewImage<'a> {
    /// Where.
    pub path: &'a Path,
    /// Bytes, as the guest sees them.
    pub size: u64,
    /// Bytes in a cluster; the format's default where not given.
    pub cluster_size: Option<u64>,
    /// What it is based on, and the format of that.
    pub backing: Option<(&'a Path, &'a str)>,
    /// It gets all of its room at once.
    pub whole_room: bool,
}

/// A storage daemon. It outlives its starter unless it is [ended](Self::end).
#[derive(Debug)]
pub struct StorageDaemon {
    process: Process,
    qmp: Qmp,
}

impl StorageDaemon {
    /// Starts one that listens for commands on `socket`: the one that belongs to this QEMU, else whichever there is.
    ///
    /// # Errors
    /// [`StorageDaemonError`]; nothing is left of the attempt then.
    pub async fn start(qemu: &Path, socket: &Path) -> Result<StorageDaemon, StorageDaemonError> {
        let beside = qemu.with_file_name(PROGRAM);
        let program = if beside.is_file() { beside } else { PathBuf::from(PROGRAM) };
        let _ = std::fs::remove_file(socket);
        let chardev = format!("socket,id=monitor,path={},server=on,wait=off", crate::spec::escape(&socket.to_string_lossy()));
        let mut command = std::process::Command::new(program);
        command.args(["--chardev", &chardev, "--monitor", "chardev=monitor"]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        detach(&mut command);
        let mut child = Command::from(command).spawn().map_err(StorageDaemonError::Run)?;
        let process = Process::of_pid(child.id().unwrap_or_default(), socket)?;
        tokio::spawn(async move { drop(child.wait().await) });
        let begin = tokio::time::Instant::now();
        loop {
            match Qmp::connect(socket).await {
                Ok(qmp) => return Ok(StorageDaemon { process, qmp }),
                Err(error) if begin.elapsed() > START || !process.exists() => {
                    process.kill();
                    return Err(error.into());
                }
                Err(_) => tokio::time::sleep(LOOK_AGAIN).await,
            }
        }
    }

    /// Its process.
    #[must_use]
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Makes a qcow2 image. The file is made, or what is there is emptied.
    ///
    /// # Errors
    /// [`StorageDaemonError`]
    pub async fn create_qcow2(&self, image: &NewImage<'_>) -> Result<(), StorageDaemonError> {
        let room = if image.whole_room { "falloc" } else { "off" };
        self.create(image.path, json!({ "driver": "file", "filename": image.path, "size": 0 })).await?;
        let node = json!({ "driver": "file", "filename": image.path, "node-name": "new" });
        self.qmp.execute_raw("blockdev-add", node).await?;
        let mut options = json!({
            "driver": "qcow2", "file": "new", "size": image.size, "preallocation": room,
        });
        if let (Value::Object(options), Some(size)) = (&mut options, image.cluster_size) {
            options.insert("cluster-size".to_owned(), size.into());
        }
        if let (Value::Object(options), Some((path, format))) = (&mut options, image.backing) {
            options.insert("backing-file".to_owned(), path.to_string_lossy().into());
            options.insert("backing-fmt".to_owned(), format.into());
            options.remove("preallocation");
        }
        let created = self.create(image.path, options).await;
        self.qmp.remove_node("new").await?;
        created
    }

    async fn create(&self, path: &Path, options: Value) -> Result<(), StorageDaemonError> {
        let failed = |why: String| StorageDaemonError::Create { path: path.to_owned(), why };
        self.qmp.execute_raw("blockdev-create", json!({ "job-id": "create", "options": options })).await?;
        let begin = tokio::time::Instant::now();
        loop {
            let jobs = self.qmp.execute_raw("query-jobs", json!({})).await?;
            let job = jobs.as_array().into_iter().flatten().find(|job| job["id"] == "create").cloned();
            let Some(job) = job else { return Err(failed("its job is gone".to_owned())) };
            if job["status"] == "concluded" {
                self.qmp.execute_raw("job-dismiss", json!({ "id": "create" })).await?;
                return match job.get("error").and_then(Value::as_str) {
                    Some(why) => Err(failed(why.to_owned())),
                    None => Ok(()),
                };
            }
            if begin.elapsed() > CREATE {
                return Err(failed(format!("that takes longer than {CREATE:?}")));
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// Has it listen on a socket for those that use what it serves.
    ///
    /// # Errors
    /// [`StorageDaemonError`]
    pub async fn listen(&self, socket: &Path) -> Result<(), StorageDaemonError> {
        Ok(self.qmp.start_serving(socket).await?)
    }

    /// Opens an image and serves it under a name. It is locked meanwhile; one that is only read may be in use by others.
    ///
    /// # Errors
    /// [`StorageDaemonError`]
    pub async fn serve(
        &self,
        path: &Path,
        format: &str,
        name: &str,
        writable: bool,
    ) -> Result<(), StorageDaemonError> {
        let is_device = std::fs::metadata(path)
            .is_ok_and(|file| std::os::unix::fs::FileTypeExt::is_block_device(&file.file_type()));
        let driver = if is_device { "host_device" } else { "file" };
        let node = json!({
            "driver": format, "node-name": name, "read-only": !writable, "discard": "unmap",
            "force-share": !writable,
            "file": { "driver": driver, "filename": path, "discard": "unmap" },
        });
        self.qmp.execute_raw("blockdev-add", node).await?;
        Ok(self.qmp.export_node(name, name, writable).await?)
    }

    /// Ends it. Everything that was written is in the images, and nothing is locked any more, when this returns.
    ///
    /// # Errors
    /// [`StorageDaemonError::Stuck`] where it had to be killed.
    pub async fn end(self) -> Result<(), StorageDaemonError> {
        let told = self.qmp.quit().await;
        if told.is_ok() && self.process.wait_for_end(END).await {
            return Ok(());
        }
        self.process.kill();
        self.process.wait_for_end(KILL).await;
        Err(StorageDaemonError::Stuck)
    }
}
