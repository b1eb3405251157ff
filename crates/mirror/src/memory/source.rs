//! The source's side of memory: scan, read, classify, send.

use std::io::{self, Write};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use dirty_tracker::{Region, Scan, ScanError, Tracker};

use super::codec::{self, Entry, MAX_PLAIN};
use super::compress::{Compression, Encoder, Encoding};
use super::delta;
use super::pages::PageSet;
use super::round::{Counts, Flow, Guest, Sent};
use super::sent::LastSent;
use super::{Ram, RamError};
use crate::audit::{Audit, Auditor, Subject};
use crate::hash::{Secret, is_zero};
use crate::layout::{PAGE_SIZE, PageIndex};
use crate::ledger::{Ledger, Ledgers, Sum};

/// Runs of at least this many pages are asked for holes before they are read: below it, reading costs less.
const HOLE_SEARCH_PAGES: u64 = 64;

/// Where a scan found more than one page in so many written, the next is made in one step: two steps cost a call for
/// each neighbourhood of written pages. Measured for 1 GiB: with nothing written 0.4 ms in two steps and 1.1 ms in one,
/// with 18,000 regions written 4.0 and 1.6 ms.
const SCATTERED: u64 = 64;

/// How to scan while the guest runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scanning {
    /// Nothing but the neighbourhood of what was written is protected again, whatever it takes: with KVM, which drops
    /// all its mappings of a range that is protected as a whole.
    AlwaysSparing,
    /// Whichever way is the quicker one.
    Quickest,
}

/// How to go about a mirror.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct How {
    /// How to scan while the guest runs.
    pub scanning: Scanning,
    /// Whether what is sent is compressed.
    pub compression: Compression,
}

/// Most memory that the last sent content of hot pages takes, of all streams together, in bytes.
const LAST_SENT: usize = 96 << 20;

/// Which part of guest RAM one of the tracker's ranges is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrackedRange {
    /// The RAM block.
    pub block: usize,
    /// Where in the block the range begins, in bytes; a multiple of the page size.
    pub offset: u64,
}

/// Why the source's side of a mirror ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// The tracker could not say what was written.
    #[error("the scan for written pages failed")]
    Scan(#[source] ScanError),
    /// Guest RAM could not be read.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// A data stream broke.
    #[error("data stream {stream} broke")]
    Stream {
        /// Number of the stream.
        stream: u16,
        /// How.
        #[source]
        source: io::Error,
    },
    /// No thread could be started.
    #[error("no thread could be started")]
    Thread(#[source] io::Error),
    /// A worker is gone, after an error that was reported before.
    #[error("a worker of the mirror has already ended")]
    Ended,
}

/// What the proof found: the frozen RAM against the ledger.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Proof {
    /// Pages compared: all of them.
    pub pages: u64,
    /// Pages whose content is not what the destination was given.
    pub mismatches: u64,
    /// The first few of them.
    pub examples: Vec<PageIndex>,
}

/// Differing pages that are kept by number, of however many.
const EXAMPLES: usize = 16;

impl Proof {
    fn differs(&mut self, page: PageIndex) {
        self.mismatches += 1;
        if self.examples.len() < EXAMPLES {
            self.examples.push(page);
        }
    }
}

/// The source's side of one mirror of memory. Its methods block; call them off the async threads.
#[derive(Debug)]
pub struct MemorySource {
    subject: Subject,
    tracker: Tracker,
    ranges: Vec<TrackedRange>,
    workers: Vec<Worker>,
    flow: Arc<Flow>,
    auditor: Auditor,
    /// Pages whose content differed from the ledger when the audit looked: written by the guest, or missed.
    suspects: Arc<Mutex<Vec<PageIndex>>>,
    /// Suspects that differed still after a scan that did not name them. The next scan decides.
    doubtful: Vec<PageIndex>,
    regions: Vec<Region>,
    scanning: Scanning,
    /// Pages that the last scan found; none has been made before the first.
    last_found: u64,
    /// Found by a scan and not yet acknowledged by the destination.
    owed: PageSet,
    round: u32,
    missed: u64,
}

#[derive(Debug)]
struct Worker {
    jobs: Sender<Job>,
    thread: Option<JoinHandle<()>>,
}

/// Where a worker tells, with its stream's number, what its job came to.
type Done<T> = Sender<(u16, Result<T, SourceError>)>;

enum Job {
    Round { number: u32, due: Arc<PageSet>, done: Done<(Counts, Sum)> },
    Prove { done: Done<Proof> },
}

impl MemorySource {
    /// Begins a mirror towards a destination whose RAM is all zero. Every page is due in the first round.
    ///
    /// `ranges` says, for each of the tracker's ranges, which part of RAM it is. `sinks` has one stream for each of the
    /// layout.
    ///
    /// # Errors
    /// [`SourceError::Thread`].
    pub fn start<W: Write + Send + 'static>(
        ram: Ram,
        secret: Secret,
        tracker: Tracker,
        ranges: Vec<TrackedRange>,
        how: How,
        sinks: Vec<W>,
    ) -> Result<MemorySource, SourceError> {
        let layout = ram.layout().clone();
        let ledgers = Arc::new(Ledgers::all_zero(&layout, &secret));
        let subject = Subject { ram: Arc::new(ram), ledgers, secret: Arc::new(secret) };
        let suspects = Arc::new(Mutex::new(Vec::new()));
        let doubted = Arc::clone(&suspects);
        let auditor = Auditor::start(subject.clone(), move |page, _: &mut Ledger| {
            doubted.lock().unwrap_or_else(PoisonError::into_inner).push(page);
        })
        .map_err(SourceError::Thread)?;
        let mut workers = Vec::with_capacity(sinks.len());
        let flow = Arc::new(Flow::default());
        for (stream, sink) in (0..).zip(sinks) {
            workers.push(Worker::start(stream, sink, subject.clone(), how.compression, Arc::clone(&flow))?);
        }
        let mut owed = PageSet::new(layout.end());
        for block in layout.blocks() {
            owed.insert(block.pages.clone());
        }
        let regions = Vec::new();
        let (round, missed, last_found) = (0, 0, 0);
        Ok(MemorySource {
            subject,
            tracker,
            ranges,
            workers,
            flow,
            auditor,
            suspects,
            doubtful: Vec::new(),
            regions,
            scanning: how.scanning,
            last_found,
            owed,
            round,
            missed,
        })
    }

    /// Scans, and sends all that is due, up to and including the barrier that ends the round on every stream. What
    /// was due stays owed until [`acknowledge`](Self::acknowledge).
    ///
    /// # Errors
    /// [`SourceError`]; the mirror cannot go on after any.
    pub fn round(&mut self, guest: Guest) -> Result<Sent, SourceError> {
        self.auditor.busy().set(true);
        let sent = self.send_due(guest);
        self.auditor.busy().set(false);
        sent
    }

    fn send_due(&mut self, guest: Guest) -> Result<Sent, SourceError> {
        let begin = Instant::now();
        let scanned = self.scan(guest)?;
        let scan = begin.elapsed();
        self.take_in_missed()?;
        let due = Arc::new(self.owed.clone());
        let (done, results) = unbounded();
        for worker in &self.workers {
            let job = Job::Round { number: self.round, due: Arc::clone(&due), done: done.clone() };
            worker.jobs.send(job).map_err(|_| SourceError::Ended)?;
        }
        drop(done);
        let mut sent = Sent {
            number: self.round,
            due: due.len(),
            scanned,
            counts: Counts::default(),
            sums: vec![Sum::default(); self.workers.len()],
            scan,
            elapsed: Duration::ZERO,
        };
        for _ in &self.workers {
            let (stream, result) = results.recv().map_err(|_| SourceError::Ended)?;
            let (counts, sum) = result?;
            sent.counts.add(&counts);
            sent.sums[usize::from(stream)] = sum;
        }
        sent.elapsed = begin.elapsed();
        self.round += 1;
        Ok(sent)
    }

    /// Scans, and adds what was written to what is owed. Returns how many pages the scan found.
    fn scan(&mut self, guest: Guest) -> Result<u64, SourceError> {
        let scan = match guest {
            // All is due, so all is protected, and a list of it would tell nothing.
            Guest::Running if self.round == 0 => Scan::OneStep,
            Guest::Running if self.scanning == Scanning::AlwaysSparing => Scan::TwoStep,
            Guest::Running if self.last_found < self.subject.ram.layout().page_count() / SCATTERED => {
                Scan::TwoStep
            }
            Guest::Running => Scan::OneStep,
            Guest::Paused => Scan::List,
        };
        self.regions.clear();
        self.tracker.scan(scan, &mut self.regions).map_err(SourceError::Scan)?;
        let layout = self.subject.ram.layout();
        let mut found = 0;
        for region in &self.regions {
            let TrackedRange { block, offset } = &self.ranges[region.range];
            let block = &layout.blocks()[*block].pages;
            // The mapping of a block on hugetlbfs may go on beyond it, up to the end of a huge page.
            let page = |at: u64| (block.start + (offset + at) / PAGE_SIZE as u64).min(block.end);
            let pages = page(region.start)..page(region.end);
            found += pages.end - pages.start;
            self.owed.insert(pages);
        }
        self.last_found = found;
        Ok(found)
    }

    /// Tells the audit's suspects that the guest has written from those whose writing was missed.
    ///
    /// A page that differs from the ledger, and is not due, may have been written since the scan. If so the next scan
    /// names it; if that does not, nothing ever would have. No worker changes the ledger while this runs.
    fn take_in_missed(&mut self) -> Result<(), SourceError> {
        for page in std::mem::take(&mut self.doubtful) {
            if !self.owed.contains(page.0) {
                self.missed += 1;
                self.owed.insert(page.0..page.0 + 1);
            }
        }
        let suspects = std::mem::take(&mut *self.suspects.lock().unwrap_or_else(PoisonError::into_inner));
        let Subject { ram, ledgers, secret } = &self.subject;
        let mut content = [0; PAGE_SIZE];
        for page in suspects {
            if self.owed.contains(page.0) {
                continue;
            }
            ram.read(page, &mut content)?;
            let known = ledgers.lock(ram.layout().stream_of(page)).get(page);
            if known != Some(secret.hash(&content)) {
                self.doubtful.push(page);
            }
        }
        Ok(())
    }

    /// What has been looked at and sent so far; it can be followed while a round is under way.
    #[must_use]
    pub fn flow(&self) -> Arc<Flow> {
        Arc::clone(&self.flow)
    }

    /// The destination has applied everything up to the barrier of the last round.
    pub fn acknowledge(&mut self) {
        self.owed.clear();
    }

    /// The destination no longer holds what it was given: these pages are sent again whatever they hold.
    pub fn repair(&mut self, pages: &[PageIndex]) {
        let layout = self.subject.ram.layout();
        for &page in pages.iter().filter(|page| layout.locate(**page).is_some()) {
            self.subject.ledgers.lock(layout.stream_of(page)).forget(page);
            self.owed.insert(page.0..page.0 + 1);
        }
    }

    /// Whether the audit has found pages of which only a further round can tell whether their writing was missed.
    #[must_use]
    pub fn in_doubt(&self) -> bool {
        !self.doubtful.is_empty() || !self.suspects.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    /// Writes that tracking missed and the audit found, so far. Anything but zero is a defect of the tracking.
    #[must_use]
    pub fn missed(&self) -> u64 {
        self.missed
    }

    /// Pages compared by the audit so far.
    #[must_use]
    pub fn audited(&self) -> u64 {
        self.auditor.audited()
    }

    /// Compares every page with the ledger now. Pages that the running guest has written since the last round
    /// differ as they should; the next round tells them from those that were missed.
    ///
    /// # Errors
    /// [`RamError`].
    pub fn audit(&self) -> Result<Audit, RamError> {
        self.auditor.all()
    }

    /// Compares all of the frozen RAM with the ledger, that is with what the destination was given.
    ///
    /// # Errors
    /// [`SourceError`].
    pub fn prove(&self) -> Result<Proof, SourceError> {
        let (done, results) = unbounded();
        for worker in &self.workers {
            worker.jobs.send(Job::Prove { done: done.clone() }).map_err(|_| SourceError::Ended)?;
        }
        drop(done);
        let mut proof = Proof::default();
        for _ in &self.workers {
            let part = results.recv().map_err(|_| SourceError::Ended)?.1?;
            proof.pages += part.pages;
            proof.mismatches += part.mismatches;
            let room = EXAMPLES - proof.examples.len();
            proof.examples.extend(part.examples.into_iter().take(room));
        }
        Ok(proof)
    }
}

impl Worker {
    fn start<W: Write + Send + 'static>(
        stream: u16,
        sink: W,
        subject: Subject,
        compression: Compression,
        flow: Arc<Flow>,
    ) -> Result<Worker, SourceError> {
        let (jobs, receiver) = bounded(1);
        let layout = subject.ram.layout();
        let streams = layout.streams();
        let pages = usize::try_from(layout.page_count()).unwrap_or(usize::MAX).min(LAST_SENT / PAGE_SIZE);
        let last_sent = LastSent::new(pages / usize::from(streams.max(1)), streams);
        let mut sender = StreamSender {
            stream,
            sink,
            subject,
            buffer: vec![0; MAX_PLAIN * PAGE_SIZE],
            runs: Vec::new(),
            filled: 0,
            entries: Vec::new(),
            head: Vec::new(),
            last_sent,
            encoder: Encoder::new(compression),
            deltas: Vec::new(),
            joined: Vec::new(),
            counts: Counts::default(),
            flow,
        };
        let thread = std::thread::Builder::new()
            .name(format!("mirror-{stream}"))
            .spawn(move || sender.work(&receiver))
            .map_err(SourceError::Thread)?;
        Ok(Worker { jobs, thread: Some(thread) })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Without its channel the worker ends, once it is done with what it is at; a blocked write is ended by
        // whoever holds the stream's abort handle.
        self.jobs = bounded(0).0;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// One worker: reads and classifies the pages of its chunks, and writes them to its stream.
struct StreamSender<W> {
    stream: u16,
    sink: W,
    subject: Subject,
    /// Content of the runs that wait to be sent.
    buffer: Vec<u8>,
    /// Those runs: page ranges whose content lies one after the other in the buffer.
    runs: Vec<Range<u64>>,
    /// Pages in the buffer.
    filled: usize,
    entries: Vec<Entry>,
    head: Vec<u8>,
    last_sent: LastSent,
    encoder: Encoder,
    /// The deltas of the frame under way.
    deltas: Vec<u8>,
    /// A payload that is to be compressed, in one piece.
    joined: Vec<u8>,
    counts: Counts,
    flow: Arc<Flow>,
}

impl<W: Write> StreamSender<W> {
    fn work(&mut self, jobs: &Receiver<Job>) {
        while let Ok(job) = jobs.recv() {
            let failed = match job {
                Job::Round { number, due, done } => {
                    let result = self.round(number, &due);
                    let failed = result.is_err();
                    let _ = done.send((self.stream, result));
                    failed
                }
                Job::Prove { done } => {
                    let result = self.prove();
                    let failed = result.is_err();
                    let _ = done.send((self.stream, result));
                    failed
                }
            };
            if failed {
                return;
            }
        }
    }

    fn broken(stream: u16) -> impl Fn(io::Error) -> SourceError {
        move |source| SourceError::Stream { stream, source }
    }

    fn round(&mut self, number: u32, due: &PageSet) -> Result<(Counts, Sum), SourceError> {
        self.counts = Counts::default();
        let ram = Arc::clone(&self.subject.ram);
        for (_, chunk) in ram.layout().chunks(self.stream) {
            for run in due.runs(chunk) {
                self.gather(number, run)?;
            }
        }
        self.flush(number)?;
        self.head.clear();
        codec::encode_barrier(&mut self.head, number);
        let written = codec::write_frame(&mut self.sink, &self.head, std::iter::empty())
            .map_err(Self::broken(self.stream))?;
        self.counts.wire_bytes += written;
        self.flow.add(0, written);
        self.sink.flush().map_err(Self::broken(self.stream))?;
        Ok((self.counts, self.subject.ledgers.lock(self.stream).sum()))
    }

    /// Takes up a run of due pages: holes are noted as zero, the rest is read into the buffer.
    fn gather(&mut self, number: u32, mut run: Range<u64>) -> Result<(), SourceError> {
        let count = run.end - run.start;
        if count >= HOLE_SEARCH_PAGES && self.subject.ram.is_hole(PageIndex(run.start), count)? {
            return self.note_hole(number, run);
        }
        while !run.is_empty() {
            let room = (MAX_PLAIN - self.filled) as u64;
            if room == 0 {
                self.flush(number)?;
                continue;
            }
            let part = run.start..run.end.min(run.start + room);
            let pages = (part.end - part.start) as usize;
            let bytes = self.filled * PAGE_SIZE..(self.filled + pages) * PAGE_SIZE;
            self.subject.ram.read(PageIndex(part.start), &mut self.buffer[bytes])?;
            self.filled += pages;
            run.start = part.end;
            self.runs.push(part);
        }
        Ok(())
    }

    fn note_hole(&mut self, number: u32, run: Range<u64>) -> Result<(), SourceError> {
        let raw = (run.end - run.start) * PAGE_SIZE as u64;
        self.counts.raw_bytes += raw;
        self.flow.add(raw, 0);
        let zero = self.subject.secret.zero_page();
        let mut ledger = self.subject.ledgers.lock(self.stream);
        for page in run.map(PageIndex) {
            if ledger.get(page) == Some(zero) {
                self.counts.unchanged += 1;
            } else {
                ledger.record(page, zero);
                self.counts.zero += 1;
                push_zero(&mut self.entries, page);
            }
        }
        drop(ledger);
        // Keeps a table of zero runs alone within its bound.
        if self.entries.len() + MAX_PLAIN + 512 > codec::MAX_ENTRIES { self.flush(number) } else { Ok(()) }
    }

    /// Classifies what is in the buffer and writes it as one frame.
    fn flush(&mut self, number: u32) -> Result<(), SourceError> {
        let parts = self.classify(number);
        let raw = (self.filled * PAGE_SIZE) as u64;
        self.counts.raw_bytes += raw;
        self.flow.add(raw, 0);
        self.runs.clear();
        self.filled = 0;
        if self.entries.is_empty() {
            return Ok(());
        }
        self.send(number, &parts)?;
        self.entries.clear();
        Ok(())
    }

    /// Turns what is in the buffer into entries of a table. Returns their payload, in pieces.
    fn classify(&mut self, number: u32) -> Vec<Part> {
        let secret = &self.subject.secret;
        let zero = secret.zero_page();
        let mut parts = Vec::new();
        let mut at = 0;
        let pages = self.runs.iter().cloned().flatten().map(PageIndex);
        let hashes = self.buffer[..self.filled * PAGE_SIZE]
            .chunks_exact(PAGE_SIZE)
            .map(|page| if is_zero(page) { zero } else { secret.hash(page) });
        // Hashed before the ledger is locked, so that the audit never waits for a megabyte's hashing.
        let hashed: Vec<_> = pages.zip(hashes).collect();
        let mut ledger = self.subject.ledgers.lock(self.stream);
        self.deltas.clear();
        for (page, hash) in hashed {
            let bytes = at..at + PAGE_SIZE;
            at = bytes.end;
            let known = ledger.get(page);
            if known == Some(hash) {
                self.counts.unchanged += 1;
                continue;
            }
            ledger.record(page, hash);
            if hash == zero {
                self.counts.zero += 1;
                push_zero(&mut self.entries, page);
                continue;
            }
            // What is sent for the first time is mostly sent for the last time.
            let hot = number > 0;
            let content = &self.buffer[bytes.clone()];
            let begin = self.deltas.len();
            let old = known.filter(|_| hot).and_then(|known| self.last_sent.get(page, known));
            let delta = old.and_then(|old| delta::encode(old, content, &mut self.deltas));
            if hot {
                self.last_sent.keep(page, hash, number, content);
            }
            match delta.and_then(|length| u16::try_from(length).ok()) {
                Some(length) => {
                    self.counts.delta += 1;
                    self.entries.push(Entry::Delta { page, hash, length });
                    parts.push(Part::Delta(begin..self.deltas.len()));
                }
                None => {
                    self.counts.plain += 1;
                    self.entries.push(Entry::Plain { page, hash });
                    match parts.last_mut() {
                        Some(Part::Plain(last)) if last.end == bytes.start => last.end = bytes.end,
                        _ => parts.push(Part::Plain(bytes)),
                    }
                }
            }
        }
        parts
    }

    /// Writes the entries and their payload as one frame.
    fn send(&mut self, number: u32, parts: &[Part]) -> Result<(), SourceError> {
        let length = codec::payload_of(&self.entries);
        let piece = |part: &Part| match part {
            Part::Plain(bytes) => &self.buffer[bytes.clone()],
            Part::Delta(bytes) => &self.deltas[bytes.clone()],
        };
        let attempt = self.encoder.wants(length);
        let encoded = attempt.and_then(|attempt| {
            self.joined.clear();
            parts.iter().for_each(|part| self.joined.extend_from_slice(piece(part)));
            self.encoder.encode(&attempt, &self.joined)
        });
        self.head.clear();
        let begin = Instant::now();
        let written = match encoded {
            Some((encoding, encoded)) => {
                codec::encode_pages(&mut self.head, number, &self.entries, encoding, encoded.len());
                codec::write_frame(&mut self.sink, &self.head, std::iter::once(encoded))
            }
            None => {
                codec::encode_pages(&mut self.head, number, &self.entries, Encoding::None, length);
                codec::write_frame(&mut self.sink, &self.head, parts.iter().map(piece))
            }
        };
        let written = written.map_err(Self::broken(self.stream))?;
        self.encoder.written(written, begin.elapsed());
        self.flow.add(0, written);
        self.counts.wire_bytes += written;
        Ok(())
    }

    fn prove(&mut self) -> Result<Proof, SourceError> {
        let mut proof = Proof::default();
        let Subject { ram, ledgers, secret } = &self.subject;
        let zero = secret.zero_page();
        let ledger = ledgers.lock(self.stream);
        for (_, chunk) in ram.layout().chunks(self.stream) {
            let hole = ram.is_hole(PageIndex(chunk.start), chunk.end - chunk.start)?;
            for first in chunk.clone().step_by(MAX_PLAIN) {
                let pages = first..chunk.end.min(first + MAX_PLAIN as u64);
                let buffer = &mut self.buffer[..(pages.end - pages.start) as usize * PAGE_SIZE];
                if !hole {
                    ram.read(PageIndex(first), buffer)?;
                }
                for (page, bytes) in pages.map(PageIndex).zip(buffer.chunks_exact(PAGE_SIZE)) {
                    let hash = if hole || is_zero(bytes) { zero } else { secret.hash(bytes) };
                    proof.pages += 1;
                    if ledger.get(page) != Some(hash) {
                        proof.differs(page);
                    }
                }
            }
        }
        Ok(proof)
    }
}

/// A piece of a payload.
enum Part {
    /// These bytes of the buffer: neighbouring plain pages.
    Plain(Range<usize>),
    /// These bytes of the frame's deltas.
    Delta(Range<usize>),
}

/// Adds a zero page to a table, in the last entry if it follows on there within the same chunk.
fn push_zero(entries: &mut Vec<Entry>, page: PageIndex) {
    use crate::layout::CHUNK_PAGES;
    if let Some(Entry::Zero { page: first, count }) = entries.last_mut()
        && first.0 + *count == page.0
        && first.0 / CHUNK_PAGES == page.0 / CHUNK_PAGES
    {
        *count += 1;
    } else {
        entries.push(Entry::Zero { page, count: 1 });
    }
}
