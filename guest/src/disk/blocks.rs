//! Writes blocks that say what they are, remembers what the disk has acknowledged, and reads back what it holds.
//!
//! Each block has a lock, held while it is written and while it is read back: what a reader finds was no write that was just
//! under way, so a fault came from outside the guest. Reads go around the page cache, which the kernel first writes out for the
//! blocks read: what they find is the disk's.

use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::block::{self, SIZE};
use super::device::{Aligned, Device};
use super::plan::Io;
use super::tally::{Fault, Place, Tally, Verdict};
use crate::page::{Identity, Sequence};
use crate::workload::{Order, Pattern};

/// Buffered blocks are synced when there are that many, or the first of them is that old.
const UNSYNCED_AT_MOST: usize = 64;
const SYNC_INTERVAL: Duration = Duration::from_millis(500);
/// Blocks read at once in a full check.
const BATCH: usize = 32;

/// How much is done, per second and at once; rates of 0 are as fast as it goes.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Blocks written per second.
    pub rate: u64,
    /// Writers.
    pub depth: u32,
    /// Blocks read back per second.
    pub check_rate: u64,
}

/// A region of such blocks.
#[derive(Debug)]
pub struct Blocks {
    device: Arc<Device>,
    /// The number of the first block: numbers count from the beginning of the disk.
    first: u64,
    boot: u64,
    pattern: Pattern,
    io: Io,
    pace: Pace,
    order: Mutex<Order>,
    random: Mutex<Sequence>,
    records: Vec<Mutex<Record>>,
    unsynced: Mutex<Unsynced>,
}

/// What is known of a block.
#[derive(Clone, Copy, Debug, Default)]
struct Record {
    /// The generation last given to the kernel.
    issued: u64,
    /// The generation that the disk has at least.
    acknowledged: u64,
}

/// Blocks in the page cache, by index, with the generation written there.
#[derive(Debug)]
struct Unsynced {
    blocks: Vec<(usize, u64)>,
    since: Instant,
}

impl Blocks {
    /// That region of a disk, in bytes, of which nothing is known.
    pub fn new(
        device: Arc<Device>,
        region: Range<u64>,
        boot: u64,
        pattern: Pattern,
        io: Io,
        pace: Pace,
    ) -> Self {
        let blocks = (region.end - region.start) / SIZE as u64;
        Self {
            device,
            first: region.start / SIZE as u64,
            boot,
            pattern,
            io,
            pace,
            order: Mutex::new(Order::new(pattern, blocks, boot)),
            random: Mutex::new(Sequence::new(!boot)),
            records: (0..blocks).map(|_| Mutex::default()).collect(),
            unsynced: Mutex::new(Unsynced { blocks: Vec::new(), since: Instant::now() }),
        }
    }

    /// How much is to be done.
    pub fn pace(&self) -> Pace {
        self.pace
    }

    /// Writes the next block.
    pub fn write_next(&self, tally: &Tally) {
        let index = lock(&self.order).next_page() as usize;
        let mut record = lock(&self.records[index]);
        // The record first: from here on the disk may hold it, whatever becomes of the write.
        record.issued += 1;
        let identity = Identity { number: self.number(index), generation: record.issued, boot: self.boot };
        let mut block = Aligned([0; SIZE]);
        block::write(&mut block.0, &self.device.serial, identity, self.pattern.content());
        let file = match self.io {
            Io::Direct => &self.device.direct,
            Io::Buffered => &self.device.buffered,
        };
        if let Err(error) = file.write_all_at(&block.0, self.offset(index)) {
            self.refused(tally, index, &error, record.issued);
            return;
        }
        match self.io {
            Io::Direct => {
                record.acknowledged = record.issued;
                tally.written(1);
            }
            Io::Buffered => {
                let written = (index, record.issued);
                drop(record);
                self.written_to_cache(written, tally);
            }
        }
    }

    fn written_to_cache(&self, written: (usize, u64), tally: &Tally) {
        let mut unsynced = lock(&self.unsynced);
        if unsynced.blocks.is_empty() {
            unsynced.since = Instant::now();
        }
        unsynced.blocks.push(written);
        let due = unsynced.blocks.len() >= UNSYNCED_AT_MOST || unsynced.since.elapsed() >= SYNC_INTERVAL;
        drop(unsynced);
        if due {
            self.settle(tally);
        }
    }

    /// Brings to the disk what is in the page cache; what was written until now is then acknowledged.
    pub fn settle(&self, tally: &Tally) {
        let blocks = std::mem::take(&mut lock(&self.unsynced).blocks);
        if let Some((index, generation)) = blocks.first() {
            if let Err(error) = self.device.buffered.sync_data() {
                return self.refused(tally, *index, &error, *generation);
            }
            for (index, generation) in &blocks {
                let mut record = lock(&self.records[*index]);
                record.acknowledged = record.acknowledged.max(*generation);
            }
            tally.written(blocks.len() as u64);
        }
    }

    /// Reads back a block at random, unless nothing is known of it.
    pub fn check_one(&self, tally: &Tally) {
        let index = lock(&self.random).below(self.records.len() as u64) as usize;
        let record = lock(&self.records[index]);
        if record.acknowledged == 0 {
            return;
        }
        let mut block = Aligned([0; SIZE]);
        if let Err(error) = self.device.direct.read_exact_at(&mut block.0, self.offset(index)) {
            return self.refused(tally, index, &error, record.acknowledged);
        }
        tally.checked();
        if let Err(fault) = self.judge(&block.0, index, *record) {
            tally.found(&self.device.serial, self.place(index), &fault, record.acknowledged);
        }
    }

    /// Reads back all blocks.
    pub fn check_all(&self, tally: &Tally, verdict: &mut Verdict) {
        self.settle(tally);
        let mut batch = Box::new(Aligned([0; BATCH * SIZE]));
        for first in (0..self.records.len()).step_by(BATCH) {
            let indices = first..(first + BATCH).min(self.records.len());
            // Nobody else ever holds more than one, so nobody waits for each other.
            let records: Vec<_> = self.records[indices.clone()].iter().map(lock).collect();
            let bytes = &mut batch.0[..records.len() * SIZE];
            let mut found = |index, fault: &Fault, expected| {
                tally.found_in(verdict, &self.device.serial, self.place(index), fault, expected);
            };
            if let Err(error) = self.device.direct.read_exact_at(bytes, self.offset(first)) {
                found(first, &Fault::Error(error.to_string()), records[0].acknowledged);
                continue;
            }
            let mut checked = 0;
            for ((index, record), block) in indices.zip(&records).zip(bytes.chunks_exact(SIZE)) {
                if record.acknowledged > 0 {
                    checked += 1;
                    if let Err(fault) = self.judge(block, index, **record) {
                        found(index, &fault, record.acknowledged);
                    }
                }
            }
            verdict.blocks += checked;
        }
    }

    fn judge(&self, block: &[u8], index: usize, record: Record) -> Result<(), Fault> {
        let allowed = record.acknowledged..=record.issued;
        block::check(block, &self.device.serial, self.number(index), self.boot, allowed)
    }

    fn refused(&self, tally: &Tally, index: usize, error: &std::io::Error, expected: u64) {
        tally.found(&self.device.serial, self.place(index), &Fault::Error(error.to_string()), expected);
    }

    fn number(&self, index: usize) -> u64 {
        self.first + index as u64
    }

    fn offset(&self, index: usize) -> u64 {
        self.number(index) * SIZE as u64
    }

    fn place(&self, index: usize) -> Place {
        Place::Block(self.number(index))
    }
}

/// A poisoned lock means that a thread panicked, and a panic ends the guest.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    const REGION: Range<u64> = 1 << 20..2 << 20;

    fn blocks(file: &File, io: Io) -> Blocks {
        let device = Device::of_file("d", file, 2 << 20);
        let pace = Pace { rate: 0, depth: 1, check_rate: 0 };
        Blocks::new(Arc::new(device), REGION, 5, Pattern::Sequential, io, pace)
    }

    fn verdict(blocks: &Blocks) -> Verdict {
        let mut verdict = Verdict::default();
        blocks.check_all(&Tally::new(|_| {}), &mut verdict);
        verdict
    }

    #[test]
    fn what_was_written_is_found_whole_and_the_rest_of_the_disk_untouched() {
        for io in [Io::Direct, Io::Buffered] {
            let (file, tally) = (tempfile::tempfile().unwrap(), Tally::new(|_| {}));
            let blocks = blocks(&file, io);
            assert_eq!(verdict(&blocks), Verdict::default(), "nothing was written yet");
            for _ in 0..300 {
                blocks.write_next(&tally);
            }
            blocks.settle(&tally);
            for _ in 0..100 {
                blocks.check_one(&tally);
            }
            let status = tally.status();
            assert_eq!((status.writes, status.checked, status.faults.total()), (300, 100, 0), "{io:?}");
            let verdict = verdict(&blocks);
            assert_eq!((verdict.blocks, verdict.faults.total()), (256, 0));
            let mut before = vec![1; 1 << 20];
            file.read_exact_at(&mut before, 0).unwrap();
            assert!(before.iter().all(|byte| *byte == 0));
        }
    }

    #[test]
    fn buffered_blocks_may_be_newer_than_what_was_synced_but_not_older() {
        let (file, tally) = (tempfile::tempfile().unwrap(), Tally::new(|_| {}));
        let blocks = blocks(&file, Io::Buffered);
        for _ in 0..256 {
            blocks.write_next(&tally);
        }
        blocks.settle(&tally);
        let mut old = vec![0; SIZE];
        file.read_exact_at(&mut old, REGION.start).unwrap();
        blocks.write_next(&tally);
        let record = *lock(&blocks.records[0]);
        assert_eq!((record.acknowledged, record.issued), (1, 2));
        assert_eq!(blocks.judge(&old, 0, record), Ok(()));
        blocks.settle(&tally);
        file.write_all_at(&old, REGION.start).unwrap();
        let verdict = verdict(&blocks);
        assert_eq!((verdict.faults.lost, verdict.faults.total()), (1, 1));
    }

    #[test]
    fn damage_from_outside_is_told_apart() {
        let (file, tally) = (tempfile::tempfile().unwrap(), Tally::new(|_| {}));
        let blocks = blocks(&file, Io::Direct);
        let at = |index: u64| REGION.start + index * SIZE as u64;
        for _ in 0..256 {
            blocks.write_next(&tally);
        }
        let mut old = vec![0; SIZE];
        file.read_exact_at(&mut old, at(0)).unwrap();
        blocks.write_next(&tally);
        file.write_all_at(&old, at(0)).unwrap();
        file.write_all_at(&old, at(1)).unwrap();
        file.write_all_at(&[0xff], at(2) + 77).unwrap();
        file.write_all_at(&[0; SIZE], at(255)).unwrap();
        let faults = verdict(&blocks).faults;
        assert_eq!((faults.lost, faults.misplaced, faults.torn, faults.total()), (2, 1, 1, 4));
    }

    #[test]
    fn a_disk_that_ends_early_is_an_error_and_no_loss() {
        let (file, tally) = (tempfile::tempfile().unwrap(), Tally::new(|_| {}));
        let blocks = blocks(&file, Io::Direct);
        blocks.write_next(&tally);
        file.set_len(REGION.start).unwrap();
        let faults = verdict(&blocks).faults;
        assert_eq!((faults.errors, faults.lost), (8, 0), "one for each batch");
    }
}
