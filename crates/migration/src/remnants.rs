//! Images that migrations have left on this host: the copy of an attempt that did not come to its end, and the disks of a machine
//! that has moved away. When the machine comes, or comes again, only what differs from them travels.
//!
//! An image that was made for an attempt that failed is removed after a while. All others were somebody's before, and are never
//! removed. One that somebody has written to since is that somebody's.

use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use qemu::Spec;
use serde::{Deserialize, Serialize};

use crate::disks;
use crate::identity;
use crate::journal::Journal;
use crate::state_file;
use crate::vm::VmName;

/// How long an image of an attempt that failed is kept.
const KEPT: Duration = Duration::from_secs(24 * 3600);
const FILE: &str = "remnants.json";

/// Why an image was left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Left {
    /// It was made for a migration to here that did not come to its end.
    Unfinished,
    /// It was there before: a disk of a machine that has moved away, or one that was to be overwritten.
    Behind,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Remnant {
    vm: VmName,
    path: PathBuf,
    left: Left,
    at: SystemTime,
    /// Which file it was: another one in its place is somebody else's. None on record: nobody knows any more.
    #[serde(default)]
    file: Option<Identity>,
    /// Its length and when it was last written, of a file.
    #[serde(default)]
    written: Option<(u64, SystemTime)>,
}

/// What tells a file, or a block device, from another one of its name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Identity {
    /// A file, by its inode, whose number may be used again, and when it was made.
    Made(u64, SystemTime),
    /// Where the file system does not say that: by its device, which may have another number after a reboot, and its inode.
    Inode(u64, u64),
    /// A block device, by the name that its maker gave it, or by its number, until the next reboot.
    Named(String),
}

impl Identity {
    fn of(path: &Path) -> Option<Identity> {
        let file = std::fs::metadata(path).ok()?;
        if file.file_type().is_block_device() {
            return identity::of(path).map(Identity::Named);
        }
        Some(match file.created() {
            Ok(made) => Identity::Made(file.ino(), made),
            Err(_) => Identity::Inode(file.dev(), file.ino()),
        })
    }
}

/// The length of a file, and when it was last written; a block device tells neither.
fn written(path: &Path) -> Option<(u64, SystemTime)> {
    let file = std::fs::metadata(path).ok().filter(std::fs::Metadata::is_file)?;
    Some((file.len(), file.modified().ok()?))
}

impl Remnant {
    /// Whether the file is still the one that was left.
    fn is_there(&self) -> bool {
        self.file.is_some() && Identity::of(&self.path) == self.file
    }

    /// Whether it is, and nobody has written to it.
    fn is_untouched(&self) -> bool {
        self.is_there() && written(&self.path) == self.written
    }
}

/// What migrations have left on this host.
#[derive(Debug)]
pub struct Remnants {
    file: PathBuf,
    known: Mutex<Vec<Remnant>>,
}

impl Remnants {
    /// Reads what is on record below the agent's state directory. What cannot be understood is as if there were nothing: images are
    /// then refused, and never overwritten.
    #[must_use]
    pub fn open(state_dir: &Path) -> Remnants {
        let file = state_dir.join(FILE);
        let known = Mutex::new(state_file::read(&file));
        Remnants { file, known }
    }

    /// Whether an image is one that this machine has left, as it was left.
    #[must_use]
    pub fn has(&self, vm: &VmName, path: &Path) -> bool {
        self.known().iter().any(|remnant| remnant.vm == *vm && remnant.path == path && remnant.is_untouched())
    }

    /// The machine that has left an image, if one has: what is in it is older than what that machine has now, or only a part of it.
    #[must_use]
    pub fn whose(&self, path: &Path) -> Option<VmName> {
        let known = self.known();
        let left = known.iter().find(|remnant| remnant.path == path && remnant.is_untouched())?;
        Some(left.vm.clone())
    }

    /// Remembers an image that is left.
    pub fn keep(&self, vm: &VmName, path: &Path, left: Left) {
        let mut known = self.known();
        // What it was before, it still is: somebody's of before, or made here.
        let known_before = known.iter().find(|remnant| remnant.path == path && remnant.is_there());
        let before = known_before.map(|remnant| remnant.left);
        known.retain(|remnant| remnant.path != path);
        let left = before.unwrap_or(left);
        let (vm, at) = (vm.clone(), SystemTime::now());
        let (file, written) = (Identity::of(path), written(path));
        known.push(Remnant { vm, path: path.to_owned(), left, at, file, written });
        self.write(&known);
    }

    /// An image is a machine's now.
    pub fn taken(&self, path: &Path) {
        let mut known = self.known();
        known.retain(|remnant| remnant.path != path);
        self.write(&known);
    }

    /// Removes what was made here and has been kept for long enough, but for what is in use again.
    pub fn expire(&self, journal: &Journal) {
        let records = journal.all();
        let made =
            records.iter().flat_map(|record| record.made.images.iter().map(|image| image.path.clone()));
        let specs = records.iter().filter_map(|record| Spec::parse(&record.argv).ok());
        let theirs = specs.flat_map(|spec| disks::images(&spec)).map(|(path, ..)| path);
        self.expire_older_than(KEPT, &made.chain(theirs).collect::<Vec<_>>());
    }

    fn expire_older_than(&self, age: Duration, used: &[PathBuf]) {
        let mut known = self.known();
        let before = known.len();
        known.retain(|remnant| {
            if !remnant.is_there() {
                return false;
            }
            let old = remnant.at.elapsed().is_ok_and(|elapsed| elapsed > age);
            let (path, vm) = (&remnant.path, &remnant.vm);
            // Where it cannot be told whether a QEMU has it open, one may have.
            let in_use = || used.contains(path) || qemu::in_use(path).unwrap_or(true);
            if remnant.left == Left::Behind || !old || in_use() {
                return true;
            }
            if remnant.is_untouched() {
                tracing::info!(image = %path.display(), %vm, "removing the image of an attempt that failed");
                let _ = std::fs::remove_file(path);
            }
            false
        });
        if known.len() != before {
            self.write(&known);
        }
    }

    fn known(&self) -> std::sync::MutexGuard<'_, Vec<Remnant>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, known: &Vec<Remnant>) {
        if let Err(e) = state_file::write(&self.file, known) {
            tracing::error!(file = %self.file.display(), error = %e, "what migrations have left cannot be put on record");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_made_is_removed_in_time_and_what_was_left_behind_never() {
        let directory = tempfile::tempdir().unwrap();
        let image = |name: &str| {
            let path = directory.path().join(name);
            std::fs::write(&path, b"content").unwrap();
            path
        };
        let (made, behind, both) = (image("made"), image("behind"), image("both"));
        let vm: VmName = "web1".parse().unwrap();
        let remnants = Remnants::open(directory.path());
        remnants.keep(&vm, &made, Left::Unfinished);
        remnants.keep(&vm, &behind, Left::Behind);
        remnants.keep(&vm, &both, Left::Behind);
        remnants.keep(&vm, &both, Left::Unfinished);
        remnants.expire_older_than(KEPT, &[]);
        let again = Remnants::open(directory.path());
        for path in [&made, &behind, &both] {
            assert!(again.has(&vm, path) && !again.has(&"other".parse().unwrap(), path));
        }
        again.expire_older_than(Duration::ZERO, std::slice::from_ref(&made));
        assert!(made.exists(), "another attempt has it");
        again.expire_older_than(Duration::ZERO, &[]);
        assert!(!made.exists() && behind.exists() && both.exists());
        assert!(!again.has(&vm, &made) && again.has(&vm, &behind) && again.has(&vm, &both));
        again.taken(&behind);
        assert!(!Remnants::open(directory.path()).has(&vm, &behind));
    }

    #[test]
    fn another_file_of_that_name_is_not_what_was_left() {
        let directory = tempfile::tempdir().unwrap();
        let (path, other) = (directory.path().join("image"), directory.path().join("other"));
        std::fs::write(&path, b"content").unwrap();
        std::fs::write(&other, b"somebody's").unwrap();
        let vm: VmName = "web1".parse().unwrap();
        let remnants = Remnants::open(directory.path());
        remnants.keep(&vm, &path, Left::Unfinished);
        assert!(Remnants::open(directory.path()).has(&vm, &path));
        std::fs::rename(&other, &path).unwrap();
        assert!(!remnants.has(&vm, &path));
        remnants.expire_older_than(Duration::ZERO, &[]);
        assert_eq!(std::fs::read(&path).unwrap(), b"somebody's");
    }

    #[test]
    fn a_file_that_somebody_has_written_to_or_uses_is_not_what_was_left() {
        let directory = tempfile::tempdir().unwrap();
        let [written, used] = ["written", "used"].map(|name| directory.path().join(name));
        let vm: VmName = "web1".parse().unwrap();
        let remnants = Remnants::open(directory.path());
        for path in [&written, &used] {
            std::fs::write(path, b"content").unwrap();
            remnants.keep(&vm, path, Left::Unfinished);
            assert_eq!(remnants.whose(path), Some(vm.clone()));
        }
        std::fs::write(&written, b"somebody's own").unwrap();
        assert!(!remnants.has(&vm, &written) && remnants.whose(&written).is_none());
        let lock = qemu::ImageLock::take(&used).unwrap();
        remnants.expire_older_than(Duration::ZERO, &[]);
        assert!(written.exists() && used.exists());
        drop(lock);
        remnants.expire_older_than(Duration::ZERO, &[]);
        assert!(written.exists() && !used.exists());
    }
}
