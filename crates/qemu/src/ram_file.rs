//! Files for guest RAM that no other user of the host can open.
//!
//! QEMU makes a `mem-path` that is not there with mode 0644, and takes one that is there whoever has made it. So it is
//! given a finished file: made here, new, 0600, in a directory that only its owner may enter. What QEMU has mapped after
//! that is held against what was made.

use std::{
    fs::{File, Metadata},
    io,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

use command_line::huge_page_size;
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;

use crate::User;
use crate::maps::FileId;
use crate::ram::RamBlock;

/// What the permissions of a directory and of a file are.
const PRIVATE_DIRECTORY: u32 = 0o700;
/// The same where QEMUs of other users have files in it: they may go through, and see no names.
const PASSED_DIRECTORY: u32 = 0o711;
const PRIVATE_FILE: u32 = 0o600;
/// The bits of a mode that are about permissions.
const PERMISSIONS: u32 = 0o7777;
/// Those of everybody but the owner.
const OTHERS: u32 = 0o077;

/// Why guest RAM has no file that is nobody else's.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RamFileError {
    /// The directory cannot be made or entered: a link is in its place, or there is no leave.
    #[error("cannot use {} as the directory of RAM files", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The directory is another user's.
    #[error("the directory of RAM files {} belongs to user {owner}, and the agent is user {user}", path.display())]
    Foreign {
        /// The directory.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
        /// Who wants to use it.
        user: u32,
    },
    /// What an earlier machine of that name has left cannot be removed.
    #[error("a RAM file that was left behind, {}, cannot be removed", path.display())]
    Stale {
        /// The file.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The file cannot be made.
    #[error("cannot make the RAM file {} of {size} bytes", path.display())]
    Make {
        /// The file.
        path: PathBuf,
        /// Its size.
        size: u64,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The file cannot be looked at.
    #[error("cannot look at the RAM file {}", path.display())]
    Look {
        /// The file.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// QEMU has not mapped the file that was made for it, or others have got at that.
    #[error("QEMU's RAM in {} is not only its own: {why}", path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// In which way.
        why: String,
    },
}

/// A directory for RAM files that only its owner may enter.
#[derive(Debug)]
pub struct RamDirectory {
    path: PathBuf,
    descriptor: File,
}

impl RamDirectory {
    /// Makes the directory, or uses one that is there and is this user's own; one that others may enter is closed to them.
    ///
    /// # Errors
    /// [`RamFileError::Directory`], [`RamFileError::Foreign`]
    pub fn open(path: &Path) -> Result<RamDirectory, RamFileError> {
        let failed = |source: io::Error| RamFileError::Directory { path: path.to_owned(), source };
        match rustix::fs::mkdir(path, Mode::from_raw_mode(PRIVATE_DIRECTORY)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(failed(error.into())),
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let descriptor =
            rustix::fs::open(path, flags, Mode::empty()).map_err(|error| failed(error.into()))?;
        let descriptor = File::from(descriptor);
        let metadata = descriptor.metadata().map_err(failed)?;
        let user = user();
        if metadata.uid() != user {
            return Err(RamFileError::Foreign { path: path.to_owned(), owner: metadata.uid(), user });
        }
        if ![PRIVATE_DIRECTORY, PASSED_DIRECTORY].contains(&(metadata.mode() & PERMISSIONS)) {
            descriptor.set_permissions(PermissionsExt::from_mode(PRIVATE_DIRECTORY)).map_err(failed)?;
        }
        Ok(RamDirectory { path: path.to_owned(), descriptor })
    }

    /// Lets QEMUs of other users go through to files that are theirs.
    ///
    /// # Errors
    /// [`RamFileError::Directory`]
    pub fn let_through(&self) -> Result<(), RamFileError> {
        let opened = self.descriptor.set_permissions(PermissionsExt::from_mode(PASSED_DIRECTORY));
        opened.map_err(|source| RamFileError::Directory { path: self.path.clone(), source })
    }

    /// Makes a file for so many bytes of RAM, for a QEMU of that user, or of this process's own. What an earlier machine has left under that name is removed: no guest may boot on
    /// its content.
    ///
    /// # Errors
    /// [`RamFileError::Stale`], [`RamFileError::Make`]
    pub fn make(&self, name: &str, size: u64, owner: Option<&User>) -> Result<MadeRamFile, RamFileError> {
        let path = self.path.join(name);
        match rustix::fs::unlinkat(&self.descriptor, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(RamFileError::Stale { path, source: error.into() }),
        }
        // A file on hugetlbfs has whole huge pages, and QEMU asks for as many.
        let size = size.next_multiple_of(huge_page_size(&self.path).unwrap_or(1));
        match self.make_new(name, size) {
            Ok(identity) => {
                if let Some(Err(source)) = owner.map(|owner| owner.give(&path)) {
                    return Err(RamFileError::Make { path, size, source });
                }
                Ok(MadeRamFile { path, identity, owner: owner.map_or_else(user, User::uid) })
            }
            Err(source) => Err(RamFileError::Make { path, size, source }),
        }
    }

    fn make_new(&self, name: &str, size: u64) -> io::Result<FileId> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(PRIVATE_FILE);
        let file = File::from(rustix::fs::openat(&self.descriptor, name, flags, mode)?);
        // An umask may have taken bits of it away.
        file.set_permissions(PermissionsExt::from_mode(PRIVATE_FILE))?;
        file.set_len(size)?;
        Ok(FileId::of(&file.metadata()?))
    }
}

/// A file that was made for a piece of guest RAM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MadeRamFile {
    path: PathBuf,
    identity: FileId,
    /// Whose it is to be: the user that QEMU runs as.
    owner: u32,
}

impl MadeRamFile {
    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the RAM that QEMU has mapped under this name is this file, and still nobody else's.
    ///
    /// # Errors
    /// [`RamFileError::Exposed`], [`RamFileError::Look`]
    pub fn check(&self, block: &RamBlock) -> Result<(), RamFileError> {
        let looked = block.file.metadata();
        let metadata = looked.map_err(|source| RamFileError::Look { path: self.path.clone(), source })?;
        match self.differs(&metadata) {
            None => Ok(()),
            Some(why) => Err(RamFileError::Exposed { path: self.path.clone(), why }),
        }
    }

    fn differs(&self, found: &Metadata) -> Option<String> {
        if FileId::of(found) != self.identity {
            return Some("it is another file than the one that was made for it".to_owned());
        }
        if found.uid() != self.owner {
            return Some(format!("it belongs to user {}, and was made for user {}", found.uid(), self.owner));
        }
        let mode = found.mode() & PERMISSIONS;
        if mode != PRIVATE_FILE {
            return Some(format!("its mode is {mode:04o}, and was {PRIVATE_FILE:04o}"));
        }
        let links = found.nlink();
        (links != 1).then(|| format!("it has {links} names"))
    }
}

/// What users other than its owner can do with a file, in words, where that is anything: those who may go through all directories
/// above it and whom its mode allows. None where it cannot be looked at.
#[must_use]
pub fn open_to_others(path: &Path) -> Option<String> {
    let file = std::fs::metadata(path).ok()?;
    if file.mode() & OTHERS == 0 {
        return None;
    }
    let whole = std::fs::canonicalize(path).ok()?;
    let passes = |bit: u32| {
        let mut above = whole.ancestors().skip(1);
        above.all(|directory| std::fs::metadata(directory).is_ok_and(|found| found.mode() & bit != 0))
    };
    let can = |shift: u32| match (file.mode() >> shift & 0o4 != 0, file.mode() >> shift & 0o2 != 0) {
        (true, true) => Some("read and write"),
        (true, false) => Some("read"),
        (false, true) => Some("write"),
        (false, false) => None,
    };
    let everybody =
        can(0).filter(|_| passes(0o001)).map(|what| format!("every user of this host can {what} it"));
    everybody.or_else(|| {
        let group = can(3).filter(|_| passes(0o011));
        group.map(|what| format!("its group, {}, can {what} it", file.gid()))
    })
}

fn user() -> u32 {
    rustix::process::geteuid().as_raw()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn mode(path: &Path) -> u32 {
        std::fs::symlink_metadata(path).unwrap().mode() & PERMISSIONS
    }

    fn block(file: File) -> RamBlock {
        let (id, path, mappings) = ("pc.ram".to_owned(), PathBuf::new(), Vec::new());
        RamBlock {
            id,
            path,
            file,
            private: false,
            anonymous: false,
            in_stream: false,
            size: MIB,
            mappings,
            page_size: 4096,
        }
    }

    #[test]
    fn a_file_and_its_directory_are_their_owners_alone_and_new() {
        let ram = tempfile::tempdir_in("/dev/shm").unwrap();
        let home = ram.path().join("vmirror-host");
        let made = RamDirectory::open(&home).unwrap().make("web1@pc.ram", MIB, None).unwrap();
        assert_eq!((mode(&home), mode(made.path())), (0o700, 0o600));
        assert_eq!(made.path().metadata().unwrap().len(), MIB);
        made.check(&block(File::open(made.path()).unwrap())).unwrap();
        // Again: nothing of what was there before is in it.
        std::fs::write(made.path(), "an old guest's secret").unwrap();
        let again = RamDirectory::open(&home).unwrap().make("web1@pc.ram", MIB, None).unwrap();
        assert!(std::fs::read(again.path()).unwrap().iter().all(|byte| *byte == 0));
        assert!(made.check(&block(File::open(again.path()).unwrap())).is_err());
    }

    #[test]
    fn a_directory_that_others_may_enter_is_closed_to_them_and_one_of_others_is_refused() {
        let ram = tempfile::tempdir_in("/dev/shm").unwrap();
        let home = ram.path().join("home");
        std::fs::create_dir(&home).unwrap();
        std::fs::set_permissions(&home, PermissionsExt::from_mode(0o755)).unwrap();
        let opened = RamDirectory::open(&home);
        assert!(opened.is_ok() && mode(&home) == 0o700, "{opened:?}");

        let link = ram.path().join("link");
        symlink(&home, &link).unwrap();
        let refused = RamDirectory::open(&link);
        assert!(matches!(refused, Err(RamFileError::Directory { .. })), "{refused:?}");
        std::fs::write(ram.path().join("file"), "").unwrap();
        let refused = RamDirectory::open(&ram.path().join("file"));
        assert!(matches!(refused, Err(RamFileError::Directory { .. })), "{refused:?}");

        // Only root can give it to somebody else; anybody finds one of root's.
        let foreign = if user() == 0 {
            std::os::unix::fs::chown(&home, Some(65534), None).unwrap();
            home
        } else {
            PathBuf::from("/proc/1")
        };
        let refused = RamDirectory::open(&foreign);
        assert!(matches!(refused, Err(RamFileError::Foreign { .. })), "{refused:?}");
        assert!(refused.unwrap_err().to_string().contains("belongs to user"));
    }

    #[test]
    fn what_was_left_and_cannot_be_removed_is_an_error_and_not_used() {
        let ram = tempfile::tempdir_in("/dev/shm").unwrap();
        let home = RamDirectory::open(&ram.path().join("home")).unwrap();
        let stale = ram.path().join("home/web1@pc.ram");
        std::fs::create_dir(&stale).unwrap();
        let refused = home.make("web1@pc.ram", MIB, None).unwrap_err();
        assert!(matches!(&refused, RamFileError::Stale { path, .. } if *path == stale), "{refused:?}");
        // A link is removed itself, and what it leads to is left.
        std::fs::remove_dir(&stale).unwrap();
        let other = ram.path().join("other");
        std::fs::write(&other, "precious").unwrap();
        symlink(&other, &stale).unwrap();
        home.make("web1@pc.ram", MIB, None).unwrap();
        assert_eq!(std::fs::read_to_string(&other).unwrap(), "precious");
        assert!(!std::fs::symlink_metadata(&stale).unwrap().is_symlink());
    }

    #[test]
    fn a_file_that_others_have_got_at_is_seen() {
        let ram = tempfile::tempdir_in("/dev/shm").unwrap();
        let made =
            RamDirectory::open(&ram.path().join("home")).unwrap().make("web1@pc.ram", MIB, None).unwrap();
        let why = || made.check(&block(File::open(made.path()).unwrap())).unwrap_err().to_string();

        std::fs::set_permissions(made.path(), PermissionsExt::from_mode(0o640)).unwrap();
        assert!(why().contains("its mode is 0640"), "{}", why());
        std::fs::set_permissions(made.path(), PermissionsExt::from_mode(0o600)).unwrap();

        std::fs::hard_link(made.path(), ram.path().join("theirs")).unwrap();
        assert!(why().contains("it has 2 names"), "{}", why());
        std::fs::remove_file(ram.path().join("theirs")).unwrap();
        made.check(&block(File::open(made.path()).unwrap())).unwrap();

        if user() == 0 {
            std::os::unix::fs::chown(made.path(), Some(65534), None).unwrap();
            assert!(why().contains("it belongs to user 65534"), "{}", why());
        }
        std::fs::remove_file(made.path()).unwrap();
        std::fs::write(made.path(), "").unwrap();
        assert!(why().contains("another file"), "{}", why());
    }

    #[test]
    fn whom_a_file_is_open_to_depends_on_the_directories_above_it() {
        let ram = tempfile::tempdir_in("/dev/shm").unwrap();
        let file = ram.path().join("ram");
        std::fs::write(&file, "").unwrap();
        let open = |directory: u32, mode: u32| {
            std::fs::set_permissions(ram.path(), PermissionsExt::from_mode(directory)).unwrap();
            std::fs::set_permissions(&file, PermissionsExt::from_mode(mode)).unwrap();
            open_to_others(&file)
        };
        assert_eq!(open(0o755, 0o600), None);
        assert_eq!(open(0o700, 0o666), None, "nobody else gets there");
        assert_eq!(open(0o755, 0o644).unwrap(), "every user of this host can read it");
        assert_eq!(open(0o755, 0o666).unwrap(), "every user of this host can read and write it");
        assert!(open(0o750, 0o664).unwrap().contains("its group"));
        assert_eq!(open_to_others(&ram.path().join("none")), None);
    }
}
