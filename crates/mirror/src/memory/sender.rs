//! One worker of the source: reads and classifies the pages of its chunks, and writes them to its stream.

use std::io::Write;
use std::ops::Range;
use std::sync::Arc;
use std::thread::JoinHandle;

use compression::Compression;
use crossbeam_channel::{Receiver, Sender, bounded, select};

use super::codec::{self, Absent, Entry, MAX_PLAIN};
use super::pages::PageSet;
use super::proof::Proof;
use super::round::{Counts, Flow};
use super::sent::LastSent;
use super::source_error::SourceError;
use super::twins::Twins;
use super::writer::FrameWriter;
use crate::audit::Subject;
use crate::hash::is_zero;
use crate::layout::{PAGE_SIZE, PageIndex};
use crate::ledger::Sum;
use crate::storage::Lane;

/// Runs of at least this many pages are asked for holes before they are read: below it, reading costs less.
const HOLE_SEARCH_PAGES: u64 = 64;

/// Most memory that is for what was last sent of hot pages, of all streams together, in bytes.
const LAST_SENT: usize = 84 << 20;

#[derive(Debug)]
pub(super) struct Worker {
    pub(super) jobs: Sender<Job>,
    thread: Option<JoinHandle<()>>,
}

/// Where a worker tells, with its stream's number, what its job came to.
pub(super) type Done<T> = Sender<(u16, Result<T, SourceError>)>;

/// What came of telling the destination something.
pub(super) struct Told {
    pub(super) counts: Counts,
    /// The stream's ledger sum of memory.
    pub(super) sum: Sum,
    /// The stream's ledger sum of disks.
    pub(super) disks: Sum,
}

pub(super) enum Job {
    /// Send these; the barrier follows the last part of a round.
    Round {
        number: u32,
        due: Arc<PageSet>,
        last: bool,
        done: Done<Told>,
    },
    /// Tell the destination what it is to be without.
    Withhold {
        number: u32,
        due: Arc<PageSet>,
        done: Done<Told>,
    },
    Prove {
        done: Done<Proof>,
    },
}

impl Worker {
    pub(super) fn start<W: Write + Send + 'static>(
        stream: u16,
        sink: W,
        subject: Subject,
        compression: Compression,
        flow: Arc<Flow>,
        lane: Option<Lane>,
    ) -> Result<Worker, SourceError> {
        let (jobs, receiver) = bounded(1);
        let layout = subject.ram.layout();
        let streams = layout.streams();
        let pages = usize::try_from(layout.page_count()).unwrap_or(usize::MAX);
        let of_stream = |pages: usize| pages / usize::from(streams.max(1));
        let last_sent = LastSent::new(of_stream(LAST_SENT), of_stream(pages), streams);
        let twins = Twins::new(of_stream(pages));
        let mut sender = StreamSender {
            stream,
            writer: FrameWriter::new((stream, streams), sink, compression, flow),
            lane,
            broken: None,
            subject,
            buffer: vec![0; MAX_PLAIN * PAGE_SIZE],
            runs: Vec::new(),
            filled: 0,
            entries: Vec::new(),
            last_sent,
            twins,
            deltas: Vec::new(),
            counts: Counts::default(),
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
    writer: FrameWriter<W>,
    /// What waits of disks, to be sent on the same stream.
    lane: Option<Lane>,
    /// The stream broke when nobody had asked for anything.
    broken: Option<SourceError>,
    subject: Subject,
    /// Content of the runs that wait to be sent.
    buffer: Vec<u8>,
    /// Those runs: page ranges whose content lies one after the other in the buffer.
    runs: Vec<Range<u64>>,
    /// Pages in the buffer.
    filled: usize,
    entries: Vec<Entry>,
    last_sent: LastSent,
    twins: Twins,
    /// The deltas, and names of twins, of the frame under way.
    deltas: Vec<u8>,
    counts: Counts,
}

impl<W: Write> StreamSender<W> {
    fn work(&mut self, jobs: &Receiver<Job>) {
        while let Some(job) = self.next(jobs) {
            let failed = match job {
                Job::Round { number, due, last, done } => {
                    let result = self.round(number, &due, last);
                    let failed = result.is_err();
                    let _ = done.send((self.stream, result));
                    failed
                }
                Job::Withhold { number, due, done } => {
                    let result = self.withhold(number, &due);
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

    /// The next job. Until it comes, what waits of disks is sent.
    fn next(&mut self, jobs: &Receiver<Job>) -> Option<Job> {
        loop {
            let Some(lane) = &mut self.lane else { return jobs.recv().ok() };
            select! {
                recv(jobs) -> job => return job.ok(),
                recv(lane.woken()) -> _ => {
                    // If more has come meanwhile, it has been told again.
                    let sent = lane.send_all(&mut self.writer).and_then(|()| self.writer.flush());
                    if let Err(error) = sent {
                        // Told by the next job; nothing is taken from the lane any more.
                        (self.lane, self.broken) = (None, Some(error));
                    }
                }
            }
        }
    }

    /// Between two frames of memory: what is urgent of disks goes first, and the copy has its share.
    fn send_blocks(&mut self) -> Result<(), SourceError> {
        match &mut self.lane {
            Some(lane) => lane.send(&mut self.writer),
            None => self.broken.take().map_or(Ok(()), Err),
        }
    }

    fn round(&mut self, number: u32, due: &PageSet, last: bool) -> Result<Told, SourceError> {
        self.send_blocks()?;
        self.counts = Counts::default();
        let ram = Arc::clone(&self.subject.ram);
        for (_, chunk) in ram.layout().chunks(self.stream) {
            for run in due.runs(chunk) {
                self.gather(number, run)?;
            }
        }
        self.flush(number)?;
        if last {
            self.barrier(number)?;
        }
        Ok(self.told())
    }

    fn told(&self) -> Told {
        let sum = self.subject.ledgers.lock(self.stream).sum();
        Told { counts: self.counts, sum, disks: self.lane.as_ref().map(Lane::sum).unwrap_or_default() }
    }

    /// Ends a round: everything of disks that waits goes before it.
    fn barrier(&mut self, number: u32) -> Result<(), SourceError> {
        if let Some(lane) = &mut self.lane {
            lane.send_all(&mut self.writer)?;
        }
        self.counts.wire_bytes += self.writer.barrier(number)?;
        Ok(())
    }

    /// Tells which pages the destination is to be without, instead of sending them.
    fn withhold(&mut self, number: u32, due: &PageSet) -> Result<Told, SourceError> {
        self.counts = Counts::default();
        let Subject { ram, ledgers, .. } = &self.subject;
        let mut ledger = ledgers.lock(self.stream);
        let mut chunks = Vec::new();
        for (_, chunk) in ram.layout().chunks(self.stream) {
            let pages = due.chunk(chunk.start);
            if pages.iter().all(|&word| word == 0) {
                continue;
            }
            let absent = Absent { first: PageIndex(chunk.start), pages };
            for page in absent.runs().flatten() {
                ledger.forget(PageIndex(page));
                self.counts.withheld += 1;
            }
            chunks.push(absent);
        }
        drop(ledger);
        for chunks in chunks.chunks(codec::MAX_ABSENT) {
            self.counts.wire_bytes += self.writer.absent(number, chunks)?;
        }
        self.barrier(number)?;
        Ok(self.told())
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
        self.writer.looked_at(raw);
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
        self.writer.looked_at(raw);
        self.runs.clear();
        self.filled = 0;
        if !self.entries.is_empty() {
            self.send(number, &parts)?;
            self.entries.clear();
        }
        self.send_blocks()
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
            if let Some(twin) = self.twins.find(hash, page, &ledger) {
                let begin = self.deltas.len();
                self.deltas.extend_from_slice(&twin.0.to_le_bytes());
                if hot {
                    self.last_sent.keep(page, hash, number, content, secret);
                }
                self.counts.duplicate += 1;
                self.entries.push(Entry::Duplicate { page, hash });
                parts.push(Part::Delta(begin..self.deltas.len()));
                continue;
            }
            let begin = self.deltas.len();
            let delta = known
                .filter(|_| hot)
                .and_then(|known| self.last_sent.delta(page, known, content, secret, &mut self.deltas));
            if hot {
                self.last_sent.keep(page, hash, number, content, secret);
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
        let payload = parts.iter().map(|part| match part {
            Part::Plain(bytes) => &self.buffer[bytes.clone()],
            Part::Delta(bytes) => &self.deltas[bytes.clone()],
        });
        self.counts.wire_bytes += self.writer.pages(number, &self.entries, payload)?;
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
    /// These bytes of the frame's deltas and names of twins.
    Delta(Range<usize>),
}

/// Adds a zero page to a table, in the last entry if it follows on there within the same chunk.
pub(super) fn push_zero(entries: &mut Vec<Entry>, page: PageIndex) {
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
