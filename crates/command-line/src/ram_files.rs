//! Where the files with a machine's RAM are.

use std::path::{Path, PathBuf};

/// `HUGETLBFS_MAGIC` of linux/magic.h.
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;
/// What the names of RAM files, and of the directories that they are in, begin with.
const OURS: &str = "vmirror-";

/// The directory below `ram_dir`, or another tmpfs or hugetlbfs, that an agent has for its RAM files alone.
#[must_use]
pub fn ram_directory(directory: &Path, host: &str) -> PathBuf {
    let plain = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '_' };
    let host: String = host.chars().map(plain).collect();
    directory.join(format!("{OURS}{host}"))
}

/// The file that holds a piece of a VM's RAM. `@` can be in neither part of its name, so no two are equal.
#[must_use]
pub(crate) fn ram_file(directory: &Path, host: &str, vm: &str, backend: &str) -> PathBuf {
    ram_directory(directory, host).join(format!("{OURS}{vm}@{backend}"))
}

/// The directory that a RAM file was put into, at whichever host: not an agent's own below it, but the one that a host is configured
/// with, or that a file system is mounted on.
#[must_use]
pub fn ram_place(file: &Path) -> Option<&Path> {
    let ours = |path: &Path| {
        path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(OURS.as_bytes()))
    };
    let directory = file.parent()?;
    if ours(file) && ours(directory) { directory.parent() } else { Some(directory) }
}

/// The directory on hugetlbfs that a `mem-path` asks for: itself, or the one that its file is or shall be in.
#[must_use]
pub(crate) fn huge_directory(mem_path: &Path) -> Option<PathBuf> {
    let directory = if mem_path.is_dir() { mem_path } else { ram_place(mem_path)? };
    huge_page_size(directory).map(|_| directory.to_owned())
}

/// The size in bytes of the huge pages that files in a directory have: none where it is not on hugetlbfs.
#[must_use]
pub fn huge_page_size(directory: &Path) -> Option<u64> {
    let system = rustix::fs::statfs(directory).ok()?;
    let is_huge = u64::try_from(system.f_type) == Ok(HUGETLBFS_MAGIC);
    u64::try_from(system.f_bsize).ok().filter(|_| is_huge)
}
