//! The images that disks are mirrored to: made before QEMU starts, held while they are written, given up before it uses them.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use mirror::storage::image::{Image, RawImage, Room, ServedImage, forget_earlier_writers};
use nbd::client::Client;
use qemu::{Create, ImageLock, NewFormat, Serve, ServedBacking, StorageDaemon, User};
use rustix::fs::{FallocateFlags, fallocate};
use uuid::Uuid;

use finding::{Finding, chain};
use host::Fence;
use host::Host;
use host::WhichFile;
use host::paths::Paths;
use host::vm::{MadeImage, Record};
use ownership::VmName;

/// Who may read an image that is made here: its owner, who is whom QEMU runs as.
const MODE: u32 = 0o600;

/// Bytes of a sector.
pub(crate) const SECTOR: u64 = 512;

/// A disk that is to be mirrored.
#[derive(Debug, Clone)]
pub(crate) struct Planned {
    /// Its place in the request.
    pub(crate) number: u32,
    pub(crate) path: PathBuf,
    pub(crate) format: String,
    /// Bytes, as the guest sees them.
    pub(crate) size: u64,
    pub(crate) cluster_size: Option<u64>,
    /// The image that it is based on, and its format: both hosts see the same.
    pub(crate) backing: Option<(PathBuf, String)>,
    /// There is an image, whose content is to be found out.
    pub(crate) exists: bool,
}

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
    /// As whom QEMU opens them, if not as the agent's own user.
    user: Option<User>,
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
    /// Makes those that are not there. Each is on record before it exists, under a name that is nobody else's, and gets its own name when
    /// it is on record which file it is: what a later start finds under that name is known to be ours, or somebody else's.
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
        let attempt = record.arrived_by.unwrap_or_else(Uuid::new_v4);
        let made: Vec<MadeImage> = planned.iter().map(|plan| is_to_be_made(plan, attempt)).collect();
        let journal = |e: &dyn std::error::Error| {
            Finding::new("journal", chain(e), "see to the destination's state_dir")
        };
        host.journal.amend(record, |now| now.made.images.clone_from(&made)).map_err(|e| journal(&e))?;
        let mut images = Images {
            room: Some(if whole_room { Room::Reserved } else { Room::Thin }),
            planned,
            directory: paths.storage.clone(),
            locks: Vec::new(),
            daemon: None,
            user: host.allow.other_user().cloned(),
        };
        if images.planned.iter().any(|plan| plan.format != "raw") {
            let private = std::fs::DirBuilder::new().mode(0o700).recursive(true).create(&paths.storage);
            private.map_err(|e| unusable(host, &paths.storage, &e))?;
            let started = StorageDaemon::start(binary, &paths.storage, |process| {
                Ok(host.journal.amend(record, |now| now.made.storage_daemon = Some(process.clone()))?)
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
        for (plan, made) in images.planned.iter().zip(&made) {
            if rehearsal && plan.exists {
                continue;
            }
            if let Some(user) =
                host.allow.other_user().filter(|_| host.left.is_left_by(&record.name, &plan.path))
            {
                user.give(&plan.path).map_err(|e| unusable(host, &plan.path, &e))?;
            }
            if plan.exists {
                forget_earlier_writers(&plan.path).map_err(|e| unusable(host, &plan.path, &e))?;
            }
            let path = made.made_as.as_ref().unwrap_or(&plan.path);
            let one = images.make_one(plan, path, whole_room).await;
            one.map_err(|e| unusable(host, &plan.path, e.as_ref()))?;
        }
        if made.iter().any(|image| image.made_as.is_some()) {
            let which = |now: &mut Record| now.made.images.iter_mut().for_each(is_made);
            host.journal.amend(record, which).map_err(|e| journal(&e))?;
        }
        for image in &made {
            give_name(image).map_err(|e| unusable(host, &image.path, &e))?;
        }
        Ok(images)
    }

    async fn make_one(
        &self,
        plan: &Planned,
        path: &Path,
        whole_room: bool,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        if plan.format == "raw" {
            let mut open = OpenOptions::new();
            let file = open.write(true).create_new(!plan.exists).mode(MODE).open(path)?;
            let metadata = file.metadata()?;
            if let Some(user) = self.user.as_ref().filter(|_| !plan.exists) {
                user.give(path)?;
            }
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
        let image = Create { path: path.to_owned(), format, size: plan.size, whole_room };
        daemon.create(&image).await?;
        Ok(self.user.as_ref().map_or(Ok(()), |user| user.give(path))?)
    }

    /// Opens all of them to be written: locked, so that no QEMU does.
    pub(crate) async fn open(
        &mut self,
        host: &Host,
        record: &mut Record,
    ) -> Result<Vec<Box<dyn Image>>, Finding> {
        let journaled = host.journal.amend(record, |now| now.made.images_written = true);
        journaled.map_err(|e| Finding::new("journal", chain(&e), "see to the destination's state_dir"))?;
        let mut opened: Vec<Box<dyn Image>> = Vec::new();
        let room = self.room.unwrap_or(Room::Thin);
        for plan in &self.planned {
            let path = &plan.path;
            // Where the machine has left them here, they were kept from everybody, and are so at every moment until QEMU has them.
            let kept = host.fence.write(&record.name, path).await;
            let kept = kept.map_err(|e| unusable(host, path, &e))?;
            match &self.daemon {
                Some(daemon) if plan.format != "raw" => {
                    let export = format!("disk{}", plan.number);
                    let serve = Serve {
                        path: path.clone(),
                        format: plan.format.clone(),
                        backing: ServedBacking::AsNamed,
                        writable: true,
                        force_share: false,
                        locked: kept.is_some(),
                        export: export.clone(),
                    };
                    self.locks.extend(kept);
                    daemon.serve(&serve).await.map_err(|e| unusable(host, path, &e))?;
                    let client = Client::connect(&daemon.nbd_socket(), &export);
                    let client = client.map_err(|e| unusable(host, path, &e))?;
                    opened.push(Box::new(ServedImage::new(client, room)));
                }
                _ => {
                    let lock = kept.map_or_else(|| ImageLock::take(path), Ok);
                    self.locks.push(lock.map_err(|e| unusable(host, path, &e))?);
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

    /// Lets go of them: nobody but QEMU uses them any more, and that only once it is told to run. Until then they are kept from all.
    pub(crate) async fn release(
        &mut self,
        fence: &Fence,
        vm: &VmName,
    ) -> Result<(), qemu::StorageDaemonError> {
        fence.hold(vm, self.planned.iter().map(|plan| plan.path.as_path()));
        self.locks.clear();
        if let Some(daemon) = self.daemon.take() {
            daemon.end().await?;
        }
        let _ = std::fs::remove_dir_all(&self.directory);
        Ok(())
    }
}

/// What is on record of an image before it is there.
fn is_to_be_made(plan: &Planned, attempt: Uuid) -> MadeImage {
    let hidden = format!(".vmirror-{attempt}-{}", plan.number);
    let made_as = (!plan.exists).then(|| plan.path.with_file_name(hidden));
    MadeImage { path: plan.path.clone(), fresh: !plan.exists, made_as, file: None }
}

/// It is there, under the name that it is made as.
fn is_made(image: &mut MadeImage) {
    image.file = image.made_as.as_deref().and_then(WhichFile::of);
}

/// Gives an image that was made its name, unless another file has it: made by somebody else since it was looked for, that is not ours to
/// remove, nor to go on from.
fn give_name(image: &MadeImage) -> io::Result<()> {
    let Some(made_as) = &image.made_as else { return Ok(()) };
    std::fs::hard_link(made_as, &image.path)?;
    std::fs::remove_file(made_as)
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

    fn planned(path: &Path) -> Planned {
        Planned {
            number: 3,
            path: path.to_owned(),
            format: "raw".to_owned(),
            size: 0,
            cluster_size: None,
            backing: None,
            exists: false,
        }
    }

    #[test]
    fn an_image_gets_its_name_when_it_is_known_which_file_it_is_and_takes_it_from_nobody() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("disk");
        let mut image = is_to_be_made(&planned(&path), Uuid::new_v4());
        let made_as = image.made_as.clone().unwrap();
        assert!(image.fresh && made_as.parent() == path.parent());
        std::fs::write(&made_as, b"ours").unwrap();
        is_made(&mut image);
        give_name(&image).unwrap();
        assert!(WhichFile::of(&path) == image.file && image.file.is_some() && !made_as.exists());

        let mut again = is_to_be_made(&planned(&path), Uuid::new_v4());
        std::fs::write(again.made_as.as_ref().unwrap(), b"ours").unwrap();
        is_made(&mut again);
        assert_eq!(give_name(&again).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_ne!(WhichFile::of(&path), again.file);
    }
}
