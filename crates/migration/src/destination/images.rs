//! The images that disks are mirrored to: made before QEMU starts, held while they are written, given up before it uses them.

use std::fs::OpenOptions;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use mirror::storage::image::{Image, RawImage, Room, ServedImage, forget_earlier_writers};
use mirror::storage::nbd::client::Client;
use qemu::{Create, ImageLock, NewFormat, Serve, ServedBacking, StorageDaemon};
use rustix::fs::{FallocateFlags, fallocate};

use crate::failure::{Finding, chain};
use crate::host::Host;
use crate::lifecycle::Paths;
use crate::reservation::{Planned, SECTOR};
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
    /// Where that has its sockets.
    directory: PathBuf,
}

/// An image could not be made or opened.
fn unusable(host: &Host, path: &Path, why: &dyn std::error::Error) -> Finding {
    Finding::new(
        "disk-unusable",
        format!("{} on {}: {}", path.display(), host.name, chain(why)),
        "see to the file system there",
    )
}

/// Whether a file could not be made as there is one.
fn is_taken(error: &(dyn std::error::Error + 'static)) -> bool {
    std::iter::successors(Some(error), |error| error.source())
        .filter_map(|error| error.downcast_ref::<std::io::Error>())
        .any(|error| error.kind() == std::io::ErrorKind::AlreadyExists)
}

impl Images {
    /// Makes those that are not there. They are on record before they exist: a crash in between leaves nothing that nobody knows of.
    pub(crate) async fn make(
        host: &Host,
        record: &mut Record,
        planned: Vec<Planned>,
        whole_room: bool,
        rehearsal: bool,
        binary: &Path,
    ) -> Result<Images, Finding> {
        // A rehearsal makes what QEMU opens when it starts, takes no room for it, and leaves what is there as it is.
        let whole_room = whole_room && !rehearsal;
        if planned.is_empty() {
            return Ok(Images::default());
        }
        let paths = Paths::of(host, &record.name);
        let made = |plan: &Planned| MadeImage { path: plan.path.clone(), fresh: !plan.exists };
        record.made.images = planned.iter().map(made).collect();
        let journal = |e: &dyn std::error::Error| {
            Finding::new("journal", chain(e), "see to the destination's state_dir")
        };
        host.journal.update(record).map_err(|e| journal(&e))?;
        let mut images = Images {
            room: Some(if whole_room { Room::Reserved } else { Room::Thin }),
            planned,
            directory: paths.storage.clone(),
            locks: Vec::new(),
            daemon: None,
        };
        if images.planned.iter().any(|plan| plan.format != "raw") {
            let private = std::fs::DirBuilder::new().mode(0o700).recursive(true).create(&paths.storage);
            private.map_err(|e| unusable(host, &paths.storage, &e))?;
            let started = StorageDaemon::start(binary, &paths.storage, |process| {
                record.made.storage_daemon = Some(process.clone());
                Ok(host.journal.update(record)?)
            });
            let daemon = started.await.map_err(|e| {
                Finding::new(
                    "storage-daemon",
                    format!("on {}: {}", host.name, chain(&e)),
                    "install qemu-storage-daemon there",
                )
            })?;
            images.daemon = Some(daemon);
        }
        for plan in &images.planned {
            if rehearsal && plan.exists {
                continue;
            }
            if plan.exists {
                forget_earlier_writers(&plan.path).map_err(|e| unusable(host, &plan.path, &e))?;
            }
            if let Err(e) = images.make_one(plan, whole_room).await {
                if is_taken(e.as_ref()) {
                    // Made by somebody else since it was looked at: not ours to remove, nor to go on from.
                    record.made.images.retain(|image| image.path != plan.path);
                    host.journal.update(record).map_err(|e| journal(&e))?;
                }
                return Err(unusable(host, &plan.path, e.as_ref()));
            }
        }
        Ok(images)
    }

    async fn make_one(
        &self,
        plan: &Planned,
        whole_room: bool,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        if plan.format == "raw" {
            let mut open = OpenOptions::new();
            let file = open.write(true).create_new(!plan.exists).mode(MODE).open(&plan.path)?;
            let metadata = file.metadata()?;
            if !metadata.file_type().is_block_device() {
                // A guest sees whole sectors, whatever the end of an image that was there.
                if metadata.len().next_multiple_of(SECTOR) != plan.size {
                    file.set_len(plan.size)?;
                }
                if whole_room {
                    fallocate(&file, FallocateFlags::empty(), 0, plan.size)?;
                }
            }
            return Ok(());
        }
        if plan.exists {
            return Ok(());
        }
        let daemon = self.daemon.as_ref().ok_or("there is no storage daemon")?;
        let format = NewFormat::Qcow2 { cluster_size: plan.cluster_size, backing: plan.backing.clone() };
        let image = Create { path: plan.path.clone(), format, size: plan.size, whole_room };
        daemon.create(&image).await?;
        // Nothing is in it yet.
        Ok(std::fs::set_permissions(&plan.path, std::fs::Permissions::from_mode(MODE))?)
    }

    /// Opens all of them to be written: locked, so that no QEMU does.
    pub(crate) async fn open(
        &mut self,
        host: &Host,
        record: &mut Record,
    ) -> Result<Vec<Box<dyn Image>>, Finding> {
        record.made.images_written = true;
        let journaled = host.journal.update(record);
        journaled.map_err(|e| Finding::new("journal", chain(&e), "see to the destination's state_dir"))?;
        let mut opened: Vec<Box<dyn Image>> = Vec::new();
        let room = self.room.unwrap_or(Room::Thin);
        for plan in &self.planned {
            let path = &plan.path;
            match &self.daemon {
                Some(daemon) if plan.format != "raw" => {
                    let export = format!("disk{}", plan.number);
                    let serve = Serve {
                        path: path.clone(),
                        format: plan.format.clone(),
                        backing: ServedBacking::AsNamed,
                        writable: true,
                        force_share: false,
                        export: export.clone(),
                    };
                    daemon.serve(&serve).await.map_err(|e| unusable(host, path, &e))?;
                    let client = Client::connect(&daemon.nbd_socket(), &export);
                    let client = client.map_err(|e| unusable(host, path, &e))?;
                    opened.push(Box::new(ServedImage::new(client, room)));
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
        if let Some(daemon) = self.daemon.take() {
            daemon.end().await?;
        }
        let _ = std::fs::remove_dir_all(&self.directory);
        Ok(())
    }
}

impl Drop for Images {
    fn drop(&mut self) {
        if let Some(daemon) = &self.daemon {
            daemon.process().kill();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_somebody_else_is_told_from_one_that_cannot_be_made() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("disk");
        let make = |path: &Path| std::fs::File::create_new(path);
        let told = |source| qemu::StorageDaemonError::File { path: path.clone(), source };
        make(&path).unwrap();
        let taken = make(&path).unwrap_err();
        assert!(is_taken(&taken));
        assert!(is_taken(&told(taken)));
        assert!(!is_taken(&told(make(&place.path().join("nowhere/disk")).unwrap_err())));
    }
}
