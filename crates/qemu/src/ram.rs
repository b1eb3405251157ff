//! Guest RAM of a live QEMU: its files, and where QEMU has mapped them.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
};

use crate::{Process, RamBackend, RamKind, Spec};

/// `f_type` of hugetlbfs (linux/magic.h).
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// A piece of guest RAM: a file that QEMU has mapped.
#[derive(Debug)]
pub struct RamBlock {
    /// The id of its backend, which names it in QEMU's migration stream too.
    pub id: String,
    /// The file's path, as on the command line. It may have been deleted since.
    pub path: PathBuf,
    /// The file, open for reading and writing.
    pub file: File,
    /// Bytes of RAM.
    pub size: u64,
    /// Where QEMU has mapped it: in the order of the file, without gap or overlap.
    pub mappings: Vec<Mapping>,
    /// Bytes per page: 4096, or that of hugetlbfs.
    pub page_size: u64,
}

/// A range of QEMU's address space that shows a range of a RAM file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapping {
    /// Address in QEMU's address space.
    pub address: u64,
    /// Bytes into the file.
    pub file_offset: u64,
    /// Bytes.
    pub len: u64,
}

/// Why guest RAM cannot be found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RamError {
    /// Its backend is not a shared, named file.
    #[error("RAM {id} is not a shared file with a name")]
    Private {
        /// The backend's id.
        id: String,
    },
    /// The process' map cannot be read.
    #[error("cannot read {}", path.display())]
    Maps {
        /// The file below /proc.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// A line of the map is not as documented in proc_pid_maps(5).
    #[error("the kernel's map of QEMU has a line that is not understood: {line:?}")]
    Form {
        /// The line.
        line: String,
    },
    /// QEMU has not mapped the file.
    #[error("QEMU has not mapped {} for RAM {id}", path.display())]
    NotMapped {
        /// The backend's id.
        id: String,
        /// The file.
        path: PathBuf,
    },
    /// QEMU has mapped a deleted file of that name and does not have it open any more.
    #[error("{} was deleted or replaced, and QEMU has no descriptor of it any more", path.display())]
    Deleted {
        /// The file.
        path: PathBuf,
    },
    /// Parts of the RAM are not mapped, or twice.
    #[error("RAM {id} of {size} bytes is mapped up to {mapped} bytes only")]
    Incomplete {
        /// The backend's id.
        id: String,
        /// Its size.
        size: u64,
        /// Bytes from its beginning that are mapped without gap or overlap.
        mapped: u64,
    },
    /// The file cannot be opened.
    #[error("cannot open {} for RAM {id}", path.display())]
    Open {
        /// The backend's id.
        id: String,
        /// The file.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
}

/// Finds the guest's RAM in the process: for every backend on the command line the file, checked by device and
/// inode to be the one that QEMU has mapped, and the mappings. A deleted file is found through QEMU's descriptors.
///
/// # Errors
/// Names the backend or file that stands in the way.
pub fn ram_blocks(process: &Process, spec: &Spec) -> Result<Vec<RamBlock>, RamError> {
    let path = PathBuf::from(format!("/proc/{}/maps", process.pid));
    let text = fs::read_to_string(&path).map_err(|source| RamError::Maps { path, source })?;
    let maps = text
        .lines()
        .map(|line| MapsLine::parse(line).ok_or_else(|| RamError::Form { line: line.to_owned() }));
    let maps = maps.collect::<Result<Vec<_>, _>>()?;
    spec.ram_backends().iter().map(|backend| ram_block(process, backend, &maps)).collect()
}

fn ram_block(process: &Process, backend: &RamBackend, maps: &[MapsLine]) -> Result<RamBlock, RamError> {
    let id = backend.id.clone();
    let path = match &backend.mem_path {
        Some(path) if backend.kind == RamKind::File && backend.share => process.absolute(path),
        _ => return Err(RamError::Private { id }),
    };
    let (file, identity) = open_mapped(process, &id, &path, maps)?;
    let mut mappings: Vec<Mapping> =
        maps.iter().filter(|line| line.file == identity && line.shared).map(|line| line.mapping).collect();
    mappings.sort_unstable_by_key(|mapping| mapping.file_offset);
    let mapped = mapped_from(backend.offset, &mappings);
    let page_size = page_size(&file);
    // A file on hugetlbfs is mapped in whole huge pages.
    if mapped != backend.size.next_multiple_of(page_size) {
        return Err(RamError::Incomplete { id, size: backend.size, mapped });
    }
    Ok(RamBlock { id, path, file, size: backend.size, mappings, page_size })
}

/// Bytes that are mapped from `offset` without gap or overlap; 0 if there is an overlap.
fn mapped_from(offset: u64, mappings: &[Mapping]) -> u64 {
    let mut end = offset;
    for mapping in mappings {
        if mapping.file_offset != end {
            return if mapping.file_offset < end { 0 } else { end - offset };
        }
        end += mapping.len;
    }
    end - offset
}

/// Opens the file that QEMU has mapped under this name.
fn open_mapped(
    process: &Process,
    id: &str,
    path: &Path,
    maps: &[MapsLine],
) -> Result<(File, FileId), RamError> {
    let failed = |source| RamError::Open { id: id.to_owned(), path: path.to_owned(), source };
    match OpenOptions::new().read(true).write(true).open(path) {
        Ok(file) => {
            let identity = FileId::of(&file.metadata().map_err(failed)?);
            if maps.iter().any(|line| line.file == identity) {
                return Ok((file, identity));
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(source) => return Err(failed(source)),
    }
    // The name is gone or belongs to another file by now. The kernel still tells what QEMU's mapping was called.
    let line = maps.iter().find(|line| {
        line.shared && line.name.strip_suffix(" (deleted)").is_some_and(|name| Path::new(name) == path)
    });
    let Some(line) = line else {
        return Err(RamError::NotMapped { id: id.to_owned(), path: path.to_owned() });
    };
    let directory = PathBuf::from(format!("/proc/{}/fd", process.pid));
    for descriptor in fs::read_dir(directory).map_err(failed)? {
        let descriptor = descriptor.map_err(failed)?.path();
        if fs::metadata(&descriptor).is_ok_and(|file| FileId::of(&file) == line.file) {
            let file = OpenOptions::new().read(true).write(true).open(descriptor).map_err(failed)?;
            return Ok((file, line.file));
        }
    }
    Err(RamError::Deleted { path: path.to_owned() })
}

fn page_size(file: &File) -> u64 {
    const BASE: u64 = 4096;
    match rustix::fs::fstatfs(file) {
        Ok(system) if u64::try_from(system.f_type) == Ok(HUGETLBFS_MAGIC) => {
            u64::try_from(system.f_bsize).unwrap_or(BASE)
        }
        _ => u64::try_from(rustix::param::page_size()).unwrap_or(BASE),
    }
}

impl RamBlock {
    /// Reads RAM at `offset` from its beginning. Holes read as zeros and stay holes, which reading through a mapping
    /// would not guarantee.
    ///
    /// # Errors
    /// What the system says.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let base = self.mappings.first().map_or(0, |mapping| mapping.file_offset);
        self.file.read_exact_at(buffer, base + offset)
    }
}

impl Process {
    /// A path as the process sees it: relative ones from its working directory.
    fn absolute(&self, path: &Path) -> PathBuf {
        if path.is_absolute() {
            return path.to_owned();
        }
        let directory = fs::read_link(format!("/proc/{}/cwd", self.pid)).unwrap_or_default();
        directory.join(path)
    }
}

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
struct MapsLine {
    mapping: Mapping,
    shared: bool,
    file: FileId,
    name: String,
}

impl MapsLine {
    fn parse(line: &str) -> Option<MapsLine> {
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
                shared: true,
                file: FileId { major: 0, minor: 26, inode: 42 },
                name: "/dev/shm/a b (deleted)".to_owned(),
            })
        );
        assert!(!MapsLine::parse("0-1 r-xp 0 08:01 5").unwrap().shared);
        assert_eq!(MapsLine::parse("nonsense"), None);
        assert_eq!(MapsLine::parse("2-1 r-xp 0 08:01 5"), None);
    }

    #[test]
    fn gaps_and_overlaps_are_seen() {
        let at = |file_offset, len| Mapping { address: 0, file_offset, len };
        assert_eq!(mapped_from(0, &[at(0, 8), at(8, 8)]), 16);
        assert_eq!(mapped_from(0, &[at(0, 8), at(12, 8)]), 8);
        assert_eq!(mapped_from(0, &[at(0, 8), at(4, 8)]), 0);
        assert_eq!(mapped_from(4, &[at(4, 8)]), 8);
        assert_eq!(mapped_from(0, &[]), 0);
    }
}
