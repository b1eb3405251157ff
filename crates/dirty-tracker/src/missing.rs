//! Pages that a process lacks, given to it when it asks.

use crate::attach::{AttachError, Tracked, check_ranges, explain_register, inject_failed, open};
use crate::inject::{self, Injection, Keep};
use crate::page_size;
use crate::userfaultfd::{self, Filled};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{PidfdGetfdFlags, pidfd_getfd};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

/// An access to a page that is not there. Whoever made it waits until the page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Fault {
    /// Number of the range it is in.
    pub range: usize,
    /// Where in the range its page begins, in bytes.
    pub offset: u64,
}

/// Why pages cannot be supplied (any more).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SupplyError {
    /// The process has ended: nobody needs pages.
    #[error("process {pid} has ended")]
    Gone {
        /// The process.
        pid: u32,
    },
    /// The kernel refused: a full tmpfs, among others.
    #[error("cannot {action} process {pid}")]
    Kernel {
        /// What was tried.
        action: &'static str,
        /// The process.
        pid: u32,
        /// What it said.
        #[source]
        source: io::Error,
    },
}

/// Supplies pages of shared memory to a process that runs without them: it stops at the first access to a page that is
/// not there, be it its own or the kernel's on its behalf, until the page is supplied.
///
/// Only pages that are *missing* are ever written: what the process has, whether it was supplied or written by itself,
/// is never changed. So the same page may be supplied any number of times, by any thread.
///
/// The process keeps a descriptor of its own of what makes it wait. If the program that supplies ends, the process waits
/// on, for [`resume`](Self::resume) by the next one; no access ever reads zeros for what was not supplied.
/// Only [`finish`](Self::finish) ends it. Dropping is like ending the program: the process waits on.
#[derive(Debug)]
pub struct MissingPages {
    pid: u32,
    pidfd: OwnedFd,
    userfaultfd: OwnedFd,
    number: i32,
    ranges: Vec<Range<u64>>,
}

impl MissingPages {
    /// From now on the process waits for what is missing in these ranges, addresses in its own address space, mapped
    /// from a file on tmpfs. Holes of the file are what is missing.
    ///
    /// Accesses by the kernel have to wait too, which takes privileges: with [`Injected`](crate::DescriptorSource::Injected) those of the
    /// process itself (`CAP_SYS_PTRACE`, or `vm.unprivileged_userfaultfd=1`); with [`Device`](crate::DescriptorSource::Device) those of
    /// whoever could open `/dev/userfaultfd`.
    ///
    /// # Errors
    /// Each with what is in the way; the process is left as it was.
    pub fn attach(
        pid: u32,
        ranges: &[Range<u64>],
        injection: impl Into<Injection>,
    ) -> Result<Self, AttachError> {
        let pidfd = open(pid)?;
        let tracked = check_ranges(pid, ranges)?;
        if let Some(Tracked { range, page_size }) =
            tracked.iter().find(|tracked| tracked.page_size != page_size::BASE)
        {
            return Err(AttachError::HugePages { range: range.clone(), page_size: *page_size });
        }
        let obtained = inject::descriptor(pid, pidfd.as_fd(), injection.into(), Keep::Both)
            .map_err(|source| inject_failed(pid, source))?;
        let missing = Self {
            pid,
            pidfd,
            userfaultfd: obtained.descriptor,
            number: obtained.number,
            ranges: ranges.to_vec(),
        };
        match missing.register() {
            Ok(()) => Ok(missing),
            Err(error) => {
                missing.finish();
                Err(error)
            }
        }
    }

    fn register(&self) -> Result<(), AttachError> {
        userfaultfd::negotiate(self.userfaultfd.as_fd(), 0)
            .map_err(|source| crate::Unsupported::Userfaultfd { source })?;
        for range in &self.ranges {
            userfaultfd::register(self.userfaultfd.as_fd(), range, userfaultfd::Mode::Missing)
                .map_err(|source| explain_register(self.pid, range, source))?;
        }
        Ok(())
    }

    /// Goes on where another program has ended, with its [`number`](Self::number) and the same ranges.
    ///
    /// Whoever waits asks again: what the other program had read of and not answered is told to nobody else by itself.
    ///
    /// # Errors
    /// [`AttachError::Gone`], [`AttachError::NotWaiting`] when the process has no such descriptor, or
    /// [`AttachError::Open`].
    pub fn resume(pid: u32, ranges: &[Range<u64>], number: i32) -> Result<Self, AttachError> {
        let pidfd = open(pid)?;
        let userfaultfd =
            pidfd_getfd(&pidfd, number, PidfdGetfdFlags::empty()).map_err(|error| match error {
                Errno::BADF => AttachError::NotWaiting { pid, number },
                Errno::SRCH => AttachError::Gone { pid },
                error => AttachError::Open { pid, source: error.into() },
            })?;
        // The process may have closed it and opened something else under that number, from which nothing may be read.
        if !is_userfaultfd(&userfaultfd) {
            return Err(AttachError::NotWaiting { pid, number });
        }
        for range in ranges {
            // Fails only where nobody can wait.
            let _ = userfaultfd::wake(userfaultfd.as_fd(), range);
        }
        Ok(Self { pid, pidfd, userfaultfd, number, ranges: ranges.to_vec() })
    }

    /// The number, inside the process, of its own descriptor.
    #[must_use]
    pub fn number(&self) -> i32 {
        self.number
    }

    /// The process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits, at most so long, until the process asks for pages, and appends to `faults` what it asks for. One page can
    /// be asked for more than once.
    ///
    /// # Errors
    /// [`SupplyError::Gone`] when the process has ended.
    pub fn wait(&self, at_most: Duration, faults: &mut Vec<Fault>) -> Result<(), SupplyError> {
        let mut ready =
            [PollFd::new(&self.userfaultfd, PollFlags::IN), PollFd::new(&self.pidfd, PollFlags::IN)];
        let at_most = Timespec {
            tv_sec: i64::try_from(at_most.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: at_most.subsec_nanos().into(),
        };
        match poll(&mut ready, Some(&at_most)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(self.failed("wait for", error.into())),
        }
        if ready[1].revents().contains(PollFlags::IN) {
            return Err(SupplyError::Gone { pid: self.pid });
        }
        if ready[0].revents().contains(PollFlags::IN) {
            userfaultfd::faults(self.userfaultfd.as_fd(), |address| {
                let page = address / page_size::BASE * page_size::BASE;
                let range = self.ranges.iter().position(|range| range.contains(&page));
                if let Some(range) = range {
                    faults.push(Fault { range, offset: page.saturating_sub(self.ranges[range].start) });
                }
            })
            .map_err(|error| self.failed("read the faults of", error))?;
        }
        Ok(())
    }

    /// Supplies whole pages that begin at `offset` of a range. Those that are there already stay as they are; whoever
    /// waits goes on.
    ///
    /// # Errors
    /// [`SupplyError`]; pages before the one that failed are supplied.
    pub fn supply(&self, range: usize, offset: u64, content: &[u8]) -> Result<(), SupplyError> {
        let start = self.ranges[range].start.saturating_add(offset);
        self.fill(start, content.len() as u64, "supply pages to", |from, _| {
            let content = content.get(usize::try_from(from.saturating_sub(start)).unwrap_or(usize::MAX)..);
            userfaultfd::copy(self.userfaultfd.as_fd(), from, content.unwrap_or_default())
        })
    }

    /// Supplies so many bytes of zero pages, as [`supply`](Self::supply) does.
    ///
    /// # Errors
    /// [`SupplyError`].
    pub fn supply_zeros(&self, range: usize, offset: u64, length: u64) -> Result<(), SupplyError> {
        let start = self.ranges[range].start.saturating_add(offset);
        self.fill(start, length, "supply zeros to", |from, end| {
            userfaultfd::zero(self.userfaultfd.as_fd(), &(from..end))
        })
    }

    fn fill(
        &self,
        start: u64,
        length: u64,
        action: &'static str,
        fill: impl Fn(u64, u64) -> Filled,
    ) -> Result<(), SupplyError> {
        let end = start.saturating_add(length);
        let mut at = start;
        while at < end {
            let Filled { bytes, stopped } = fill(at, end);
            at = at.saturating_add(bytes);
            match stopped {
                None => {}
                // The mappings are being changed at this moment.
                Some(error) if error.raw_os_error() == Some(libc::EAGAIN) => {}
                Some(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                    // It is there; but who asked before it was has not been told.
                    let page = at..at.saturating_add(page_size::BASE);
                    userfaultfd::wake(self.userfaultfd.as_fd(), &page)
                        .map_err(|error| self.failed(action, error))?;
                    at = page.end;
                }
                Some(error) => return Err(self.failed(action, error)),
            }
        }
        Ok(())
    }

    fn failed(&self, action: &'static str, source: io::Error) -> SupplyError {
        let pid = self.pid;
        match source.raw_os_error() {
            Some(libc::ESRCH) => SupplyError::Gone { pid },
            _ => SupplyError::Kernel { action, pid, source },
        }
    }

    /// Ends it: the process has everything, and what it lacks from now on reads as zeros. Its own descriptor is closed.
    pub fn finish(&self) {
        for range in &self.ranges {
            // Fails only where the process is gone or the range was never registered: nobody waits then.
            let _ = userfaultfd::unregister(self.userfaultfd.as_fd(), range);
        }
        // If it cannot be held now, it keeps a descriptor that governs nothing any more.
        let _ = inject::close(self.pid, self.pidfd.as_fd(), self.number);
    }
}

fn is_userfaultfd(descriptor: &OwnedFd) -> bool {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", descriptor.as_raw_fd()));
    link.is_ok_and(|link| link.as_os_str().as_encoded_bytes() == b"anon_inode:[userfaultfd]")
}
