//! The memory's rounds: one after the other, each acknowledged before the next.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use compression::Compression;
use dirty_tracker::{DescriptorSource, Injection, KnownFilters, ScanError, Tracker};
use link::AbortHandle;
use mirror::hash::Secret;
use mirror::layout::{Layout, PAGE_SIZE};
use mirror::memory::Ram;
use mirror::memory::pages::PageSet;
use mirror::memory::post_copy::PostCopySource;
use mirror::memory::round::{Flow, Guest, Sent};
use mirror::memory::source::{How, MemorySource, Proof, Scanned, Scanning, SourceError, TrackedRange};
use mirror::storage::Lane;
use mirror::storage::layout::BLOCK_SIZE;
use mirror::storage::source::StorageSource;
use qemu::{Qmp, RamBlock};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::disks::blocks;
use super::estimate::Estimate;
use super::inbox::Inbox;
use super::peer::{Destination, violation};
use super::stop::Stop;
use finding::Finding;
use movable::confinement;
use protocol::deadlines::ROUND;
use protocol::wire::{Reply, Request, Sums};
use session::report::{Memory, Quiesced, Round, Verification};

/// How often a guest that was stopped for a scan is told again to go on.
const UNQUIESCE: u32 = 3;
/// What a destination reads back of its copy at the least, in bytes per second.
const SLOWEST_AUDIT: u64 = 100 << 20;
/// How long to watch a guest to see how fast it dirties memory: longer than the pauses of one that works in bursts.
const GLANCE: Duration = Duration::from_millis(100);

/// The memory's side of a mirror: its state, and what has been measured.
pub(super) struct Rounds {
    /// Absent while work is under way on a thread of its own.
    memory: Option<MemorySource>,
    /// That work; kept here so that it is waited for even if whoever began it is not there any more.
    busy: Option<JoinHandle<MemorySource>>,
    aborts: Vec<AbortHandle>,
    streams: usize,
    inbox: Inbox,
    last_scan: Option<Instant>,
    /// Pages that the destination's audit has compared, as it last told.
    audited_there: u64,
    repaired: u64,
    /// Pages that the destination is without.
    pub(super) withheld: u64,
    /// Whether both ledgers were equal after the last round.
    pub(super) equal: bool,
    pub(super) sums: Option<Sums>,
    pub(super) estimate: Estimate,
    pub(super) report: Vec<Round>,
    pub(super) totals: Memory,
    pub(super) hold: Duration,
    quiesce: Option<Qmp>,
    /// A scan has stopped the guest and not been able to let it go on.
    left_stopped: Arc<AtomicBool>,
    /// The stops that scans have needed, where they need any.
    pub(super) quiesced: Option<Quiesced>,
    /// What has gone through, a round under way included.
    pub(super) flow: Arc<Flow>,
    /// The mirror of disks, on the same streams.
    storage: Option<Arc<StorageSource>>,
    audited_blocks: u64,
    repaired_blocks: u64,
}

/// What the rounds begin with.
pub(super) struct Begin<W> {
    pub(super) pid: u32,
    pub(super) known_filters: KnownFilters,
    /// The guest may give memory back while it runs.
    pub(super) gives_back: bool,
    pub(super) ram: Vec<RamBlock>,
    pub(super) layout: Layout,
    pub(super) secret: Secret,
    pub(super) kvm: bool,
    pub(super) sinks: Vec<W>,
    pub(super) aborts: Vec<AbortHandle>,
    pub(super) switch_cost: Duration,
    pub(super) compression: Compression,
    /// The guest's QEMU, where it must be quiesced for scans.
    pub(super) quiesce: Option<Qmp>,
    /// The mirror of disks, and what waits of it for each stream.
    pub(super) storage: Option<Arc<StorageSource>>,
    pub(super) lanes: Vec<Lane>,
}

impl Rounds {
    /// Begins tracking: from here on nothing that the guest writes is missed. Blocks.
    pub(super) fn begin<W: std::io::Write + Send + 'static>(begin: Begin<W>) -> Result<Rounds, Stop> {
        let Begin { pid, ram, layout, secret, kvm, sinks, aborts, switch_cost, compression, quiesce, .. } =
            begin;
        let (storage, lanes) = (begin.storage, begin.lanes);
        let streams = sinks.len();
        let (mut addresses, mut ranges) = (Vec::new(), Vec::new());
        for (block, ram) in ram.iter().enumerate() {
            let base = ram.mappings.first().map_or(0, |mapping| mapping.file_offset);
            for mapping in &ram.mappings {
                addresses.push(mapping.address..mapping.address + mapping.len);
                ranges.push(TrackedRange { block, offset: mapping.file_offset - base });
            }
        }
        let injection = Injection { source: DescriptorSource::Injected, known: begin.known_filters };
        let tracker = Tracker::attach(pid, &addresses, injection)
            .map_err(|e| Stop::Failed(confinement::untracked(&e)))?;
        let hold = tracker.hold();
        let totals = Memory { pages: layout.page_count(), page_size: PAGE_SIZE as u64, ..Memory::default() };
        let ram = Ram::new(layout, ram.into_iter().map(|block| movable::ram::file_of(block, pid)).collect())
            .map_err(|e| Stop::because("ram", &e, "see whether the VM's RAM file is still there"))?;
        let scanning = if kvm { Scanning::AlwaysSparing } else { Scanning::Quickest };
        let how = How { scanning, compression, gives_back: begin.gives_back };
        let memory =
            MemorySource::start(ram, secret, tracker, ranges, how, sinks, lanes).map_err(|e| broken(&e))?;
        let blocks = storage.as_ref().map_or(0, |storage| storage.layout().block_count());
        Ok(Rounds {
            flow: memory.flow(),
            memory: Some(memory),
            busy: None,
            aborts,
            streams,
            inbox: Inbox::new(totals.pages, blocks),
            storage,
            audited_blocks: 0,
            repaired_blocks: 0,
            last_scan: None,
            audited_there: 0,
            repaired: 0,
            withheld: 0,
            equal: false,
            sums: None,
            estimate: Estimate::new(switch_cost),
            report: Vec::new(),
            totals,
            hold,
            quiesced: quiesce.as_ref().map(|_| Quiesced::default()),
            quiesce,
            left_stopped: Arc::default(),
        })
    }

    /// Runs one blocking piece of work on the memory, on a thread of its own. While it runs, what the destination says
    /// is taken in, and its failure ends the work.
    async fn with<T: Send + 'static>(
        &mut self,
        destination: &mut Destination,
        work: impl FnOnce(&mut MemorySource) -> Result<T, SourceError> + Send + 'static,
    ) -> Result<T, Stop> {
        let Some(mut memory) = self.memory.take() else {
            return Err(broken(&SourceError::Ended));
        };
        let (tell, answer) = oneshot::channel();
        let busy = tokio::task::spawn_blocking(move || {
            // Nobody waits any more when this fails.
            let _ = tell.send(work(&mut memory));
            memory
        });
        self.attend(destination, busy, answer).await
    }

    /// Waits for a piece of work to end.
    async fn attend<T>(
        &mut self,
        destination: &mut Destination,
        busy: JoinHandle<MemorySource>,
        answer: oneshot::Receiver<Result<T, SourceError>>,
    ) -> Result<T, Stop> {
        let busy = self.busy.insert(busy);
        let mut stop = None;
        let ended = loop {
            tokio::select! {
                ended = &mut *busy => break ended,
                heard = destination.receive(), if stop.is_none() => {
                    if let Err(why) = heard.and_then(|reply| self.inbox.note(reply)) {
                        // The streams are of no use any more, and the work may be blocked on them.
                        stop = Some(why);
                        self.aborts.iter().for_each(AbortHandle::abort);
                    }
                }
            }
        };
        self.busy = None;
        self.memory = ended.ok();
        let result = answer.await.unwrap_or(Err(SourceError::Ended));
        match (stop, result) {
            (Some(stop), _) => Err(stop),
            (None, Ok(value)) => Ok(value),
            // A stream breaks because the destination failed, which it says on the control connection.
            (None, Err(e @ SourceError::Stream { .. })) => {
                Err(self.reason(destination).await.unwrap_or(broken(&e)))
            }
            (None, Err(e)) => Err(broken(&e)),
        }
    }

    /// What the destination says of its failure, if it says it soon.
    async fn reason(&mut self, destination: &mut Destination) -> Option<Stop> {
        let failed = async {
            loop {
                if let Err(stop) = destination.receive().await {
                    return stop;
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(1), failed).await.ok()
    }

    /// One round, up to the destination's acknowledgement.
    pub(super) async fn round(&mut self, destination: &mut Destination, guest: Guest) -> Result<(), Stop> {
        self.exchange(destination, guest, MemorySource::send).await
    }

    /// A round in which what is due is not sent: the destination is told to be without it.
    pub(super) async fn withhold(&mut self, destination: &mut Destination) -> Result<(), Stop> {
        self.exchange(destination, Guest::Running, MemorySource::withhold).await?;
        self.withheld = self.memory.as_ref().map_or(0, MemorySource::withheld);
        Ok(())
    }

    /// The last of these, of a paused guest: what it writes all the time it gets, as far as that can be sent in this time.
    pub(super) async fn withhold_cold(
        &mut self,
        destination: &mut Destination,
        time: Duration,
    ) -> Result<(), Stop> {
        let most = (self.estimate.wire_rate.unwrap_or(0.0) * time.as_secs_f64()) as usize / PAGE_SIZE;
        let send = move |memory: &mut MemorySource, _, scanned| memory.withhold_cold(scanned, most);
        self.exchange(destination, Guest::Paused, send).await?;
        self.withheld = self.memory.as_ref().map_or(0, MemorySource::withheld);
        Ok(())
    }

    async fn exchange(
        &mut self,
        destination: &mut Destination,
        guest: Guest,
        send: impl FnOnce(&mut MemorySource, Guest, Scanned) -> Result<Sent, SourceError> + Send + 'static,
    ) -> Result<(), Stop> {
        let repairs = self.inbox.take_repairs();
        self.repaired += repairs.len() as u64;
        self.repair_blocks()?;
        let scanned = self.scan(destination, guest).await?;
        let begin = scanned.begin;
        let sent = self
            .with(destination, move |memory| {
                memory.repair(&repairs);
                send(memory, guest, scanned)
            })
            .await?;
        let sums = self.acknowledged(destination, &sent).await?;
        let took = begin.elapsed();
        let there =
            sums.decode(self.streams).ok_or_else(|| violation("sent sums for another number of streams"))?;
        let disks = sums
            .decode_disks(self.streams)
            .ok_or_else(|| violation("sent sums for another number of streams"))?;
        self.equal = there == sent.sums && disks == sent.disk_sums;
        if guest == Guest::Paused && !self.equal {
            let (memory, disks) = (there == sent.sums, disks == sent.disk_sums);
            tracing::warn!(round = sent.number, memory, disks, "what of the copy is equal");
        }
        (self.audited_there, self.audited_blocks) = (sums.audited, sums.audited_blocks);
        self.sums = Some(Sums::new(sums.barrier, &sent.sums, 0).with_disks(&sent.disk_sums, 0));
        if let Some(memory) = &mut self.memory {
            memory.acknowledge();
        }
        if guest == Guest::Running {
            let since = self.last_scan.replace(begin).map(|last| begin - last);
            self.estimate.learn(&sent, took, since);
        }
        self.totals.raw_bytes += sent.counts.raw_bytes;
        self.totals.wire_bytes += sent.counts.wire_bytes;
        self.report.push(Round {
            n: sent.number,
            dirty_pages: sent.due,
            deferred: sent.deferred,
            zero: sent.counts.zero,
            unchanged: sent.counts.unchanged,
            delta: sent.counts.delta,
            duplicate: sent.counts.duplicate,
            plain: sent.counts.plain,
            withheld: sent.counts.withheld,
            raw_bytes: sent.counts.raw_bytes,
            wire_bytes: sent.counts.wire_bytes,
            duration_ms: took.as_secs_f64() * 1e3,
            scan_ms: sent.scan.as_secs_f64() * 1e3,
            paused: guest == Guest::Paused,
            merged: 0,
            estimate: (guest == Guest::Running).then(|| self.estimate.told()),
        });
        merge(&mut self.report);
        Ok(())
    }

    /// Has blocks sent again that the destination has found wrong.
    fn repair_blocks(&mut self) -> Result<(), Stop> {
        for wrong in self.inbox.take_blocks() {
            // A check fails where the guest has written the block since: that is no discrepancy.
            if !wrong.checked {
                self.repaired_blocks += wrong.blocks.len() as u64;
            }
            let repaired = self.storage.as_ref().is_some_and(|storage| storage.repair(&blocks(&wrong)));
            if !repaired {
                return Err(violation("finds blocks wrong that there are not"));
            }
        }
        Ok(())
    }

    /// Of a paused guest: checks that have failed, because the guest had written a block since, are settled. What else is wrong with
    /// blocks stays to be judged.
    pub(super) async fn settle_checks(&mut self) -> Result<(), Stop> {
        let Some(storage) = self.storage.clone() else { return Ok(()) };
        let (checked, wrong): (Vec<_>, Vec<_>) =
            self.inbox.take_blocks().into_iter().partition(|wrong| wrong.checked);
        wrong.into_iter().try_for_each(|wrong| self.inbox.note(Reply::WrongBlocks(wrong)))?;
        if !checked.iter().all(|wrong| storage.repair(&blocks(wrong))) {
            return Err(violation("finds blocks wrong that there are not"));
        }
        let settled = tokio::task::spawn_blocking(move || {
            while storage.uncertain() > 0 && !storage.is_over() {
                storage.settle()?;
            }
            Ok::<_, (usize, std::io::Error)>(())
        });
        settled.await.map_err(|e| broken(&e))?.map_err(|(_, e)| broken(&e))
    }

    async fn acknowledged(&mut self, destination: &mut Destination, sent: &Sent) -> Result<Sums, Stop> {
        loop {
            let reply = match self.inbox.other() {
                Some(reply) => reply,
                None => destination.receive_within(ROUND, "acknowledge what was sent").await?,
            };
            match reply {
                Reply::Barrier(sums) if sums.barrier == sent.number => return Ok(sums),
                Reply::Mismatch(_) | Reply::WrongBlocks(_) => self.inbox.note(reply)?,
                other => {
                    return Err(violation(&format!(
                        "said {other} instead of reaching barrier {}",
                        sent.number
                    )));
                }
            }
        }
    }

    /// How fast the guest dirties memory at this moment, in bytes per second: what it dirties in a short while.
    pub(super) async fn dirty_rate_now(&mut self, destination: &mut Destination) -> Result<f64, Stop> {
        let first = self.scan(destination, Guest::Running).await?;
        tokio::time::sleep(GLANCE).await;
        let second = self.scan(destination, Guest::Running).await?;
        self.last_scan = Some(second.begin);
        Ok((second.pages * PAGE_SIZE as u64) as f64 / (second.begin - first.begin).as_secs_f64())
    }

    /// Scans. A guest with devices that write its memory behind the tracking is stopped meanwhile, which drains them.
    async fn scan(&mut self, destination: &mut Destination, guest: Guest) -> Result<Scanned, Stop> {
        let Some(qmp) = self.quiesce.clone().filter(|_| guest == Guest::Running) else {
            return self.with(destination, move |memory| memory.look(guest)).await;
        };
        let memory = self.memory.take().ok_or_else(|| broken(&SourceError::Ended))?;
        let (tell, answer) = oneshot::channel();
        // On a task of its own: whoever waits for it may go, the guest goes on all the same.
        let left_stopped = Arc::clone(&self.left_stopped);
        let busy = tokio::spawn(async move {
            let (memory, scanned) = quiesced_scan(&qmp, memory, &left_stopped).await;
            let _ = tell.send(Ok(scanned));
            memory
        });
        let (scanned, stopped) = self.attend(destination, busy, answer).await??;
        if let Some(quiesced) = &mut self.quiesced {
            let ms = stopped.as_secs_f64() * 1e3;
            quiesced.stops += 1;
            quiesced.total_ms += ms;
            quiesced.longest_ms = quiesced.longest_ms.max(ms);
        }
        Ok(scanned)
    }

    /// Begins to supply what was withheld, or what the destination says is missing.
    pub(super) fn supply<W: std::io::Write + Send + 'static>(
        &self,
        missing: Option<PageSet>,
        urgent: W,
        bulk: Vec<W>,
    ) -> Result<PostCopySource, Stop> {
        let memory = self.memory.as_ref().ok_or_else(|| broken(&SourceError::Ended))?;
        memory.supply(missing, urgent, bulk).map_err(|e| broken(&e))
    }

    /// The secret and the layout that hashes and pages are by.
    pub(super) fn identity(&self) -> Option<(Secret, Layout)> {
        self.memory.as_ref().map(|memory| (memory.secret().clone(), memory.layout().clone()))
    }

    /// The ledger's sums as it stands, for the wire.
    pub(super) fn sums_now(&self) -> Vec<u8> {
        let sums = self.memory.as_ref().map(MemorySource::sums).unwrap_or_default();
        Sums::new(0, &sums, 0).sums
    }

    /// Has the destination read its whole copy back. Returns how many pages it compared, and how many differed.
    pub(super) async fn read_back(&mut self, destination: &mut Destination) -> Result<(u64, u64), Stop> {
        let disks = self.storage.as_ref().map_or(0, |storage| storage.layout().block_count());
        let size = self.totals.pages * PAGE_SIZE as u64 + disks * BLOCK_SIZE as u64;
        let limit = ROUND + Duration::from_secs(size / SLOWEST_AUDIT);
        destination.send(Request::Audit(protocol::wire::Nothing {})).await?;
        loop {
            match destination.receive_within(limit, "read its copy back").await? {
                Reply::Audited(audited) => {
                    self.audited_there = self.audited_there.saturating_add(audited.pages);
                    self.audited_blocks = self.audited_blocks.saturating_add(audited.blocks);
                    let differing = audited.differing.saturating_add(audited.differing_blocks);
                    return Ok((audited.pages, differing));
                }
                reply @ (Reply::Mismatch(_) | Reply::WrongBlocks(_)) => self.inbox.note(reply)?,
                other => return Err(violation(&format!("said {other} instead of what its audit found"))),
            }
        }
    }

    /// Compares all of the source's RAM with the ledger. What differs is settled by the next rounds.
    pub(super) async fn audit(&mut self, destination: &mut Destination) -> Result<(), Stop> {
        self.with(destination, |memory| Ok(memory.audit()?)).await.map(drop)
    }

    /// Compares all of the frozen RAM with the ledger.
    pub(super) async fn prove(&mut self) -> Result<Proof, Stop> {
        let memory = self.memory.take().ok_or_else(|| broken(&SourceError::Ended))?;
        let work = tokio::task::spawn_blocking(move || {
            let proof = memory.prove();
            (memory, proof)
        });
        let (memory, proof) = work.await.map_err(|e| broken(&e))?;
        self.memory = Some(memory);
        proof.map_err(|e| broken(&e))
    }

    /// Whether the destination has asked for pages that it has not yet been sent again.
    pub(super) fn repairs_due(&self) -> bool {
        self.inbox.repairs() > 0 || self.inbox.has_blocks()
    }

    /// Whether an audit has raised a doubt that further rounds must settle.
    pub(super) fn in_doubt(&self) -> bool {
        self.repairs_due() || !self.equal || self.memory.as_ref().is_some_and(MemorySource::in_doubt)
    }

    /// Whether anything at all is not certain: of a guest that stands still nothing may be.
    pub(super) fn is_certain(&self) -> bool {
        let settled = self.storage.as_ref().is_none_or(|storage| storage.uncertain() == 0);
        settled && !self.in_doubt() && !self.memory.as_ref().is_some_and(MemorySource::has_suspects)
    }

    /// Takes in what the destination says while no round is under way.
    pub(super) fn note(&mut self, reply: Reply) -> Result<(), Stop> {
        self.inbox.note(reply)
    }

    /// What the audits have done so far.
    pub(super) fn verification(&self) -> Verification {
        let (audited, missed) =
            self.memory.as_ref().map_or((0, 0), |memory| (memory.audited(), memory.missed()));
        Verification {
            audited_pages: audited.saturating_add(self.audited_there),
            repaired_pages: self.repaired + self.inbox.repairs() as u64 + missed,
            audited_blocks: self.audited_blocks,
            repaired_blocks: self.repaired_blocks,
            ..Verification::default()
        }
    }

    /// Tells whether a scan has stopped the guest and not been able to let it go on. It is certain when the rounds have ended.
    pub(super) fn left_stopped(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.left_stopped)
    }

    /// Ends the streams; whatever blocks on them ends too.
    pub(super) fn abort(&self) {
        for abort in &self.aborts {
            abort.abort();
        }
    }

    /// Gives everything back: streams, threads, tracking. No thread touches the machine's memory when it returns.
    pub(super) async fn end(mut self) {
        self.abort();
        let busy = match self.busy.take() {
            Some(busy) => busy.await.ok(),
            None => None,
        };
        if let Some(memory) = self.memory.take().or(busy) {
            let _ = tokio::task::spawn_blocking(move || drop(memory)).await;
        }
    }
}

/// Stops the guest, which drains its disks, scans, and lets it go on. Returns for how long it was stopped, too.
async fn quiesced_scan(
    qmp: &Qmp,
    mut memory: MemorySource,
    left_stopped: &AtomicBool,
) -> (MemorySource, Result<(Scanned, Duration), Stop>) {
    let begin = Instant::now();
    match qmp.quiesce().await {
        Ok(true) => {}
        Ok(false) => {
            let message = "the VM was paused by somebody else";
            let paused = Finding::new("vm-paused", message, "migrate the VM when it runs again");
            return (memory, Err(Stop::Failed(paused)));
        }
        Err(e) => {
            // It may have been stopped all the same.
            left_stopped.store(qmp.unquiesce().await.is_err(), Ordering::Relaxed);
            return (memory, Err(Stop::qemu(e)));
        }
    }
    let scanning = tokio::task::spawn_blocking(move || {
        let scanned = memory.look(Guest::Running);
        (memory, scanned)
    });
    let scanned = scanning.await;
    let mut resumed = qmp.unquiesce().await;
    for _ in 0..UNQUIESCE {
        if resumed.is_ok() {
            break;
        }
        resumed = qmp.unquiesce().await;
    }
    left_stopped.store(resumed.is_err(), Ordering::Relaxed);
    let stopped = begin.elapsed();
    let (memory, scanned) = match scanned {
        Ok(scanned) => scanned,
        Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
    };
    let scanned = scanned.map_err(|e| broken(&e));
    (memory, scanned.and_then(|scanned| resumed.map(|()| (scanned, stopped)).map_err(Stop::qemu)))
}

/// Rounds that a report tells one by one; and those of them at its beginning and end that always are.
const MOST_ROUNDS: usize = 1000;
const FIRST_ROUNDS: usize = 16;
const LAST_ROUNDS: usize = 200;

/// A mirror may stand for days. When there are too many rounds to be told, neighbours in the middle become one.
fn merge(rounds: &mut Vec<Round>) {
    if rounds.len() <= MOST_ROUNDS {
        return;
    }
    let last = rounds.split_off(rounds.len() - LAST_ROUNDS);
    let middle = rounds.split_off(FIRST_ROUNDS);
    for pair in middle.chunks(2) {
        let mut round = pair[0].clone();
        pair[1..].iter().for_each(|next| round.take_in(next));
        rounds.push(round);
    }
    rounds.extend(last);
}

fn broken(error: &(dyn std::error::Error + 'static)) -> Stop {
    match error.downcast_ref() {
        // A QEMU that ends loses its memory first, and its monitor after that.
        Some(SourceError::Scan(ScanError::Gone { .. })) => {
            Stop::because("qemu-gone", error, "see the VM's log on the source")
        }
        _ => Stop::because("mirror", error, "see the logs of both agents"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn however_many_rounds_there_are_the_report_stays_small_and_its_sums_right() {
        let mut rounds = Vec::new();
        for n in 0..50_000 {
            rounds.push(Round { n, dirty_pages: 3, unchanged: 3, wire_bytes: 7, ..Round::default() });
            merge(&mut rounds);
        }
        assert!(rounds.len() <= MOST_ROUNDS, "{}", rounds.len());
        assert_eq!(rounds.iter().map(|round| round.wire_bytes).sum::<u64>(), 350_000);
        assert_eq!(rounds.iter().map(|round| u64::from(round.merged) + 1).sum::<u64>(), 50_000);
        assert!(rounds.is_sorted_by_key(|round| round.n));
        assert_eq!((rounds[1].n, rounds.last().map(|round| round.n)), (1, Some(49_999)));
    }

    #[test]
    fn a_scan_of_a_qemu_that_has_ended_says_that_it_has() {
        let kind = |error: ScanError| match broken(&SourceError::Scan(error)) {
            Stop::Failed(finding) => finding.kind,
            other => panic!("{other:?}"),
        };
        assert_eq!(kind(ScanError::Gone { pid: 7 }), "qemu-gone");
        assert_eq!(kind(ScanError::Lost { pid: 7, range: 0..4096 }), "mirror");
    }
}
