//! The source's side of memory: scan, read, classify, send.

use std::io::Write;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use compression::Compression;
use crossbeam_channel::unbounded;
use dirty_tracker::{Region, Scan, Tracker};

use super::heat::Heat;
use super::holes::{self, Holes};
use super::pages::PageSet;
use super::post_copy::PostCopySource;
pub use super::proof::Proof;
pub use super::ram::TrackedRange;
use super::round::{Counts, Flow, Guest, Sent};
use super::sender::{Job, Told, Worker};
pub use super::source_error::SourceError;
use super::{Ram, RamError};
use crate::audit::{Audit, Auditor, Subject};
use crate::hash::Secret;
use crate::layout::{Layout, PAGE_SIZE, PageIndex};
use crate::ledger::{Ledger, Ledgers, Sum};
use crate::storage::Lane;

/// Where a scan found more than one page in so many written, the next is made in one step: two steps cost a call for
/// each neighbourhood of written pages. Measured for 1 GiB: with nothing written 0.4 ms in two steps and 1.1 ms in one,
/// with 18,000 regions written 4.0 and 1.6 ms.
const SCATTERED: u64 = 64;

/// Fewer hot pages than this are not worth the second look at them.
const HOT_PAGES: u64 = 256;

/// What the workers are to do with pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Telling {
    /// Send them; the round's barrier follows the last.
    Send { last: bool },
    /// Tell the destination that it is to be without them.
    Withhold,
}

/// What a scan has found.
#[derive(Debug, Clone, Copy)]
pub struct Scanned {
    /// How many pages were written since the scan before.
    pub pages: u64,
    /// When it began.
    pub begin: Instant,
    /// How long it took.
    pub took: Duration,
}

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
    /// Whether the guest may give memory back, which leaves holes that no scan finds.
    pub gives_back: bool,
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
    compression: Compression,
    holes: Holes,
    heat: Heat,
    /// Pages that the last scan found; none has been made before the first.
    last_found: u64,
    /// Found by a scan and not yet acknowledged by the destination.
    owed: PageSet,
    /// Owed in the round that was acknowledged last.
    acknowledged: PageSet,
    /// What the destination was told to be without.
    withheld: PageSet,
    round: u32,
    missed: u64,
}

impl MemorySource {
    /// Begins a mirror towards a destination whose RAM is all zero. Every page is due in the first round.
    ///
    /// `ranges` says, for each of the tracker's ranges, which part of RAM it is. `sinks` has one stream for each of the
    /// layout, and `lanes` what waits of disks on each, if there are any.
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
        lanes: Vec<Lane>,
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
        let mut lanes = lanes.into_iter();
        for (stream, sink) in (0..).zip(sinks) {
            let (subject, flow, lane) = (subject.clone(), Arc::clone(&flow), lanes.next());
            workers.push(Worker::start(stream, sink, subject, how.compression, flow, lane)?);
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
            compression: how.compression,
            holes: Holes::new(how.gives_back),
            heat: Heat::new(layout.end()),
            last_found,
            acknowledged: PageSet::new(layout.end()),
            withheld: PageSet::new(layout.end()),
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
        let scanned = self.look(guest)?;
        self.send(guest, scanned)
    }

    /// The second half of a [`round`](Self::round): sends what a scan made just before has found, and all else that is due.
    ///
    /// # Errors
    /// As [`round`](Self::round).
    pub fn send(&mut self, guest: Guest, scanned: Scanned) -> Result<Sent, SourceError> {
        self.tell_due(guest, scanned, false)
    }

    /// The first half of a [`round`](Self::round): scans, looks for what the guest has given back, and sends nothing. What it finds is owed
    /// from now on.
    ///
    /// # Errors
    /// [`SourceError::Scan`], or [`SourceError::Ram`].
    pub fn look(&mut self, guest: Guest) -> Result<Scanned, SourceError> {
        let begin = Instant::now();
        let pages = self.scan(guest)?;
        Ok(Scanned { pages, begin, took: begin.elapsed() })
    }

    /// Begins to supply what was withheld, once the guest stands still here for good; or, to go on after a link was lost,
    /// what the destination says is still missing.
    ///
    /// # Errors
    /// [`SourceError::Thread`].
    pub fn supply<W: Write + Send + 'static>(
        &self,
        missing: Option<PageSet>,
        urgent: W,
        bulk: Vec<W>,
    ) -> Result<PostCopySource, SourceError> {
        // The guest never runs here again, and the proof compares everything: an audit would only be in the way.
        self.auditor.rest();
        let unsent = missing.unwrap_or_else(|| self.withheld.clone());
        let heat = |page| self.heat.of(page);
        let flow = Arc::clone(&self.flow);
        PostCopySource::with(self.subject.clone(), flow, self.compression, unsent, heat, urgent, bulk)
    }

    /// The ledger sums, by stream. At the destination they are the same once everything has come.
    #[must_use]
    pub fn sums(&self) -> Vec<Sum> {
        let streams = 0..self.subject.ram.layout().streams();
        streams.map(|stream| self.subject.ledgers.lock(stream).sum()).collect()
    }

    /// How many pages were withheld.
    #[must_use]
    pub fn withheld(&self) -> u64 {
        self.withheld.len()
    }

    /// The layout of the memory.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        self.subject.ram.layout()
    }

    /// The key of the content hashes.
    #[must_use]
    pub fn secret(&self) -> &Secret {
        &self.subject.secret
    }

    /// As [`send`](Self::send), but what is due is not sent: the destination is told to be without it. It stays owed
    /// until it is supplied, by a [`PostCopySource`].
    ///
    /// # Errors
    /// [`SourceError`]; the mirror cannot go on after any.
    pub fn withhold(&mut self, guest: Guest, scanned: Scanned) -> Result<Sent, SourceError> {
        let sent = self.tell_due(guest, scanned, true)?;
        self.withheld.extend(&self.owed);
        Ok(sent)
    }

    /// The last round of a paused guest: as [`withhold`](Self::withhold), but what the guest has lately written again and
    /// again, it will want at once: of that, what was withheld before included, at most so many pages are sent.
    ///
    /// # Errors
    /// As [`withhold`](Self::withhold).
    pub fn withhold_cold(&mut self, scanned: Scanned, most: usize) -> Result<Sent, SourceError> {
        let wanted = self.wanted_soon(most);
        // What is sent now was named by a scan, if not by this one.
        self.doubtful.retain(|page| !wanted.contains(page.0));
        self.withheld.subtract(&wanted);
        self.owed.subtract(&wanted);
        self.auditor.busy().set(true);
        let mut first = Sent { due: wanted.len(), ..self.nothing_sent(&scanned) };
        let told = self.tell(wanted, Telling::Send { last: false }, &mut first);
        let mut sent = told.and_then(|()| self.withhold(Guest::Paused, scanned))?;
        sent.due += first.due;
        sent.counts.add(&first.counts);
        Ok(sent)
    }

    /// The hottest pages, at most so many. A page that three of the last four scans found was found by one of the last two: it is
    /// owed, or was in the round before.
    fn wanted_soon(&self, most: usize) -> PageSet {
        let mut unsent = self.owed.clone();
        unsent.extend(&self.acknowledged);
        let blocks = self.subject.ram.layout().blocks().iter();
        let pages = blocks.flat_map(|block| unsent.runs(block.pages.clone())).flatten();
        let heats = pages.map(|page| (self.heat.lately(PageIndex(page)), page));
        let mut hot: Vec<_> = heats.filter(|(_, page)| self.heat.is_hot(PageIndex(*page))).collect();
        hot.sort_by_key(|(heat, _)| std::cmp::Reverse(*heat));
        let mut wanted = PageSet::new(self.subject.ram.layout().end());
        hot.iter().take(most).for_each(|(_, page)| wanted.insert(*page..*page + 1));
        wanted
    }

    /// A round of which nothing is sent yet.
    fn nothing_sent(&self, scanned: &Scanned) -> Sent {
        Sent {
            number: self.round,
            due: self.owed.len(),
            scanned: scanned.pages,
            deferred: 0,
            counts: Counts::default(),
            sums: vec![Sum::default(); self.workers.len()],
            disk_sums: vec![Sum::default(); self.workers.len()],
            scan: scanned.took,
            elapsed: Duration::ZERO,
        }
    }

    fn tell_due(&mut self, guest: Guest, scanned: Scanned, withhold: bool) -> Result<Sent, SourceError> {
        self.auditor.busy().set(true);
        let sent = self.tell_all(guest, scanned, withhold);
        self.auditor.busy().set(false);
        sent
    }

    fn tell_all(&mut self, guest: Guest, scanned: Scanned, withhold: bool) -> Result<Sent, SourceError> {
        self.take_in_missed()?;
        let mut sent = self.nothing_sent(&scanned);
        let mut due = self.owed.clone();
        if guest == Guest::Running && !withhold {
            let mut hot = self.hot(&due);
            if hot.len() >= HOT_PAGES {
                due.subtract(&hot);
                self.tell(due, Telling::Send { last: false }, &mut sent)?;
                sent.deferred = self.still_hot(&mut hot)?;
                sent.due -= sent.deferred;
                due = hot;
            }
        }
        let telling = if withhold { Telling::Withhold } else { Telling::Send { last: true } };
        self.tell(due, telling, &mut sent)?;
        sent.elapsed = scanned.begin.elapsed();
        self.round += 1;
        Ok(sent)
    }

    /// Has the workers send these pages, or tell that they are left out, and adds what came of it to `sent`.
    fn tell(&self, due: PageSet, telling: Telling, sent: &mut Sent) -> Result<(), SourceError> {
        let due = Arc::new(due);
        let (done, results) = unbounded();
        for worker in &self.workers {
            let (number, due, done) = (self.round, Arc::clone(&due), done.clone());
            let job = match telling {
                Telling::Withhold => Job::Withhold { number, due, done },
                Telling::Send { last } => Job::Round { number, due, last, done },
            };
            worker.jobs.send(job).map_err(|_| SourceError::Ended)?;
        }
        drop(done);
        for _ in &self.workers {
            let (stream, result) = results.recv().map_err(|_| SourceError::Ended)?;
            let Told { counts, sum, disks } = result?;
            sent.counts.add(&counts);
            sent.sums[usize::from(stream)] = sum;
            sent.disk_sums[usize::from(stream)] = disks;
        }
        Ok(())
    }

    /// Those of these pages that the guest writes again and again.
    fn hot(&self, due: &PageSet) -> PageSet {
        let mut hot = PageSet::new(self.subject.ram.layout().end());
        for block in self.subject.ram.layout().blocks() {
            for page in due.runs(block.pages.clone()).flatten() {
                if self.heat.is_hot(PageIndex(page)) {
                    hot.insert(page..page + 1);
                }
            }
        }
        hot
    }

    /// Takes out of a set of hot pages what the guest has written again by now: sent, it would only be sent once more. The
    /// next scan finds it, as nothing has protected it. Returns how many pages that were.
    fn still_hot(&mut self, hot: &mut PageSet) -> Result<u64, SourceError> {
        let before = hot.len();
        self.regions.clear();
        self.tracker.scan(Scan::List, &mut self.regions).map_err(SourceError::Scan)?;
        for region in &self.regions {
            hot.remove(self.pages_of(region));
        }
        Ok(before - hot.len())
    }

    /// The pages of a region that was found written.
    fn pages_of(&self, region: &Region) -> Range<u64> {
        let TrackedRange { block, offset } = &self.ranges[region.range];
        let block = &self.subject.ram.layout().blocks()[*block].pages;
        // The mapping of a block on hugetlbfs may go on beyond it, up to the end of a huge page.
        let page = |at: u64| (block.start + (offset + at) / PAGE_SIZE as u64).min(block.end);
        page(region.start)..page(region.end)
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
        let mut found = 0;
        self.heat.next_scan();
        for region in &self.regions {
            let pages = self.pages_of(region);
            found += pages.end - pages.start;
            self.heat.found(pages.clone());
            self.owed.insert(pages);
        }
        self.last_found = found;
        self.take_in_holes(guest)?;
        Ok(found)
    }

    /// Adds to what is owed the pages that the guest has given back since the destination was given their content.
    fn take_in_holes(&mut self, guest: Guest) -> Result<(), SourceError> {
        // In the first round everything is owed.
        if !self.holes.are_due(guest) || (guest == Guest::Running && self.round == 0) {
            return Ok(());
        }
        let begin = Instant::now();
        self.regions.clear();
        self.tracker.unmapped(&mut self.regions).map_err(SourceError::Scan)?;
        for region in &self.regions {
            let pages = self.pages_of(region);
            if !pages.is_empty() {
                holes::find(&self.subject, pages, &mut self.owed)?;
            }
        }
        self.holes.looked(begin.elapsed());
        Ok(())
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
            // What was withheld since the audit looked is not known any more, and is not doubtful for it.
            if known.is_some_and(|known| known != secret.hash(&content)) {
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
        std::mem::swap(&mut self.owed, &mut self.acknowledged);
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

    /// Whether there are pages that differ from the ledger after a scan that did not name them: only a further round can tell
    /// whether their writing was missed.
    #[must_use]
    pub fn in_doubt(&self) -> bool {
        !self.doubtful.is_empty()
    }

    /// Whether the audit has found pages that differ from the ledger since the last scan. While the guest runs and writes there
    /// always are some; the next scan names them.
    #[must_use]
    pub fn has_suspects(&self) -> bool {
        !self.suspects.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
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
        self.auditor.rest();
        let (done, results) = unbounded();
        for worker in &self.workers {
            worker.jobs.send(Job::Prove { done: done.clone() }).map_err(|_| SourceError::Ended)?;
        }
        drop(done);
        let mut proof = Proof::default();
        for _ in &self.workers {
            proof.add(results.recv().map_err(|_| SourceError::Ended)?.1?);
        }
        Ok(proof)
    }
}
