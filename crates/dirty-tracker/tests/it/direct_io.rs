//! Reads around the page cache write memory that no scan sees, unless none is under way while it is scanned.

use crate::tracee::{PAGE, Ram, Tracee, map};
use dirty_tracker::{DescriptorSource, Region, Scan, Tracker};
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

const PAGES: u64 = 4096;
/// Bytes of one read.
const READ: usize = 64 << 10;
/// Bytes of the file that is read.
const FILE: usize = 32 << 20;
const READERS: u32 = 2;
/// Scans of one attempt.
const SCANS: u32 = 300;
/// How often the loss is looked for: it was found in each of many first attempts.
const ATTEMPTS: u32 = 50;

/// The role of a process that reads a file around the page cache, into all of its memory. It answers `hold` when no read
/// is under way any more, and `go`.
pub(crate) fn reader(ram: &Path, file: &Path) {
    static HOLD: AtomicBool = AtomicBool::new(true);
    static HELD: AtomicU32 = AtomicU32::new(0);
    let memory = map(ram);
    let (address, length) = (memory.as_mut_ptr() as usize, memory.len());
    for seed in 1..=u64::from(READERS) {
        let file = File::options().read(true).custom_flags(libc::O_DIRECT).open(file).unwrap();
        std::thread::spawn(move || {
            let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            loop {
                if HOLD.load(Ordering::SeqCst) {
                    HELD.fetch_add(1, Ordering::SeqCst);
                    while HOLD.load(Ordering::SeqCst) {
                        std::thread::yield_now();
                    }
                    HELD.fetch_sub(1, Ordering::SeqCst);
                }
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let to = (state >> 33) as usize % (length / READ) * READ;
                let from = (state >> 40) as usize % (FILE / READ) * READ;
                // SAFETY: within the mapping, which is never unmapped; what lies there is bytes that only these threads
                // write, and nobody in this process reads.
                let place = unsafe { std::slice::from_raw_parts_mut((address + to) as *mut u8, READ) };
                file.read_exact_at(place, from as u64).unwrap();
            }
        });
    }
    println!("ready");
    for line in std::io::stdin().lines() {
        let hold = line.unwrap() == "hold";
        HOLD.store(hold, Ordering::SeqCst);
        while (HELD.load(Ordering::SeqCst) == READERS) != hold {
            std::thread::yield_now();
        }
        println!("done");
    }
}

fn follow(ram: &Ram, regions: &[Region], copy: &mut [u8]) {
    for region in regions {
        let bytes = &mut copy[region.start as usize..region.end as usize];
        ram.file.read_exact_at(bytes, region.start).unwrap();
    }
}

/// Pages in which a copy that follows the scans differs in the end.
fn lost(quiesced: bool) -> usize {
    let ram = Ram::new(PAGES);
    // Not on a tmpfs, which has nothing to go around.
    let mut file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut state = 1_u64;
    let content = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        state.to_le_bytes()
    });
    file.write_all(&content.take(FILE / 8).flatten().collect::<Vec<u8>>()).unwrap();
    file.as_file().sync_all().unwrap();
    let path = ram.path();
    let mut tracee = Tracee::start("direct", &[path.to_str().unwrap(), file.path().to_str().unwrap()]);
    assert_eq!(tracee.line(), "ready");
    let range = tracee.range_of(&path);
    let mut tracker = Tracker::attach(tracee.pid(), &[range], DescriptorSource::Injected).unwrap();
    let mut copy = vec![0; (PAGES * PAGE) as usize];
    let mut regions = Vec::new();
    for _ in 0..SCANS {
        regions.clear();
        if quiesced {
            tracee.ask("hold");
        }
        tracker.scan(Scan::OneStep, &mut regions).unwrap();
        tracee.ask("go");
        follow(&ram, &regions, &mut copy);
    }
    tracee.ask("hold");
    regions.clear();
    tracker.scan(Scan::List, &mut regions).unwrap();
    follow(&ram, &regions, &mut copy);
    let mut now = vec![0; copy.len()];
    ram.file.read_exact_at(&mut now, 0).unwrap();
    let pages = |bytes: &[u8]| bytes.chunks(PAGE as usize).map(<[u8]>::to_vec).collect::<Vec<_>>();
    pages(&copy).iter().zip(pages(&now)).filter(|(copy, now)| *copy != now).count()
}

#[test]
fn a_scan_with_reads_under_way_loses_pages_and_one_without_loses_none() {
    assert!((0..ATTEMPTS).any(|_| lost(false) > 0), "the danger is not there: then what is guarded against?");
    for _ in 0..3 {
        assert_eq!(lost(true), 0);
    }
}
