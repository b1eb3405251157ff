//! Which file it is that a path names: another one may have its name later.

use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::identity;

/// What tells a file, or a block device, from another one of its name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WhichFile {
    /// A file, by its inode, whose number may be used again, and when it was made.
    Made(u64, SystemTime),
    /// Where the file system does not say that: by its device, which may have another number after a reboot, and its inode.
    Inode(u64, u64),
    /// A block device, by the name that its maker gave it, or by its number, until the next reboot.
    Named(String),
}

impl WhichFile {
    /// The one that is at a path now. None where there is none, or it is a device of which nothing is known.
    #[must_use]
    pub fn of(path: &Path) -> Option<WhichFile> {
        let file = std::fs::metadata(path).ok()?;
        if file.file_type().is_block_device() {
            return identity::of(path).map(WhichFile::Named);
        }
        Some(match file.created() {
            Ok(made) => WhichFile::Made(file.ino(), made),
            Err(_) => WhichFile::Inode(file.dev(), file.ino()),
        })
    }
}
