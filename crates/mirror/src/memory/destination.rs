//! The destination's side of memory: receive, check, write, record.

use std::io::{self, Read};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use compression::{DecodeError, Decoder, Encoding};

use super::codec::{self, Entry, FrameError, Header, TWIN_LENGTH};
use super::delta::{self, DeltaError};
use super::pages::PageSet;
use super::{Ram, RamError};
use crate::audit::{Audit, Auditor, Busy, Subject};
use crate::hash::{ContentHash, Secret, is_zero};
use crate::layout::{PAGE_SIZE, PageIndex};
use crate::ledger::{Ledger, Ledgers, Sum};
use crate::storage::destination::{BlockReceiver, StorageDestination, StorageError, Wrong};

/// What the destination's workers and audit have to say. Mismatches of pages are always told before any barrier
/// whose sum they have changed.
#[derive(Debug)]
pub enum Event {
    /// All that was sent before this barrier, on this stream, has been applied.
    Barrier {
        /// Which stream.
        stream: u16,
        /// Which barrier.
        number: u32,
        /// The stream's ledger sum at this point.
        sum: Sum,
        /// The sum of its ledger of disks.
        disks: Sum,
    },
    /// A block of a disk is not what it should be; it has been struck from the ledger and is to be sent again.
    WrongBlock(Wrong),
    /// The copy of a page is not what the ledger says; it has been struck from the ledger and is to be sent again.
    Mismatch(PageIndex),
    /// A stream ended in order.
    Ended {
        /// Which stream.
        stream: u16,
    },
    /// A stream broke, or the copy could not be written.
    Failed {
        /// Which stream.
        stream: u16,
        /// How.
        error: DestinationError,
    },
}

/// Why the destination's side of a mirror ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DestinationError {
    /// The stream broke.
    #[error("the data stream broke")]
    Stream(#[source] io::Error),
    /// The peer does not keep to the protocol.
    #[error("the data stream carries what it must not")]
    Frame(#[from] FrameError),
    /// A payload that does not decode.
    #[error("the data stream carries what it must not")]
    Payload(#[from] DecodeError),
    /// A delta that does not fit a page.
    #[error("the data stream carries what it must not")]
    Delta(#[from] DeltaError),
    /// Pages are left out of a copy whose source has not said that it would be without any: they would be zeros to the guest.
    #[error("the data stream leaves {chunks} chunks out, and post-copy was not announced")]
    Absent {
        /// How many.
        chunks: usize,
    },
    /// The copy could not be written.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// The copy of a disk could not be written.
    #[error(transparent)]
    Storage(#[from] StorageError),
}

/// The destination's side of one mirror of memory.
pub struct MemoryDestination {
    subject: Subject,
    auditor: Auditor,
    workers: Vec<JoinHandle<()>>,
    events: Arc<dyn Fn(Event) + Send + Sync>,
    /// Pages that the source withholds; none before it has said that it will.
    absent: Arc<Mutex<Option<PageSet>>>,
}

/// What is left of a copy that is not kept up to date any more.
#[derive(Debug)]
pub struct Finished {
    pub(super) subject: Subject,
    /// Pages that were withheld.
    pub(super) absent: PageSet,
}

impl MemoryDestination {
    /// Begins a copy in RAM files that nothing has written yet; what they hold is cleared. `events` is called from
    /// the workers' threads and must not block.
    ///
    /// # Errors
    /// [`RamError`] when the files cannot be cleared, or no thread can be started.
    pub fn start(
        mut ram: Ram,
        secret: Secret,
        events: impl Fn(Event) + Send + Sync + 'static,
    ) -> Result<MemoryDestination, RamError> {
        ram.begin_copy()?;
        let ledgers = Arc::new(Ledgers::all_zero(ram.layout(), &secret));
        let subject = Subject { ram: Arc::new(ram), ledgers, secret: Arc::new(secret) };
        let events: Arc<dyn Fn(Event) + Send + Sync> = Arc::new(events);
        let tell = Arc::clone(&events);
        let auditor = Auditor::start(subject.clone(), move |page, ledger: &mut Ledger| {
            // Told with the ledger locked: a barrier's sum that lacks the page cannot be told first.
            ledger.forget(page);
            tell(Event::Mismatch(page));
        })
        .map_err(|source| RamError::Io { action: "start auditing", block: "all".into(), source })?;
        let absent = Arc::default();
        Ok(MemoryDestination { subject, auditor, workers: Vec::new(), events, absent })
    }

    /// Takes in one of the layout's data streams, which may carry blocks of disks too.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn attach<R: Read + Send + 'static>(
        &mut self,
        stream: u16,
        source: R,
        storage: Option<&StorageDestination>,
    ) -> io::Result<()> {
        let mut receiver = StreamReceiver {
            stream,
            source,
            subject: self.subject.clone(),
            events: Arc::clone(&self.events),
            busy: self.auditor.busy(),
            absent: Arc::clone(&self.absent),
            blocks: storage.map(|storage| storage.stream(stream)),
            entries: Vec::new(),
            table: Vec::new(),
            encoded: Vec::new(),
            pages: Vec::new(),
            decoder: Decoder::default(),
        };
        let thread =
            std::thread::Builder::new().name(format!("copy-{stream}")).spawn(move || receiver.work())?;
        self.workers.push(thread);
        Ok(())
    }

    /// From now on the source may leave pages out. Before, it is a violation.
    pub fn allow_absent(&self) {
        let mut absent = self.absent.lock().unwrap_or_else(PoisonError::into_inner);
        absent.get_or_insert_with(|| PageSet::new(self.subject.ram.layout().end()));
    }

    /// Pages compared by the audit so far.
    #[must_use]
    pub fn audited(&self) -> u64 {
        self.auditor.audited()
    }

    /// Reads the whole copy back and compares it with the ledger, now. Blocks until done. Pages that differ are told
    /// as [`Event::Mismatch`] too.
    ///
    /// # Errors
    /// [`RamError`].
    pub fn audit(&self) -> Result<Audit, RamError> {
        self.auditor.all()
    }

    /// How many pages the source withholds.
    #[must_use]
    pub fn absent(&self) -> u64 {
        let absent = self.absent.lock().unwrap_or_else(PoisonError::into_inner);
        absent.as_ref().map_or(0, PageSet::len)
    }

    /// Ends the copy's upkeep: no thread touches the RAM files any more once this has returned. The streams must
    /// have ended, or been aborted.
    pub fn finish(self) -> Finished {
        drop(self.auditor);
        for worker in self.workers {
            let _ = worker.join();
        }
        let absent = self.absent.lock().unwrap_or_else(PoisonError::into_inner).take();
        let absent = absent.unwrap_or_else(|| PageSet::new(self.subject.ram.layout().end()));
        Finished { subject: self.subject, absent }
    }
}

struct StreamReceiver<R> {
    stream: u16,
    source: R,
    subject: Subject,
    events: Arc<dyn Fn(Event) + Send + Sync>,
    busy: Busy,
    absent: Arc<Mutex<Option<PageSet>>>,
    /// Where blocks of disks go.
    blocks: Option<BlockReceiver>,
    entries: Vec<Entry>,
    table: Vec<u8>,
    /// The payload as it came, where it is compressed.
    encoded: Vec<u8>,
    pages: Vec<u8>,
    decoder: Decoder,
}

impl<R: Read> StreamReceiver<R> {
    fn work(&mut self) {
        let stream = self.stream;
        let last = match self.receive() {
            Ok(()) => Event::Ended { stream },
            Err(error) => Event::Failed { stream, error },
        };
        (self.events)(last);
    }

    fn receive(&mut self) -> Result<(), DestinationError> {
        while let Some(head) = codec::read_header(&mut self.source).map_err(DestinationError::Stream)? {
            match codec::decode_header(&head)? {
                Header::Pages { entries, encoding, payload, .. } => {
                    self.busy.set(true);
                    self.take(entries, encoding, payload)?;
                    self.apply()?;
                }
                Header::Absent { chunks, .. } => {
                    if self.absent.lock().unwrap_or_else(PoisonError::into_inner).is_none() {
                        return Err(DestinationError::Absent { chunks });
                    }
                    self.busy.set(true);
                    self.give_up(chunks)?;
                }
                Header::Barrier(number) => {
                    self.busy.set(false);
                    // Told with the ledger locked, as the audit's findings are: their order is the order of the
                    // changes to the sum.
                    let ledger = self.subject.ledgers.lock(self.stream);
                    let disks = self.blocks.as_ref().map(BlockReceiver::sum).unwrap_or_default();
                    (self.events)(Event::Barrier { stream: self.stream, number, sum: ledger.sum(), disks });
                }
                Header::Blocks { entries, encoding, payload } => {
                    self.take_blocks(entries, encoding, payload)?
                }
                Header::Sync => self.blocks.as_ref().ok_or(StorageError::NoDisks)?.sync(),
            }
        }
        Ok(())
    }

    /// Reads a frame's table and payload, and decodes both.
    fn take(&mut self, entries: usize, encoding: Encoding, payload: usize) -> Result<(), DestinationError> {
        let into = if encoding == Encoding::None { &mut self.pages } else { &mut self.encoded };
        codec::read_body(&mut self.source, entries, payload, &mut self.table, into)
            .map_err(DestinationError::Stream)?;
        let layout = self.subject.ram.layout();
        let described = codec::decode_table(&self.table, layout, Some(self.stream), &mut self.entries)?;
        if encoding != Encoding::None {
            self.decoder.decode(encoding, &self.encoded, described, &mut self.pages)?;
        } else if payload != described {
            return Err(FrameError::Payload { described, payload }.into());
        }
        Ok(())
    }

    /// Reads, checks and writes blocks of disks.
    fn take_blocks(
        &mut self,
        entries: usize,
        encoding: Encoding,
        payload: usize,
    ) -> Result<(), DestinationError> {
        let blocks = self.blocks.as_mut().ok_or(StorageError::NoDisks)?;
        let into = if encoding == Encoding::None { &mut self.pages } else { &mut self.encoded };
        codec::read_body(&mut self.source, entries, payload, &mut self.table, into)
            .map_err(DestinationError::Stream)?;
        let described = blocks.table(&self.table).map_err(StorageError::from)?;
        if encoding != Encoding::None {
            self.decoder.decode(encoding, &self.encoded, described, &mut self.pages)?;
        } else if payload != described {
            return Err(FrameError::Payload { described, payload }.into());
        }
        let events = &self.events;
        Ok(blocks.apply(&self.pages, |wrong| events(Event::WrongBlock(wrong)))?)
    }

    /// Gives up pages that are to be absent: they are holes, and not in the ledger.
    fn give_up(&mut self, chunks: usize) -> Result<(), DestinationError> {
        let Subject { ram, ledgers, .. } = &self.subject;
        let chunks = codec::read_absent(&mut self.source, chunks, ram.layout(), self.stream)
            .map_err(DestinationError::Stream)??;
        for absent in chunks {
            let mut ledger = ledgers.lock(self.stream);
            for run in absent.runs() {
                ram.clear(PageIndex(run.start), run.end - run.start)?;
                run.clone().for_each(|page| ledger.forget(PageIndex(page)));
                let mut absent = self.absent.lock().unwrap_or_else(PoisonError::into_inner);
                absent.get_or_insert_with(|| PageSet::new(ram.layout().end())).insert(run);
            }
        }
        Ok(())
    }

    /// Checks and writes one frame. The ledger is locked meanwhile, so the audit sees content and entry together.
    fn apply(&mut self) -> Result<(), DestinationError> {
        let Subject { ram, ledgers, secret } = &self.subject;
        let mut ledger = ledgers.lock(self.stream);
        // Neighbouring plain pages are written in one call: where in the payload they begin, and the first page.
        let mut run: Option<(usize, PageIndex)> = None;
        let mut at = 0;
        let write = |run: Option<(usize, PageIndex)>, end: usize| match run {
            Some((start, first)) => ram.write(first, &self.pages[start..end]),
            None => Ok(()),
        };
        // What is recorded is what will be written, whatever the sender said; where they differ the page is asked for
        // again.
        let record = |ledger: &mut Ledger, page: PageIndex, content: &[u8], hash: ContentHash| {
            let found = if is_zero(content) { secret.zero_page() } else { secret.hash(content) };
            if found == hash {
                ledger.record(page, hash);
            } else {
                ledger.forget(page);
                (self.events)(Event::Mismatch(page));
            }
        };
        for entry in &self.entries {
            match *entry {
                Entry::Plain { page, hash } => {
                    let follows = run
                        .is_some_and(|(start, first)| first.0 + ((at - start) / PAGE_SIZE) as u64 == page.0);
                    if !follows {
                        write(run, at)?;
                        run = Some((at, page));
                    }
                    record(&mut ledger, page, &self.pages[at..at + PAGE_SIZE], hash);
                    at += PAGE_SIZE;
                }
                Entry::Delta { page, hash, length } => {
                    write(run.take(), at)?;
                    let end = at + usize::from(length);
                    let mut content = [0; PAGE_SIZE];
                    ram.read(page, &mut content)?;
                    delta::apply(&self.pages[at..end], &mut content)?;
                    record(&mut ledger, page, &content, hash);
                    ram.write(page, &content)?;
                    at = end;
                }
                Entry::Duplicate { page, hash } => {
                    write(run.take(), at)?;
                    let end = at + TWIN_LENGTH;
                    let twin = self.pages[at..end].try_into().expect("the table's payload is all there");
                    let twin = PageIndex(u64::from_le_bytes(twin));
                    let layout = ram.layout();
                    if layout.locate(twin).is_none() || layout.stream_of(twin) != self.stream {
                        return Err(FrameError::Pages { page: twin.0, count: 1 }.into());
                    }
                    let mut content = [0; PAGE_SIZE];
                    ram.read(twin, &mut content)?;
                    record(&mut ledger, page, &content, hash);
                    ram.write(page, &content)?;
                    at = end;
                }
                Entry::Zero { page, count } => {
                    write(run.take(), at)?;
                    clear(ram, &mut ledger, secret, page.0..page.0 + count)?;
                }
            }
        }
        write(run, at)?;
        drop(ledger);
        self.no_longer_absent();
        Ok(())
    }

    /// What comes after all is not absent.
    fn no_longer_absent(&self) {
        let mut absent = self.absent.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(absent) = absent.as_mut() else { return };
        for entry in &self.entries {
            match *entry {
                Entry::Zero { page, count } => absent.remove(page.0..page.0 + count),
                Entry::Plain { page, .. } | Entry::Delta { page, .. } | Entry::Duplicate { page, .. } => {
                    absent.remove(page.0..page.0 + 1)
                }
            }
        }
    }
}

/// Makes pages zero where they are not, each run of them at once.
fn clear(ram: &Ram, ledger: &mut Ledger, secret: &Secret, pages: Range<u64>) -> Result<(), RamError> {
    let zero = secret.zero_page();
    let mut at = pages.start;
    while at < pages.end {
        let holds_data = |page: u64| ledger.get(PageIndex(page)) != Some(zero);
        let count = (at..pages.end).take_while(|&page| holds_data(page)).count() as u64;
        if count == 0 {
            at += 1;
            continue;
        }
        ram.clear(PageIndex(at), count)?;
        for page in at..at + count {
            ledger.record(PageIndex(page), zero);
        }
        at += count;
    }
    Ok(())
}
