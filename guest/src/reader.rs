//! Reads a disk over and over, through the page cache: memory that is written by a device, not by a CPU.
//!
//! Every block of the disk says which one it is ([`block`]). A block is read twice: the first time from the disk, the second
//! time, some megabytes later, from the memory that the device was told to write. If that memory was left behind when the
//! machine moved, it says something else.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering::Relaxed;

use crate::status::Counters;

/// Bytes of a block.
pub const BLOCK: usize = 4096;
/// Blocks between the two reads: 8 MiB.
const WINDOW: u64 = 2048;

/// What a block of the disk holds: its number, again and again.
#[must_use]
pub fn block(number: u64) -> [u8; BLOCK] {
    let mut block = [0; BLOCK];
    block.as_chunks_mut::<8>().0.fill(number.to_le_bytes());
    block
}

/// Reads the disk, a window at a time, for ever. Blocks that are not what they should be are counted as stale and told.
///
/// # Errors
/// Where the disk cannot be read, or is smaller than a window.
pub fn run(disk: &File, blocks: u64, counters: &Counters, tell: impl Fn(&str)) -> io::Result<()> {
    if blocks < WINDOW {
        return Err(io::Error::other("the disk is smaller than 8 MiB"));
    }
    let mut buffer = vec![0; BLOCK * 32];
    loop {
        for window in (0..blocks - WINDOW + 1).step_by(WINDOW as usize) {
            forget(disk, window)?;
            for pass in ["disk", "memory"] {
                for first in (window..window + WINDOW).step_by(buffer.len() / BLOCK) {
                    disk.read_exact_at(&mut buffer, first * BLOCK as u64)?;
                    for (number, read) in (first..).zip(buffer.chunks_exact(BLOCK)) {
                        if read != block(number) {
                            counters.stale.fetch_add(1, Relaxed);
                            tell(&format!("block {number} read from {pass} begins {:02x?}", &read[..16]));
                        }
                    }
                }
            }
        }
    }
}

/// Has the kernel forget a window, so that it is read from the disk again.
fn forget(disk: &File, first: u64) -> io::Result<()> {
    let (start, length) = (first * BLOCK as u64, WINDOW * BLOCK as u64);
    // SAFETY: no pointers; the descriptor is open for the duration of the call.
    let error = unsafe {
        libc::posix_fadvise(
            disk.as_raw_fd(),
            start.cast_signed(),
            length.cast_signed(),
            libc::POSIX_FADV_DONTNEED,
        )
    };
    if error == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(error)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_says_which_one_it_is_throughout() {
        let block = block(0x0102);
        assert_eq!(block[..8], [2, 1, 0, 0, 0, 0, 0, 0]);
        assert!(block.chunks_exact(8).all(|word| word == &block[..8]));
    }
}
