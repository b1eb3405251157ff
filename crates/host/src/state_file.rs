//! A small file of JSON below the agent's state directory, replaced as a whole.

use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// A small file of JSON.
#[derive(Debug)]
pub(crate) struct StateFile {
    path: PathBuf,
    /// What is in it is not known: it is not written over.
    unread: bool,
}

impl StateFile {
    /// What is on record. What cannot be understood is as if there were nothing, and is put aside. A file that cannot be read, as of a
    /// failing disk, stays as it is: nothing is known then, and nothing can be put on record before an agent has read it.
    pub(crate) fn open<T: DeserializeOwned + Default>(path: PathBuf) -> (StateFile, T) {
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return (StateFile { path, unread: false }, T::default());
            }
            Err(e) => {
                tracing::error!(file = %path.display(), error = %e, "cannot be read, and is not written over");
                return (StateFile { path, unread: true }, T::default());
            }
        };
        let content = serde_json::from_slice(&text).unwrap_or_else(|e| {
            let aside = path.with_extension("bad");
            tracing::error!(file = %path.display(), error = %e, aside = %aside.display(), "cannot be understood");
            let _ = std::fs::rename(&path, aside);
            T::default()
        });
        (StateFile { path, unread: false }, content)
    }

    /// Whether what is in it is not known.
    pub(crate) fn is_unread(&self) -> bool {
        self.unread
    }

    /// Has it not written over, for want of what was to be added to it.
    pub(crate) fn leave_alone(&mut self) {
        self.unread = true;
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Puts it on record: after a crash there is this, or what was there before.
    ///
    /// # Errors
    /// What the system says, or that it could not be read before.
    pub(crate) fn write<T: Serialize>(&self, content: &T) -> io::Result<()> {
        if self.unread {
            return Err(io::Error::other("it could not be read when the agent started"));
        }
        let text = serde_json::to_vec_pretty(content)?;
        let new = self.path.with_extension("new");
        // It says which files the agent may remove.
        let mut open = OpenOptions::new();
        let mut written = open.write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        written.set_permissions(Permissions::from_mode(0o600))?;
        written.write_all(&text)?;
        written.sync_all()?;
        std::fs::rename(&new, &self.path)?;
        self.path.parent().map_or(Ok(()), |directory| File::open(directory)?.sync_all())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_understood_is_put_aside_and_what_cannot_be_read_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("known.json");
        let open = || StateFile::open::<Vec<u32>>(path.clone());
        let (file, nothing) = open();
        assert!(nothing.is_empty());
        file.write(&vec![1, 2]).unwrap();
        assert_eq!(open().1, [1, 2]);
        std::fs::write(&path, "of a later version").unwrap();
        let (file, nothing) = open();
        assert!(nothing.is_empty());
        assert_eq!(std::fs::read(path.with_extension("bad")).unwrap(), b"of a later version");
        file.write(&vec![3]).unwrap();
        // Nothing reads a directory, root or not.
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        let (file, nothing) = open();
        assert!(nothing.is_empty());
        assert!(file.write(&vec![4]).is_err());
        assert!(path.is_dir() && !path.with_extension("new").exists());
    }
}
