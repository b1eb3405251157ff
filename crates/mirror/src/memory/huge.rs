//! Files on hugetlbfs. They differ from those on a tmpfs in four ways (seen on Linux 6.18):
//!
//! - there is no `pwrite`: content is written through a mapping. A store to a huge page that cannot be had is a SIGBUS,
//!   so every huge page is allocated by `fallocate`, which fails with ENOSPC instead, before anything is stored to it;
//! - `SEEK_DATA` takes all of the file for data, so holes cannot be found; `pread` of a hole gives zeros and allocates
//!   nothing, as on a tmpfs;
//! - a hole that covers a whole huge page gives the page back *and* what QEMU's mapping had reserved of the pool for it:
//!   the guest's next write there could be a SIGBUS to QEMU. So nothing is punched, and zeros are written;
//! - sizes are multiples of the huge page.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{FallocateFlags, fallocate};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// `HUGETLBFS_MAGIC` of linux/magic.h.
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// The size of the pages of a file in bytes, if it is on hugetlbfs.
pub(super) fn page_size(file: &File) -> io::Result<Option<u64>> {
    let system = rustix::fs::fstatfs(file)?;
    let is_huge = u64::try_from(system.f_type) == Ok(HUGETLBFS_MAGIC);
    Ok(u64::try_from(system.f_bsize).ok().filter(|_| is_huge))
}

/// A writable mapping of a whole file on hugetlbfs.
#[derive(Debug)]
pub(super) struct HugeMapping {
    base: NonNull<u8>,
    len: usize,
    page_size: usize,
    /// For every huge page of the file whether it is there to be written.
    allocated: Vec<AtomicBool>,
}

// SAFETY: the mapping belongs to this value alone and stays where it is until it is dropped. It is shared memory that is
// only ever copied to, by raw pointer; no reference into it exists. Who writes which page is settled by the caller
// (a page has one stream), and two threads that wrote one would spoil that page, not this process.
unsafe impl Send for HugeMapping {}
// SAFETY: as above; what threads share beside the mapping is atomic.
unsafe impl Sync for HugeMapping {}

impl HugeMapping {
    /// Maps a file. Takes nothing from the pool of huge pages.
    pub(super) fn new(file: &File, page_size: u64) -> io::Result<HugeMapping> {
        let absurd = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let len = usize::try_from(file.metadata()?.len()).map_err(absurd)?;
        let page_size = usize::try_from(page_size).map_err(absurd)?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // NORESERVE: QEMU's mapping has reserved the pages already, and each is allocated before it is used.
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice changes nothing that exists.
        let base = unsafe { mmap(std::ptr::null_mut(), len, protection, flags, file, 0) }?;
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        let allocated = (0..len.div_ceil(page_size)).map(|_| AtomicBool::new(false)).collect();
        Ok(HugeMapping { base, len, page_size, allocated })
    }

    /// Writes at `offset` of the file.
    ///
    /// # Errors
    /// When no huge page is left for it (ENOSPC), or the place is not in the file.
    pub(super) fn write(&self, file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
        let place = self.make_room(file, offset, bytes.len())?;
        // SAFETY: `place` begins that many bytes of this mapping, all of them allocated; the caller's bytes are
        // ordinary memory of this process, so the two do not overlap. The file cannot have become shorter under it:
        // it was made for this copy, and nothing but this process and its QEMU, which never resizes it, has it.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), place.as_ptr(), bytes.len()) };
        Ok(())
    }

    /// Writes zeros at `offset` of the file.
    ///
    /// # Errors
    /// As [`HugeMapping::write`].
    pub(super) fn clear(&self, file: &File, offset: u64, len: usize) -> io::Result<()> {
        let place = self.make_room(file, offset, len)?;
        // SAFETY: as in `write`.
        unsafe { std::ptr::write_bytes(place.as_ptr(), 0, len) };
        Ok(())
    }

    /// Allocates the huge pages of a part of the file, and says where in the mapping it is.
    fn make_room(&self, file: &File, offset: u64, len: usize) -> io::Result<NonNull<u8>> {
        let outside = || io::Error::from(io::ErrorKind::UnexpectedEof);
        let begin = usize::try_from(offset).map_err(|_| outside())?;
        let end = begin.checked_add(len).filter(|end| *end <= self.len).ok_or_else(outside)?;
        for page in begin / self.page_size..end.div_ceil(self.page_size) {
            // Whoever reads `true` here comes after the system call of who wrote it, or does not mind a second one.
            if !self.allocated[page].load(Ordering::Acquire) {
                let at = (page * self.page_size) as u64;
                rustix::io::retry_on_intr(|| {
                    fallocate(file.as_fd(), FallocateFlags::KEEP_SIZE, at, self.page_size as u64)
                })?;
                self.allocated[page].store(true, Ordering::Release);
            }
        }
        // SAFETY: `begin` is within the mapping, as was just checked.
        Ok(unsafe { self.base.add(begin) })
    }
}

impl Drop for HugeMapping {
    fn drop(&mut self) {
        // SAFETY: nothing refers to the mapping any more.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// Whether no page of the file is allocated: all of it reads as zeros.
pub(super) fn is_empty(file: &File) -> io::Result<bool> {
    Ok(file.metadata()?.blocks() == 0)
}
