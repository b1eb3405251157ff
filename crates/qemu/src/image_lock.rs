//! QEMU's locks on image files, as an outsider sees and takes them.
//!
//! QEMU tells others what it does with an image, and what it lets them do, by locks on single bytes of the file
//! (`block/file-posix.c`): byte 100 + n is locked by who does n, byte 200 + n by who does not let others do n, where n is the
//! bit of a permission (`include/block/block-common.h`). All locks are shared ones of an open file (F_OFD_SETLK); who takes
//! some then looks whether anybody has one that contradicts. The bytes need not exist.

use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

/// `RAW_LOCK_PERM_BASE`, `RAW_LOCK_SHARED_BASE`.
const DOES: i64 = 100;
const FORBIDS: i64 = 200;
/// Bits of permissions: `BLK_PERM_CONSISTENT_READ`, `BLK_PERM_WRITE`, `BLK_PERM_RESIZE`.
const READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;
/// What a writer locks: it reads and writes, and lets nobody write or resize.
const OURS: [i64; 4] = [DOES + READ, DOES + WRITE, FORBIDS + WRITE, FORBIDS + RESIZE];
/// What who keeps others out locks: it lets nobody write or resize. Who reads finds no hindrance.
const KEEPS_OUT: [i64; 2] = [FORBIDS + WRITE, FORBIDS + RESIZE];
/// What contradicts it.
const AGAINST_US: [i64; 4] = [FORBIDS + READ, FORBIDS + WRITE, DOES + WRITE, DOES + RESIZE];

/// Why an image is not locked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageLockError {
    /// Another process writes the image, or does not let others write.
    #[error("{} is in use by another process", path.display())]
    InUse {
        /// The image.
        path: PathBuf,
    },
    /// The file cannot be opened, or its file system has no such locks.
    #[error("cannot lock {}", path.display())]
    System {
        /// The image.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
}

/// The locks of a writer, on an image that no QEMU can open meanwhile unless it was told to ignore locks. Released on
/// drop.
#[derive(Debug)]
pub struct ImageLock {
    file: File,
}

impl ImageLock {
    /// Takes the locks.
    ///
    /// # Errors
    /// [`ImageLockError::InUse`] if a QEMU has the image open for writing, or for reading without others writing.
    pub fn take(path: &Path) -> Result<ImageLock, ImageLockError> {
        let failed = |source| ImageLockError::System { path: path.to_owned(), source };
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(failed)?;
        let lock = ImageLock { file };
        for byte in OURS {
            set(&lock.file, byte, 1, libc::F_RDLCK).map_err(failed)?;
        }
        // Looked at after ours are there: of two that come at the same time, at least one sees the other.
        for byte in AGAINST_US {
            if is_locked(&lock.file, byte).map_err(failed)? {
                return Err(ImageLockError::InUse { path: path.to_owned() });
            }
        }
        Ok(lock)
    }

    /// Takes them beside one's own that keep others out, which stay: at no moment can anybody else open the image for writing.
    ///
    /// # Errors
    /// As of [`ImageLock::take`]. A reader that does not let others write counts.
    pub fn beside(path: &Path, kept: &KeepOut) -> Result<ImageLock, ImageLockError> {
        let failed = |source| ImageLockError::System { path: path.to_owned(), source };
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(failed)?;
        let lock = ImageLock { file };
        // A file does not see its own locks, and so the one that is kept sees those of others, until this one has the same.
        let is_free = |bytes: [i64; 2]| {
            let locked = bytes.map(|byte| is_locked(&kept.file, byte).map_err(failed));
            for byte in locked {
                if byte? {
                    return Err(ImageLockError::InUse { path: path.to_owned() });
                }
            }
            Ok(())
        };
        is_free([DOES + WRITE, DOES + RESIZE])?;
        for byte in [DOES + READ, DOES + WRITE] {
            set(&lock.file, byte, 1, libc::F_RDLCK).map_err(failed)?;
        }
        is_free([FORBIDS + READ, FORBIDS + WRITE])?;
        for byte in KEEPS_OUT {
            set(&lock.file, byte, 1, libc::F_RDLCK).map_err(failed)?;
        }
        Ok(lock)
    }
}

impl Drop for ImageLock {
    fn drop(&mut self) {
        // Closing would do, but for a child that is just being started and has not closed its copy yet.
        if let Err(error) = set(&self.file, DOES, FORBIDS, libc::F_UNLCK) {
            tracing::warn!(%error, "an image's locks stay until its file is closed everywhere");
        }
    }
}

/// Keeps every QEMU from opening an image for writing, unless it was told to ignore locks. Taken beside the locks of one that has
/// it open already, which notices nothing of it. Released on drop, for every process that has this very file open.
#[derive(Debug)]
pub struct KeepOut {
    file: File,
    /// Others that have the file open keep the locks.
    passed_on: AtomicBool,
}

impl KeepOut {
    /// Takes the locks, whoever else has some. The image is not written, and opened for reading only.
    ///
    /// # Errors
    /// [`ImageLockError::System`] if the file cannot be opened for reading, or its file system has no such locks.
    pub fn take(path: &Path) -> Result<KeepOut, ImageLockError> {
        let failed = |source| ImageLockError::System { path: path.to_owned(), source };
        let lock = KeepOut { file: File::open(path).map_err(failed)?, passed_on: AtomicBool::default() };
        for byte in KEEPS_OUT {
            set(&lock.file, byte, 1, libc::F_RDLCK).map_err(failed)?;
        }
        Ok(lock)
    }

    /// Whether somebody writes the image.
    ///
    /// # Errors
    /// What the system said.
    pub fn is_written(&self) -> io::Result<bool> {
        is_locked(&self.file, DOES + WRITE)
    }

    /// Whether somebody else lets nobody write the image, as this does.
    ///
    /// # Errors
    /// What the system said.
    pub fn is_kept_by_others(&self) -> io::Result<bool> {
        is_locked(&self.file, FORBIDS + WRITE)
    }

    /// When this is dropped, leaves the locks to whoever else has this very file open. As when the process ends, they go with the last of
    /// them.
    pub fn pass_on(&self) {
        self.passed_on.store(true, Ordering::Relaxed);
    }

    /// The file that is locked, whatever its name is by now.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }
}

impl Drop for KeepOut {
    fn drop(&mut self) {
        if self.passed_on.load(Ordering::Relaxed) {
            return;
        }
        // As of an `ImageLock`.
        if let Err(error) = set(&self.file, DOES, FORBIDS, libc::F_UNLCK) {
            tracing::warn!(%error, "an image's locks stay until its file is closed everywhere");
        }
    }
}

/// Whether another process writes an image or does not let others write it, by QEMU's locks. A QEMU that is paused has
/// its locks; one that was migrated away has let go of them. A lock of this process counts too.
///
/// # Errors
/// If the file cannot be opened for reading, or its file system has no such locks.
pub fn in_use(path: &Path) -> io::Result<bool> {
    let file = File::open(path)?;
    Ok(is_locked(&file, DOES + WRITE)? || is_locked(&file, FORBIDS + WRITE)?)
}

fn set(file: &File, start: i64, len: i64, kind: libc::c_int) -> io::Result<()> {
    fcntl(file, libc::F_OFD_SETLK, &mut flock(start, len, kind))
}

/// Whether somebody else has a lock on a byte.
fn is_locked(file: &File, byte: i64) -> io::Result<bool> {
    // An exclusive lock, which any other stands in the way of, is only asked about.
    let mut lock = flock(byte, 1, libc::F_WRLCK);
    fcntl(file, libc::F_OFD_GETLK, &mut lock)?;
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}

fn flock(start: i64, len: i64, kind: libc::c_int) -> libc::flock {
    libc::flock {
        // The kinds are 0, 1 and 2.
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start,
        l_len: len,
        l_pid: 0,
    }
}

fn fcntl(file: &File, command: libc::c_int, lock: &mut libc::flock) -> io::Result<()> {
    // SAFETY: the descriptor is open while `file` is borrowed, and both commands that are used here read and write
    // nothing but the one flock, which is borrowed for as long.
    match unsafe { libc::fcntl(file.as_raw_fd(), command, std::ptr::from_mut(lock)) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_keeps_others_out_until_it_is_dropped() {
        let image = tempfile::NamedTempFile::new().unwrap();
        assert!(!in_use(image.path()).unwrap());
        let lock = ImageLock::take(image.path()).unwrap();
        assert!(in_use(image.path()).unwrap());
        let copy = lock.file.try_clone().unwrap();
        assert!(matches!(ImageLock::take(image.path()), Err(ImageLockError::InUse { .. })));
        drop(lock);
        assert!(!in_use(image.path()).unwrap(), "a copy of the descriptor does not keep the lock");
        drop(ImageLock::take(image.path()).unwrap());
        drop(copy);
    }

    #[test]
    fn who_is_kept_out_is_a_writer_and_no_reader() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let writer = ImageLock::take(image.path()).unwrap();
        let kept = KeepOut::take(image.path()).unwrap();
        assert!(kept.is_written().unwrap(), "it is taken beside one that writes");
        drop(writer);
        assert!(!kept.is_written().unwrap());
        assert!(in_use(image.path()).unwrap());
        assert!(matches!(ImageLock::take(image.path()), Err(ImageLockError::InUse { .. })));
        // What a reader looks at: whether somebody writes, or lets nobody read.
        let reader = File::open(image.path()).unwrap();
        for byte in [DOES + WRITE, FORBIDS + READ] {
            assert!(!is_locked(&reader, byte).unwrap());
        }
        drop(kept);
        drop(ImageLock::take(image.path()).unwrap());
    }

    #[test]
    fn who_writes_beside_its_own_lock_lets_nobody_in_at_any_moment() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let kept = KeepOut::take(image.path()).unwrap();
        let reader = File::open(image.path()).unwrap();
        for byte in [FORBIDS + WRITE, DOES + WRITE] {
            set(&reader, byte, 1, libc::F_RDLCK).unwrap();
            assert!(matches!(ImageLock::beside(image.path(), &kept), Err(ImageLockError::InUse { .. })));
            set(&reader, byte, 1, libc::F_UNLCK).unwrap();
        }
        assert!(!kept.is_written().unwrap(), "an attempt leaves nothing");
        let writer = ImageLock::beside(image.path(), &kept).unwrap();
        assert!(is_locked(&reader, DOES + WRITE).unwrap(), "who reads can tell");
        drop(kept);
        assert!(ImageLock::take(image.path()).is_err());
        let kept = KeepOut::take(image.path()).unwrap();
        assert!(kept.is_kept_by_others().unwrap());
        drop(writer);
        assert!(!kept.is_kept_by_others().unwrap());
        assert!(ImageLock::take(image.path()).is_err());
        drop(kept);
        drop(ImageLock::take(image.path()).unwrap());
    }

    #[test]
    fn readers_that_let_others_write_are_no_hindrance() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let reader = File::open(image.path()).unwrap();
        set(&reader, DOES + READ, 1, libc::F_RDLCK).unwrap();
        drop(ImageLock::take(image.path()).unwrap());
        set(&reader, FORBIDS + WRITE, 1, libc::F_RDLCK).unwrap();
        assert!(ImageLock::take(image.path()).is_err());
    }
}
