//! Memory in huge pages is tracked in huge pages.

use crate::tracee::{PAGE, Ram, Tracee};
use dirty_tracker::{AttachError, DescriptorSource, Region, Scan, Tracker};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use std::path::{Path, PathBuf};

const HUGE: u64 = 2 << 20;
const HUGE_PAGES: u64 = 4;
const RESERVE: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

/// A hugetlbfs of our own with that many pages reserved, all given back when dropped.
struct HugePages {
    /// Two runs at once must not count each other's pages as those of the host.
    _lock: std::fs::File,
    before: u64,
    mounted_at: PathBuf,
    _directory: tempfile::TempDir,
}

fn reserved() -> Option<u64> {
    std::fs::read_to_string(RESERVE).ok()?.trim().parse().ok()
}

impl HugePages {
    /// Nothing, with the reason said aloud, where this host or user cannot have them.
    fn reserve() -> Option<Self> {
        let skip = |why: &str| {
            eprintln!("SKIPPED huge page tests: {why}");
            None
        };
        if !rustix::process::geteuid().is_root() {
            return skip("needs root to reserve huge pages");
        }
        let Ok(lock) = std::fs::File::open(RESERVE) else { return skip("the kernel has no 2 MiB pages") };
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
        let Some(before) = reserved() else { return skip("the kernel has no 2 MiB pages") };
        if std::fs::write(RESERVE, (before + HUGE_PAGES).to_string()).is_err() {
            return skip("cannot change nr_hugepages");
        }
        let directory = tempfile::Builder::new().prefix("dirty-tracker-test-").tempdir().unwrap();
        let mounted_at = directory.path().to_path_buf();
        let size = std::ffi::CString::new(format!("pagesize=2M,size={}", HUGE * HUGE_PAGES)).unwrap();
        // `drop` of this gives the pages back, from here on whatever happens.
        let pages = Self { _lock: lock, before, mounted_at: mounted_at.clone(), _directory: directory };
        if reserved() < Some(before + HUGE_PAGES) {
            return skip("memory is too fragmented for huge pages");
        }
        match mount("none", &mounted_at, "hugetlbfs", MountFlags::empty(), Some(size.as_c_str())) {
            Ok(()) => Some(pages),
            Err(error) => skip(&format!("cannot mount hugetlbfs: {error}")),
        }
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        // Not mounted, if mounting was what failed.
        let _ = unmount(&self.mounted_at, UnmountFlags::DETACH);
        std::fs::write(RESERVE, self.before.to_string()).unwrap();
    }
}

fn tracee(on: &Path) -> (Ram, Tracee) {
    let ram = Ram::on(on, HUGE * HUGE_PAGES);
    let mut tracee = Tracee::start("memory", &[ram.path().to_str().unwrap()]);
    assert_eq!(tracee.line(), "ready");
    (ram, tracee)
}

#[test]
fn huge_pages_are_found_as_a_whole_beside_small_ones() {
    let Some(pages) = HugePages::reserve() else { return };
    let (ram, mut tracee) = tracee(&pages.mounted_at);
    let range = tracee.range_of(&ram.path());
    // A range in small pages of the same process, for ranges of mixed page sizes: its stack.
    let stack = dirty_tracker::mappings(tracee.pid())
        .unwrap()
        .into_iter()
        .find(|mapping| mapping.path == Path::new("[stack]"))
        .unwrap()
        .range;
    let ranges = [range.clone(), stack];
    // Two of them the process has touched.
    for page in [0, 2] {
        tracee.ask(&format!("write {}", page * HUGE / PAGE));
    }
    let mut tracker = Tracker::attach(tracee.pid(), &ranges, DescriptorSource::Injected).unwrap();
    assert_eq!((tracker.page_size(0), tracker.page_size(1)), (HUGE, PAGE));
    let mut regions = Vec::new();
    tracker.scan(Scan::OneStep, &mut regions).unwrap();
    assert_eq!(regions[0], Region { range: 0, start: 0, end: HUGE * HUGE_PAGES });
    for scan in [Scan::OneStep, Scan::TwoStep, Scan::List] {
        // The last one not before the last scan of this loop, which is of a page that never existed.
        let huge = if scan == Scan::List { 3 } else { 2 };
        tracee.ask(&format!("write {}", huge * HUGE / PAGE + 17));
        regions.clear();
        let stats = tracker.scan(scan, &mut regions).unwrap();
        assert_eq!(regions[0], Region { range: 0, start: huge * HUGE, end: (huge + 1) * HUGE }, "{scan:?}");
        let in_stack: u64 = regions[1..].iter().map(|region| region.bytes() / PAGE).sum();
        assert!(regions[1..].iter().all(|region| region.range == 1));
        assert_eq!(stats.pages, HUGE / PAGE + in_stack, "pages are counted in 4 KiB");
        assert_eq!(regions[0].pages(PAGE).count() as u64, HUGE / PAGE);
    }
    tracker.detach().unwrap();

    let part = range.start..range.start + HUGE + PAGE;
    match Tracker::attach(tracee.pid(), &[part], DescriptorSource::Injected).unwrap_err() {
        AttachError::Misaligned { page_size, .. } => assert_eq!(page_size, HUGE),
        error => panic!("{error}"),
    }
    // The file is gone and the process keeps it open no longer: only the mapping is left to tell its page size.
    std::fs::remove_file(ram.path()).unwrap();
    let tracker = Tracker::attach(tracee.pid(), &[range], DescriptorSource::Injected).unwrap();
    assert_eq!(tracker.page_size(0), HUGE);
    drop(tracker);
    drop(tracee);
}
