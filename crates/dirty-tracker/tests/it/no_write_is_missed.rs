//! The promise that everything rests on: a copy that follows the scans equals the original.

use crate::tracee::{PAGE, Ram, Tracee, map};
use dirty_tracker::{DescriptorSource, Region, Scan, Tracker};
use proptest::prelude::*;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const THREADS: u64 = 4;
const PAGES: u64 = 4096;
/// Writes of one case, over all threads: more than a million, and more if that many scans take longer.
const WRITES: u64 = 1_200_000;
/// Scans of one case that the writers write through, whatever the machine's speed.
const SCANS: u64 = 6;

/// Which page a thread writes next.
#[derive(Clone, Copy, Debug)]
enum Pattern {
    /// Any page.
    Scattered,
    /// One after the other.
    Sequential,
    /// The same few pages nearly always, some other now and then.
    Hot,
    /// Any page, every 16th time written by the kernel (`read` into the memory) instead of the thread.
    Kernel,
}

const PATTERNS: [Pattern; 4] = [Pattern::Scattered, Pattern::Sequential, Pattern::Hot, Pattern::Kernel];

/// The role: four threads write at full speed, until told that it is enough and each has done its share.
/// Arguments: file, seed, one pattern number per thread.
///
/// Every write puts a number that was never written before (thread and count) in a slot of the
/// thread's own in the page, so that a lost write, unlike one of a constant, always shows.
pub(crate) fn writers(arguments: &[&str]) {
    let memory = map(Path::new(arguments[0]));
    let seed: u64 = arguments[1].parse().unwrap();
    let mut go = String::new();
    println!("ready");
    std::io::stdin().read_line(&mut go).unwrap();
    // SAFETY: the memory is a mapping that is never unmapped, aligned to pages, and reached through these
    // atomics only from here on.
    let slots: &[AtomicU64] =
        unsafe { std::slice::from_raw_parts(memory.as_ptr().cast(), memory.len() / size_of::<AtomicU64>()) };
    let enough = &AtomicBool::new(false);
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let pattern = PATTERNS[arguments[2 + thread as usize].parse::<usize>().unwrap()];
            scope.spawn(move || write(slots, thread, pattern, seed, enough));
        }
        std::io::stdin().read_line(&mut go).unwrap();
        enough.store(true, Ordering::Relaxed);
    });
    println!("done");
    std::io::stdin().read_line(&mut go).unwrap();
}

fn write(slots: &[AtomicU64], thread: u64, pattern: Pattern, seed: u64, enough: &AtomicBool) {
    const SLOTS_PER_PAGE: u64 = PAGE / 8;
    let zeros = std::fs::File::open("/dev/zero").unwrap();
    let mut random = (seed << 3 | thread << 1 | 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    for count in 0.. {
        if count >= WRITES / THREADS && enough.load(Ordering::Relaxed) {
            break;
        }
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let page = match pattern {
            Pattern::Scattered | Pattern::Kernel => random % PAGES,
            Pattern::Sequential => count % PAGES,
            Pattern::Hot if random.is_multiple_of(64) => (random >> 8) % PAGES,
            Pattern::Hot => random % 8,
        };
        // Slots of different threads lie side by side: they write the same pages at the same time.
        let within = (random >> 32) % (SLOTS_PER_PAGE / THREADS) * THREADS + thread;
        let slot = &slots[(page * SLOTS_PER_PAGE + within) as usize];
        if matches!(pattern, Pattern::Kernel) && count % 16 == 0 {
            // The kernel writes into the tracked page itself: `read` gets its address.
            // SAFETY: the slot is 8 bytes of memory that stays mapped, which the kernel may overwrite.
            let read = unsafe { libc::pread(zeros.as_raw_fd(), slot.as_ptr().cast(), 8, 0) };
            assert_eq!(read, 8);
        } else {
            slot.store(thread << 60 | (count + 1), Ordering::Relaxed);
        }
    }
}

/// Reads from the file what a scan found written, into the copy.
fn follow(ram: &Ram, regions: &[Region], copy: &mut [u8]) {
    for region in regions {
        let bytes = &mut copy[region.start as usize..region.end as usize];
        ram.file.read_exact_at(bytes, region.start).unwrap();
    }
}

fn follows_exactly(seed: u64, patterns: [usize; 4], scans: &[Scan]) {
    let ram = Ram::new(PAGES);
    let numbers = patterns.map(|pattern| pattern.to_string());
    let path = ram.path();
    let mut arguments = vec![path.to_str().unwrap()];
    let seed = seed.to_string();
    arguments.push(&seed);
    arguments.extend(numbers.iter().map(String::as_str));
    let mut tracee = Tracee::start("writers", &arguments);
    assert_eq!(tracee.line(), "ready");
    let range = tracee.range_of(&path);
    let mut tracker = Tracker::attach(tracee.pid(), &[range], DescriptorSource::Injected).unwrap();
    let mut regions = Vec::new();
    tracker.scan(Scan::OneStep, &mut regions).unwrap();
    let mut copy = vec![0; (PAGES * PAGE) as usize];
    let (sender, done) = std::sync::mpsc::channel();
    tracee.say("go");
    let mut rounds = 0_u64;
    std::thread::scope(|scope| {
        let tracee = &mut tracee;
        let (enough, told) = std::sync::mpsc::channel();
        scope.spawn(move || {
            // An error is a panic over there, and ends the writers too.
            let _ = told.recv();
            sender.send(tracee.ask("enough"))
        });
        for scan in scans.iter().cycle() {
            if rounds == SCANS {
                enough.send(()).unwrap();
            }
            let finished = done.try_recv();
            regions.clear();
            tracker.scan(*scan, &mut regions).unwrap();
            follow(&ram, &regions, &mut copy);
            rounds += 1;
            match finished {
                // This scan began after the last write.
                Ok(line) => {
                    assert_eq!(line, "done");
                    break;
                }
                Err(std::sync::mpsc::TryRecvError::Empty) => {}
                Err(error) => panic!("{error}"),
            }
        }
    });
    let mut original = vec![0; copy.len()];
    ram.file.read_exact_at(&mut original, 0).unwrap();
    let written = original.chunks(8).filter(|slot| slot.iter().any(|&byte| byte != 0)).count();
    assert!(written > 1000, "the writers wrote next to nothing: {written}");
    let differing = (0..PAGES as usize)
        .filter(|page| copy[page * 4096..(page + 1) * 4096] != original[page * 4096..(page + 1) * 4096])
        .count();
    assert_eq!(differing, 0, "pages lost after {rounds} rounds");
    // Once everything was protected and nobody writes any more, nothing is found.
    regions.clear();
    tracker.scan(Scan::TwoStep, &mut regions).unwrap();
    assert_eq!(tracker.scan(Scan::List, &mut Vec::new()).unwrap().pages, 0);
    tracker.detach().unwrap();
    assert!(tracee.finish().success());
}

fn any_scan() -> impl Strategy<Value = Scan> {
    prop_oneof![3 => Just(Scan::OneStep), 3 => Just(Scan::TwoStep), 1 => Just(Scan::List)]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8, max_shrink_iters: 8, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_write_of_four_threads_at_full_speed_is_missed(
        seed: u32,
        patterns in prop::array::uniform4(0..PATTERNS.len()),
        scans in prop::collection::vec(any_scan(), 1..8),
    ) {
        follows_exactly(seed.into(), patterns, &scans);
    }
}

/// The pages of a scan, one number each.
fn pages(regions: &[Region]) -> Vec<u64> {
    regions.iter().flat_map(|region| region.pages(PAGE)).map(|offset| offset / PAGE).collect()
}

#[test]
fn exactly_the_written_pages_are_found_in_every_way_of_scanning() {
    let ram = Ram::new(PAGES);
    ram.file.write_all_at(&vec![7; (PAGES * PAGE) as usize], 0).unwrap();
    let mut tracee = Tracee::start("memory", &[ram.path().to_str().unwrap()]);
    assert_eq!(tracee.line(), "ready");
    let whole = tracee.range_of(&ram.path());
    // Two ranges with a gap: what is written in the gap is nobody's business.
    let ranges = [whole.start..whole.start + 1000 * PAGE, whole.start + 1100 * PAGE..whole.end];
    let mut tracker = Tracker::attach(tracee.pid(), &ranges, DescriptorSource::Injected).unwrap();
    assert_eq!(tracker.ranges(), ranges);
    assert_eq!((tracker.page_size(0), tracker.page_size(1), tracker.page_size(2)), (PAGE, PAGE, 0));
    let mut regions = Vec::new();
    tracker.scan(Scan::OneStep, &mut regions).unwrap();
    for scan in [Scan::OneStep, Scan::TwoStep] {
        for page in [3, 4, 5, 68, 800, 999, 1050, 1100, 4095] {
            tracee.ask(&format!("write {page}"));
        }
        tracee.ask("kernel 1500");
        regions.clear();
        let listed = tracker.scan(Scan::List, &mut regions).unwrap();
        let expected = [
            (0, 3, 6),
            (0, 68, 69),
            (0, 800, 801),
            (0, 999, 1000),
            (1, 0, 1),
            (1, 400, 401),
            (1, 2995, 2996),
        ]
        .map(|(range, start, end)| Region { range, start: start * PAGE, end: end * PAGE });
        assert_eq!(regions, expected);
        assert_eq!((listed.pages, listed.regions), (9, 7));
        // Listing leaves the marks; what is appended goes behind what is there.
        let stats = tracker.scan(scan, &mut regions).unwrap();
        assert_eq!(regions[..7], regions[7..]);
        assert_eq!((stats.pages, stats.regions), (9, 7));
        regions.clear();
        assert_eq!(tracker.scan(Scan::List, &mut regions).unwrap().pages, 0);
    }
    tracker.detach().unwrap();
}

#[test]
fn pages_never_touched_are_all_in_the_first_scan_and_found_when_written() {
    let ram = Ram::new(PAGES);
    let mut tracee = Tracee::start("memory", &[ram.path().to_str().unwrap()]);
    assert_eq!(tracee.line(), "ready");
    let range = tracee.range_of(&ram.path());
    let mut tracker = Tracker::attach(tracee.pid(), &[range], DescriptorSource::Injected).unwrap();
    let mut scan = |scan| {
        let mut regions = Vec::new();
        tracker.scan(scan, &mut regions).unwrap();
        pages(&regions)
    };
    let all: Vec<u64> = (0..PAGES).collect();
    assert_eq!(scan(Scan::TwoStep), all);
    assert_eq!(scan(Scan::TwoStep), []);
    for page in [10, 2000, 2001] {
        tracee.ask(&format!("write {page}"));
        // The kernel allocates memory page by page, by reading too; that is no write.
        tracee.ask(&format!("read {}", page + 5));
    }
    assert_eq!(scan(Scan::OneStep), [10, 2000, 2001]);
}

/// Pages that go away after they were written and before a scan has told so, whole page tables included.
#[test]
fn where_a_hole_was_punched_nothing_is_mapped_and_no_scan_says_so() {
    let ram = Ram::new(PAGES);
    let mut tracee = Tracee::start("memory", &[ram.path().to_str().unwrap()]);
    assert_eq!(tracee.line(), "ready");
    let range = tracee.range_of(&ram.path());
    let mut tracker = Tracker::attach(tracee.pid(), &[range], DescriptorSource::Injected).unwrap();
    tracker.scan(Scan::OneStep, &mut Vec::new()).unwrap();
    (0..64).for_each(|page| drop(tracee.ask(&format!("write {page}"))));
    tracker.scan(Scan::TwoStep, &mut Vec::new()).unwrap();
    let unmapped = |tracker: &mut Tracker| {
        let mut regions = Vec::new();
        tracker.unmapped(&mut regions).unwrap();
        pages(&regions)
    };
    assert_eq!(unmapped(&mut tracker), (64..PAGES).collect::<Vec<_>>());
    tracee.ask("punch 10 5");
    let mut written = Vec::new();
    tracker.scan(Scan::TwoStep, &mut written).unwrap();
    assert_eq!(pages(&written), []);
    let punched: Vec<u64> = (10..15).chain(64..PAGES).collect();
    assert_eq!(unmapped(&mut tracker), punched);
    tracee.ask("write 12");
    assert_eq!(unmapped(&mut tracker), punched.into_iter().filter(|page| *page != 12).collect::<Vec<_>>());
    tracker.detach().unwrap();
}

#[test]
fn a_written_page_that_goes_away_is_still_found() {
    let ram = Ram::new(PAGES);
    let mut tracee = Tracee::start("memory", &[ram.path().to_str().unwrap()]);
    assert_eq!(tracee.line(), "ready");
    let range = tracee.range_of(&ram.path());
    let mut tracker = Tracker::attach(tracee.pid(), &[range], DescriptorSource::Injected).unwrap();
    tracker.scan(Scan::OneStep, &mut Vec::new()).unwrap();
    for (verb, first, count) in
        [("punch", 2000, 1), ("punch", 1536, 512), ("drop", 3072, 512), ("drop", 3600, 3)]
    {
        for page in first..first + count {
            tracee.ask(&format!("write {page}"));
        }
        tracee.ask(&format!("{verb} {first} {count}"));
        let mut regions = Vec::new();
        tracker.scan(Scan::TwoStep, &mut regions).unwrap();
        assert_eq!(pages(&regions), (first..first + count).collect::<Vec<_>>(), "{verb}");
    }
    tracker.detach().unwrap();
}
