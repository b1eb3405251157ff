//! Whether a directory has huge pages.

use std::path::Path;

/// `HUGETLBFS_MAGIC` of linux/magic.h.
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// The size in bytes of the huge pages that files in a directory have: none where it is not on hugetlbfs.
#[must_use]
pub fn huge_page_size(directory: &Path) -> Option<u64> {
    let system = rustix::fs::statfs(directory).ok()?;
    let is_huge = u64::try_from(system.f_type) == Ok(HUGETLBFS_MAGIC);
    u64::try_from(system.f_bsize).ok().filter(|_| is_huge)
}
