//! What the kernel says of a process's address space.

use std::{fs, io, os::unix::fs::MetadataExt, path::PathBuf};

use crate::{Mapping, Process};

/// What makes a file the same file: device and inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FileId {
    major: u32,
    minor: u32,
    inode: u64,
}

impl FileId {
    pub(crate) fn of(file: &fs::Metadata) -> FileId {
        let device = file.dev();
        FileId { major: rustix::fs::major(device), minor: rustix::fs::minor(device), inode: file.ino() }
    }
}

/// A line of `/proc/PID/maps`, see proc_pid_maps(5).
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct MapsLine {
    pub(crate) mapping: Mapping,
    pub(crate) readable: bool,
    pub(crate) shared: bool,
    pub(crate) file: FileId,
    pub(crate) name: String,
}

impl MapsLine {
    /// Whether it is no file's, and no stack or other special memory.
    pub(crate) fn is_anonymous(&self) -> bool {
        self.file.inode == 0 && (self.name.is_empty() || self.name.starts_with("[anon:"))
    }

    /// Whether some of these addresses are in it.
    pub(crate) fn meets(&self, addresses: &std::ops::Range<u64>) -> bool {
        self.mapping.address < addresses.end && addresses.start < self.mapping.address + self.mapping.len
    }

    /// Whether an address is in it.
    pub(crate) fn contains(&self, address: u64) -> bool {
        (self.mapping.address..self.mapping.address + self.mapping.len).contains(&address)
    }

    pub(crate) fn parse(line: &str) -> Option<MapsLine> {
        let hex = |text: &str| u64::from_str_radix(text, 16).ok();
        let mut rest = line;
        let mut field = || {
            let (word, after) = rest.split_once(' ').unwrap_or((rest, ""));
            rest = after.trim_start();
            word
        };
        let (from, to) = field().split_once('-')?;
        let permissions = field();
        let offset = field();
        let (major, minor) = field().split_once(':')?;
        let inode = field().parse().ok()?;
        let (from, to) = (hex(from)?, hex(to)?);
        Some(MapsLine {
            mapping: Mapping { address: from, file_offset: hex(offset)?, len: to.checked_sub(from)? },
            readable: permissions.starts_with('r'),
            shared: permissions.ends_with('s'),
            file: FileId {
                major: u32::from_str_radix(major, 16).ok()?,
                minor: u32::from_str_radix(minor, 16).ok()?,
                inode,
            },
            name: rest.to_owned(),
        })
    }
}

/// The kernel's map of a process. A line that cannot be understood is left out, and nothing is found there then.
///
/// # Errors
/// The file below /proc, and what the system says.
pub(crate) fn maps(process: &Process) -> Result<Vec<MapsLine>, (PathBuf, io::Error)> {
    let path = PathBuf::from(format!("/proc/{}/maps", process.pid));
    let text = fs::read_to_string(&path).map_err(|source| (path, source))?;
    Ok(text.lines().filter_map(MapsLine::parse).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_map() {
        let line = "7f00-8f00 rw-s 00001000 00:1a 42                         /dev/shm/a b (deleted)";
        assert_eq!(
            MapsLine::parse(line),
            Some(MapsLine {
                mapping: Mapping { address: 0x7f00, file_offset: 0x1000, len: 0x1000 },
                readable: true,
                shared: true,
                file: FileId { major: 0, minor: 26, inode: 42 },
                name: "/dev/shm/a b (deleted)".to_owned(),
            })
        );
        assert!(!MapsLine::parse("0-1 r-xp 0 08:01 5").unwrap().shared);
        assert_eq!(MapsLine::parse("nonsense"), None);
        assert_eq!(MapsLine::parse("2-1 r-xp 0 08:01 5"), None);
    }
}
