//! Guest RAM of a live QEMU: where it can be read, and where QEMU has mapped it.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use crate::{
    Process, RamBackend, Spec,
    maps::{FileId, MapsLine, maps},
};

/// Where RAM that is no named file is in QEMU's address space, by the id of its backend.
pub type RamAddresses = BTreeMap<String, u64>;

/// `f_type` of hugetlbfs (linux/magic.h).
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// A piece of guest RAM.
#[derive(Debug)]
pub struct RamBlock {
    /// The id of its backend, which names it in QEMU's migration stream too.
    pub id: String,
    /// The file's path, as on the command line, which may have been deleted since; of RAM that is no named file, where it is read.
    pub path: PathBuf,
    /// The file, open for reading and writing; of private RAM the memory of the process (`/proc/PID/mem`), open for reading.
    pub file: File,
    /// Nothing but the process itself has it mapped: it is read through the process's address space.
    pub private: bool,
    /// Where it is private: no file is behind it, so what was never touched of it is zero.
    pub anonymous: bool,
    /// A migration by QEMU carries it, whatever is set: it is no shared file with a name.
    pub in_stream: bool,
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
    /// Bytes into the file; of private RAM, whose file is the process's memory, the address once more.
    pub file_offset: u64,
    /// Bytes.
    pub len: u64,
}

/// Why guest RAM cannot be found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RamError {
    /// Its backend is not a shared, named file, and it is not known where QEMU has it.
    #[error("RAM {id} is private to QEMU, and it is not known where it is")]
    Private {
        /// The backend's id.
        id: String,
    },
    /// The process has ended, or it is not certain that it has not.
    #[error("process {pid} has ended")]
    Gone {
        /// The process.
        pid: u32,
    },
    /// The process's memory cannot be read.
    #[error("cannot open {} to read RAM {id}", path.display())]
    Memory {
        /// The backend's id.
        id: String,
        /// The file below /proc.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
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

/// Finds the guest's RAM in the process: for every backend on the command line that is a named file that file, checked by device and
/// inode to be the one that QEMU has mapped, and the mappings. A deleted file is found through QEMU's descriptors. Other RAM is at one of
/// these `addresses`, as [`RamTable::locate`](crate::RamTable::locate) finds them.
///
/// # Errors
/// Names the backend or file that stands in the way.
pub fn ram_blocks(
    process: &Process,
    spec: &Spec,
    addresses: &RamAddresses,
) -> Result<Vec<RamBlock>, RamError> {
    let maps = maps(process).map_err(|(path, source)| RamError::Maps { path, source })?;
    let block = |backend: &RamBackend| match is_named_file(backend) {
        true => file_block(process, backend, &maps),
        false => block_at(process, backend, &maps, addresses.get(&backend.id).copied()),
    };
    spec.ram_backends().iter().map(block).collect()
}

/// Whether RAM is a shared file with a name, which can be opened by that.
pub(crate) fn is_named_file(backend: &RamBackend) -> bool {
    backend.named_file().is_some()
}

fn file_block(process: &Process, backend: &RamBackend, maps: &[MapsLine]) -> Result<RamBlock, RamError> {
    let id = backend.id.clone();
    let Some(path) = backend.mem_path.as_ref().map(|path| process.absolute(path)) else {
        return Err(RamError::Private { id });
    };
    let (file, identity) = open_mapped(process, &id, &path, maps)?;
    shared_block(backend, path, file, identity, maps)
}

/// RAM in a file that others can map too.
fn shared_block(
    backend: &RamBackend,
    path: PathBuf,
    file: File,
    identity: FileId,
    maps: &[MapsLine],
) -> Result<RamBlock, RamError> {
    let id = backend.id.clone();
    let mut mappings: Vec<Mapping> =
        maps.iter().filter(|line| line.file == identity && line.shared).map(|line| line.mapping).collect();
    mappings.sort_unstable_by_key(|mapping| mapping.file_offset);
    let mapped = mapped_from(backend.offset, &mappings);
    let page_size = page_size(&file);
    // A file on hugetlbfs is mapped in whole huge pages.
    if mapped != backend.size.next_multiple_of(page_size) {
        return Err(RamError::Incomplete { id, size: backend.size, mapped });
    }
    let in_stream = !is_named_file(backend);
    Ok(RamBlock {
        id,
        path,
        file,
        private: false,
        anonymous: false,
        in_stream,
        size: backend.size,
        mappings,
        page_size,
    })
}

/// RAM at an address: a file without a name that QEMU shares with others, or its own memory.
fn block_at(
    process: &Process,
    backend: &RamBackend,
    maps: &[MapsLine],
    address: Option<u64>,
) -> Result<RamBlock, RamError> {
    let id = backend.id.clone();
    let address = address.ok_or_else(|| RamError::Private { id: id.clone() })?;
    let there = maps.iter().find(|line| line.contains(address));
    let there = there.ok_or_else(|| RamError::Private { id: id.clone() })?;
    // Anonymous memory can be shared, with children, and has no descriptor then.
    let descriptor = match there.is_anonymous() {
        true => None,
        false => open_descriptor(process, &id, Path::new(&there.name), there.file)
            .ok()
            .or_else(|| open_mapping(process, there)),
    };
    if let (true, Some(file)) = (there.shared, descriptor.as_ref()) {
        let file = file.try_clone().map_err(|source| RamError::Open {
            id: id.clone(),
            path: (&there.name).into(),
            source,
        })?;
        return shared_block(backend, PathBuf::from(&there.name), file, there.file, maps);
    }
    let path = PathBuf::from(format!("/proc/{}/mem", process.pid));
    let file = File::open(&path).map_err(|source| RamError::Memory {
        id: id.clone(),
        path: path.clone(),
        source,
    })?;
    // Opened, it stays that process's.
    if !process.look().runs() {
        return Err(RamError::Gone { pid: process.pid });
    }
    let mapped = private_from(address, maps);
    if mapped < backend.size {
        return Err(RamError::Incomplete { id, size: backend.size, mapped });
    }
    let mappings = vec![Mapping { address, file_offset: address, len: backend.size }];
    let base = u64::try_from(rustix::param::page_size()).unwrap_or(4096);
    let page_size = descriptor.as_ref().map_or(base, page_size);
    let anonymous =
        maps.iter().filter(|line| line.meets(&(address..address + backend.size))).all(MapsLine::is_anonymous);
    Ok(RamBlock {
        id,
        path,
        file,
        private: true,
        anonymous,
        in_stream: true,
        size: backend.size,
        mappings,
        page_size,
    })
}

/// Bytes from an address on that are the process's own, without gap. The kernel has a line for each part that it treats in another way.
fn private_from(address: u64, maps: &[MapsLine]) -> u64 {
    let mut end = address;
    for line in maps.iter().filter(|line| line.readable) {
        if line.contains(end) {
            end = line.mapping.address + line.mapping.len;
        }
    }
    end - address
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
    Ok((open_descriptor(process, id, path, line.file)?, line.file))
}

/// Opens a file that has no name any more, or never had one, by the descriptor that QEMU has of it.
fn open_descriptor(process: &Process, id: &str, path: &Path, identity: FileId) -> Result<File, RamError> {
    let failed = |source| RamError::Open { id: id.to_owned(), path: path.to_owned(), source };
    let directory = PathBuf::from(format!("/proc/{}/fd", process.pid));
    for descriptor in fs::read_dir(directory).map_err(failed)? {
        let descriptor = descriptor.map_err(failed)?.path();
        if fs::metadata(&descriptor).is_ok_and(|file| FileId::of(&file) == identity) {
            return OpenOptions::new().read(true).write(true).open(descriptor).map_err(failed);
        }
    }
    Err(RamError::Deleted { path: path.to_owned() })
}

/// Opens a file of which the process has no descriptor, such as memory that it shares with its children, by what it has mapped. The kernel
/// lets only root do that.
fn open_mapping(process: &Process, line: &MapsLine) -> Option<File> {
    let (from, to) = (line.mapping.address, line.mapping.address + line.mapping.len);
    let path = format!("/proc/{}/map_files/{from:x}-{to:x}", process.pid);
    let file = OpenOptions::new().read(true).write(true).open(path).ok()?;
    (FileId::of(&file.metadata().ok()?) == line.file).then_some(file)
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

#[cfg(test)]
mod tests {
    use super::*;

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
