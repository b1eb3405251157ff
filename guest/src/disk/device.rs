//! A disk: finding it, and its regions.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::error::DiskError;
use super::plan::Role;

const BLOCK_DEVICES: &str = "/sys/block";
/// Bytes of a sector in the kernel's files, whatever the disk's own.
const SECTOR: u64 = 512;

/// Bytes that begin where direct I/O wants them to.
#[repr(C, align(4096))]
#[derive(Debug)]
pub struct Aligned<const SIZE: usize>(pub [u8; SIZE]);

/// A disk that is open both ways.
#[derive(Debug)]
pub struct Device {
    /// Its serial number.
    pub serial: String,
    /// Its device file.
    pub path: PathBuf,
    /// Open for I/O around the page cache.
    pub direct: File,
    /// Open for I/O through the page cache.
    pub buffered: File,
    /// Its size.
    pub bytes: u64,
}

impl Device {
    /// Finds and opens the disk with that serial number.
    ///
    /// # Errors
    /// Where there is none, or it cannot be opened.
    pub fn find(serial: &str) -> Result<Self, DiskError> {
        let failed = |what| DiskError::system(serial, what);
        for entry in fs::read_dir(BLOCK_DEVICES).map_err(failed("looking for it"))? {
            let entry = entry.map_err(failed("looking for it"))?;
            // Not every block device has one.
            let Ok(found) = fs::read_to_string(entry.path().join("serial")) else { continue };
            if found.trim() != serial {
                continue;
            }
            let sectors = fs::read_to_string(entry.path().join("size")).map_err(failed("its size"))?;
            let sectors: u64 =
                sectors.trim().parse().map_err(io::Error::other).map_err(failed("its size"))?;
            let path = Path::new("/dev").join(entry.file_name());
            let open = |flags| OpenOptions::new().read(true).write(true).custom_flags(flags).open(&path);
            return Ok(Self {
                serial: serial.to_owned(),
                direct: open(libc::O_DIRECT).map_err(failed("opening it"))?,
                buffered: open(0).map_err(failed("opening it"))?,
                bytes: sectors * SECTOR,
                path,
            });
        }
        Err(DiskError::Missing(serial.to_owned()))
    }

    /// The roles with their regions, in bytes.
    ///
    /// # Errors
    /// Where the disk is too small for them.
    pub fn regions(&self, roles: &[Role]) -> Result<Vec<(Role, Range<u64>)>, DiskError> {
        let too_small = || DiskError::TooSmall { serial: self.serial.clone(), bytes: self.bytes };
        let mut next = 0;
        let mut regions = Vec::new();
        for role in roles {
            let end = role.region_mib.map_or(self.bytes, |mib| next + (mib << 20));
            if end > self.bytes || end <= next {
                return Err(too_small());
            }
            regions.push((*role, next..end));
            next = end;
        }
        Ok(regions)
    }

    /// A file that stands for a disk. Not opened for direct I/O, which not every file system has.
    #[cfg(test)]
    pub(super) fn of_file(serial: &str, file: &File, bytes: u64) -> Self {
        file.set_len(bytes).unwrap();
        let [direct, buffered] = [(); 2].map(|()| file.try_clone().unwrap());
        Self { serial: serial.to_owned(), path: PathBuf::new(), direct, buffered, bytes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::Work;

    #[test]
    fn regions_follow_each_other_and_stay_on_the_disk() {
        let device = Device::of_file("d", &tempfile::tempfile().unwrap(), 8 << 20);
        let journal = Work::Journal { rate: 0 };
        let regions = device.regions(&[Work::BLOCKS.within(5), journal.in_the_rest()]).unwrap();
        assert_eq!((&regions[0].1, &regions[1].1), (&(0..5 << 20), &(5 << 20..8 << 20)));
        for roles in [
            vec![Work::BLOCKS.within(9)],
            vec![Work::BLOCKS.within(8), journal.in_the_rest()],
            vec![Work::BLOCKS.within(7), journal.within(2)],
        ] {
            assert!(matches!(device.regions(&roles), Err(DiskError::TooSmall { .. })), "{roles:?}");
        }
    }

    #[test]
    fn a_disk_that_is_not_there_is_named() {
        let error = Device::find("no-such-serial").unwrap_err();
        assert!(error.to_string().contains("no-such-serial"), "{error}");
    }
}
