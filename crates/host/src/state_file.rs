//! A small file of JSON below the agent's state directory, replaced as a whole.

use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use finding::Finding;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// A small file of JSON.
#[derive(Debug)]
pub(crate) struct StateFile {
    path: PathBuf,
    /// What is in it is not known: it is not written over.
    unread: bool,
    unknown: Option<Unknown>,
}

/// Why it is not known what was on record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Unknown {
    /// It cannot be read: nothing is put on record.
    Unread {
        /// In words, with its path.
        why: String,
    },
    /// It was not understood, now or by an agent of before, and lies aside.
    Aside {
        /// In words, with its path.
        why: String,
        /// Where.
        aside: PathBuf,
    },
}

impl Unknown {
    /// What the operator is told.
    pub(crate) fn finding(&self, kind: &str, not_known: &str, see_to: &str) -> Finding {
        match self {
            Unknown::Unread { why } => Finding::new(
                kind,
                format!("{why}: {not_known}, and nothing is put on record there"),
                format!("{see_to}; see to the disk of state_dir, and restart the agent"),
            ),
            Unknown::Aside { why, aside } => Finding::new(
                kind,
                format!("{why}: {not_known}"),
                format!("{see_to}; then remove {}, and restart the agent", aside.display()),
            ),
        }
    }
}

impl StateFile {
    /// What is on record. What cannot be understood is as if there were nothing, and is put aside. A file that cannot be read, as of a
    /// failing disk, stays as it is: nothing is known then, and nothing can be put on record before an agent has read it.
    pub(crate) fn open<T: DeserializeOwned + Default>(path: PathBuf) -> (StateFile, T) {
        let aside = path.with_extension("bad");
        let read = match std::fs::read(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                tracing::error!(file = %path.display(), error = %e, "cannot be read, and is not written over");
                let why = format!("{} cannot be read: {e}", path.display());
                let unknown = Some(Unknown::Unread { why });
                return (StateFile { path, unread: true, unknown }, T::default());
            }
            read => read.ok(),
        };
        let understood = read.map_or_else(|| Ok(T::default()), |text| serde_json::from_slice(&text));
        let why = match &understood {
            Err(e) => {
                tracing::error!(file = %path.display(), error = %e, aside = %aside.display(), "cannot be understood");
                let _ = std::fs::rename(&path, &aside);
                Some(format!("{} cannot be understood ({e}) and was put aside", path.display()))
            }
            // Nobody has seen to it yet.
            Ok(_) if aside.exists() => Some(format!(
                "{} could not be understood and was put aside when the agent was started earlier",
                path.display()
            )),
            Ok(_) => None,
        };
        let unknown = why.map(|why| Unknown::Aside { why, aside });
        (StateFile { path, unread: false, unknown }, understood.unwrap_or_default())
    }

    /// None at all.
    #[cfg(fuzzing)]
    pub(crate) fn nowhere() -> StateFile {
        StateFile { path: PathBuf::new(), unread: true, unknown: None }
    }

    /// Why it is not known what was on record, if it is not.
    pub(crate) fn unknown(&self) -> Option<&Unknown> {
        self.unknown.as_ref()
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

    #[test]
    fn that_it_is_not_known_is_told_until_somebody_has_seen_to_it() {
        let directory = tempfile::tempdir().unwrap();
        let (path, aside) = (directory.path().join("known.json"), directory.path().join("known.bad"));
        let told = || {
            let unknown = StateFile::open::<Vec<u32>>(path.clone()).0.unknown().cloned();
            unknown.map(|unknown| unknown.finding("kind", "nobody knows", "look"))
        };
        assert_eq!(told(), None);
        std::fs::write(&path, "[1, 2").unwrap();
        let first = told().unwrap();
        assert!(first.message.contains("known.json cannot be understood (EOF"), "{first:?}");
        assert!(first.message.ends_with(": nobody knows") && first.hint.contains("known.bad"), "{first:?}");
        let again = told().unwrap();
        assert!(again.message.contains("earlier") && again.hint == first.hint, "{again:?}");
        std::fs::remove_file(&aside).unwrap();
        assert_eq!(told(), None);
        std::fs::create_dir(&path).unwrap();
        let unread = told().unwrap();
        assert!(unread.message.contains("known.json cannot be read: Is a directory"), "{unread:?}");
        assert!(unread.message.contains("nothing is put on record"), "{unread:?}");
        std::fs::remove_dir(&path).unwrap();
        assert_eq!(told(), None);
    }
}
