//! A journal: what an application has promised to keep.
//!
//! Each record goes to the disk by itself, through the page cache, and is synced; only then is its sequence number
//! [acknowledged](Acknowledged) to whoever listens on the network. So a client knows what must be on the disk, whatever
//! became of the guest. After a boot the journal goes on where the disk says that it ended.
//!
//! The region is a ring of slots of [`SLOT`] bytes, the record with sequence number N (from 1) in slot N - 1:
//!
//! | bytes | content |
//! | --- | --- |
//! | 0..8 | [`MAGIC`] |
//! | 8..16 | sequence number |
//! | 16..40 | the disk's serial number, zeros behind it |
//! | 40..504 | body |
//! | 504..512 | XXH64 of the first 504 bytes |

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use super::block::{checksum, put_serial, serial_in};
use super::device::{Aligned, Device};
use super::error::DiskError;
use super::tally::{Fault, Place, Tally, Verdict};
use crate::page::{self, Content, Identity, get, put};

/// Bytes of a record: no disk writes half a sector.
pub const SLOT: usize = 512;
/// The first eight bytes of every record.
pub const MAGIC: u64 = u64::from_le_bytes(*b"VMIRRORj");

const SEQUENCE: usize = 8;
const SERIAL: usize = 16;
const BODY: usize = 40;
const CHECKSUM: usize = SLOT - 8;
/// Bytes read at once.
const BATCH: usize = 128 << 10;

/// The record of that sequence number.
#[must_use]
pub fn record(serial: &str, sequence: u64) -> [u8; SLOT] {
    let mut record = [0; SLOT];
    put(&mut record, 0, MAGIC);
    put(&mut record, SEQUENCE, sequence);
    put_serial(&mut record[SERIAL..BODY], serial);
    let identity = Identity { number: sequence, generation: sequence, boot: 0 };
    page::fill_body(&mut record[BODY..CHECKSUM], identity, Content::Noise);
    let checksum = checksum(&record[..CHECKSUM]);
    put(&mut record, CHECKSUM, checksum);
    record
}

/// The sequence number in a slot, 0 where nothing was ever written.
fn sequence_in(slot: &[u8], serial: &str) -> Result<u64, Fault> {
    if slot.iter().all(|byte| *byte == 0) {
        return Ok(0);
    }
    if get(slot, 0) != MAGIC || get(slot, CHECKSUM) != checksum(&slot[..CHECKSUM]) {
        return Err(Fault::Torn);
    }
    let (sequence, whose) = (get(slot, SEQUENCE), serial_in(&slot[SERIAL..BODY]));
    if whose == serial { Ok(sequence) } else { Err(Fault::Misplaced { serial: whose, number: sequence }) }
}

/// A journal as it was found on a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replay {
    slots: Vec<Result<u64, Fault>>,
}

impl Replay {
    /// Reads the journal of the disk with that serial number, in a region in bytes. A file open for direct I/O will do.
    ///
    /// # Errors
    /// Where it cannot be read.
    pub fn read(disk: &File, region: Range<u64>, serial: &str) -> io::Result<Self> {
        let mut batch = Box::new(Aligned([0; BATCH]));
        let mut slots = Vec::new();
        for offset in region.clone().step_by(BATCH) {
            let length = (region.end - offset).min(BATCH as u64) as usize;
            disk.read_exact_at(&mut batch.0[..length], offset)?;
            slots.extend(batch.0[..length].chunks_exact(SLOT).map(|slot| sequence_in(slot, serial)));
        }
        Ok(Self { slots })
    }

    /// The highest sequence number there is; 0 where there is none.
    pub fn last(&self) -> u64 {
        self.slots.iter().filter_map(|slot| slot.as_ref().ok()).max().copied().unwrap_or(0)
    }

    /// How many records a journal that ended with `last` must still hold. The slot of the next one may be under way.
    pub fn held(&self, last: u64) -> u64 {
        last.min((self.slots.len() as u64).saturating_sub(1))
    }

    /// What is wrong with the records that a journal that ended with `last` must still hold, by sequence number.
    pub fn faults(&self, last: u64) -> Vec<(u64, Fault)> {
        let held = last + 1 - self.held(last)..=last;
        let fault = |sequence| match &self.slots[self.slot_of(sequence)] {
            Ok(found) if *found == sequence => None,
            Ok(found) if *found > sequence => Some(Fault::Ahead { found: *found }),
            Ok(found) => Some(Fault::Lost { found: *found }),
            Err(fault) => Some(fault.clone()),
        };
        held.filter_map(|sequence| Some((sequence, fault(sequence)?))).collect()
    }

    fn slot_of(&self, sequence: u64) -> usize {
        slot_of(sequence, self.slots.len() as u64) as usize
    }
}

fn slot_of(sequence: u64, slots: u64) -> u64 {
    (sequence - 1) % slots
}

/// A journal being written.
#[derive(Debug)]
pub struct Journal {
    device: Arc<Device>,
    region: Range<u64>,
    rate: u64,
    /// The last sequence number that is on the disk.
    last: Mutex<u64>,
}

impl Journal {
    /// Goes on with the journal in that region, and tells what is wrong with it.
    ///
    /// # Errors
    /// Where the disk cannot be read.
    pub fn open(
        device: Arc<Device>,
        region: Range<u64>,
        rate: u64,
        tally: &Tally,
        acknowledged: &Acknowledged,
    ) -> Result<Self, DiskError> {
        let replay = Replay::read(&device.direct, region.clone(), &device.serial)
            .map_err(DiskError::system(&device.serial, "reading its journal"))?;
        let last = replay.last();
        for (sequence, fault) in replay.faults(last) {
            tally.found(&device.serial, Place::Record(sequence), &fault, sequence);
        }
        acknowledged.publish(&device.serial, last);
        Ok(Self { device, region, rate, last: Mutex::new(last) })
    }

    /// Records per second; 0 is as fast as it goes.
    pub fn rate(&self) -> u64 {
        self.rate
    }

    /// Appends a record, and acknowledges it once it is on the disk. One that the disk refuses is tried again the next time.
    pub fn append(&self, tally: &Tally, acknowledged: &Acknowledged) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let sequence = *last + 1;
        let slots = (self.region.end - self.region.start) / SLOT as u64;
        let offset = self.region.start + slot_of(sequence, slots) * SLOT as u64;
        let record = record(&self.device.serial, sequence);
        let file = &self.device.buffered;
        match file.write_all_at(&record, offset).and_then(|()| file.sync_data()) {
            Ok(()) => {
                *last = sequence;
                acknowledged.publish(&self.device.serial, sequence);
            }
            Err(error) => {
                let fault = Fault::Error(error.to_string());
                tally.found(&self.device.serial, Place::Record(sequence), &fault, sequence);
            }
        }
    }

    /// Looks for every record that was acknowledged and not overwritten since. Appending waits meanwhile.
    pub fn check(&self, tally: &Tally, verdict: &mut Verdict) {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let serial = &self.device.serial;
        let replay = match Replay::read(&self.device.direct, self.region.clone(), serial) {
            Ok(replay) => replay,
            Err(error) => {
                let fault = Fault::Error(error.to_string());
                return tally.found_in(verdict, serial, Place::Record(*last), &fault, *last);
            }
        };
        verdict.records += replay.held(*last);
        for (sequence, fault) in replay.faults(*last) {
            tally.found_in(verdict, serial, Place::Record(sequence), &fault, sequence);
        }
        // One more there may be, written but refused when it was synced.
        if replay.last() > *last + 1 {
            let fault = Fault::Ahead { found: replay.last() };
            tally.found_in(verdict, serial, Place::Record(replay.last()), &fault, *last);
        }
    }
}

/// The last sequence number acknowledged by each journal, by the disk's serial number.
#[derive(Debug, Default)]
pub struct Acknowledged {
    last: Mutex<BTreeMap<String, u64>>,
    changed: Condvar,
}

impl Acknowledged {
    /// All of them now.
    pub fn all(&self) -> BTreeMap<String, u64> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// All of them, once they are others than these, or after a while.
    pub fn after(&self, known: &BTreeMap<String, u64>, within: Duration) -> BTreeMap<String, u64> {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.changed.wait_timeout_while(last, within, |last| last == known);
        waited.unwrap_or_else(PoisonError::into_inner).0.clone()
    }

    /// That record of that disk is there to stay.
    pub fn publish(&self, serial: &str, sequence: u64) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.insert(serial.to_owned(), sequence);
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Eight slots after a megabyte of something else.
    const REGION: Range<u64> = 1 << 20..(1 << 20) + 8 * SLOT as u64;

    fn open(file: &File, tally: &Tally) -> (Journal, Acknowledged) {
        let device = Arc::new(Device::of_file("d", file, 2 << 20));
        let acknowledged = Acknowledged::default();
        let journal = Journal::open(device, REGION, 0, tally, &acknowledged).unwrap();
        (journal, acknowledged)
    }

    fn write_slot(file: &File, slot: u64, bytes: &[u8]) {
        file.write_all_at(bytes, REGION.start + slot * SLOT as u64).unwrap();
    }

    fn replay(file: &File) -> Replay {
        Replay::read(file, REGION, "d").unwrap()
    }

    #[test]
    fn a_journal_goes_on_where_the_disk_says_that_it_ended() {
        let (file, tally) = (tempfile::tempfile().unwrap(), Tally::new(|_| {}));
        let mut expected = 0;
        for _ in 0..5 {
            let (journal, acknowledged) = open(&file, &tally);
            assert_eq!(acknowledged.all()["d"], expected);
            for _ in 0..5 {
                journal.append(&tally, &acknowledged);
            }
            expected += 5;
            assert_eq!(acknowledged.all()["d"], expected);
            let mut verdict = Verdict::default();
            journal.check(&tally, &mut verdict);
            assert_eq!((verdict.records, verdict.faults.total()), (expected.min(7), 0));
        }
        assert_eq!(tally.status().faults.total(), 0);
    }

    #[test]
    fn an_acknowledged_record_that_is_gone_is_found() {
        let (file, tally) = (tempfile::tempfile().unwrap(), Tally::new(|_| {}));
        let (journal, acknowledged) = open(&file, &tally);
        for _ in 0..12 {
            journal.append(&tally, &acknowledged);
        }
        assert_eq!((replay(&file).last(), replay(&file).faults(12)), (12, vec![]));
        // Records 9 to 12 are in the slots 0 to 3, 5 to 8 in the others.
        write_slot(&file, 3, &record("d", 4));
        write_slot(&file, 1, &[7; SLOT]);
        write_slot(&file, 5, &record("other", 6));
        let misplaced = Fault::Misplaced { serial: "other".into(), number: 6 };
        let expected = [(6, misplaced), (10, Fault::Torn), (12, Fault::Lost { found: 4 })];
        assert_eq!(replay(&file).faults(12), expected);
        let mut verdict = Verdict::default();
        journal.check(&tally, &mut verdict);
        assert_eq!((verdict.faults.lost, verdict.faults.torn, verdict.faults.misplaced), (1, 1, 1));
        // Without the client's knowledge only what is between the others is missed.
        assert_eq!(replay(&file).last(), 11);
    }

    #[test]
    fn a_record_under_way_at_a_crash_is_no_fault() {
        let (file, tally) = (tempfile::tempfile().unwrap(), Tally::new(|_| {}));
        let (journal, acknowledged) = open(&file, &tally);
        for _ in 0..10 {
            journal.append(&tally, &acknowledged);
        }
        write_slot(&file, 2, &[7; SLOT]);
        assert_eq!((replay(&file).last(), replay(&file).faults(10)), (10, vec![]));
        write_slot(&file, 2, &record("d", 11));
        let mut verdict = Verdict::default();
        journal.check(&tally, &mut verdict);
        assert_eq!(verdict.faults.total(), 0);
    }

    #[test]
    fn a_disk_newer_than_the_guest_is_found() {
        let (file, tally) = (tempfile::tempfile().unwrap(), Tally::new(|_| {}));
        let (journal, acknowledged) = open(&file, &tally);
        journal.append(&tally, &acknowledged);
        for sequence in 2..=5 {
            write_slot(&file, sequence - 1, &record("d", sequence));
        }
        let mut verdict = Verdict::default();
        journal.check(&tally, &mut verdict);
        assert_eq!((verdict.faults.ahead, verdict.faults.total()), (1, 1));
    }

    #[test]
    fn whoever_waits_hears_of_the_next_number_or_of_nothing() {
        let acknowledged = Acknowledged::default();
        acknowledged.publish("d", 1);
        let known = acknowledged.all();
        assert_eq!(acknowledged.after(&known, Duration::from_millis(10)), known);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| acknowledged.after(&known, Duration::from_secs(60)));
            acknowledged.publish("d", 2);
            assert_eq!(waiting.join().unwrap()["d"], 2);
        });
    }
}
