//! What fuzz targets are given of this crate beyond its interface. Compiled for nobody else.

use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

pub use crate::journal::fuzzing::{Slot, slots};

/// A file without a name with this content at these places, and a path that leads to it.
pub(crate) fn memory_file(parts: &[(u64, &[u8])]) -> (File, PathBuf) {
    let file = rustix::fs::memfd_create("journal", rustix::fs::MemfdFlags::CLOEXEC);
    let file = File::from(file.expect("memory for a file"));
    for (at, content) in parts {
        file.write_all_at(content, *at).expect("memory for a file");
    }
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    (file, path)
}
