//! The memory's rounds: one after the other, each acknowledged before the next.

mod audits;
mod report;
mod scan;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
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
use mirror::memory::source::{How, MemorySource, Scanned, Scanning, SourceError, TrackedRange};
use mirror::storage::Lane;
use mirror::storage::source::StorageSource;
use qemu::{Qmp, RamBlock};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::estimate::Estimate;
use super::inbox::Inbox;
use super::peer::{Destination, violation};
use super::stop::Stop;
use movable::confinement;
use protocol::deadlines::ROUND;
use protocol::wire::{Reply, Sums};
use session::report::{Memory, Quiesced, Round};

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
        let disks = storage.as_ref().map(|storage| storage.layout().clone());
        Ok(Rounds {
            flow: memory.flow(),
            inbox: Inbox::new(memory.layout().clone(), disks),
            memory: Some(memory),
            busy: None,
            aborts,
            streams,
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
        report::merge(&mut self.report);
        Ok(())
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

    /// Takes in what the destination says while no round is under way.
    pub(super) fn note(&mut self, reply: Reply) -> Result<(), Stop> {
        self.inbox.note(reply)
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
    fn a_scan_of_a_qemu_that_has_ended_says_that_it_has() {
        let kind = |error: ScanError| match broken(&SourceError::Scan(error)) {
            Stop::Failed(finding) => finding.kind,
            other => panic!("{other:?}"),
        };
        assert_eq!(kind(ScanError::Gone { pid: 7 }), "qemu-gone");
        assert_eq!(kind(ScanError::Lost { pid: 7, range: 0..4096 }), "mirror");
    }
}
