//! What has another process written? Dirty-page tracking from outside, without its help.
//!
//! A [`Tracker`] attaches to a running process by pid and to ranges of its memory, and then tells at each
//! [`scan`](Tracker::scan) which pages were written since the last one, be it by the process, by the kernel on its
//! behalf (`read` into the memory), or by a KVM guest that runs on it. The process is unmodified, is not
//! told, and needs no privileges; neither does the tracker, if it runs as the same user.
//!
//! ```no_run
//! use dirty_tracker::{DescriptorSource, Scan, Tracker, mappings};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let pid = 4711;
//! let ram: Vec<_> = mappings(pid)?
//!     .into_iter()
//!     .filter(|mapping| mapping.path.ends_with("ram") && mapping.writable)
//!     .map(|mapping| mapping.range)
//!     .collect();
//! let mut tracker = Tracker::attach(pid, &ram, DescriptorSource::Injected)?;
//! let mut regions = Vec::new();
//! tracker.scan(Scan::OneStep, &mut regions)?; // all of it: tracking begins here
//! loop {
//!     regions.clear();
//!     let stats = tracker.scan(Scan::OneStep, &mut regions)?;
//!     println!("{} pages written, found in {:?}", stats.pages, stats.elapsed);
//!     for region in &regions {
//!         for offset in region.pages(tracker.page_size(region.range)) {
//!             // read the page at `ram[region.range].start + offset`
//! #           let _ = offset;
//!         }
//!     }
//! #   break;
//! }
//! tracker.detach()?;
//! # Ok(())
//! # }
//! ```
//!
//! # How
//! The process's main thread is held by ptrace for a fraction of a millisecond and made to create a
//! userfaultfd ([`DescriptorSource`]), which is brought over and closed on its side. Memory registered with it is
//! write-protected page by page; a write makes the *kernel* lift the protection (`UFFD_FEATURE_WP_ASYNC`), so no
//! thread of the process ever waits for us. `ioctl(PAGEMAP_SCAN)` returns and renews what was lifted.
//!
//! # What it promises
//! - No write is missed between two scans, but for what is written by devices directly into pinned pages
//!   (`O_DIRECT` reads, VFIO): those bypass page protection altogether, and are the caller's to rule out.
//! - The process is left exactly as it was, by [`detach`](Tracker::detach), by dropping the tracker, and by the
//!   death of the tracking program at any instant: registers, memory, descriptors, signal state, and the system
//!   call its main thread waits in. What any stop and continue does, this does too: `epoll_wait` and
//!   the few others listed in signal(7) return `EINTR`.
//! - A process that a seccomp filter might kill for what it is made to call is left alone ([`Injection`]).
//! - It is not followed through `fork` or `execve`.
//!
//! # The other way round
//! A process that was started without its memory can be given it while it runs: [`MissingPages`] has it wait at each
//! page that is not there until that is supplied.
//!
//! Threads that write faster than a copy can follow can be slowed from outside too: [`Throttle`].
//!
//! # What it needs
//! Linux 6.7 on `x86_64`; [`kernel_support`] finds out, and names what is missing.

mod attach;
mod inject;
mod maps;
mod missing;
mod page_size;
mod pagemap;
mod region;
mod support;
mod throttle;
mod tracker;
mod userfaultfd;

pub use attach::{AttachError, may_attach};
pub use inject::{
    ATTACH_PATIENCE, DescriptorSource, InjectError, Injection, KnownFilters, ThreadState, seccomp_filters,
};
pub use maps::{Mapping, MapsError, mappings};
pub use missing::{Fault, MissingPages, SupplyError};
pub use pagemap::Resident;
pub use region::Region;
pub use support::{Unsupported, kernel_support};
pub use throttle::{LONGEST_STOP, Slowed, Throttle, ThrottleError};
pub use tracker::{DetachError, Scan, ScanError, ScanStats, Tracker};
