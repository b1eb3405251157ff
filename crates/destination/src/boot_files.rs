//! Files that a machine boots from directly: taken in where this host does not have them, before its QEMU starts, which reads them at once.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use mirror::hash::{ContentHash, Secret};
use qemu::Spec;
use uuid::Uuid;

use crate::reservation::allowed::{allowed, creatable};
use finding::Finding;
use host::Host;
use host::boot_files::{MOST, named, read};
use protocol::wire;

/// What a file is called as long as it is not whole.
const UNFINISHED: &str = ".vmirror-file-";

/// Which of the files this host does not have and can take. Of a machine whose command line names no such file none is taken.
pub(crate) fn lacking(host: &Host, spec: &Spec, files: &[wire::BootFile]) -> Vec<u32> {
    let named = named(spec);
    let lacks = |file: &wire::BootFile| {
        let path = Path::new(&file.path);
        let is_named = named.iter().any(|named| named == path);
        // Where it cannot be made, the reservation says that it is missing, and why.
        is_named && file.size <= MOST && !path.exists() && !is_link(path) && creatable(host, path).is_ok()
    };
    (0..).zip(files).filter(|(_, file)| lacks(file)).map(|(number, _)| number).collect()
}

/// A link that leads nowhere is no place to write to.
fn is_link(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok()
}

/// Files that were shipped here. As long as they are on nobody's record, they go when this is dropped.
#[derive(Debug, Default)]
pub(crate) struct Shipped(Vec<PathBuf>);

impl Shipped {
    pub(crate) fn add(&mut self, path: PathBuf) {
        self.0.push(path);
    }

    pub(crate) fn paths(&self) -> &[PathBuf] {
        &self.0
    }

    /// They are on record.
    pub(crate) fn are_recorded(&mut self) {
        self.0.clear();
    }
}

impl Drop for Shipped {
    fn drop(&mut self) {
        self.0.iter().for_each(|path| drop(std::fs::remove_file(path)));
    }
}

/// A file on its way here. As long as it has not been put in its place, it is removed when this is dropped.
pub(crate) struct Arriving {
    path: PathBuf,
    unfinished: PathBuf,
    file: File,
    left: u64,
    hash: Vec<u8>,
}

impl Arriving {
    /// Begins to take in a file.
    pub(crate) fn new(described: &wire::BootFile) -> std::io::Result<Arriving> {
        let path = PathBuf::from(&described.path);
        let unfinished = path.with_file_name(format!("{UNFINISHED}{}", Uuid::new_v4()));
        let mut open = OpenOptions::new();
        let file = open.write(true).create_new(true).mode(0o644).open(&unfinished)?;
        let (left, hash) = (described.size, described.hash.clone());
        Ok(Arriving { path, unfinished, file, left, hash })
    }

    /// Whether all of it has come.
    pub(crate) fn is_whole(&self) -> bool {
        self.left == 0
    }

    /// Takes in a part. False where it is more than there can be.
    pub(crate) fn take(&mut self, part: &[u8]) -> std::io::Result<bool> {
        let Some(left) = self.left.checked_sub(part.len() as u64) else { return Ok(false) };
        self.left = left;
        self.file.write_all(part)?;
        Ok(true)
    }

    /// Puts the file in its place, if it is what the source has and nobody else has put something there.
    pub(crate) fn finish(self, host: &Host, secret: &Secret) -> Result<PathBuf, Finding> {
        let failed = |what: String| {
            Finding::new(
                "file-not-shipped",
                format!("{} on {}: {what}", self.path.display(), host.name),
                "copy it there, under the same path",
            )
        };
        let content = read(&self.unfinished).map_err(|e| failed(e.to_string()))?;
        let hash: ContentHash = secret.hash(&content);
        if hash.bits().to_le_bytes()[..] != self.hash[..] {
            return Err(failed("it is not what the source has".to_owned()));
        }
        let directory = self.path.parent().unwrap_or(Path::new("/")).to_owned();
        let placed = self.file.sync_all().and_then(|()| std::fs::hard_link(&self.unfinished, &self.path));
        placed.map_err(|e| failed(e.to_string()))?;
        if !allowed(host, &directory) {
            let _ = std::fs::remove_file(&self.path);
            return Err(failed("its directory is not allowed".to_owned()));
        }
        Ok(self.path.clone())
    }
}

impl Drop for Arriving {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.unfinished);
    }
}
