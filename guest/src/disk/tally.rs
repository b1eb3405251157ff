//! What was done to the disks, and what was found wrong with them.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

/// Findings that are printed; more would only flood the console.
const REPORTED_AT_MOST: usize = 64;

/// What is wrong with a block, a record or a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Older than what the disk has acknowledged: an acknowledged write is gone.
    Lost {
        /// The generation or sequence number found; 0 is what nobody wrote.
        found: u64,
    },
    /// The checksum does not fit the rest: parts of different writes, or bytes that nobody wrote.
    Torn,
    /// Whole, but it belongs elsewhere.
    Misplaced {
        /// The serial number of the disk it belongs to.
        serial: String,
        /// Its number there.
        number: u64,
    },
    /// Newer than anything that was written: the memory of the guest went back in time, its disk did not.
    Ahead {
        /// The generation or sequence number found.
        found: u64,
    },
    /// The disk refused: what the system said.
    Error(String),
}

/// How many of each fault.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Faults {
    /// See [`Fault::Lost`].
    pub lost: u64,
    /// See [`Fault::Torn`].
    pub torn: u64,
    /// See [`Fault::Misplaced`].
    pub misplaced: u64,
    /// See [`Fault::Ahead`].
    pub ahead: u64,
    /// See [`Fault::Error`].
    pub errors: u64,
}

impl Faults {
    /// All together: zero for sound disks.
    pub fn total(&self) -> u64 {
        self.lost + self.torn + self.misplaced + self.ahead + self.errors
    }

    fn add(&mut self, fault: &Fault) {
        *match fault {
            Fault::Lost { .. } => &mut self.lost,
            Fault::Torn => &mut self.torn,
            Fault::Misplaced { .. } => &mut self.misplaced,
            Fault::Ahead { .. } => &mut self.ahead,
            Fault::Error(_) => &mut self.errors,
        } += 1;
    }
}

/// The disks' part of the guest's status.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DiskStatus {
    /// Blocks written and acknowledged, and operations on files.
    pub writes: u64,
    /// Blocks read back in passing, and files.
    pub checked: u64,
    /// The last sequence number that each journal has acknowledged, by the disk's serial number.
    pub acknowledged: BTreeMap<String, u64>,
    /// What was found, each counted once per generation; errors each time.
    pub faults: Faults,
    /// Whether the work has ended and the disks are left as they are.
    pub quiet: bool,
}

/// The outcome of a full check.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// Blocks that were written before and read back.
    pub blocks: u64,
    /// Journal records that had been acknowledged and were looked for.
    pub records: u64,
    /// Files that should or should no longer be there and were looked for.
    pub files: u64,
    /// Everything found wrong, whether it was known before or not.
    pub faults: Faults,
    /// As [`DiskStatus::acknowledged`].
    pub acknowledged: BTreeMap<String, u64>,
}

/// Where something was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// A block of the disk, by number.
    Block(u64),
    /// A journal record, by sequence number.
    Record(u64),
    /// A file, by number.
    File(u64),
}

/// Something found wrong, as the console tells it.
struct Finding<'a> {
    disk: &'a str,
    place: Place,
    fault: &'a Fault,
    expected: u64,
}

impl fmt::Display for Finding<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { disk, place, fault, expected } = self;
        write!(f, "disk {disk}: {place:?}: {fault:?}, expected {expected}")
    }
}

/// Counts.
pub struct Tally {
    writes: AtomicU64,
    checked: AtomicU64,
    findings: Mutex<Findings>,
    tell: Box<dyn Fn(&str) + Send + Sync>,
}

#[derive(Debug, Default)]
struct Findings {
    faults: Faults,
    /// Faults already counted, with the generation that was expected then.
    known: HashMap<(String, Place), u64>,
    told: usize,
}

impl Tally {
    /// All zero; the first findings are told.
    pub fn new(tell: impl Fn(&str) + Send + Sync + 'static) -> Self {
        Self {
            writes: AtomicU64::new(0),
            checked: AtomicU64::new(0),
            findings: Mutex::default(),
            tell: Box::new(tell),
        }
    }

    /// The counts; what they do not cover is as by default.
    pub fn status(&self) -> DiskStatus {
        DiskStatus {
            writes: self.writes.load(Relaxed),
            checked: self.checked.load(Relaxed),
            faults: self.findings.lock().unwrap_or_else(PoisonError::into_inner).faults,
            ..DiskStatus::default()
        }
    }

    /// That many were written.
    pub fn written(&self, count: u64) {
        self.writes.fetch_add(count, Relaxed);
    }

    /// One was read back in passing.
    pub fn checked(&self) {
        self.checked.fetch_add(1, Relaxed);
    }

    /// Something is wrong.
    pub fn found(&self, disk: &str, place: Place, fault: &Fault, expected: u64) {
        let mut findings = self.findings.lock().unwrap_or_else(PoisonError::into_inner);
        let error = matches!(fault, Fault::Error(_));
        if !error && findings.known.insert((disk.to_owned(), place), expected) == Some(expected) {
            return;
        }
        findings.faults.add(fault);
        findings.told += 1;
        let tell = findings.told <= REPORTED_AT_MOST;
        drop(findings);
        if tell {
            (self.tell)(&Finding { disk, place, fault, expected }.to_string());
        }
    }

    /// Something is wrong, and was found in a full check.
    pub fn found_in(&self, verdict: &mut Verdict, disk: &str, place: Place, fault: &Fault, expected: u64) {
        verdict.faults.add(fault);
        self.found(disk, place, fault, expected);
    }
}

impl fmt::Debug for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tally").field("status", &self.status()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn a_finding_is_counted_once_per_generation_and_told() {
        let said: Arc<Mutex<Vec<String>>> = Arc::default();
        let tells = Arc::clone(&said);
        let tally = Tally::new(move |line| tells.lock().unwrap().push(line.to_owned()));
        for expected in [3, 3, 4] {
            tally.found("d", Place::Block(9), &Fault::Lost { found: 2 }, expected);
        }
        tally.found("e", Place::Block(9), &Fault::Torn, 3);
        let faults = tally.status().faults;
        assert_eq!((faults.lost, faults.torn, faults.total()), (2, 1, 3));
        assert_eq!(said.lock().unwrap()[0], "disk d: Block(9): Lost { found: 2 }, expected 3");
        assert_eq!(said.lock().unwrap().len(), 3);
    }

    #[test]
    fn a_full_check_counts_what_is_known_again() {
        let tally = Tally::new(|_| {});
        for _ in 0..2 {
            let mut verdict = Verdict::default();
            tally.found_in(&mut verdict, "d", Place::File(1), &Fault::Torn, 1);
            assert_eq!(verdict.faults.torn, 1);
        }
        assert_eq!(tally.status().faults.torn, 1);
    }
}
