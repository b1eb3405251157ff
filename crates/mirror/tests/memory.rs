//! A whole mirror of memory, source to destination over sockets, of a process that keeps writing.
//!
//! The process is this test program again, told by an environment variable to map a file and write to it.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use compression::Compression;
use dirty_tracker::{DescriptorSource, Tracker};
use mirror::hash::Secret;
use mirror::layout::{Layout, PAGE_SIZE, PageIndex};
use mirror::ledger::Sum;
use mirror::memory::destination::{DestinationError, Event, MemoryDestination};
use mirror::memory::round::{Guest, Sent};
use mirror::memory::source::{How, MemorySource, Scanning, TrackedRange};
use mirror::memory::{Ram, RamFile};

const WRITER: &str = "MIRROR_TEST_WRITER";
const PAGES: u64 = 4096;
const SIZE: u64 = PAGES * PAGE_SIZE as u64;

/// Not a test but the other process: maps the file and writes to random pages of its first half until it is killed.
#[test]
fn writer_process() {
    let Some(path) = std::env::var_os(WRITER) else { return };
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    // SAFETY: a fresh shared mapping of a file of this size; the pointer is used only within it.
    let memory = unsafe {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        libc::mmap(std::ptr::null_mut(), SIZE as usize, protection, libc::MAP_SHARED, file.as_raw_fd(), 0)
    };
    assert_ne!(memory, libc::MAP_FAILED);
    println!("address {}", memory as u64);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    loop {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let page = (state >> 8) % (PAGES / 2);
        // However fast it writes between two rounds, of every other page it writes the same word.
        let word = if page.is_multiple_of(2) { page % 500 } else { state % 500 };
        let offset = (page * PAGE_SIZE as u64 + word * 8) as usize;
        // SAFETY: within the mapping, aligned to 8.
        unsafe {
            memory.cast::<u8>().add(offset).cast::<u64>().write_volatile(if state.is_multiple_of(7) {
                0
            } else {
                state
            })
        };
        if state.is_multiple_of(64) {
            std::thread::yield_now();
        }
    }
}

/// A process that writes, its RAM file, and the destination's; all gone when dropped.
struct Rig {
    _directory: tempfile::TempDir,
    child: Child,
    address: u64,
    source: PathBuf,
    destination: PathBuf,
}

impl Rig {
    fn new() -> Rig {
        let directory = tempfile::Builder::new().prefix("mirror-test-").tempdir_in("/dev/shm").unwrap();
        let (source, destination) = (directory.path().join("source"), directory.path().join("destination"));
        for path in [&source, &destination] {
            File::create(path).unwrap().set_len(SIZE).unwrap();
        }
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "writer_process", "--nocapture"])
            .env(WRITER, &source)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let address = loop {
            let line = lines.next().unwrap().unwrap();
            if let Some((_, address)) = line.split_once("address ") {
                break address.trim().parse().unwrap();
            }
        };
        Rig { _directory: directory, child, address, source, destination }
    }

    fn signal(&self, signal: i32) {
        // SAFETY: signals a child of ours that has not been waited for.
        assert_eq!(unsafe { libc::kill(self.child.id() as i32, signal) }, 0);
        if signal == libc::SIGSTOP {
            let state = || std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
            while !state().rsplit_once(')').unwrap().1.trim_start().starts_with('T') {
                std::thread::yield_now();
            }
        }
    }

    fn mirror(&self, streams: u16) -> Mirror {
        self.mirror_with(streams, Compression::Auto)
    }

    fn mirror_with(&self, streams: u16, compression: Compression) -> Mirror {
        let layout = Layout::new([("ram", SIZE)], streams).unwrap();
        let secret = Secret::random().unwrap();
        let ram = |path: &Path| {
            let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
            Ram::new(layout.clone(), vec![RamFile { file, offset: 0, process: None }]).unwrap()
        };
        let (tell, events) = channel();
        let mut destination =
            MemoryDestination::start(ram(&self.destination), secret.clone(), move |event| {
                drop(tell.send(event))
            })
            .unwrap();
        let mut sinks = Vec::new();
        for stream in 0..streams {
            let (sink, source) = UnixStream::pair().unwrap();
            destination.attach(stream, source, None).unwrap();
            sinks.push(sink);
        }
        let range = self.address..self.address + SIZE;
        let tracker = Tracker::attach(self.child.id(), &[range], DescriptorSource::Injected).unwrap();
        let ranges = vec![TrackedRange { block: 0, offset: 0 }];
        let how = How { scanning: Scanning::Quickest, compression, gives_back: true };
        let ram = ram(&self.source);
        let source = MemorySource::start(ram, secret, tracker, ranges, how, sinks, Vec::new()).unwrap();
        Mirror { source, destination, events, mismatches: Vec::new() }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Mirror {
    source: MemorySource,
    destination: MemoryDestination,
    events: Receiver<Event>,
    mismatches: Vec<PageIndex>,
}

impl Mirror {
    /// One round, up to the destination's acknowledgement. Returns both sides' sums too.
    fn round(&mut self, guest: Guest) -> (Sent, Vec<Sum>) {
        let sent = self.source.round(guest).unwrap();
        self.until_acknowledged(sent)
    }

    fn until_acknowledged(&mut self, sent: Sent) -> (Sent, Vec<Sum>) {
        assert_eq!(sent.counts.pages(), sent.due, "every page that was due is accounted for");
        let mut sums = vec![None; sent.sums.len()];
        while sums.iter().any(Option::is_none) {
            match self.events.recv().unwrap() {
                Event::Barrier { stream, number, sum, .. } if number == sent.number => {
                    sums[usize::from(stream)] = Some(sum);
                }
                Event::Mismatch(page) => self.mismatches.push(page),
                other => panic!("{other:?}"),
            }
        }
        self.source.acknowledge();
        (sent, sums.into_iter().map(Option::unwrap).collect())
    }

    fn finish(self) {
        drop(self.source);
        self.destination.finish();
    }
}

fn assert_equal(rig: &Rig) {
    let (source, destination) =
        (std::fs::read(&rig.source).unwrap(), std::fs::read(&rig.destination).unwrap());
    let differing = source
        .chunks(PAGE_SIZE)
        .zip(destination.chunks(PAGE_SIZE))
        .enumerate()
        .filter(|(_, (a, b))| a != b)
        .map(|(page, _)| page);
    assert_eq!(differing.collect::<Vec<_>>(), Vec::<usize>::new(), "pages that differ");
}

fn allocated(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(path).unwrap().blocks() * 512
}

#[test]
fn no_write_of_a_running_process_is_lost() {
    for (streams, compression) in
        [(1, Compression::Auto), (3, Compression::Off), (2, Compression::Lz4), (2, Compression::Zstd)]
    {
        let rig = Rig::new();
        let mut mirror = rig.mirror_with(streams, compression);
        let (first, _) = mirror.round(Guest::Running);
        assert_eq!(first.due, PAGES, "the first round is everything");
        let (mut rounds, mut deltas, mut deferred) = (0, 0, 0);
        while rounds < 40 || deferred == 0 {
            let (sent, _) = mirror.round(Guest::Running);
            (rounds, deltas, deferred) = (rounds + 1, deltas + sent.counts.delta, deferred + sent.deferred);
            assert!(rounds < 10_000, "all of the pages are hot, and none is ever deferred");
            // Only where many are due is a second look at the hot ones worth it: the process is left the time to write them.
            if sent.due < PAGES / 2 {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        assert!(deltas > 0, "pages that change by some words are sent as deltas");
        rig.signal(libc::SIGSTOP);
        let (sent, sums) = mirror.round(Guest::Paused);
        assert_eq!(sent.sums, sums, "the gate");
        let proof = mirror.source.prove().unwrap();
        assert_eq!((proof.pages, proof.mismatches), (PAGES, 0), "the proof");
        assert_equal(&rig);
        assert_eq!(mirror.source.missed(), 0);
        assert_eq!(mirror.mismatches, []);
        assert!(allocated(&rig.destination) <= SIZE / 2 + (1 << 20), "holes stay holes");
        mirror.finish();
    }
}

#[test]
fn a_page_zeroed_after_it_was_sent_is_zero_at_the_destination() {
    let rig = Rig::new();
    rig.signal(libc::SIGSTOP);
    let file = OpenOptions::new().write(true).open(&rig.source).unwrap();
    file.write_all_at(&[5; 40 * PAGE_SIZE], SIZE / 2).unwrap();
    let mut mirror = rig.mirror(1);
    mirror.round(Guest::Running);
    // Written through the file, not the mapping: the tracker cannot see it, only the audit can.
    file.write_all_at(&[0; 20 * PAGE_SIZE], SIZE / 2).unwrap();
    let found = mirror.source.audit().unwrap();
    assert_eq!(found.differing.len(), 20);
    assert!(mirror.source.has_suspects() && !mirror.source.in_doubt());
    mirror.round(Guest::Running);
    assert!(mirror.source.in_doubt(), "no scan has named them");
    let (sent, _) = mirror.round(Guest::Running);
    assert_eq!((sent.scanned, sent.counts.zero), (0, 20));
    assert!(!mirror.source.in_doubt() && !mirror.source.has_suspects());
    assert_eq!(mirror.source.missed(), 20, "writes that tracking missed are counted");
    assert_equal(&rig);
    mirror.finish();
}

/// Gives pages of a RAM file back to the host, as QEMU does for a balloon, a report of free pages or virtio-mem.
fn punch(file: &File, pages: std::ops::Range<u64>) {
    let (offset, len) = (pages.start * PAGE_SIZE as u64, (pages.end - pages.start) * PAGE_SIZE as u64);
    let flags = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: takes a descriptor that is open, and numbers.
    let punched = unsafe { libc::fallocate(file.as_raw_fd(), flags, offset as i64, len as i64) };
    assert_eq!(punched, 0, "{}", std::io::Error::last_os_error());
}

#[test]
fn what_a_guest_gave_back_between_the_last_scan_and_the_pause_is_zero_at_the_destination() {
    let rig = Rig::new();
    let file = OpenOptions::new().read(true).write(true).open(&rig.source).unwrap();
    let mut mirror = rig.mirror(3);
    mirror.round(Guest::Running);
    // Of one half all pages are mapped, by the process that writes them; of the other none.
    while mirror.round(Guest::Running).0.scanned < PAGES / 4 {}
    rig.signal(libc::SIGSTOP);
    file.write_all_at(&[5; 600 * PAGE_SIZE], SIZE / 2).unwrap();
    let holds: Vec<PageIndex> = (PAGES / 2..PAGES / 2 + 600).map(PageIndex).collect();
    mirror.source.repair(&holds);
    mirror.round(Guest::Running);
    assert_equal(&rig);

    punch(&file, 10..100);
    punch(&file, PAGES / 2 + 7..PAGES / 2 + 8);
    punch(&file, PAGES / 2 + 100..PAGES / 2 + 590);
    let (sent, sums) = mirror.round(Guest::Paused);
    assert!(sent.counts.zero >= 400, "{:?}", sent.counts);
    assert_eq!(sent.sums, sums, "the gate");
    assert_eq!(mirror.source.prove().unwrap().mismatches, 0, "the proof raises no alarm");
    assert_equal(&rig);
    assert_eq!(mirror.source.missed(), 0, "no write was missed");
    // What is zero there is not sent again.
    let (sent, _) = mirror.round(Guest::Paused);
    assert_eq!(sent.counts.zero, 0, "{:?}", sent.counts);
    mirror.finish();
}

#[test]
fn what_a_running_guest_gives_back_is_found_before_the_audit_takes_it_for_a_missed_write() {
    let rig = Rig::new();
    rig.signal(libc::SIGSTOP);
    let file = OpenOptions::new().read(true).write(true).open(&rig.source).unwrap();
    file.write_all_at(&[5; 40 * PAGE_SIZE], SIZE / 2).unwrap();
    let mut mirror = rig.mirror(1);
    mirror.round(Guest::Running);
    punch(&file, PAGES / 2..PAGES / 2 + 20);
    // While it runs not every round has the time to look.
    let mut zero = 0;
    for _ in 0..10_000 {
        zero += mirror.round(Guest::Running).0.counts.zero;
        if zero > 0 {
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!((zero, mirror.source.missed()), (20, 0));
    assert_equal(&rig);
    mirror.finish();
}

#[test]
fn a_flipped_bit_at_the_destination_is_found_and_repaired() {
    let rig = Rig::new();
    rig.signal(libc::SIGSTOP);
    let mut mirror = rig.mirror(2);
    mirror.round(Guest::Running);
    let copy = OpenOptions::new().read(true).write(true).open(&rig.destination).unwrap();
    let (mut byte, places) = ([0], [SIZE / 3, SIZE - 1, 0]);
    for place in places {
        copy.read_exact_at(&mut byte, place).unwrap();
        copy.write_all_at(&[byte[0] ^ 0x10], place).unwrap();
    }
    assert_eq!(mirror.destination.audit().unwrap().pages, PAGES);
    // The next round brings in what the audit had to say; before the repair the gate must not hold.
    let (sent, sums) = mirror.round(Guest::Paused);
    assert_ne!(sent.sums, sums, "the gate stays shut");
    let mismatches = std::mem::take(&mut mirror.mismatches);
    let mut pages: Vec<u64> = mismatches.iter().map(|page| page.0).collect();
    pages.sort_unstable();
    assert_eq!(pages, [0, SIZE / 3 / PAGE_SIZE as u64, PAGES - 1]);
    mirror.source.repair(&mismatches);
    let (sent, sums) = mirror.round(Guest::Paused);
    assert!(
        sent.counts.plain + sent.counts.zero >= 3,
        "sent again although the ledger of the source knew them"
    );
    assert_eq!(sent.sums, sums, "the gate opens");
    assert_equal(&rig);
    mirror.finish();
}

#[test]
fn pages_are_not_left_out_of_a_copy_that_was_not_told_so() {
    for announced in [false, true] {
        let rig = Rig::new();
        rig.signal(libc::SIGSTOP);
        let mut mirror = rig.mirror(1);
        if announced {
            mirror.destination.allow_absent();
        }
        let scanned = mirror.source.look(Guest::Paused).unwrap();
        // It is told by a stream that the destination may have closed already.
        let _ = mirror.source.withhold(Guest::Paused, scanned);
        match mirror.events.recv().unwrap() {
            Event::Barrier { .. } => assert!(announced, "holes would be zeros to the guest"),
            Event::Failed { error: DestinationError::Absent { chunks }, .. } => {
                assert!(!announced && chunks > 0);
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(mirror.destination.absent() > 0, announced);
        mirror.finish();
    }
}

#[test]
fn of_what_is_withheld_the_hottest_pages_come_before_the_guest_runs() {
    const MOST: usize = 100;
    let rig = Rig::new();
    let mut mirror = rig.mirror(2);
    mirror.destination.allow_absent();
    mirror.round(Guest::Running);
    // The process writes to half of all pages, again and again. Once each of four scans in a row has found most of them, more
    // than a quarter must be hot.
    let (mut in_a_row, mut time) = (0, Duration::from_millis(10));
    while in_a_row < 4 {
        std::thread::sleep(time);
        let scanned = mirror.source.look(Guest::Running).unwrap();
        if scanned.pages < PAGES / 2 * 3 / 4 {
            (in_a_row, time) = (0, time * 2);
        } else {
            in_a_row += 1;
        }
        let sent = mirror.source.withhold(Guest::Running, scanned).unwrap();
        let (sent, sums) = mirror.until_acknowledged(sent);
        assert_eq!(sent.sums, sums);
    }
    let before = mirror.source.withheld();
    rig.signal(libc::SIGSTOP);
    let scanned = mirror.source.look(Guest::Paused).unwrap();
    let sent = mirror.source.withhold_cold(scanned, MOST).unwrap();
    let (sent, sums) = mirror.until_acknowledged(sent);
    assert_eq!(sent.sums, sums, "the gate");
    let there = sent.counts.pages() - sent.counts.withheld;
    assert_eq!(there, MOST as u64, "of {before} pages");
    assert_eq!(mirror.source.withheld(), mirror.destination.absent(), "both know what is still to come");
    assert!(mirror.destination.absent() > 0);
    mirror.finish();
}

#[test]
fn a_write_that_tracking_missed_cannot_hide_from_the_proof() {
    let rig = Rig::new();
    rig.signal(libc::SIGSTOP);
    let mut mirror = rig.mirror(2);
    mirror.round(Guest::Running);
    let file = OpenOptions::new().write(true).open(&rig.source).unwrap();
    file.write_all_at(b"unseen", SIZE / 2 + 5).unwrap();
    let proof = mirror.source.prove().unwrap();
    assert_eq!(proof.mismatches, 1);
    assert_eq!(proof.examples, [PageIndex((SIZE / 2 + 5) / PAGE_SIZE as u64)]);
    mirror.finish();
}

#[test]
fn a_page_that_is_sent_as_a_copy_of_another_is_what_it_should_be_even_when_the_other_changes() {
    for streams in [1, 3] {
        let rig = Rig::new();
        rig.signal(libc::SIGSTOP);
        let file = OpenOptions::new().write(true).open(&rig.source).unwrap();
        let page = |number: u64| SIZE / 2 + number * PAGE_SIZE as u64;
        let same = vec![7; PAGE_SIZE];
        // Neighbours, and pages of other chunks and so of other streams.
        let twins: Vec<u64> = (0..40).chain((600..640).step_by(3)).collect();
        for &number in &twins {
            file.write_all_at(&same, page(number)).unwrap();
        }
        let mut mirror = rig.mirror(streams);
        let (sent, sums) = mirror.round(Guest::Running);
        assert_eq!(sent.sums, sums);
        assert!(sent.counts.duplicate >= twins.len() as u64 - 2 * u64::from(streams), "{sent:?}");
        assert_equal(&rig);
        // What was copied from changes, and in the same round another page becomes what it was.
        let other = vec![8; PAGE_SIZE];
        for number in [0, 1, 2, 39, 600] {
            file.write_all_at(&other, page(number)).unwrap();
        }
        file.write_all_at(&same, page(100)).unwrap();
        mirror.source.audit().unwrap();
        mirror.round(Guest::Running);
        let (sent, sums) = mirror.round(Guest::Running);
        assert!(sent.counts.duplicate >= 3, "{sent:?}");
        assert_eq!(sent.sums, sums);
        assert_eq!(mirror.mismatches, []);
        assert_equal(&rig);
        mirror.finish();
    }
}
