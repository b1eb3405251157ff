//! The copy while it is being mirrored: pages and device state applied, the gate, the load.

use std::ops::Range;
use std::sync::Arc;

use dirty_tracker::KnownFilters;
use link::{AbortHandle, DataReceiver};
use mirror::ledger::Sum;
use mirror::memory::destination::{DestinationError, Event, Finished, MemoryDestination};
use mirror::memory::post_copy::Places;
use mirror::storage::destination::{StorageDestination, Wrong};
use tokio::sync::broadcast::error::RecvError;
use tokio::time::timeout;

use crate::arrivals::Arrivals;
use crate::end::{End, failed, qemu_gone, violation};
use crate::events::Events;
use crate::network::Frames;
use crate::receiving::ReceivingHost;
use crate::reservation::Reservation;
use crate::source::Source;
use crate::storage::broke;
use crate::tail::{self, Attendance, Tail};
use crate::waiting::{self, Waiting};
use finding::{Finding, chain, kind};
use host::vm::PostCopy;
use protocol::deadlines::LOAD;
use protocol::wire::{self, NETWORK_STREAM, Reply, Request as Asked};
use session::options::MAX_STREAMS;

/// A copy while it is being mirrored.
pub(super) struct Copy {
    pub(super) streams: usize,
    /// Dropped before the reservation: who writes images has ended when their locks are let go of.
    pub(super) memory: Upkeep,
    pub(super) reservation: Reservation,
    pub(super) events: Events,
    /// Which streams have come.
    pub(super) attached: Vec<bool>,
    /// The barrier that streams are arriving at.
    pub(super) barrier: Option<Barrier>,
    /// The sums, of memory and of disks, at the last barrier that all streams have reached, until the copy is found changed.
    pub(super) last: Option<(Vec<Sum>, Vec<Sum>)>,
    /// Where QEMU has guest RAM: addresses, and which part of it each is.
    pub(super) places: (Vec<Range<u64>>, Places),
    /// Which seccomp filters of QEMU are known.
    pub(super) known_filters: KnownFilters,
    /// The source has said that it may ask for post-copy, and has not asked yet.
    pub(super) may_lack: bool,
    /// Where post-copy was asked for: QEMU, that waits for what is missing.
    pub(super) waiting: Option<Waiting>,
    /// Streams for what is missing, come before they are needed.
    pub(super) supply: Vec<DataReceiver>,
}

pub(super) struct Barrier {
    pub(super) number: u32,
    pub(super) sums: Vec<Option<(Sum, Sum)>>,
}

impl Copy {
    /// Applies what comes until the source says that everything has come and the gate holds.
    pub(super) async fn run(&mut self, source: &mut Source, arrivals: &mut Arrivals) -> Result<(), End> {
        let mut qemu = self.reservation.qmp.events();
        loop {
            tokio::select! {
                // In this order: what the audit found is told before a barrier, and both before the gate is tried.
                biased;
                Some(event) = self.events.next() => self.event(event?, source).await?,
                Some((stream, receiver)) = arrivals.queue.recv() => match stream {
                    NETWORK_STREAM if source.frames.is_expected() => source.frames = Frames::receive(receiver)?,
                    _ => self.attach(stream, receiver)?,
                },
                word = source.next_request() => {
                    match word? {
                        Asked::HoldDevices(_) => self.reservation.device.hold(),
                        Asked::DeviceState(part) => {
                            let fed = timeout(LOAD, self.reservation.device.feed(&part)).await;
                            fed.map_err(|_| not_loaded("QEMU at the destination takes no device state"))?
                                .map_err(|e| not_loaded(&chain(&e)))?;
                        }
                        // Once: QEMU is given something for it each time.
                        Asked::PostCopy(_) if std::mem::take(&mut self.may_lack) => {
                            self.wait_for_missing(source).await?;
                        }
                        Asked::Audit(_) => self.audit(source).await?,
                        Asked::Load(sums) => return self.gate(&sums),
                        Asked::Cancel(_) => return Err(End::Cancelled),
                        other => return Err(violation(&format!("sent {other} out of order"))),
                    }
                }
                event = qemu.recv() => {
                    if let Err(RecvError::Closed) = event {
                        return Err(qemu_gone());
                    }
                }
            }
        }
    }

    fn attach(&mut self, stream: u16, receiver: DataReceiver) -> Result<(), End> {
        if self.waiting.is_some() && usize::from(stream) >= self.streams {
            if self.supply.len() > usize::from(MAX_STREAMS) {
                return Err(violation("opened a data stream too many"));
            }
            self.supply.push(receiver);
            return Ok(());
        }
        let Upkeep { memory: Some(memory), storage, aborts } = &mut self.memory else { return Ok(()) };
        let free = self.attached.get_mut(usize::from(stream)).filter(|attached| !**attached);
        *free.ok_or_else(|| violation("opened a data stream too many"))? = true;
        aborts.push(receiver.abort_handle().map_err(|e| failed("data-stream", &e))?);
        memory.attach(stream, receiver, storage.as_ref()).map_err(|e| failed("data-stream", &e))
    }

    /// Has QEMU wait for pages that are not there: from here on the source may leave some out.
    async fn wait_for_missing(&mut self, source: &mut Source) -> Result<(), End> {
        let Reservation { record, qmp, .. } = &mut self.reservation;
        // Its name is on record before it is there, and while the guest still runs.
        let missing = tail::missing_file(&source.host, &record.name);
        let amended = source.host.journal.amend(record, |now| now.made.files.push(missing));
        amended.map_err(|e| failed("journal", &e))?;
        let pid = record.process.as_ref().map_or(0, |process| process.pid);
        let (addresses, places) = &self.places;
        let waiting = waiting::attach(qmp, pid, self.known_filters, addresses, places.clone()).await;
        self.waiting = Some(waiting.map_err(|finding| End::Failed(vec![finding]))?);
        if let Some(memory) = &self.memory.memory {
            memory.allow_absent();
        }
        source.reply(Reply::PostCopyReady(wire::Nothing {})).await
    }

    async fn event(&mut self, event: Event, source: &mut Source) -> Result<(), End> {
        match event {
            Event::Barrier { stream, number, sum, disks } => {
                self.arrive(stream, number, (sum, disks), source).await
            }
            Event::WrongBlock(Wrong { block, checked }) => {
                self.last = None;
                if !checked {
                    tracing::warn!(vm = %self.reservation.record.name, block = block.0, "a block of the copy is not what it should be");
                }
                let blocks = vec![block.0];
                source.reply(Reply::WrongBlocks(wire::WrongBlocks { blocks, checked })).await
            }
            Event::Mismatch(page) => {
                self.last = None;
                tracing::warn!(vm = %self.reservation.record.name, page = page.0, "a page of the copy is not what it should be");
                source.reply(Reply::Mismatch(wire::Pages { pages: vec![page.0] })).await
            }
            Event::Ended { .. } => Err(violation("ended a data stream too early")),
            Event::Failed { error: DestinationError::Storage(error), .. } => {
                Err(broke(&self.reservation.images, &error))
            }
            Event::Failed { error, .. } => Err(failed("data-stream", &error)),
        }
    }

    /// Notes that a stream has reached a barrier, and tells the source when all have.
    async fn arrive(
        &mut self,
        stream: u16,
        number: u32,
        sum: (Sum, Sum),
        source: &mut Source,
    ) -> Result<(), End> {
        let empty = || Barrier { number, sums: vec![None; self.streams] };
        let barrier = self.barrier.get_or_insert_with(empty);
        if barrier.number != number {
            return Err(violation("let its streams go past each other's barriers"));
        }
        barrier.sums[usize::from(stream)] = Some(sum);
        let Some(sums) = barrier.sums.iter().copied().collect::<Option<Vec<_>>>() else { return Ok(()) };
        self.barrier = None;
        let Upkeep { memory, storage, .. } = &self.memory;
        let audited = memory.as_ref().map_or(0, MemoryDestination::audited);
        let audited_blocks = storage.as_ref().map_or(0, StorageDestination::audited);
        let (memory, disks): (Vec<Sum>, Vec<Sum>) = sums.into_iter().unzip();
        let reply = wire::Sums::new(number, &memory, audited).with_disks(&disks, audited_blocks);
        self.last = Some((memory, disks));
        source.reply(Reply::Barrier(reply)).await
    }

    async fn audit(&mut self, source: &mut Source) -> Result<(), End> {
        let Some(memory) = &self.memory.memory else { return Ok(()) };
        let audit = tokio::task::block_in_place(|| memory.audit()).map_err(|e| failed("ram", &e))?;
        let mut wrong = Vec::new();
        let blocks = match &self.memory.storage {
            Some(storage) => tokio::task::block_in_place(|| storage.audit(|found| wrong.push(found)))
                .map_err(|e| broke(&self.reservation.images, &e))?,
            None => 0,
        };
        let differing_blocks = wrong.len() as u64;
        for found in wrong {
            self.event(Event::WrongBlock(found), source).await?;
        }
        // Which pages they are is told before how many.
        while let Some(event) = self.events.waiting() {
            self.event(event?, source).await?;
        }
        let differing = audit.differing.len() as u64;
        source
            .reply(Reply::Audited(wire::Audited { pages: audit.pages, differing, blocks, differing_blocks }))
            .await
    }

    /// Whether what was applied is what was sent.
    fn gate(&self, sums: &wire::Sums) -> Result<(), End> {
        let there = sums.decode(self.streams).zip(sums.decode_disks(self.streams));
        if self.last.is_some() && there == self.last {
            return Ok(());
        }
        Err(End::Failed(vec![Finding::new(
            kind::GATE,
            "the copy is not equal to the original",
            "migrate again; if it recurs, test the memory of both hosts",
        )]))
    }

    /// RAM is complete, or will be asked for: nothing but QEMU touches what there is of it any more.
    pub(super) fn memory_is_complete(
        &mut self,
        host: &ReceivingHost,
    ) -> Result<Option<(Arc<Tail>, Attendance, PostCopy)>, End> {
        let finished = self.memory.end();
        let (Some(waiting), Some(copy)) = (self.waiting.take(), finished) else { return Ok(None) };
        let supply = std::mem::take(&mut self.supply);
        let Reservation { record, qmp, .. } = &self.reservation;
        Tail::begin(host, record, qmp.clone(), copy, waiting, supply).map(Some)
    }

    /// QEMU loads its devices, while the disks are put on stable storage and given up to it.
    pub(super) async fn load_all(&mut self, host: &ReceivingHost) -> Result<(), End> {
        let vm = self.reservation.record.name.clone();
        let storage = self.memory.storage.take();
        let mut images = std::mem::take(&mut self.reservation.images);
        let finish = async {
            if let Some(storage) = storage {
                let ended = tokio::task::spawn_blocking(move || {
                    let synced = storage.sync();
                    storage.finish();
                    synced
                });
                ended.await.map_err(|e| failed("disk", &e))?.map_err(|e| broke(&images, &e))?;
            }
            images.release(&host.fence, &vm).await.map_err(|e| failed("disk", &e))
        };
        let ((), ()) = tokio::try_join!(self.load(), finish)?;
        Ok(())
    }

    /// QEMU loads its devices.
    pub(super) async fn load(&mut self) -> Result<(), End> {
        let Reservation { record, device, .. } = &self.reservation;
        tracing::info!(vm = %record.name, bytes = device.bytes(), "what there is of memory is equal; QEMU loads its devices");
        let mut events = self.reservation.qmp.events();
        let Reservation { qmp, device, .. } = &mut self.reservation;
        let loaded = async {
            device.release().await.map_err(|e| not_loaded(&chain(&e)))?;
            loop {
                let status = match events.recv().await {
                    Ok(event) if event.name == "MIGRATION" => {
                        event.data.get("status").and_then(|status| status.as_str()).map(str::to_owned)
                    }
                    Ok(_) => None,
                    // Events were missed: ask.
                    Err(RecvError::Lagged(_)) => {
                        qmp.query_migrate().await.map_err(|e| failed("qemu", &e))?.status
                    }
                    Err(RecvError::Closed) => {
                        return Err(not_loaded("QEMU at the destination ended while loading"));
                    }
                };
                match status.as_deref() {
                    Some("completed") => return Ok(()),
                    Some("failed") => {
                        return Err(not_loaded("QEMU at the destination did not take the device state"));
                    }
                    _ => {}
                }
            }
        };
        let late = || not_loaded("QEMU at the destination did not load the device state in time");
        timeout(LOAD, loaded).await.map_err(|_| late())?
    }
}

pub(super) fn not_loaded(message: &str) -> End {
    End::Qemu(Finding::new("device-state", message, "its version may not know the source's devices"))
}

/// What keeps the copy up to date. Ends when dropped.
pub(super) struct Upkeep {
    pub(super) memory: Option<MemoryDestination>,
    pub(super) storage: Option<StorageDestination>,
    pub(super) aborts: Vec<AbortHandle>,
}

impl Upkeep {
    /// Ends the streams, and with them the workers. Nothing touches the RAM files any more when this returns.
    fn end(&mut self) -> Option<Finished> {
        for abort in &self.aborts {
            abort.abort();
        }
        let memory = self.memory.take()?;
        Some(tokio::task::block_in_place(|| memory.finish()))
    }
}

impl Drop for Upkeep {
    fn drop(&mut self) {
        self.end();
    }
}
