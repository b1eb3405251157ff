//! QEMU's storage daemon: makes images, and serves them over NBD, in QEMU's own image formats.
//!
//! It is started detached like a VM, so that it outlives its starter; who keeps its [`Process`] can
//! [attach](StorageDaemon::attach) to it again, or end it. Everything that it serves is on one unix socket beside that
//! of its QMP.

use std::{
    fs, io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::{Value, json};

use crate::{
    launch::{KillOnDrop, LaunchError, NotRecorded, start},
    process::Process,
    qmp::{ExportError, Qmp, QmpError},
};

/// The program's name.
const PROGRAM: &str = "qemu-storage-daemon";
/// How long the daemon may take to end. It flushes what it has open.
pub const STORAGE_DAEMON_DEADLINE: Duration = Duration::from_secs(60);
/// Most letters of an export's name: its nodes are named after it, and QEMU allows 31.
const LONGEST_EXPORT: usize = 26;

/// Why an image is not made or served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StorageDaemonError {
    /// The daemon does not start.
    #[error("the QEMU storage daemon does not start")]
    Launch(#[from] LaunchError),
    /// The daemon refused a command, or does not answer.
    #[error("the QEMU storage daemon did not do what it was told")]
    Qmp(#[from] QmpError),
    /// The daemon's NBD server does not start.
    #[error("the QEMU storage daemon cannot serve")]
    Export(#[from] ExportError),
    /// The file of a new image cannot be made, or is there already.
    #[error("cannot make {}", path.display())]
    File {
        /// The image.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The image cannot be made.
    #[error("cannot make the image {}: {reason}", path.display())]
    Create {
        /// The image.
        path: PathBuf,
        /// QEMU's words.
        reason: String,
    },
    /// The name of an export is too long.
    #[error("the name of the export {export:?} is longer than 26 letters")]
    ExportName {
        /// The name.
        export: String,
    },
    /// The daemon does not end.
    #[error("the QEMU storage daemon {pid} has not ended in {after:?}")]
    Lingers {
        /// Its process id.
        pid: u32,
        /// How long was waited.
        after: Duration,
    },
}

/// The format of a new image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NewFormat {
    /// Raw.
    Raw,
    /// qcow2.
    Qcow2 {
        /// Bytes per cluster. None: QEMU's choice, 64 KiB.
        cluster_size: Option<u64>,
        /// The backing file's name, written into the image as it is, and its format. It is not looked at.
        backing: Option<(PathBuf, String)>,
    },
}

/// An image to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Create {
    /// The new file.
    pub path: PathBuf,
    /// Its format.
    pub format: NewFormat,
    /// Bytes that a guest sees, in whole sectors of 512.
    pub size: u64,
    /// A qcow2 image without a backing file gets all the room that it can need, at once.
    pub whole_room: bool,
}

/// What is behind a served image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ServedBacking {
    /// What the image names, if anything.
    AsNamed,
    /// Nothing, whatever the image names: clusters that it does not have read as zeros.
    Nothing,
    /// This file of this format, whatever the image names.
    File(PathBuf, String),
}

/// An image to serve.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Serve {
    /// The image.
    pub path: PathBuf,
    /// Its format, by QEMU's driver name.
    pub format: String,
    /// What is behind it. Only for formats that have backing files.
    pub backing: ServedBacking,
    /// Whether clients may write.
    pub writable: bool,
    /// Whether to read it though another process writes it, or has it locked for itself. Only for what is not writable.
    pub force_share: bool,
    /// The caller has the image locked: QEMU neither takes locks nor minds those of others.
    pub locked: bool,
    /// The name of the export, at most 26 letters: letters, digits, `-`, `.` and `_`, a letter first.
    pub export: String,
}

/// A running storage daemon. Dropping it leaves the process.
#[derive(Debug)]
pub struct StorageDaemon {
    process: Process,
    qmp: Qmp,
}

impl StorageDaemon {
    /// Starts the daemon of the QEMU whose binary is given, or, where that has none beside it, the one in PATH. Its
    /// sockets (`qmp`, `nbd`) and its `log` are put in a directory, which must be private to the caller (who reaches the
    /// sockets reaches the images) and hold no other daemon: that would lose its sockets.
    ///
    /// `record` puts its process on record before it has done anything.
    ///
    /// # Errors
    /// With the daemon's own last words if it gave up.
    pub async fn start(
        qemu: &Path,
        directory: &Path,
        record: impl FnOnce(&Process) -> Result<(), NotRecorded>,
    ) -> Result<StorageDaemon, StorageDaemonError> {
        let beside = qemu.parent().map(|directory| directory.join(PROGRAM)).filter(|path| path.is_file());
        let binary = beside.unwrap_or_else(|| PathBuf::from(PROGRAM));
        let socket = directory.join("qmp");
        // A comma in a path is doubled in QEMU's options.
        let path = socket.display().to_string().replace(',', ",,");
        let arguments = [
            "--chardev",
            &format!("socket,id=monitor,path={path},server=on,wait=off"),
            "--monitor",
            "chardev=monitor",
        ];
        let mut command = std::process::Command::new(&binary);
        command.args(arguments);
        let process = start(command, &socket, &directory.join("log"), None, Vec::new(), record).await?;
        let mut unless_ready = KillOnDrop(Some(process.clone()));
        let daemon = StorageDaemon::attach(process).await?;
        daemon.qmp.start_nbd_server(&daemon.nbd_socket()).await?;
        unless_ready.0 = None;
        Ok(daemon)
    }

    /// Connects to a daemon that was started earlier.
    ///
    /// # Errors
    /// If it does not answer.
    pub async fn attach(process: Process) -> Result<StorageDaemon, StorageDaemonError> {
        let qmp = Qmp::connect(&process.qmp_socket).await?;
        Ok(StorageDaemon { process, qmp })
    }

    /// Its process, for [`StorageDaemon::attach`] after a restart, or to end what does not answer.
    #[must_use]
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Its monitor.
    #[must_use]
    pub fn qmp(&self) -> &Qmp {
        &self.qmp
    }

    /// Where it serves.
    #[must_use]
    pub fn nbd_socket(&self) -> PathBuf {
        self.process.qmp_socket.with_file_name("nbd")
    }

    /// Makes an image that reads as zeros, or as its backing file, and that only this user can open.
    ///
    /// # Errors
    /// [`StorageDaemonError::File`] if there is a file of that name; [`StorageDaemonError::Create`] with QEMU's words. No
    /// file is left behind.
    pub async fn create(&self, image: &Create) -> Result<(), StorageDaemonError> {
        // QEMU would empty a file that is there.
        fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&image.path)
            .map_err(|source| StorageDaemonError::File { path: image.path.clone(), source })?;
        let created = self.fill(image).await;
        if created.is_err()
            && let Err(error) = fs::remove_file(&image.path)
        {
            tracing::warn!(%error, image = %image.path.display(), "an image that failed cannot be removed");
        }
        created
    }

    async fn fill(&self, image: &Create) -> Result<(), StorageDaemonError> {
        const JOB: &str = "create";
        const NODE: &str = "created-file";
        let failed = |reason| StorageDaemonError::Create { path: image.path.clone(), reason };
        // The format's driver makes the file as long as it needs it.
        let length = if image.format == NewFormat::Raw { image.size } else { 0 };
        let file = json!({ "driver": "file", "filename": image.path, "size": length });
        self.qmp.create_image(JOB, file).await?.map_err(failed)?;
        let NewFormat::Qcow2 { cluster_size, backing } = &image.format else { return Ok(()) };
        let node = json!({ "driver": "file", "node-name": NODE, "filename": image.path });
        self.qmp.execute_raw("blockdev-add", node).await?;
        let mut options = json!({ "driver": "qcow2", "file": NODE, "size": image.size });
        if let Some(size) = cluster_size {
            options["cluster-size"] = json!(size);
        }
        if image.whole_room && backing.is_none() {
            options["preallocation"] = json!("falloc");
        }
        if let Some((backing, format)) = backing {
            options["backing-file"] = json!(backing);
            options["backing-fmt"] = json!(format);
        }
        let created = self.qmp.create_image(JOB, options).await;
        self.qmp.remove_node(NODE).await?;
        created?.map_err(failed)
    }

    /// Serves an image on [`StorageDaemon::nbd_socket`]. Discards reach the file, zeros are written as they come, and
    /// QEMU's image locks are taken, unless `force_share` is asked for or the caller has them.
    ///
    /// # Errors
    /// With QEMU's words, such as `Failed to get "write" lock` if a QEMU has the image open. Nothing is left of what
    /// failed.
    pub async fn serve(&self, image: &Serve) -> Result<(), StorageDaemonError> {
        let [node, file] = nodes(&image.export)?;
        self.qmp.execute_raw("blockdev-add", file_node(image, &file)).await?;
        let served = async {
            self.qmp.execute_raw("blockdev-add", format_node(image, &node, &file)).await?;
            self.qmp.add_export(&node, &image.export, image.writable).await
        };
        if let Err(error) = served.await {
            self.qmp.remove_node(&node).await?;
            self.qmp.remove_node(&file).await?;
            return Err(error.into());
        }
        Ok(())
    }

    /// Ends an export: cuts its clients off, writes the image's metadata, flushes and closes it. No error if there is no
    /// such export.
    ///
    /// QEMU does not tell an error of that last flush: who has written flushes over NBD first, and looks at the answer.
    ///
    /// # Errors
    /// [`StorageDaemonError::Qmp`]
    pub async fn end_serving(&self, export: &str) -> Result<(), StorageDaemonError> {
        let [node, file] = nodes(export)?;
        self.qmp.remove_export(export).await?;
        self.qmp.remove_node(&node).await?;
        self.qmp.remove_node(&file).await?;
        Ok(())
    }

    /// Ends the daemon, and all exports with it, and waits until it has ended.
    ///
    /// # Errors
    /// [`StorageDaemonError::Lingers`] after a minute.
    pub async fn end(self) -> Result<(), StorageDaemonError> {
        self.qmp.quit().await?;
        if self.process.wait_for_end(STORAGE_DAEMON_DEADLINE).await {
            return Ok(());
        }
        Err(StorageDaemonError::Lingers { pid: self.process.pid, after: STORAGE_DAEMON_DEADLINE })
    }
}

/// The names of an export's nodes: of the image, and of its file.
fn nodes(export: &str) -> Result<[String; 2], StorageDaemonError> {
    if export.len() > LONGEST_EXPORT {
        return Err(StorageDaemonError::ExportName { export: export.to_owned() });
    }
    Ok([format!("{export}-img"), format!("{export}-file")])
}

fn file_node(image: &Serve, name: &str) -> Value {
    json!({
        "driver": protocol_driver(&image.path),
        "node-name": name,
        "filename": image.path,
        "locking": if image.locked { "off" } else { "auto" },
        "discard": "unmap",
        "read-only": !image.writable,
        "force-share": image.force_share,
    })
}

fn format_node(image: &Serve, name: &str, file: &str) -> Value {
    let mut node = json!({
        "driver": image.format,
        "node-name": name,
        "file": file,
        "discard": "unmap",
        "detect-zeroes": "off",
        "read-only": !image.writable,
        "force-share": image.force_share,
    });
    match &image.backing {
        ServedBacking::AsNamed => {}
        ServedBacking::Nothing => node["backing"] = Value::Null,
        ServedBacking::File(path, format) => {
            node["backing"] = json!({
                "driver": format,
                "read-only": true,
                "force-share": image.force_share,
                "file": {
                    "driver": protocol_driver(path),
                    "filename": path,
                    "read-only": true,
                    "force-share": image.force_share,
                },
            });
        }
    }
    node
}

/// QEMU has a driver for files, and one for block devices.
fn protocol_driver(path: &Path) -> &'static str {
    let is_device = fs::metadata(path)
        .is_ok_and(|file| std::os::unix::fs::FileTypeExt::is_block_device(&file.file_type()));
    if is_device { "host_device" } else { "file" }
}
