//! The destination's side of post-copy: the guest's questions passed on, the answers put in their place.

use std::collections::HashMap;
use std::io::{self, Read};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use compression::{DecodeError, Decoder, Encoding};
use dirty_tracker::{Fault, MissingPages, SupplyError};

use crate::audit::Subject;
use crate::hash::{ContentHash, Secret, is_zero};
use crate::layout::{CHUNK_PAGES, Layout, PAGE_SIZE, PageIndex};
use crate::ledger::{Ledgers, Sum};
use crate::memory::codec::{self, Entry, FrameError, Header};
use crate::memory::destination::Finished;
use crate::memory::pages::PageSet;
use crate::memory::ram::TrackedRange;
use crate::memory::{Ram, RamError};

/// How often the thread that waits for the guest's questions looks whether it is still wanted.
const LOOK_UP: Duration = Duration::from_millis(50);

/// What the destination's side has to say. Called for on its threads.
#[derive(Debug)]
pub enum Event {
    /// The guest waits for these.
    Wanted(Vec<PageIndex>),
    /// These came, but not as they were sent; they are still missing.
    Mismatch(PageIndex),
    /// Nothing is missing any more.
    Complete,
    /// The guest waits for something that cannot be given to it now: no memory is left, among others. It is tried again.
    Stuck(PostCopyError),
    /// The process has ended: nobody needs pages any more.
    Failed(PostCopyError),
}

/// Why a stream of supplied pages, or supplying them, failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PostCopyError {
    /// The stream broke.
    #[error("the data stream broke")]
    Stream(#[source] io::Error),
    /// The peer does not keep to the protocol.
    #[error("the data stream carries what it must not")]
    Frame(#[from] FrameError),
    /// A payload that does not decode.
    #[error("the data stream carries what it must not")]
    Payload(#[from] DecodeError),
    /// The page cannot be given to QEMU.
    #[error(transparent)]
    Supply(#[from] SupplyError),
    /// The RAM files could not be examined.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// No thread could be started.
    #[error("no thread could be started")]
    Thread(#[source] io::Error),
}

/// How the guest fared while pages were missing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Faults {
    /// Pages that it had to wait for.
    pub count: u64,
    /// The longest wait for one, from the kernel's word to the page in its place.
    pub longest: Duration,
    /// All waits together.
    pub total: Duration,
}

/// Where in QEMU's address space guest RAM is.
#[derive(Debug, Clone)]
pub struct Places {
    /// For each range that is waited on: which part of RAM it is, and its length in bytes.
    pub ranges: Vec<(TrackedRange, u64)>,
}

impl Places {
    fn page(&self, layout: &Layout, fault: Fault) -> Option<PageIndex> {
        let (TrackedRange { block, offset }, _) = self.ranges.get(fault.range)?;
        Some(PageIndex(layout.blocks().get(*block)?.pages.start + (offset + fault.offset) / PAGE_SIZE as u64))
    }

    /// The range that a page is in, where in it, and how many pages it goes on.
    fn find(&self, layout: &Layout, page: PageIndex) -> Option<(usize, u64, u64)> {
        let (block, at) = layout.locate(page)?;
        self.ranges.iter().enumerate().find_map(|(number, (part, length))| {
            let within = at.checked_sub(part.offset).filter(|within| within < length)?;
            (part.block == block).then(|| (number, within, (length - within) / PAGE_SIZE as u64))
        })
    }
}

/// The destination's side of one post-copy. The guest may run from its start on. Dropping it leaves the guest waiting,
/// for [`PostCopyDestination::resume`].
#[derive(Debug)]
pub struct PostCopyDestination {
    shared: Arc<Shared>,
    listener: Mutex<Option<JoinHandle<()>>>,
    workers: Mutex<Vec<JoinHandle<()>>>,
}

struct Shared {
    layout: Layout,
    ledgers: Arc<Ledgers>,
    secret: Mutex<Arc<Secret>>,
    supplier: MissingPages,
    places: Places,
    state: Mutex<State>,
    events: Box<dyn Fn(Event) + Send + Sync>,
    stop: AtomicBool,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("supplier", &self.supplier).finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct State {
    missing: PageSet,
    left: u64,
    /// What the guest waits for, and since when.
    waiting: HashMap<PageIndex, Instant>,
    faults: Faults,
}

/// Of what was missing when a post-copy began, what still is: the holes.
///
/// # Errors
/// [`RamError`] when the RAM files cannot be examined.
pub fn still_missing(ram: &Ram, missing: &PageSet) -> Result<PageSet, RamError> {
    let layout = ram.layout();
    let mut still = PageSet::new(layout.end());
    for block in layout.blocks() {
        for run in missing.runs(block.pages.clone()) {
            for hole in ram.holes(run)? {
                still.insert(hole);
            }
        }
    }
    Ok(still)
}

impl PostCopyDestination {
    /// Begins with a copy whose withheld pages are what is missing. `supplier` is attached to the process that runs on it.
    ///
    /// # Errors
    /// [`PostCopyError::Thread`].
    pub fn start(
        copy: Finished,
        supplier: MissingPages,
        places: Places,
        events: impl Fn(Event) + Send + Sync + 'static,
    ) -> Result<PostCopyDestination, PostCopyError> {
        let Finished { subject: Subject { ram, ledgers, secret }, absent } = copy;
        Self::with(ram.layout().clone(), ledgers, secret, absent, supplier, places, events)
    }

    /// Goes on where another agent has ended, with what is [still missing](still_missing).
    ///
    /// # Errors
    /// [`PostCopyError::Thread`].
    pub fn resume(
        layout: &Layout,
        secret: Secret,
        missing: PageSet,
        supplier: MissingPages,
        places: Places,
        events: impl Fn(Event) + Send + Sync + 'static,
    ) -> Result<PostCopyDestination, PostCopyError> {
        let ledgers = Arc::new(Ledgers::all_zero(layout, &secret));
        Self::with(layout.clone(), ledgers, Arc::new(secret), missing, supplier, places, events)
    }

    fn with(
        layout: Layout,
        ledgers: Arc<Ledgers>,
        secret: Arc<Secret>,
        missing: PageSet,
        supplier: MissingPages,
        places: Places,
        events: impl Fn(Event) + Send + Sync + 'static,
    ) -> Result<PostCopyDestination, PostCopyError> {
        let left = missing.len();
        let state = State { missing, left, waiting: HashMap::new(), faults: Faults::default() };
        let shared = Arc::new(Shared {
            layout,
            ledgers,
            secret: Mutex::new(secret),
            supplier,
            places,
            state: Mutex::new(state),
            events: Box::new(events),
            stop: AtomicBool::new(false),
        });
        let listening = Arc::clone(&shared);
        let listener = std::thread::Builder::new()
            .name("post-copy".into())
            .spawn(move || listening.listen())
            .map_err(PostCopyError::Thread)?;
        Ok(PostCopyDestination { shared, listener: Mutex::new(Some(listener)), workers: Mutex::default() })
    }

    /// Takes in a stream of supplied pages. `ended` is called when it has ended, with what ended it if it was not the
    /// source in the orderly way; what it has not brought can come by others.
    ///
    /// # Errors
    /// [`PostCopyError::Thread`].
    pub fn attach<R: Read + Send + 'static>(
        &self,
        source: R,
        ended: impl FnOnce(Option<PostCopyError>) + Send + 'static,
    ) -> Result<(), PostCopyError> {
        let mut receiver = Receiver {
            source,
            shared: Arc::clone(&self.shared),
            secret: Arc::clone(&lock(&self.shared.secret)),
            entries: Vec::new(),
            hashes: Vec::new(),
            table: Vec::new(),
            encoded: Vec::new(),
            pages: Vec::new(),
            decoder: Decoder::default(),
        };
        let worker = std::thread::Builder::new()
            .name("supply".into())
            .spawn(move || ended(receiver.receive().err()))
            .map_err(PostCopyError::Thread)?;
        let mut workers = lock(&self.workers);
        workers.retain(|worker| !worker.is_finished());
        workers.push(worker);
        Ok(())
    }

    /// Another source goes on, whose hashes are made with another secret. What came from the one before stays.
    pub fn trust(&self, secret: Secret) {
        *lock(&self.shared.secret) = Arc::new(secret);
    }

    /// What is missing now.
    #[must_use]
    pub fn missing(&self) -> PageSet {
        self.shared.state().missing.clone()
    }

    /// How many pages are missing now.
    #[must_use]
    pub fn left(&self) -> u64 {
        self.shared.state().left
    }

    /// What the guest waits for now: to be asked for again when a source has been lost.
    #[must_use]
    pub fn waited_for(&self) -> Vec<PageIndex> {
        self.shared.state().waiting.keys().copied().collect()
    }

    /// How the guest has fared so far.
    #[must_use]
    pub fn faults(&self) -> Faults {
        self.shared.state().faults
    }

    /// The ledger sums, by stream of the layout: with nothing missing they are those of the source.
    #[must_use]
    pub fn sums(&self) -> Vec<Sum> {
        (0..self.shared.layout.streams()).map(|stream| self.shared.ledgers.lock(stream).sum()).collect()
    }

    /// Ends it, everything being there: the guest waits for nothing any more. The streams must have ended, or been
    /// aborted. Returns how the guest has fared.
    pub fn finish(&self) -> Faults {
        self.end();
        for worker in std::mem::take(&mut *lock(&self.workers)) {
            let _ = worker.join();
        }
        self.shared.supplier.finish();
        self.faults()
    }

    fn end(&self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(listener) = lock(&self.listener).take() {
            let _ = listener.join();
        }
    }
}

impl Drop for PostCopyDestination {
    fn drop(&mut self) {
        self.end();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Passes the guest's questions on, until told to stop. Only the end of the process ends it before.
    fn listen(&self) {
        let (mut faults, mut wanted, mut stuck) = (Vec::new(), Vec::new(), false);
        while !self.stop.load(Ordering::Relaxed) {
            let heard = self.supplier.wait(LOOK_UP, &mut faults);
            // Those that could not be answered stay for the next time.
            let answered = heard.and(self.sort(&mut faults, &mut wanted));
            if !wanted.is_empty() {
                (self.events)(Event::Wanted(std::mem::take(&mut wanted)));
            }
            match answered {
                Ok(()) => stuck = false,
                Err(error @ SupplyError::Gone { .. }) => return (self.events)(Event::Failed(error.into())),
                Err(error) => {
                    if !std::mem::replace(&mut stuck, true) {
                        (self.events)(Event::Stuck(error.into()));
                    }
                    std::thread::sleep(LOOK_UP);
                }
            }
        }
    }

    /// What is not missing is a hole because it is zero, and is answered here. The rest is wanted. Faults that could not
    /// be answered are left.
    fn sort(&self, faults: &mut Vec<Fault>, wanted: &mut Vec<PageIndex>) -> Result<(), SupplyError> {
        let (now, mut failed) = (Instant::now(), Ok(()));
        faults.retain(|&fault| {
            let Some(page) = self.places.page(&self.layout, fault) else { return false };
            let mut state = self.state();
            if state.missing.contains(page.0) {
                if let std::collections::hash_map::Entry::Vacant(waiting) = state.waiting.entry(page) {
                    waiting.insert(now);
                    wanted.push(page);
                }
                return false;
            }
            drop(state);
            match self.supplier.supply_zeros(fault.range, fault.offset, PAGE_SIZE as u64) {
                Ok(()) => false,
                Err(error) => {
                    failed = Err(error);
                    true
                }
            }
        });
        failed
    }

    /// Calls `put` for each part of a run of pages that is in one place: with its range, where in it, and the part.
    fn in_places(
        &self,
        pages: &Range<u64>,
        mut put: impl FnMut(usize, u64, Range<u64>) -> Result<(), SupplyError>,
    ) -> Result<(), PostCopyError> {
        let mut at = pages.start;
        while at < pages.end {
            let Some((range, offset, more)) = self.places.find(&self.layout, PageIndex(at)) else {
                let count = (pages.end - pages.start).into();
                return Err(FrameError::Pages { page: pages.start, count }.into());
            };
            let part = at..pages.end.min(at + more);
            at = part.end;
            put(range, offset, part)?;
        }
        Ok(())
    }

    /// These pages of one chunk are in their place: only now are they not missing.
    fn arrived(&self, pages: Range<u64>, hashes: impl Iterator<Item = ContentHash>) {
        if pages.is_empty() {
            return;
        }
        let mut ledger = self.ledgers.lock(self.layout.stream_of(PageIndex(pages.start)));
        pages.clone().zip(hashes).for_each(|(page, hash)| ledger.record(PageIndex(page), hash));
        drop(ledger);
        let mut state = self.state();
        let before = state.left;
        for page in pages {
            if state.missing.contains(page) {
                state.missing.remove(page..page + 1);
                state.left -= 1;
            }
            if let Some(since) = state.waiting.remove(&PageIndex(page)) {
                let waited = since.elapsed();
                state.faults.count += 1;
                state.faults.total += waited;
                state.faults.longest = state.faults.longest.max(waited);
            }
        }
        let complete = before > 0 && state.left == 0;
        drop(state);
        if complete {
            (self.events)(Event::Complete);
        }
    }
}

/// One stream of supplied pages.
struct Receiver<R> {
    source: R,
    shared: Arc<Shared>,
    secret: Arc<Secret>,
    entries: Vec<Entry>,
    /// Of the run of pages that is being gathered.
    hashes: Vec<ContentHash>,
    table: Vec<u8>,
    encoded: Vec<u8>,
    pages: Vec<u8>,
    decoder: Decoder,
}

impl<R: Read> Receiver<R> {
    fn receive(&mut self) -> Result<(), PostCopyError> {
        while let Some(head) = codec::read_header(&mut self.source).map_err(PostCopyError::Stream)? {
            match codec::decode_header(&head)? {
                Header::Pages { entries, encoding, payload, .. } => {
                    self.take(entries, encoding, payload)?;
                    self.supply()?;
                }
                Header::Barrier(_) => {}
                Header::Absent { .. } | Header::Blocks { .. } | Header::Sync => {
                    return Err(FrameError::Kind(head[0]).into());
                }
            }
        }
        Ok(())
    }

    fn take(&mut self, entries: usize, encoding: Encoding, payload: usize) -> Result<(), PostCopyError> {
        let into = if encoding == Encoding::None { &mut self.pages } else { &mut self.encoded };
        codec::read_body(&mut self.source, entries, payload, &mut self.table, into)
            .map_err(PostCopyError::Stream)?;
        let described = codec::decode_table(&self.table, &self.shared.layout, None, &mut self.entries)?;
        if encoding != Encoding::None {
            self.decoder.decode(encoding, &self.encoded, described, &mut self.pages)?;
        } else if payload != described {
            return Err(FrameError::Payload { described, payload }.into());
        }
        Ok(())
    }

    /// Puts the pages of a frame in their places, neighbours in one call.
    fn supply(&mut self) -> Result<(), PostCopyError> {
        // The run that is being gathered: its pages, and where in the payload they begin.
        let (mut run, mut start, mut at) = (0..0, 0, 0);
        self.hashes.clear();
        for number in 0..self.entries.len() {
            match self.entries[number] {
                Entry::Zero { page, count } => {
                    self.put(std::mem::take(&mut run), start)?;
                    self.put_zeros(page.0..page.0 + count)?;
                }
                Entry::Plain { page, hash } => {
                    let content = &self.pages[at..at + PAGE_SIZE];
                    let found =
                        if is_zero(content) { self.secret.zero_page() } else { self.secret.hash(content) };
                    let follows = run.end == page.0 && !page.0.is_multiple_of(CHUNK_PAGES);
                    if !follows || found != hash {
                        self.put(std::mem::take(&mut run), start)?;
                    }
                    if found == hash {
                        if run.is_empty() {
                            (run, start) = (page.0..page.0, at);
                        }
                        run.end += 1;
                        self.hashes.push(hash);
                    } else {
                        (self.shared.events)(Event::Mismatch(page));
                    }
                    at += PAGE_SIZE;
                }
                // What is missing has no content that a delta could be of, and whether another page is there is not known.
                Entry::Delta { page, .. } | Entry::Duplicate { page, .. } => {
                    return Err(FrameError::Pages { page: page.0, count: 1 }.into());
                }
            }
        }
        self.put(run, start)
    }

    /// Puts a run of pages in their places: their content begins there in the payload, their hashes are gathered.
    fn put(&mut self, pages: Range<u64>, start: usize) -> Result<(), PostCopyError> {
        let shared = &self.shared;
        shared.in_places(&pages, |range, offset, part| {
            let skipped = (part.start - pages.start) as usize * PAGE_SIZE;
            let bytes = start + skipped..start + skipped + (part.end - part.start) as usize * PAGE_SIZE;
            shared.supplier.supply(range, offset, &self.pages[bytes])
        })?;
        shared.arrived(pages, self.hashes.drain(..));
        Ok(())
    }

    fn put_zeros(&self, pages: Range<u64>) -> Result<(), PostCopyError> {
        let shared = &self.shared;
        shared.in_places(&pages, |range, offset, part| {
            shared.supplier.supply_zeros(range, offset, (part.end - part.start) * PAGE_SIZE as u64)
        })?;
        shared.arrived(pages, std::iter::repeat(self.secret.zero_page()));
        Ok(())
    }
}
