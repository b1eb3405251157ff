//! `ioctl(PAGEMAP_SCAN)` on `/proc/PID/pagemap`: which pages were written, and protecting them again.
//!
//! Structures and numbers are those of `include/uapi/linux/fs.h` since Linux 6.7.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;

/// Regions one call can return. 1.5 MiB of buffer; more written regions than that take another call.
const REGIONS_PER_CALL: usize = 1 << 16;

/// `PM_SCAN_WP_MATCHING`: protect what is returned, in the same step.
const WP_MATCHING: u64 = 1;
/// `PM_SCAN_CHECK_WPASYNC`: fail on memory that is not (any longer) under an asynchronous userfaultfd,
/// rather than skip it silently.
const CHECK_WPASYNC: u64 = 2;
/// `PAGE_IS_WRITTEN`: not protected, be there a page, one swapped out, or none.
const WRITTEN: u64 = 2;
/// `PAGE_IS_PRESENT`: mapped now.
const PRESENT: u64 = 8;
/// `PAGE_IS_SWAPPED`: swapped out, or protected though there is nothing yet.
const SWAPPED: u64 = 16;
/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::c_ulong = 0xC060_6610;

/// `struct pm_scan_arg`.
#[repr(C)]
struct ScanArgument {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    regions: u64,
    regions_length: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

impl PageRegion {
    const NONE: PageRegion = PageRegion { start: 0, end: 0, categories: 0 };
}

/// What to do with written pages besides returning them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protection {
    /// Leave them writable: they will be returned again.
    Leave,
    /// Protect them, so that they are returned again only when written again.
    Renew,
}

/// What is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sought {
    /// What was written.
    Written(Protection),
    /// What is not mapped now.
    Unmapped,
    /// What is neither mapped nor swapped out.
    Empty,
}

/// Bytes of an entry of the page map.
const ENTRY: usize = 8;

/// Which memory of a process, that no file backs, has nothing in it: what was never touched, or was given back. It reads as zeros.
///
/// Of a page table that is there, a page that was protected before it was touched counts as one that has something.
#[derive(Debug)]
pub struct Resident {
    pagemap: File,
}

impl Resident {
    /// Regions asked for at a time.
    const REGIONS: usize = 128;

    /// Looks at the memory of a process as it is now: after an `execve` it still means the old memory.
    ///
    /// # Errors
    /// When its pagemap cannot be opened.
    pub fn open(pid: u32) -> io::Result<Resident> {
        Ok(Resident { pagemap: File::open(format!("/proc/{pid}/pagemap"))? })
    }

    /// Whether all of a range of addresses is empty.
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn is_empty(&self, range: &Range<u64>) -> io::Result<bool> {
        let mut region = [PageRegion::NONE];
        let (count, _) = scan(self.pagemap.as_fd(), range.clone(), Sought::Empty, &mut region)?;
        let empty = count == 1 && region[0].start <= range.start && region[0].end >= range.end;
        if empty {
            self.is_there(range.start)?;
        }
        Ok(empty)
    }

    /// That the process has its memory still: of one that is ending, what is gone already looks empty. `PAGEMAP_SCAN` of Linux 6.18 refuses
    /// that itself, as was tried; whether all since 6.7 do is not known. To read the page map the memory has to be there
    /// (`mmget_not_zero` in the kernel's `pagemap_read`).
    fn is_there(&self, address: u64) -> io::Result<()> {
        let mut entry = [0; ENTRY];
        let at = address / rustix::param::page_size() as u64 * ENTRY as u64;
        match self.pagemap.read_at(&mut entry, at)? {
            ENTRY => Ok(()),
            _ => Err(io::Error::other("the process has ended")),
        }
    }

    /// Calls `found` with every empty part of a range of addresses, in order.
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn empty(&self, range: &Range<u64>, mut found: impl FnMut(Range<u64>)) -> io::Result<()> {
        let mut regions = vec![PageRegion::NONE; Self::REGIONS];
        let mut at = range.start;
        while at < range.end {
            let (count, end) = scan(self.pagemap.as_fd(), at..range.end, Sought::Empty, &mut regions)?;
            self.is_there(range.start)?;
            regions.iter().take(count).for_each(|region| found(region.start..region.end));
            if end <= at {
                return Err(io::Error::other("PAGEMAP_SCAN made no progress"));
            }
            at = end;
        }
        Ok(())
    }
}

/// The pagemap of one process, and the buffer its answers are put in.
pub(crate) struct Pagemap {
    file: File,
    buffer: Vec<PageRegion>,
}

impl std::fmt::Debug for Pagemap {
    /// Without the buffer, whose content means nothing between scans.
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Pagemap").field("file", &self.file).finish_non_exhaustive()
    }
}

impl Pagemap {
    /// Opens the pagemap of a process as it is now: after an `execve` it still means the old memory.
    pub(crate) fn open(pid: u32) -> io::Result<Self> {
        let file = File::open(format!("/proc/{pid}/pagemap"))?;
        Ok(Self { file, buffer: vec![PageRegion::NONE; REGIONS_PER_CALL] })
    }

    /// Calls `found` with every written run of addresses in `range`, in order. Returns how many calls
    /// to the kernel it took.
    ///
    /// When it fails part of the way, what `found` has been told before is true, and already protected.
    pub(crate) fn written(
        &mut self,
        range: &Range<u64>,
        protection: Protection,
        found: impl FnMut(Range<u64>),
    ) -> io::Result<u32> {
        self.walk(range, Sought::Written(protection), found)
    }

    /// Calls `found` with every run of addresses in `range` at which no page is mapped now, in order.
    pub(crate) fn unmapped(&mut self, range: &Range<u64>, found: impl FnMut(Range<u64>)) -> io::Result<u32> {
        self.walk(range, Sought::Unmapped, found)
    }

    fn walk(
        &mut self,
        range: &Range<u64>,
        sought: Sought,
        mut found: impl FnMut(Range<u64>),
    ) -> io::Result<u32> {
        let mut position = range.start;
        let mut calls = 0;
        while position < range.end {
            let (count, walk_end) = scan(self.file.as_fd(), position..range.end, sought, &mut self.buffer)?;
            calls += 1;
            for region in self.buffer.iter().take(count) {
                found(region.start..region.end);
            }
            if walk_end <= position {
                return Err(io::Error::other("PAGEMAP_SCAN made no progress"));
            }
            position = walk_end;
        }
        Ok(calls)
    }
}

/// Whether this kernel knows PAGEMAP_SCAN, tried on our own process, over no memory at all.
pub(crate) fn probe() -> io::Result<()> {
    let file = File::open("/proc/self/pagemap")?;
    scan(file.as_fd(), 0..0, Sought::Written(Protection::Leave), &mut []).map(|_| ())
}

/// One call: how many regions it returned, and up to where it looked.
fn scan(
    pagemap: BorrowedFd<'_>,
    range: Range<u64>,
    sought: Sought,
    buffer: &mut [PageRegion],
) -> io::Result<(usize, u64)> {
    let (flags, inverted, category) = match sought {
        Sought::Written(Protection::Leave) => (CHECK_WPASYNC, 0, WRITTEN),
        Sought::Written(Protection::Renew) => (CHECK_WPASYNC | WP_MATCHING, 0, WRITTEN),
        Sought::Unmapped => (CHECK_WPASYNC, PRESENT, PRESENT),
        Sought::Empty => (0, PRESENT | SWAPPED, PRESENT | SWAPPED),
    };
    let mut argument = ScanArgument {
        size: size_of::<ScanArgument>() as u64,
        flags,
        start: range.start,
        end: range.end,
        walk_end: 0,
        regions: if buffer.is_empty() { 0 } else { buffer.as_mut_ptr().expose_provenance() as u64 },
        regions_length: buffer.len() as u64,
        max_pages: 0,
        category_inverted: inverted,
        category_mask: category,
        category_anyof_mask: 0,
        return_mask: category,
    };
    // SAFETY: the argument is the structure this request reads and writes; the regions it points to
    // are `regions_length` of them, plain integers, and ours alone for the length of the call.
    let result = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut argument) };
    match usize::try_from(result) {
        Ok(count) => Ok((count, argument.walk_end)),
        Err(_) => Err(io::Error::last_os_error()),
    }
}
