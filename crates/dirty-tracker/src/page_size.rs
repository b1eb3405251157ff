//! In what size of pages a mapping is tracked.

use crate::maps::Mapping;
use rustix::fs::{Mode, OFlags};
use rustix::fs::{StatFs, fstat, open, statfs};
use std::path::{Path, PathBuf};

/// The page size of everything but hugetlbfs on the supported architecture. Transparent huge pages do
/// not count: the kernel splits them when it protects a part.
pub(crate) const BASE: u64 = 4096;

/// `HUGETLBFS_MAGIC` of `statfs`.
const HUGETLBFS: i64 = 0x9584_58f6;

/// The page size of a mapping of process `pid`, in bytes: 4096, or the huge page size of its hugetlbfs.
///
/// Found by `statfs` on the mapped file, by whichever way leads to it: its path, `/proc/PID/map_files`
/// (privileged), a descriptor that the process still holds. Only when all fail, as for a file without a name that
/// was closed, is smaps read: it has the answer for every mapping, but the kernel walks all page tables
/// for it, with the address space locked, which a big process notices.
pub(crate) fn of_mapping(pid: u32, mapping: &Mapping) -> u64 {
    // hugetlbfs has no block device, so its files show major number 0, as tmpfs files do.
    if mapping.inode == 0 || libc::major(mapping.device) != 0 {
        return BASE;
    }
    let by_name = mapping
        .path
        .strip_prefix("/")
        .ok()
        .filter(|_| !mapping.deleted)
        .map(|path| PathBuf::from(format!("/proc/{pid}/root")).join(path));
    let by_range = format!("/proc/{pid}/map_files/{:x}-{:x}", mapping.range.start, mapping.range.end);
    by_name
        .into_iter()
        .chain([PathBuf::from(by_range)])
        .find_map(|path| of_file(&path, mapping))
        .or_else(|| {
            let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
            descriptors.filter_map(Result::ok).find_map(|entry| of_file(&entry.path(), mapping))
        })
        .or_else(|| {
            from_smaps(&std::fs::read_to_string(format!("/proc/{pid}/smaps")).ok()?, mapping.range.start)
        })
        .unwrap_or(BASE)
}

/// The page size of the filesystem of the file at `path`, if it is the file that is mapped.
fn of_file(path: &Path, mapping: &Mapping) -> Option<u64> {
    // O_PATH: the file is looked at, not opened, so no driver and no lease notices.
    let file = open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).ok()?;
    let found = fstat(&file).ok()?;
    if !mapping.is_of_file(found.st_dev, found.st_ino) {
        return None;
    }
    let StatFs { f_type, f_bsize, .. } = rustix::fs::fstatfs(&file).or_else(|_| statfs(path)).ok()?;
    if f_type == HUGETLBFS { u64::try_from(f_bsize).ok() } else { Some(BASE) }
}

/// The `KernelPageSize` of the mapping that starts at `start`.
fn from_smaps(smaps: &str, start: u64) -> Option<u64> {
    let head = format!("{start:08x}-");
    let size = smaps
        .lines()
        .skip_while(|line| !line.starts_with(&head))
        .find_map(|line| line.strip_prefix("KernelPageSize:"))?;
    size.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::maps::mappings;

    #[test]
    fn smaps_is_read_at_the_right_mapping() {
        let smaps = "00400000-00500000 rw-s 0 00:01 1 /a\nKernelPageSize:        4 kB\n\
                     7f0000000000-7f0040000000 rw-s 0 00:01 2 /b\nSize: 1 kB\nKernelPageSize:     2048 kB\n";
        assert_eq!(from_smaps(smaps, 0x40_0000), Some(4096));
        assert_eq!(from_smaps(smaps, 0x7f00_0000_0000), Some(2 << 20));
        assert_eq!(from_smaps(smaps, 0x1000), None);
    }

    #[test]
    fn our_own_mappings_are_of_base_pages() {
        let pid = std::process::id();
        for mapping in mappings(pid).unwrap() {
            assert_eq!(of_mapping(pid, &mapping), BASE, "{mapping:?}");
        }
    }
}
