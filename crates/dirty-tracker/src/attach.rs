//! What comes before tracking: the process is found, what is to be tracked is looked at, and what is in the way is told apart.

use crate::inject::{self, InjectError, KnownFilters};
use crate::maps::{Mapping, MapsError, mappings};
use crate::page_size;
use crate::support::Unsupported;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};

/// Why tracking could not begin. The process is as it was before.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AttachError {
    /// This kernel cannot do it.
    #[error("dirty pages cannot be tracked on this host")]
    Unsupported(#[from] Unsupported),
    /// There is no such process (any more).
    #[error("process {pid} does not exist")]
    Gone {
        /// The process.
        pid: u32,
    },
    /// The process cannot be watched for its end.
    #[error("cannot open process {pid}")]
    Open {
        /// The process.
        pid: u32,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It has no userfaultfd of that number: it does not wait for pages (any more).
    #[error("process {pid} does not wait for pages by its descriptor {number}")]
    NotWaiting {
        /// The process.
        pid: u32,
        /// The descriptor.
        number: i32,
    },
    /// Its mappings could not be read.
    #[error("cannot find out what process {pid} has mapped")]
    Maps {
        /// The process.
        pid: u32,
        /// Why not.
        #[source]
        source: MapsError,
    },
    /// There was nothing to track.
    #[error("no ranges to track were given")]
    NoRanges,
    /// A range that does not begin and end at page boundaries, or is empty.
    #[error("range {:#x}-{:#x} is empty or not made of whole pages of {page_size} bytes", .range.start, .range.end)]
    Misaligned {
        /// The range.
        range: Range<u64>,
        /// The size of pages in it.
        page_size: u64,
    },
    /// Two of the ranges share memory, whose writes would then be seen by either one scan or the other.
    #[error("ranges {:#x}-{:#x} and {:#x}-{:#x} overlap", .first.start, .first.end, .second.start, .second.end)]
    Overlap {
        /// One range.
        first: Range<u64>,
        /// The other.
        second: Range<u64>,
    },
    /// The process has not mapped all of a range.
    #[error("process {pid} has nothing mapped at {address:#x}, in range {:#x}-{:#x}", .range.start, .range.end)]
    NotMapped {
        /// The process.
        pid: u32,
        /// The range.
        range: Range<u64>,
        /// The first address in it without memory.
        address: u64,
    },
    /// Pages larger than 4 KiB, where only those will do.
    #[error("range {:#x}-{:#x} has pages of {page_size} bytes, which cannot be supplied one by one", .range.start, .range.end)]
    HugePages {
        /// The range.
        range: Range<u64>,
        /// The size of its pages.
        page_size: u64,
    },
    /// No userfaultfd could be had from the process.
    #[error("cannot get a userfaultfd from process {pid}")]
    Inject {
        /// The process.
        pid: u32,
        /// Why not.
        #[source]
        source: InjectError,
    },
    /// Another userfaultfd governs memory in a range: another tracker, a post-copy migration, or the process's own.
    #[error("range {:#x}-{:#x} of process {pid} is already under another userfaultfd: is another tracker attached?", .range.start, .range.end)]
    Busy {
        /// The process.
        pid: u32,
        /// The range.
        range: Range<u64>,
    },
    /// Memory the kernel cannot write-protect: for one, that which the process has no right to write anyway.
    #[error("range {:#x}-{:#x} of process {pid} cannot be write-protected: is it mapped for reading only?", .range.start, .range.end)]
    NotTrackable {
        /// The process.
        pid: u32,
        /// The range.
        range: Range<u64>,
    },
    /// The kernel refused the range for another reason.
    #[error("cannot track range {:#x}-{:#x} of process {pid}", .range.start, .range.end)]
    Register {
        /// The process.
        pid: u32,
        /// The range.
        range: Range<u64>,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The pagemap could not be opened.
    #[error("cannot open the pagemap of process {pid}")]
    Pagemap {
        /// The process.
        pid: u32,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// One tracked range.
#[derive(Debug)]
pub(crate) struct Tracked {
    pub(crate) range: Range<u64>,
    pub(crate) page_size: u64,
}

/// Whether this program may hold process `pid` and make it make a userfaultfd, without doing so: leave to trace it, no
/// tracer in the way, no seccomp filter that is not `known`. What else [`attach`](crate::Tracker::attach) needs is not looked at.
///
/// # Errors
/// Each with what is in the way.
pub fn may_attach(pid: u32, known: KnownFilters) -> Result<(), AttachError> {
    let pidfd = open(pid)?;
    inject::try_out(pid, pidfd.as_fd(), known).map_err(|source| inject_failed(pid, source))
}

/// A process, not to be mistaken for a later one of the same number.
pub(crate) fn open(pid: u32) -> Result<OwnedFd, AttachError> {
    let number = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(AttachError::Gone { pid })?;
    pidfd_open(number, PidfdFlags::empty()).map_err(|error| match error {
        rustix::io::Errno::SRCH => AttachError::Gone { pid },
        error => AttachError::Open { pid, source: error.into() },
    })
}

/// Why no userfaultfd could be had.
pub(crate) fn inject_failed(pid: u32, source: InjectError) -> AttachError {
    match source {
        InjectError::Gone { pid } => AttachError::Gone { pid },
        source => AttachError::Inject { pid, source },
    }
}

/// Checks the ranges against what the process has mapped, and finds their page sizes.
pub(crate) fn check_ranges(pid: u32, ranges: &[Range<u64>]) -> Result<Vec<Tracked>, AttachError> {
    if ranges.is_empty() {
        return Err(AttachError::NoRanges);
    }
    let mapped = mappings(pid).map_err(|source| match source {
        MapsError::Gone { pid } => AttachError::Gone { pid },
        source => AttachError::Maps { pid, source },
    })?;
    for (number, first) in ranges.iter().enumerate() {
        let overlaps = |second: &&Range<u64>| first.start < second.end && second.start < first.end;
        if let Some(second) = ranges.iter().skip(number + 1).find(overlaps) {
            return Err(AttachError::Overlap { first: first.clone(), second: second.clone() });
        }
    }
    ranges.iter().map(|range| check_range(pid, range, &mapped)).collect()
}

fn check_range(pid: u32, range: &Range<u64>, mapped: &[Mapping]) -> Result<Tracked, AttachError> {
    let misaligned = |page_size| AttachError::Misaligned { range: range.clone(), page_size };
    if range.is_empty() {
        return Err(misaligned(page_size::BASE));
    }
    let mut covered = range.start;
    let mut largest = page_size::BASE;
    for mapping in mapped.iter().filter(|mapping| mapping.range.end > range.start) {
        if covered >= range.end || mapping.range.start > covered {
            break;
        }
        covered = mapping.range.end;
        largest = largest.max(page_size::of_mapping(pid, mapping));
    }
    if covered < range.end {
        return Err(AttachError::NotMapped { pid, range: range.clone(), address: covered });
    }
    if !range.start.is_multiple_of(largest) || !range.end.is_multiple_of(largest) {
        return Err(misaligned(largest));
    }
    Ok(Tracked { range: range.clone(), page_size: largest })
}

pub(crate) fn explain_register(pid: u32, range: &Range<u64>, source: io::Error) -> AttachError {
    let range = range.clone();
    match source.raw_os_error() {
        Some(libc::EBUSY) => AttachError::Busy { pid, range },
        Some(libc::EINVAL | libc::EPERM) => AttachError::NotTrackable { pid, range },
        Some(libc::ESRCH | libc::ENOMEM) => AttachError::Gone { pid },
        _ => AttachError::Register { pid, range, source },
    }
}
