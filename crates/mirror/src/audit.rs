//! The audit: a live check of ledger against content, on either side.
//!
//! One thread a side goes over the pages, again and again, a slice at a time, and keeps out of the way of sending
//! and writing. At the destination a difference means that the copy has changed by itself; the page is struck from
//! the ledger and asked for again. At the source it means that the guest has written the page, which the next scan
//! will say too; only where the scan does not, a write was missed. The two sides differ in nothing but what they
//! make of a difference, so that is all they bring.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

use crate::hash::{ContentHash, Secret, is_zero};
use crate::layout::{PAGE_SIZE, PageIndex};
use crate::ledger::{Ledger, Ledgers};
use crate::memory::{Ram, RamError};

/// Pages looked at in one go: 256 KiB, some 50 µs of work.
const SLICE_PAGES: u64 = 64;
/// Between slices of the rolling audit: with [`SLICE_PAGES`] about 50 MiB/s, one per cent of a core.
const TICK: Duration = Duration::from_millis(5);
/// However busy the mirror is, one slice in so many ticks is looked at.
const PATIENCE: u32 = 20;

/// What is audited: content and ledgers of one side of one mirror.
#[derive(Debug, Clone)]
pub(crate) struct Subject {
    pub(crate) ram: Arc<Ram>,
    pub(crate) ledgers: Arc<Ledgers>,
    pub(crate) secret: Arc<Secret>,
}

/// What a full audit found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Audit {
    /// Pages compared.
    pub pages: u64,
    /// Those whose content was not what the ledger says.
    pub differing: Vec<PageIndex>,
}

enum Order {
    All(Sender<Result<Audit, RamError>>),
    Stop,
}

/// The thread that audits one side of a mirror. Ends when dropped.
#[derive(Debug)]
pub(crate) struct Auditor {
    orders: Sender<Order>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    /// Set while pages are sent or written.
    busy: AtomicBool,
    /// Set when the rolling audit is over.
    over: AtomicBool,
    audited: AtomicU64,
}

/// Tells an audit whether the mirror is at work.
#[derive(Debug, Clone)]
pub(crate) struct Busy(Arc<Shared>);

impl Busy {
    pub(crate) fn set(&self, busy: bool) {
        self.0.busy.store(busy, Ordering::Relaxed);
    }
}

/// Called, with the page's ledger locked, for every page whose content is not what the ledger says.
pub(crate) trait Differs: FnMut(PageIndex, &mut Ledger) + Send + 'static {}
impl<F: FnMut(PageIndex, &mut Ledger) + Send + 'static> Differs for F {}

impl Auditor {
    /// Starts auditing.
    pub(crate) fn start(subject: Subject, differs: impl Differs) -> std::io::Result<Auditor> {
        let (orders, receiver) = bounded(1);
        let shared = Arc::new(Shared::default());
        let mut work = Work {
            slices: slices(&subject),
            subject,
            shared: Arc::clone(&shared),
            buffer: vec![0; SLICE_PAGES as usize * PAGE_SIZE],
            expected: Vec::with_capacity(SLICE_PAGES as usize),
            differs,
        };
        let thread = std::thread::Builder::new().name("audit".into()).spawn(move || {
            // Least favoured among the agent's threads; a refusal costs nothing but that favour.
            let _ = rustix::process::nice(10);
            work.run(&receiver);
        })?;
        Ok(Auditor { orders, shared, thread: Some(thread) })
    }

    /// By which the mirror's workers make the rolling audit stand back.
    pub(crate) fn busy(&self) -> Busy {
        Busy(Arc::clone(&self.shared))
    }

    /// Ends the rolling audit: from here on nothing is compared but what [`all`](Self::all) is asked for.
    pub(crate) fn rest(&self) {
        self.shared.over.store(true, Ordering::Relaxed);
    }

    /// Pages compared so far, all passes together.
    pub(crate) fn audited(&self) -> u64 {
        self.shared.audited.load(Ordering::Relaxed)
    }

    /// Compares every page now, without standing back. Blocks until done.
    pub(crate) fn all(&self) -> Result<Audit, RamError> {
        let (reply, answer) = bounded(1);
        let ended = "the audit's thread ends only when the auditor is dropped";
        self.orders.send(Order::All(reply)).expect(ended);
        answer.recv().expect(ended)
    }
}

impl Drop for Auditor {
    fn drop(&mut self) {
        let _ = self.orders.send(Order::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// All pages, cut into slices in the order in which they are audited.
fn slices(subject: &Subject) -> Vec<(u16, PageIndex, u64)> {
    let layout = subject.ram.layout();
    let mut slices = Vec::new();
    for stream in 0..layout.streams() {
        for (_, pages) in layout.chunks(stream) {
            for start in pages.clone().step_by(SLICE_PAGES as usize) {
                slices.push((stream, PageIndex(start), SLICE_PAGES.min(pages.end - start)));
            }
        }
    }
    slices
}

struct Work<D> {
    subject: Subject,
    shared: Arc<Shared>,
    slices: Vec<(u16, PageIndex, u64)>,
    buffer: Vec<u8>,
    expected: Vec<Option<ContentHash>>,
    differs: D,
}

impl<D: Differs> Work<D> {
    fn run(&mut self, orders: &Receiver<Order>) {
        let (mut next, mut waited) = (0, 0);
        loop {
            match orders.recv_timeout(TICK) {
                Ok(Order::All(reply)) => {
                    let _ = reply.send(self.all());
                }
                Ok(Order::Stop) | Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => {
                    waited += 1;
                    if self.shared.over.load(Ordering::Relaxed) {
                        continue;
                    }
                    if self.shared.busy.load(Ordering::Relaxed) && waited < PATIENCE {
                        continue;
                    }
                    waited = 0;
                    // A page that cannot be read now is left to the next pass; a full audit reports it.
                    let _ = self.slice(next, &mut Audit::default());
                    next = (next + 1) % self.slices.len();
                }
            }
        }
    }

    fn all(&mut self) -> Result<Audit, RamError> {
        let mut audit = Audit::default();
        for slice in 0..self.slices.len() {
            self.slice(slice, &mut audit)?;
        }
        Ok(audit)
    }

    /// Compares one slice. The ledger is locked to take the expectation, and again only for pages that differ: the
    /// worker may have been at them in between, so they are read once more while nothing can change the entry.
    fn slice(&mut self, slice: usize, audit: &mut Audit) -> Result<(), RamError> {
        let (stream, first, count) = self.slices[slice];
        let Subject { ram, ledgers, secret } = &self.subject;
        let pages = || (first.0..first.0 + count).map(PageIndex);
        self.expected.clear();
        {
            let ledger = ledgers.lock(stream);
            self.expected.extend(pages().map(|page| ledger.get(page)));
        }
        let hole = ram.is_hole(first, count)?;
        let buffer = &mut self.buffer[..count as usize * PAGE_SIZE];
        if !hole {
            ram.read(first, buffer)?;
        }
        let content = |page: &[u8]| if is_zero(page) { secret.zero_page() } else { secret.hash(page) };
        for (n, page) in pages().enumerate() {
            let Some(expected) = self.expected[n] else { continue };
            let bytes = n * PAGE_SIZE..(n + 1) * PAGE_SIZE;
            let found = if hole { secret.zero_page() } else { content(&buffer[bytes.clone()]) };
            audit.pages += 1;
            if found != expected {
                let mut ledger = ledgers.lock(stream);
                ram.read(page, &mut buffer[bytes.clone()])?;
                let now = ledger.get(page);
                if now.is_some() && now != Some(content(&buffer[bytes])) {
                    audit.differing.push(page);
                    (self.differs)(page, &mut ledger);
                }
            }
        }
        self.shared.audited.fetch_add(count, Ordering::Relaxed);
        Ok(())
    }
}
