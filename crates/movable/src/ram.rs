//! Guest RAM as the mirror reads and writes it.

use mirror::memory::{RamFile, RamProcess};
use qemu::RamBlock;

/// A block of the RAM of process `pid`.
#[must_use]
pub fn file_of(block: RamBlock, pid: u32) -> RamFile {
    RamFile {
        offset: block.mappings.first().map_or(0, |mapping| mapping.file_offset),
        file: block.file,
        process: block.private.then_some(RamProcess { pid, anonymous: block.anonymous }),
    }
}
