//! What an image file is, and whether somebody uses it.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// What an image is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Image {
    /// A qcow2 image (docs/interop/qcow2.txt).
    Qcow2 {
        /// Bytes, as the guest sees them.
        virtual_size: u64,
        /// Bytes in a cluster.
        cluster_size: u64,
    },
    /// An image of another known format.
    Other(&'static str),
    /// None of these: its bytes are the disk's.
    Raw {
        /// Bytes.
        size: u64,
    },
}

impl Image {
    /// The format, by QEMU's name for it.
    #[must_use]
    pub fn format(&self) -> &'static str {
        match self {
            Image::Qcow2 { .. } => "qcow2",
            Image::Other(format) => format,
            Image::Raw { .. } => "raw",
        }
    }

    /// Bytes, as the guest sees them; 0 where that is not known.
    #[must_use]
    pub fn virtual_size(&self) -> u64 {
        match self {
            Image::Qcow2 { virtual_size, .. } => *virtual_size,
            Image::Raw { size } => *size,
            Image::Other(_) => 0,
        }
    }
}

/// What the formats that QEMU knows begin with.
const MAGIC: &[(&[u8], &str)] = &[
    (b"KDMV", "vmdk"),
    (b"COWD", "vmdk"),
    (b"# Disk DescriptorFile", "vmdk"),
    (b"<<< ", "vdi"),
    (b"conectix", "vpc"),
    (b"vhdxfile", "vhdx"),
    (b"QED\0", "qed"),
    (b"LUKS\xba\xbe", "luks"),
    (b"WithoutFreeSpace", "parallels"),
];
const QCOW2: &[u8; 4] = b"QFI\xfb";
/// Cluster sizes that QEMU accepts, as powers of two.
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;

/// Finds out what an image is, from how it begins.
///
/// # Errors
/// Where it cannot be read, or calls itself qcow2 and is not.
pub fn examine(path: &Path) -> io::Result<Image> {
    let mut file = File::open(path)?;
    let size = file.seek(SeekFrom::End(0))?;
    let mut head = [0; 64];
    let length = file.read_at(&mut head, 0)?;
    let head = &head[..length];
    if head.starts_with(QCOW2) {
        let field = |at: usize, length: usize| -> io::Result<u64> {
            let bytes = head.get(at..at + length).ok_or(io::ErrorKind::UnexpectedEof)?;
            Ok(bytes.iter().fold(0, |number, &byte| number << 8 | u64::from(byte)))
        };
        let bits = u32::try_from(field(20, 4)?).unwrap_or(u32::MAX);
        if !CLUSTER_BITS.contains(&bits) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a qcow2 image with impossible clusters"));
        }
        return Ok(Image::Qcow2 { virtual_size: field(24, 8)?, cluster_size: 1 << bits });
    }
    let other = MAGIC.iter().find(|(magic, _)| head.starts_with(magic));
    Ok(other.map_or(Image::Raw { size }, |(_, format)| Image::Other(format)))
}

/// Where QEMU's image locks are (block/file-posix.c): a byte for each permission that a user has, and one for each that
/// it does not share.
const HAS: i64 = 100;
const SHARES_NOT: i64 = 200;
/// The permission to write (include/block/block-common.h).
const WRITE: i64 = 1;

/// Whether another program writes an image, or does not want it to be written.
///
/// # Errors
/// Where that cannot be told.
pub fn in_use(path: &Path) -> io::Result<bool> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    for at in [HAS + WRITE, SHARES_NOT + WRITE] {
        let mut lock = write_lock(at, libc::F_WRLCK);
        // SAFETY: the descriptor is open, and the structure outlives the call.
        if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &mut lock) } != 0 {
            return Err(io::Error::last_os_error());
        }
        if i32::from(lock.l_type) != libc::F_UNLCK {
            return Ok(true);
        }
    }
    Ok(false)
}

fn write_lock(at: i64, kind: libc::c_int) -> libc::flock {
    libc::flock {
        l_type: libc::c_short::try_from(kind).unwrap_or_default(),
        l_whence: 0,
        l_start: at,
        l_len: 1,
        l_pid: 0,
    }
}

/// The lock of a program that writes an image: no QEMU writes it meanwhile. Let go of when dropped.
#[derive(Debug)]
pub struct ImageLock {
    _file: File,
}

impl ImageLock {
    /// Locks an image.
    ///
    /// # Errors
    /// [`io::ErrorKind::ResourceBusy`] where somebody else writes it.
    pub fn take(path: &Path) -> io::Result<ImageLock> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        for at in [HAS + WRITE, SHARES_NOT + WRITE] {
            // Shared, as QEMU takes them: that another holds the opposite byte is what excludes it.
            let lock = write_lock(at, libc::F_RDLCK);
            // SAFETY: as above.
            if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        for at in [HAS + WRITE, SHARES_NOT + WRITE] {
            let mut lock = write_lock(at, libc::F_WRLCK);
            // SAFETY: as above.
            if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &mut lock) } != 0 {
                return Err(io::Error::last_os_error());
            }
            if i32::from(lock.l_type) != libc::F_UNLCK {
                return Err(io::Error::new(io::ErrorKind::ResourceBusy, "another program uses the image"));
            }
        }
        Ok(ImageLock { _file: file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(content: &[u8]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), content).unwrap();
        file
    }

    #[test]
    fn images_are_known_by_how_they_begin() {
        let mut qcow2 = vec![0; 104];
        qcow2[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        qcow2[20..24].copy_from_slice(&16u32.to_be_bytes());
        qcow2[24..32].copy_from_slice(&(5u64 << 30).to_be_bytes());
        let found = examine(image(&qcow2).path()).unwrap();
        assert_eq!(found, Image::Qcow2 { virtual_size: 5 << 30, cluster_size: 65536 });
        qcow2[23] = 63;
        assert!(examine(image(&qcow2).path()).is_err());
        assert!(examine(image(b"QFI\xfb").path()).is_err());
        assert_eq!(examine(image(b"KDMV....").path()).unwrap().format(), "vmdk");
        assert_eq!(examine(image(b"").path()).unwrap(), Image::Raw { size: 0 });
        assert_eq!(examine(image(&[7; 1000]).path()).unwrap().virtual_size(), 1000);
    }

    #[test]
    fn one_writer_at_a_time() {
        let image = image(&[0; 4096]);
        assert!(!in_use(image.path()).unwrap());
        let lock = ImageLock::take(image.path()).unwrap();
        assert!(in_use(image.path()).unwrap());
        assert_eq!(ImageLock::take(image.path()).unwrap_err().kind(), io::ErrorKind::ResourceBusy);
        drop(lock);
        assert!(!in_use(image.path()).unwrap());
    }
}
