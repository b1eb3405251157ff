//! Does this kernel have what tracking needs? Found by trying, never from a version number: kernels
//! of distributions carry features back, and sandboxes take them away.

use crate::{pagemap, userfaultfd};
use std::io;
use std::os::fd::AsFd;

/// A feature of the kernel that tracking cannot do without, and is not there.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Unsupported {
    /// No `userfaultfd` that an unprivileged process may make.
    #[error(
        "this kernel refuses userfaultfd(UFFD_USER_MODE_ONLY), which needs CONFIG_USERFAULTFD, Linux 5.11 \
         or later, and no seccomp filter that denies it"
    )]
    Userfaultfd {
        /// What the kernel answered when it was tried on our own process.
        #[source]
        source: io::Error,
    },
    /// `userfaultfd` lacks a feature.
    #[error(
        "this kernel's userfaultfd has no {feature}, which needs Linux {since} or later (it offers {offered:#x})"
    )]
    Feature {
        /// The kernel's name for it.
        feature: &'static str,
        /// The version of Linux that brought it.
        since: &'static str,
        /// The features the kernel does offer, as `UFFDIO_API` returned them.
        offered: u64,
    },
    /// No `PAGEMAP_SCAN`.
    #[error(
        "this kernel has no ioctl PAGEMAP_SCAN on /proc/self/pagemap, which needs CONFIG_PROC_PAGE_MONITOR \
         and Linux 6.7 or later"
    )]
    PagemapScan {
        /// What the kernel answered when it was tried on our own process.
        #[source]
        source: io::Error,
    },
}

/// Whether tracking can work on this kernel, by trying each part of it on our own process.
///
/// # Errors
/// Names the first feature that is missing.
pub fn kernel_support() -> Result<(), Unsupported> {
    let descriptor = userfaultfd::create().map_err(|source| Unsupported::Userfaultfd { source })?;
    let offered = userfaultfd::negotiate(descriptor.as_fd(), 0)
        .map_err(|source| Unsupported::Userfaultfd { source })?;
    for (bit, feature, since) in [
        (userfaultfd::WP_HUGETLBFS_SHMEM, "UFFD_FEATURE_WP_HUGETLBFS_SHMEM", "5.19"),
        (userfaultfd::WP_UNPOPULATED, "UFFD_FEATURE_WP_UNPOPULATED", "6.4"),
        (userfaultfd::WP_ASYNC, "UFFD_FEATURE_WP_ASYNC", "6.7"),
    ] {
        if offered & bit == 0 {
            return Err(Unsupported::Feature { feature, since, offered });
        }
    }
    pagemap::probe().map_err(|source| Unsupported::PagemapScan { source })
}
