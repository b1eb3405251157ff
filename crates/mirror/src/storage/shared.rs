//! What the threads of the source of disks share: the queue, the ledgers, the images, and the settling of what is not certain.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crossbeam_channel::Sender;

use super::image::Image;
use super::layout::{BlockIndex, DiskLayout};
use super::ledgers::new_ledgers;
use super::queue::Queue;
use crate::hash::Secret;
use crate::ledger::Ledgers;

/// Blocks that are read at a time to be settled: 2 MiB.
pub(super) const BATCH: usize = 32;
/// Least that must have been sent before more is read, in bytes.
const READ_AHEAD: usize = 4 << 20;
/// How long to wait for that at a time.
const DRAIN: Duration = Duration::from_millis(50);

#[derive(Debug, Default)]
struct Counted {
    raw: AtomicU64,
    wire: AtomicU64,
}

/// What the source's threads share.
pub(super) struct Shared {
    pub(super) layout: DiskLayout,
    pub(super) secret: Secret,
    pub(super) ledgers: Ledgers<BlockIndex>,
    /// Tells that something was taken from the queue.
    pub(super) taken: Condvar,
    queue: Mutex<Queue>,
    wakes: Vec<Sender<()>>,
    pub(super) images: Vec<Box<dyn Image>>,
    counted: Vec<Counted>,
    /// Why the source's own image cannot be read.
    unreadable: Mutex<Option<(usize, io::Error)>>,
    over: AtomicBool,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("layout", &self.layout).finish_non_exhaustive()
    }
}

impl Shared {
    /// `zero` says of which disks the destination's copy is known to be all zero; `wakes` has one for each stream.
    pub(super) fn new(
        layout: DiskLayout,
        secret: Secret,
        zero: &[bool],
        images: Vec<Box<dyn Image>>,
        wakes: Vec<Sender<()>>,
    ) -> Shared {
        Shared {
            ledgers: new_ledgers(&layout, &secret, zero),
            queue: Mutex::new(Queue::new(layout.clone(), zero)),
            counted: images.iter().map(|_| Counted::default()).collect(),
            layout,
            secret,
            taken: Condvar::new(),
            wakes,
            images,
            unreadable: Mutex::default(),
            over: AtomicBool::new(false),
        }
    }

    pub(super) fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn count(&self, disk: usize, raw: u64, wire: u64) {
        self.counted[disk].raw.fetch_add(raw, Ordering::Relaxed);
        self.counted[disk].wire.fetch_add(wire, Ordering::Relaxed);
    }

    /// What was counted of a disk: bytes of it, and bytes on the wire.
    pub(super) fn counted(&self, disk: usize) -> (u64, u64) {
        let Counted { raw, wire } = &self.counted[disk];
        (raw.load(Ordering::Relaxed), wire.load(Ordering::Relaxed))
    }

    /// Nothing is settled any more.
    pub(super) fn end(&self) {
        self.over.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    /// The disk that could not be read since this was asked last, and why.
    pub(super) fn take_unreadable(&self) -> Option<(usize, io::Error)> {
        self.unreadable.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Wakes whoever sends.
    pub(super) fn wake(&self, queue: &Queue) {
        for (stream, wake) in (0..).zip(&self.wakes) {
            if queue.waits(stream) {
                // One that is awake already looks again.
                let _ = wake.try_send(());
            }
        }
    }

    /// Lets go of what waits for streams that have stopped.
    pub(super) fn watch(&self) {
        let gone = self.queue().let_go_of_stalled();
        if !gone.items.is_empty() {
            tracing::warn!(
                pieces = gone.items.len(),
                waited = gone.answered.len(),
                "the link stands still: the guest's writes do not wait for it"
            );
        }
    }

    /// Reads what is not certain and has it sent, until so much is done, or nothing is left of what was uncertain at the beginning.
    /// Returns how many blocks were read.
    pub(super) fn settle(&self, most: u64) -> u64 {
        let mut left = self.queue().uncertain().min(most);
        let mut settled = 0;
        while left > 0 && !self.is_over() {
            let mut queue = self.queue();
            while queue.waiting() > READ_AHEAD && !self.is_over() {
                let waited = self.taken.wait_timeout(queue, DRAIN);
                drop(waited.unwrap_or_else(PoisonError::into_inner).0);
                // Who waits here for a stream may be the one who sees whether it has stopped.
                self.watch();
                queue = self.queue();
            }
            // Where nothing is sent any more, all that is read would be owed again.
            let taken = if queue.is_closed() { Vec::new() } else { queue.take_uncertain(BATCH) };
            drop(queue);
            if taken.is_empty() {
                break;
            }
            left = left.saturating_sub(taken.len() as u64);
            settled += taken.len() as u64;
            let read: Vec<_> = taken.into_iter().map(|block| (block, self.read(block))).collect();
            let mut queue = self.queue();
            for (block, data) in read {
                match data {
                    Ok(data) => queue.settle(block, data),
                    Err(unreadable) => {
                        queue.not_settled(block);
                        *self.unreadable.lock().unwrap_or_else(PoisonError::into_inner) = Some(unreadable);
                        left = 0;
                    }
                }
            }
            self.wake(&queue);
        }
        settled
    }

    fn read(&self, block: BlockIndex) -> Result<Vec<u8>, (usize, io::Error)> {
        let place = self.layout.locate(block).expect("only blocks that were written can be uncertain");
        let mut data = vec![0; place.length];
        self.images[place.disk].read(place.offset, &mut data).map_err(|e| (place.disk, e))?;
        Ok(data)
    }
}
