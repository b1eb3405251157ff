//! The source's side of post-copy: supplies what the guest waits for, and pushes the rest.

use std::collections::BTreeSet;
use std::io::Write;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use compression::Compression;
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};

use crate::audit::Subject;
use crate::hash::{Secret, is_zero};
use crate::layout::{CHUNK_PAGES, Layout, PAGE_SIZE, PageIndex};
use crate::ledger::Ledgers;
use crate::memory::codec::{Entry, MAX_PLAIN};
use crate::memory::pages::PageSet;
use crate::memory::round::Flow;
use crate::memory::sender::push_zero;
use crate::memory::source_error::SourceError;
use crate::memory::writer::FrameWriter;
use crate::memory::{Ram, RamError};

/// Pages, aligned to as many, of which all that are missing come with the one that was asked for: 64 KiB.
const NEIGHBOURHOOD: u64 = 16;
/// Pages that are pushed in one frame: 128 KiB. What a guest waits for is never far behind.
const PUSHED_AT_ONCE: u64 = 32;
/// So long after the hand-over nothing is pushed while the guest asks for memory. What it needs to do anything at all it asks
/// for one after the other, and what is pushed meanwhile is in the way of each: on a link of 1 Gbit/s an answer took 4.3 ms,
/// and a guest's first answer to a client 270 ms.
const FIRST: Duration = Duration::from_millis(250);
/// A guest that has not asked for so long does not wait for anything. At first it also computes between two questions: longest
/// where it is emulated, and all of its code has to be translated again.
const QUIET: Duration = Duration::from_millis(20);

/// The source's side of one post-copy. The memory stands still: the guest does not run here any more. Ends when dropped;
/// whatever blocks on a stream is ended by the stream's abort handle.
#[derive(Debug)]
pub struct PostCopySource {
    shared: Arc<Shared>,
    /// Tells that there is something in [`Shared::wanted`].
    wants: Option<Sender<()>>,
    workers: Vec<JoinHandle<()>>,
    results: Receiver<Result<(), SourceError>>,
}

#[derive(Debug)]
struct Shared {
    ram: Arc<Ram>,
    ledgers: Arc<Ledgers>,
    secret: Arc<Secret>,
    flow: Arc<Flow>,
    /// Not sent by anybody yet.
    unsent: Mutex<PageSet>,
    /// Asked for, and not answered yet: no more than there are pages, however often one is asked for.
    wanted: Mutex<BTreeSet<PageIndex>>,
    /// Chunks with unsent pages, in the order in which they are pushed, and how many were taken.
    chunks: Vec<Range<u64>>,
    taken: AtomicUsize,
    gate: Gate,
}

/// Holds pushing back until it may begin.
#[derive(Debug, Default)]
struct Gate {
    state: Mutex<State>,
    changed: Condvar,
    ended: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    /// Since when pushing may begin.
    open: Option<Instant>,
    /// When the guest has asked last.
    asked: Option<Instant>,
}

impl State {
    /// How long pushing has to wait, seen from now; none where it need not.
    fn wait(&self, now: Instant) -> Option<Duration> {
        let Some(open) = self.open else { return Some(Duration::MAX) };
        let quiet_at = self.asked.unwrap_or(open).max(open) + QUIET;
        let until = quiet_at.min(open + FIRST);
        until.checked_duration_since(now).filter(|wait| !wait.is_zero())
    }
}

impl Gate {
    /// Waits until something may be pushed.
    fn pass(&self) {
        let mut state = lock(&self.state);
        while !self.ended.load(Ordering::Relaxed) {
            state = match state.wait(Instant::now()) {
                None => return,
                Some(Duration::MAX) => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(wait) => {
                    self.changed.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }
}

impl PostCopySource {
    /// Begins to supply what is asked for, from `ram` to `urgent`, and, once told to [`push`](Self::push), the rest to
    /// `bulk`. `heat` tells of a page how likely the guest is to want it soon.
    ///
    /// # Errors
    /// [`SourceError::Thread`].
    pub fn start<W: Write + Send + 'static>(
        ram: Arc<Ram>,
        secret: Secret,
        unsent: PageSet,
        heat: impl Fn(PageIndex) -> u32,
        urgent: W,
        bulk: Vec<W>,
    ) -> Result<PostCopySource, SourceError> {
        let ledgers = Arc::new(Ledgers::all_zero(ram.layout(), &secret));
        let subject = Subject { ram, ledgers, secret: Arc::new(secret) };
        Self::with(subject, Arc::default(), Compression::Auto, unsent, heat, urgent, bulk)
    }

    pub(in crate::memory) fn with<W: Write + Send + 'static>(
        subject: Subject,
        flow: Arc<Flow>,
        compression: Compression,
        unsent: PageSet,
        heat: impl Fn(PageIndex) -> u32,
        urgent: W,
        bulk: Vec<W>,
    ) -> Result<PostCopySource, SourceError> {
        let Subject { ram, ledgers, secret } = subject;
        let chunks = hottest_first(ram.layout(), &unsent, heat);
        let shared = Arc::new(Shared {
            ram,
            ledgers,
            secret,
            flow,
            unsent: Mutex::new(unsent),
            wanted: Mutex::default(),
            chunks,
            taken: AtomicUsize::new(0),
            gate: Gate::default(),
        });
        let (wants, wanted) = bounded(1);
        let (tell, results) = unbounded();
        let mut source =
            PostCopySource { shared: Arc::clone(&shared), wants: Some(wants), workers: Vec::new(), results };
        let first = shared.ram.layout().streams();
        let mut start = |name: &str, work: Box<dyn FnOnce() + Send>| {
            let worker = std::thread::Builder::new().name(name.into()).spawn(work);
            worker.map(|worker| source.workers.push(worker)).map_err(SourceError::Thread)
        };
        let mut urgent = Supply::new(Arc::clone(&shared), first, urgent, Compression::Off);
        let told = tell.clone();
        start(
            "supply",
            Box::new(move || {
                // A push ends by itself; this ends only with the link, or when nobody asks any more.
                if let Err(error) = urgent.answer(&wanted) {
                    let _ = told.send(Err(error));
                }
            }),
        )?;
        for (number, sink) in (first.saturating_add(1)..).zip(bulk) {
            let mut bulk = Supply::new(Arc::clone(&shared), number, sink, compression);
            let told = tell.clone();
            start("push", Box::new(move || drop(told.send(bulk.push()))))?;
        }
        Ok(source)
    }

    /// The guest waits for these: they go first, with their neighbours, whether or not they were sent before.
    ///
    /// False, and nothing is done, where there are not all of these, or more would wait to be supplied than each page twice: nobody who
    /// waits for pages asks so.
    #[must_use]
    pub fn supply(&self, pages: Vec<PageIndex>) -> bool {
        let layout = self.shared.ram.layout();
        {
            let mut wanted = lock(&self.shared.wanted);
            let too_many = (wanted.len() + pages.len()) as u64 > layout.page_count().saturating_mul(2);
            if too_many || !pages.iter().all(|page| layout.locate(*page).is_some()) {
                return false;
            }
            wanted.extend(pages);
        }
        lock(&self.shared.gate.state).asked = Some(Instant::now());
        if let Some(wants) = &self.wants {
            // Where one word waits to be heard, that is enough.
            let _ = wants.try_send(());
        }
        true
    }

    /// Begins to push what nobody has asked for. At first only while nobody asks.
    pub fn push(&self) {
        lock(&self.shared.gate.state).open.get_or_insert_with(Instant::now);
        self.shared.gate.changed.notify_all();
    }

    /// The failure of a stream, as soon as one has failed. Does not block.
    #[must_use]
    pub fn failure(&self) -> Option<SourceError> {
        self.results.try_iter().find_map(Result::err)
    }

    /// Bytes written to the streams so far, before encryption; those of the rounds before included.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.shared.flow.wire_bytes()
    }

    /// Pages that were given to no stream yet.
    #[must_use]
    pub fn unsent(&self) -> u64 {
        lock(&self.shared.unsent).len()
    }
}

impl Drop for PostCopySource {
    fn drop(&mut self) {
        self.wants = None;
        self.shared.gate.ended.store(true, Ordering::Relaxed);
        self.push();
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The chunks that have pages to send, hottest first.
fn hottest_first(layout: &Layout, unsent: &PageSet, heat: impl Fn(PageIndex) -> u32) -> Vec<Range<u64>> {
    let all = layout.blocks().iter().flat_map(|block| {
        let end = block.pages.end;
        let first = block.pages.start / CHUNK_PAGES..end.div_ceil(CHUNK_PAGES);
        first.map(move |chunk| chunk * CHUNK_PAGES..((chunk + 1) * CHUNK_PAGES).min(end))
    });
    let mut chunks: Vec<(u64, Range<u64>)> = all
        .filter_map(|chunk| {
            let pages = unsent.runs(chunk.clone()).flatten();
            let (count, heat) =
                pages.fold((0, 0), |(count, sum), page| (count + 1, sum + u64::from(heat(PageIndex(page)))));
            (count > 0).then_some((heat, chunk))
        })
        .collect();
    chunks.sort_by_key(|(heat, _)| std::cmp::Reverse(*heat));
    chunks.into_iter().map(|(_, chunk)| chunk).collect()
}

/// One stream of supplied pages.
struct Supply<W> {
    shared: Arc<Shared>,
    writer: FrameWriter<W>,
    buffer: Vec<u8>,
    entries: Vec<Entry>,
    /// Which parts of the buffer are to be sent.
    parts: Vec<Range<usize>>,
    /// Bytes of the buffer that hold content.
    filled: usize,
}

impl<W: Write> Supply<W> {
    fn new(shared: Arc<Shared>, stream: u16, sink: W, compression: Compression) -> Supply<W> {
        let streams = shared.ram.layout().streams();
        let writer = FrameWriter::new((stream, streams), sink, compression, Arc::clone(&shared.flow));
        Supply {
            shared,
            writer,
            buffer: vec![0; MAX_PLAIN * PAGE_SIZE],
            entries: Vec::new(),
            parts: Vec::new(),
            filled: 0,
        }
    }

    /// Supplies what is asked for, until nobody can ask any more.
    fn answer(&mut self, wanted: &Receiver<()>) -> Result<(), SourceError> {
        while let Ok(()) = wanted.recv() {
            let pages = std::mem::take(&mut *lock(&self.shared.wanted));
            for run in self.with_neighbours(&pages) {
                self.gather(run)?;
            }
            self.send()?;
            self.writer.flush()?;
        }
        Ok(())
    }

    /// What is wanted, and what is unsent around it; those are taken.
    fn with_neighbours(&self, pages: &BTreeSet<PageIndex>) -> Vec<Range<u64>> {
        let mut unsent = lock(&self.shared.unsent);
        let mut taken = PageSet::new(self.shared.ram.layout().end());
        let mut around = BTreeSet::new();
        for page in pages {
            let first = page.0 / NEIGHBOURHOOD * NEIGHBOURHOOD;
            let neighbours = first..first + NEIGHBOURHOOD;
            for run in unsent.runs(neighbours.clone()).collect::<Vec<_>>() {
                unsent.remove(run.clone());
                taken.insert(run);
            }
            taken.insert(page.0..page.0 + 1);
            around.insert(neighbours.start);
        }
        around
            .into_iter()
            .flat_map(|first| taken.runs(first..first + NEIGHBOURHOOD).collect::<Vec<_>>())
            .collect()
    }

    /// Pushes chunks that nobody else has taken, until there are none.
    fn push(&mut self) -> Result<(), SourceError> {
        self.shared.gate.pass();
        loop {
            let next = self.shared.taken.fetch_add(1, Ordering::Relaxed);
            let Some(chunk) = self.shared.chunks.get(next).cloned() else { break };
            for first in chunk.clone().step_by(PUSHED_AT_ONCE as usize) {
                self.shared.gate.pass();
                if self.shared.gate.ended.load(Ordering::Relaxed) {
                    return Ok(());
                }
                let window = first..chunk.end.min(first + PUSHED_AT_ONCE);
                let mut unsent = lock(&self.shared.unsent);
                let runs: Vec<_> = unsent.runs(window).collect();
                runs.iter().for_each(|run| unsent.remove(run.clone()));
                drop(unsent);
                for run in runs {
                    self.gather(run)?;
                }
                self.send()?;
            }
        }
        self.writer.flush()
    }

    /// Reads a run of pages of one chunk into the frame under way.
    fn gather(&mut self, run: Range<u64>) -> Result<(), SourceError> {
        if self.filled + (run.end - run.start) as usize * PAGE_SIZE > self.buffer.len() {
            self.send()?;
        }
        let bytes = self.filled..self.filled + (run.end - run.start) as usize * PAGE_SIZE;
        let Shared { ram, ledgers, secret, .. } = &*self.shared;
        let read: Result<(), RamError> = ram.read(PageIndex(run.start), &mut self.buffer[bytes.clone()]);
        read?;
        self.writer.looked_at(bytes.len() as u64);
        self.filled = bytes.end;
        let mut ledger = ledgers.lock(ram.layout().stream_of(PageIndex(run.start)));
        for (page, start) in run.map(PageIndex).zip(bytes.step_by(PAGE_SIZE)) {
            let content = &self.buffer[start..start + PAGE_SIZE];
            if is_zero(content) {
                ledger.record(page, secret.zero_page());
                push_zero(&mut self.entries, page);
                continue;
            }
            let hash = secret.hash(content);
            ledger.record(page, hash);
            self.entries.push(Entry::Plain { page, hash });
            match self.parts.last_mut() {
                Some(last) if last.end == start => last.end += PAGE_SIZE,
                _ => self.parts.push(start..start + PAGE_SIZE),
            }
        }
        Ok(())
    }

    fn send(&mut self) -> Result<(), SourceError> {
        if !self.entries.is_empty() {
            let payload = self.parts.iter().map(|part| &self.buffer[part.clone()]);
            self.writer.pages(0, &self.entries, payload)?;
        }
        self.entries.clear();
        self.parts.clear();
        self.filled = 0;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::fs::FileExt;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::memory::RamFile;

    #[test]
    fn at_first_nothing_is_pushed_while_the_guest_asks_and_later_it_always_is() {
        let begin = Instant::now();
        let at = |ms| begin + Duration::from_millis(ms);
        let wait = |state: &State, ms| state.wait(at(ms)).map(|wait| wait.as_millis());
        assert_eq!(State { open: None, asked: Some(begin) }.wait(begin), Some(Duration::MAX));
        let unasked = State { open: Some(begin), asked: None };
        assert_eq!((wait(&unasked, 1), wait(&unasked, 20)), (Some(19), None));
        let asked = |ms| State { open: Some(begin), asked: Some(at(ms)) };
        assert_eq!((wait(&asked(100), 101), wait(&asked(100), 121)), (Some(19), None));
        assert_eq!((wait(&asked(248), 249), wait(&asked(300), 300)), (Some(1), None));
    }

    use crate::memory::codec::{Header, decode_header, decode_table, read_body, read_header};

    const CHUNKS: u64 = 6;
    const PAGES: u64 = CHUNKS * CHUNK_PAGES;

    /// A guest's memory, no page of it zero and no two alike.
    fn ram() -> Arc<Ram> {
        let file = tempfile::tempfile().unwrap();
        for page in 0..PAGES {
            let content: Vec<u8> =
                (0..PAGE_SIZE as u64 / 8).flat_map(|n| (page * 1024 + n + 1).to_le_bytes()).collect();
            file.write_all_at(&content, page * PAGE_SIZE as u64).unwrap();
        }
        let layout = Layout::new([("ram", PAGES * PAGE_SIZE as u64)], 1).unwrap();
        Arc::new(Ram::new(layout, vec![RamFile { file, offset: 0, process: None }]).unwrap())
    }

    /// The pages of the frames that come, in their order, until there are so many.
    fn pages(stream: &mut impl Read, layout: &Layout, count: usize) -> Vec<u64> {
        let (mut table, mut payload, mut entries) = (Vec::new(), Vec::new(), Vec::new());
        let mut pages = Vec::new();
        while pages.len() < count {
            let head = read_header(stream).unwrap().expect("the stream goes on");
            let Header::Pages { entries: number, payload: length, .. } = decode_header(&head).unwrap() else {
                panic!("{head:?}")
            };
            read_body(stream, number, length, &mut table, &mut payload).unwrap();
            decode_table(&table, layout, None, &mut entries).unwrap();
            for entry in &entries {
                let Entry::Plain { page, .. } = entry else { panic!("{entry:?}") };
                pages.push(page.0);
            }
        }
        pages
    }

    #[test]
    fn what_is_asked_for_does_not_wait_behind_the_rest_and_the_rest_goes_hottest_first() {
        let ram = ram();
        let layout = ram.layout().clone();
        // Of the neighbours of what will be asked for every other one; and all of three chunks, the coldest first.
        let asked = CHUNK_PAGES + 37;
        let mut unsent = PageSet::new(layout.end());
        (CHUNK_PAGES + 32..CHUNK_PAGES + 48).step_by(2).for_each(|page| unsent.insert(page..page + 1));
        let chunk = |number: u64| number * CHUNK_PAGES..(number + 1) * CHUNK_PAGES;
        [2, 3, 5].into_iter().for_each(|number| unsent.insert(chunk(number)));
        let heat = |page: PageIndex| match page.0 / CHUNK_PAGES {
            5 => 9,
            3 => 4,
            _ => 1,
        };
        let [(urgent, mut answers), (bulk, mut rest)] = [(); 2].map(|()| UnixStream::pair().unwrap());
        rest.set_nonblocking(true).unwrap();
        let secret = Secret::random().unwrap();
        let ledgers = Arc::new(Ledgers::all_zero(&layout, &secret));
        let subject = Subject { ram, ledgers, secret: Arc::new(secret) };
        let source =
            PostCopySource::with(subject, Arc::default(), Compression::Off, unsent, heat, urgent, vec![bulk])
                .unwrap();

        // Before anything is pushed; the page itself though it is not among those that are known to be missing.
        assert!(source.supply(vec![PageIndex(asked)]));
        let mut expected: Vec<u64> = (CHUNK_PAGES + 32..CHUNK_PAGES + 48).step_by(2).collect();
        expected.push(asked);
        expected.sort_unstable();
        assert_eq!(pages(&mut answers, &layout, expected.len()), expected);
        assert!(rest.read(&mut [0]).is_err_and(|e| e.kind() == std::io::ErrorKind::WouldBlock));
        // One that the rest has not come to goes before it, and not twice.
        assert!(source.supply(vec![PageIndex(chunk(2).start)]));
        let neighbours: Vec<u64> = chunk(2).take(NEIGHBOURHOOD as usize).collect();
        assert_eq!(pages(&mut answers, &layout, neighbours.len()), neighbours);

        rest.set_nonblocking(false).unwrap();
        source.push();
        let expected: Vec<u64> =
            chunk(5).chain(chunk(3)).chain(chunk(2).skip(NEIGHBOURHOOD as usize)).collect();
        assert_eq!(pages(&mut rest, &layout, expected.len()), expected);
        source.results.recv().unwrap().unwrap();
        assert_eq!(source.unsent(), 0);
        // What was sent is sent again when it is asked for again: it may have been lost.
        assert!(source.supply(vec![PageIndex(asked)]));
        assert_eq!(pages(&mut answers, &layout, 1), [asked]);
        assert!(source.failure().is_none());
        // Whoever asks for more than there is does not wait for pages: it fills this host's memory.
        let too_many = usize::try_from(layout.page_count()).unwrap() * 2 + 1;
        assert!(!source.supply(vec![PageIndex(asked); too_many]));
        assert!(
            !source.supply(vec![PageIndex(asked), PageIndex(layout.end())])
                && !source.supply(vec![PageIndex(u64::MAX)])
        );
    }
}
