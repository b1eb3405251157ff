//! The userfaultfd interface of the kernel: the calls this crate needs, and nothing of policy.
//!
//! Structures and numbers are those of `include/uapi/linux/userfaultfd.h`; neither `libc` nor
//! `rustix` has the ones from Linux 6.7.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// `UFFD_USER_MODE_ONLY`: what lets a process without privileges make one.
pub(crate) const USER_MODE_ONLY: i32 = 1;
/// `UFFD_FEATURE_WP_HUGETLBFS_SHMEM`: write protection of shared memory. Linux 5.19.
pub(crate) const WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
/// `UFFD_FEATURE_WP_UNPOPULATED`: protects pages that do not exist yet. Linux 6.4.
pub(crate) const WP_UNPOPULATED: u64 = 1 << 13;
/// `UFFD_FEATURE_WP_ASYNC`: the kernel resolves the faults itself. Linux 6.7.
pub(crate) const WP_ASYNC: u64 = 1 << 15;
/// `USERFAULTFD_IOC_NEW`, asked of `/dev/userfaultfd`: `_IO(0xAA, 0x00)`.
pub(crate) const IOC_NEW: u64 = 0xAA00;

/// `UFFD_API`: the only version of the interface there is.
const API: u64 = 0xAA;
/// What the kernel is to do about a registered range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// `UFFDIO_REGISTER_MODE_MISSING`: ask for pages that are not there.
    Missing = 1,
    /// `UFFDIO_REGISTER_MODE_WP`: watch what is written.
    WriteProtect = 2,
}

/// `UFFD_EVENT_PAGEFAULT`.
const EVENT_PAGEFAULT: u8 = 0x12;
/// `sizeof(struct uffd_msg)`.
const MESSAGE: usize = 32;
/// Messages read at once.
const MESSAGES: usize = 64;
/// `UFFDIO_WRITEPROTECT_MODE_WP` left out: the call takes protection away.
const WRITEPROTECT_MODE_NONE: u64 = 0;

const UFFDIO_API: libc::c_ulong = 0xC018_AA3F;
const UFFDIO_REGISTER: libc::c_ulong = 0xC020_AA00;
const UFFDIO_UNREGISTER: libc::c_ulong = 0x8010_AA01;
const UFFDIO_WAKE: libc::c_ulong = 0x8010_AA02;
const UFFDIO_COPY: libc::c_ulong = 0xC028_AA03;
const UFFDIO_ZEROPAGE: libc::c_ulong = 0xC020_AA04;
const UFFDIO_WRITEPROTECT: libc::c_ulong = 0xC018_AA06;

#[repr(C)]
struct ApiArgument {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct RangeArgument {
    start: u64,
    length: u64,
}

impl RangeArgument {
    fn of(range: &Range<u64>) -> Self {
        Self { start: range.start, length: range.end.saturating_sub(range.start) }
    }
}

#[repr(C)]
struct RegisterArgument {
    range: RangeArgument,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct WriteProtectArgument {
    range: RangeArgument,
    mode: u64,
}

/// Makes a userfaultfd for our own address space, as an unprivileged process may.
pub(crate) fn create() -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | USER_MODE_ONLY;
    // SAFETY: userfaultfd takes flags and touches no memory of ours.
    let number = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    let number = i32::try_from(number).map_err(io::Error::other)?;
    if number < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Opens the conversation, asking for `features`; returns the features this kernel has.
///
/// It can be done once per descriptor.
pub(crate) fn negotiate(descriptor: BorrowedFd<'_>, features: u64) -> io::Result<u64> {
    let mut argument = ApiArgument { api: API, features, ioctls: 0 };
    // SAFETY: the argument is the structure this request reads and writes, and outlives the call.
    let result = unsafe { libc::ioctl(descriptor.as_raw_fd(), UFFDIO_API, &raw mut argument) };
    if result == 0 { Ok(argument.features) } else { Err(io::Error::last_os_error()) }
}

/// Puts `range` under this descriptor.
pub(crate) fn register(descriptor: BorrowedFd<'_>, range: &Range<u64>, mode: Mode) -> io::Result<()> {
    let mut argument = RegisterArgument { range: RangeArgument::of(range), mode: mode as u64, ioctls: 0 };
    // SAFETY: the argument is the structure this request reads and writes, and outlives the call.
    // The request changes how the kernel answers faults in the range, never its content.
    let result = unsafe { libc::ioctl(descriptor.as_raw_fd(), UFFDIO_REGISTER, &raw mut argument) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Takes `range` out again, and with it every protection in it.
pub(crate) fn unregister(descriptor: BorrowedFd<'_>, range: &Range<u64>) -> io::Result<()> {
    let mut argument = RangeArgument::of(range);
    // SAFETY: the argument is the structure this request reads, and outlives the call.
    let result = unsafe { libc::ioctl(descriptor.as_raw_fd(), UFFDIO_UNREGISTER, &raw mut argument) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[repr(C)]
struct CopyArgument {
    to: u64,
    from: u64,
    length: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
struct ZeroArgument {
    range: RangeArgument,
    mode: u64,
    zeroed: i64,
}

/// How far a call came that fills in pages, and why no further.
pub(crate) struct Filled {
    /// Bytes of pages that are there now and were not before.
    pub(crate) bytes: u64,
    /// What stopped it at the page after them.
    pub(crate) stopped: Option<io::Error>,
}

impl Filled {
    fn of(result: i32, bytes: i64, length: u64) -> Self {
        let bytes = u64::try_from(bytes).unwrap_or(0).min(length);
        // EAGAIN with something done only says that not all was; the next call tells why.
        let stopped = (result != 0 && bytes == 0).then(io::Error::last_os_error);
        Self { bytes, stopped }
    }
}

/// Puts `content` where there are no pages yet, beginning at `to`, and wakes who waits for them.
pub(crate) fn copy(descriptor: BorrowedFd<'_>, to: u64, content: &[u8]) -> Filled {
    let length = content.len() as u64;
    let mut argument = CopyArgument { to, from: content.as_ptr() as u64, length, mode: 0, copied: 0 };
    // SAFETY: the argument is the structure this request reads and writes, and outlives the call, as does the content,
    // which is only read. What changes is memory of the process the descriptor is of, where it has none yet.
    let result = unsafe { libc::ioctl(descriptor.as_raw_fd(), UFFDIO_COPY, &raw mut argument) };
    Filled::of(result, argument.copied, length)
}

/// Puts zeros where there are no pages yet, and wakes who waits for them.
pub(crate) fn zero(descriptor: BorrowedFd<'_>, range: &Range<u64>) -> Filled {
    let length = range.end.saturating_sub(range.start);
    let mut argument = ZeroArgument { range: RangeArgument::of(range), mode: 0, zeroed: 0 };
    // SAFETY: the argument is the structure this request reads and writes, and outlives the call.
    let result = unsafe { libc::ioctl(descriptor.as_raw_fd(), UFFDIO_ZEROPAGE, &raw mut argument) };
    Filled::of(result, argument.zeroed, length)
}

/// Wakes who waits for pages in `range`, to look again.
pub(crate) fn wake(descriptor: BorrowedFd<'_>, range: &Range<u64>) -> io::Result<()> {
    let mut argument = RangeArgument::of(range);
    // SAFETY: the argument is the structure this request reads, and outlives the call.
    let result = unsafe { libc::ioctl(descriptor.as_raw_fd(), UFFDIO_WAKE, &raw mut argument) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Calls `fault` with the address of every access that waits and has not been read of yet, some of them at once.
/// Returns whether there were any.
pub(crate) fn faults(descriptor: BorrowedFd<'_>, mut fault: impl FnMut(u64)) -> io::Result<bool> {
    const ADDRESS: usize = 16;
    let mut messages = [0_u8; MESSAGE * MESSAGES];
    let read = match rustix::io::read(descriptor, &mut messages) {
        Ok(read) => read,
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(false),
        Err(error) => return Err(error.into()),
    };
    for message in messages.get(..read).unwrap_or_default().chunks_exact(MESSAGE) {
        let address = message.get(ADDRESS..).and_then(|rest| rest.first_chunk::<8>());
        if let (Some(&EVENT_PAGEFAULT), Some(address)) = (message.first(), address) {
            fault(u64::from_ne_bytes(*address));
        }
    }
    Ok(read > 0)
}

/// Whether the address space the descriptor was made in still stands: its process has neither
/// ended nor begun to, nor replaced itself by `execve`.
///
/// Asks to take protection away from the highest page a process can have. Nothing of ours is
/// registered there, so a living address space answers ENOENT and is left as it was; a dead one
/// answers ESRCH before the kernel even looks. This is the earliest sign of an ending process: memory
/// is torn down well before a pidfd reports it.
pub(crate) fn address_space_stands(descriptor: BorrowedFd<'_>) -> io::Result<bool> {
    const HIGHEST_PAGE: u64 = (1 << 47) - 2 * 4096;
    let mut argument = WriteProtectArgument {
        range: RangeArgument { start: HIGHEST_PAGE, length: 4096 },
        mode: WRITEPROTECT_MODE_NONE,
    };
    // SAFETY: the argument is the structure this request reads, and outlives the call.
    let result = unsafe { libc::ioctl(descriptor.as_raw_fd(), UFFDIO_WRITEPROTECT, &raw mut argument) };
    if result == 0 {
        return Ok(true);
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::ESRCH) => Ok(false),
        // EAGAIN: the mappings are being changed at this moment, so there are some.
        error if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EAGAIN)) => Ok(true),
        error => Err(error),
    }
}
