//! The images that disks are mirrored to: made before QEMU starts, held while they are written, given up before it uses them.

use std::fs::OpenOptions;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use mirror::storage::image::{Image, RawImage, Room, ServedImage};
use mirror::storage::nbd::client::Client;
use qemu::image::ImageLock;
use qemu::{NewImage, StorageDaemon};
use rustix::fs::{FallocateFlags, fallocate};

use crate::failure::{Finding, chain};
use crate::host::Host;
use crate::lifecycle::Paths;
use crate::reservation::Planned;
use crate::vm::{MadeImage, Record};

/// Who may read an image that is made here: its owner. QEMU runs as that.
const MODE: u32 = 0o600;

/// The images of one machine.
#[derive(Debug, Default)]
pub(crate) struct Images {
    pub(crate) planned: Vec<Planned>,
    room: Option<Room>,
    locks: Vec<ImageLock>,
    /// Serves images of formats that only QEMU knows.
    daemon: Option<StorageDaemon>,
    socket: PathBuf,
}

/// An image could not be made or opened.
fn unusable(host: &Host, path: &Path, why: &dyn std::error::Error) -> Finding {
    Finding::new(
        "disk-unusable",
        format!("{} on {}: {}", path.display(), host.name, chain(why)),
        "see to the file system there",
    )
}

impl Images {
    /// Makes those that are not there. They are on record before they exist: a crash in between leaves nothing that nobody knows of.
    pub(crate) async fn make(
        host: &Host,
        record: &mut Record,
        planned: Vec<Planned>,
        whole_room: bool,
        binary: &Path,
    ) -> Result<Images, Finding> {
        if planned.is_empty() {
            return Ok(Images::default());
        }
        let paths = Paths::of(host, &record.name);
        let made = |plan: &Planned| MadeImage { path: plan.path.clone(), fresh: !plan.exists };
        record.made.images = planned.iter().map(made).collect();
        let journal = |e: &dyn std::error::Error| Finding::new("journal", chain(e), "see to the destination's state_dir");
        host.journal.update(record).map_err(|e| journal(&e))?;
        let mut images = Images {
            room: Some(if whole_room { Room::Reserved } else { Room::Thin }),
            planned,
            socket: paths.storage,
            locks: Vec::new(),
            daemon: None,
        };
        if images.planned.iter().any(|plan| plan.format != "raw") {
            let daemon = StorageDaemon::start(binary, &paths.daemon).await.map_err(|e| {
                Finding::new("storage-daemon", format!("on {}: {}", host.name, chain(&e)), "install qemu-storage-daemon there")
            })?;
            record.made.storage_daemon = Some(daemon.process().clone());
            images.daemon = Some(daemon);
            host.journal.update(record).map_err(|e| journal(&e))?;
        }
        for plan in &images.planned {
            images.make_one(plan, whole_room).await.map_err(|e| unusable(host, &plan.path, e.as_ref()))?;
        }
        Ok(images)
    }

    async fn make_one(&self, plan: &Planned, whole_room: bool) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        if plan.format == "raw" {
            let mut open = OpenOptions::new();
            let file = open.write(true).create(true).truncate(false).mode(MODE).open(&plan.path)?;
            if !file.metadata()?.file_type().is_block_device() {
                file.set_len(plan.size)?;
                if whole_room {
                    fallocate(&file, FallocateFlags::empty(), 0, plan.size)?;
                }
            }
            return Ok(());
        }
        if plan.exists {
            return Ok(());
        }
        // Made with our permissions first: the daemon would use its own.
        OpenOptions::new().write(true).create(true).truncate(false).mode(MODE).open(&plan.path)?;
        let daemon = self.daemon.as_ref().ok_or("there is no storage daemon")?;
        let backing = plan.backing.as_ref().map(|(path, format)| (path.as_path(), format.as_str()));
        let image = NewImage {
            path: &plan.path,
            size: plan.size,
            cluster_size: plan.cluster_size,
            backing,
            whole_room,
        };
        Ok(daemon.create_qcow2(&image).await?)
    }

    /// Opens all of them to be written: locked, so that no QEMU does.
    pub(crate) async fn open(&mut self, host: &Host) -> Result<Vec<Box<dyn Image>>, Finding> {
        let mut opened: Vec<Box<dyn Image>> = Vec::new();
        if let Some(daemon) = &self.daemon {
            let _ = std::fs::remove_file(&self.socket);
            daemon.listen(&self.socket).await.map_err(|e| unusable(host, &self.socket, &e))?;
        }
        let room = self.room.unwrap_or(Room::Thin);
        for plan in &self.planned {
            let path = &plan.path;
            match &self.daemon {
                Some(daemon) if plan.format != "raw" => {
                    let name = format!("disk{}", plan.number);
                    daemon.serve(path, &plan.format, &name, true).await.map_err(|e| unusable(host, path, &e))?;
                    let client = Client::connect(&self.socket, &name).map_err(|e| unusable(host, path, &e))?;
                    opened.push(Box::new(ServedImage::new(client)));
                }
                _ => {
                    self.locks.push(ImageLock::take(path).map_err(|e| unusable(host, path, &e))?);
                    let image = RawImage::writable(path, room).map_err(|e| unusable(host, path, &e))?;
                    opened.push(Box::new(image));
                }
            }
        }
        Ok(opened)
    }

    /// Which images are known to be all zero: those that were just made, and are based on nothing.
    pub(crate) fn are_zero(&self) -> Vec<bool> {
        self.planned.iter().map(|plan| !plan.exists && plan.backing.is_none()).collect()
    }

    /// Lets go of them: nobody but QEMU uses them any more.
    pub(crate) async fn release(&mut self) -> Result<(), qemu::StorageDaemonError> {
        self.locks.clear();
        match self.daemon.take() {
            Some(daemon) => daemon.end().await,
            None => Ok(()),
        }
    }
}

impl Drop for Images {
    fn drop(&mut self) {
        if let Some(daemon) = &self.daemon {
            daemon.process().kill();
        }
    }
}
