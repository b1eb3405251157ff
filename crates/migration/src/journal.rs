//! The journal: which machines are this host's, kept so that a crash at any moment leaves the truth behind.
//!
//! One file for each machine, with two slots. A record is written whole into the slot that is not current and made
//! durable with one `fdatasync`; a slot that was being written when the power went fails its checksum, and the other
//! one holds. The files never grow, so nothing but their data has to reach the disk: the two writes that lie within the
//! downtime cost what one sector costs.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use uuid::Uuid;

use crate::vm::{Departed, Ownership, Record, VmName};

/// Bytes of a slot: enough for a command line of a hundred devices.
const SLOT: u64 = 256 * 1024;
/// magic 8 · sequence 8 · length 8 · checksum 16
const HEADER: usize = 40;
/// How long a hand-over to this host is remembered after its machine has gone.
const REMEMBERED: Duration = Duration::from_secs(90 * 24 * 3600);
const MAGIC: [u8; 8] = *b"vmirror1";

/// The records of all machines of one agent.
#[derive(Debug)]
pub struct Journal {
    directory: PathBuf,
    /// One empty file for each hand-over to this host whose machine is not here any more.
    departed: PathBuf,
    entries: Mutex<HashMap<VmName, Entry>>,
    /// One for each name that somebody has decided about since the start.
    deciding: Mutex<HashMap<VmName, Arc<tokio::sync::Mutex<()>>>>,
    promising: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
struct Entry {
    record: Record,
    file: File,
    sequence: u64,
}

/// Why the journal could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JournalError {
    /// Another machine has the name.
    #[error("a VM named {0} is already here")]
    NameTaken(VmName),
    /// No machine has the name.
    #[error("no VM named {0} is here")]
    Unknown(VmName),
    /// A record that does not fit a slot.
    #[error("the record of VM {name} has {length} bytes, more than the {SLOT} that a journal holds")]
    TooLarge {
        /// The machine.
        name: VmName,
        /// Bytes of its record.
        length: usize,
    },
    /// Neither slot holds a record.
    #[error("{} holds no readable record", .0.display())]
    Corrupt(PathBuf),
    /// The system refused.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl Journal {
    /// Opens the journal below a state directory, and reads all records.
    ///
    /// # Errors
    /// [`JournalError`]; a record that cannot be read is an error and not passed over, because it may say that a
    /// machine was given away.
    pub fn open(state_dir: &Path) -> Result<Journal, JournalError> {
        let directory = state_dir.join("vms");
        let failed = |action, path: &Path| {
            let path = path.to_owned();
            move |source| JournalError::Io { action, path, source }
        };
        std::fs::create_dir_all(&directory).map_err(failed("create", &directory))?;
        let departed = state_dir.join("departed");
        std::fs::create_dir_all(&departed).map_err(failed("create", &departed))?;
        forget_old(&departed);
        let mut entries = HashMap::new();
        for found in std::fs::read_dir(&directory).map_err(failed("list", &directory))? {
            let path = found.map_err(failed("list", &directory))?.path();
            if path.extension().is_some_and(|extension| extension == "journal") {
                let entry = Entry::load(&path)?;
                entries.insert(entry.record.name.clone(), entry);
            } else if path.extension().is_some_and(|extension| extension == "new") {
                // A crash while a record was first written: the name was never claimed.
                std::fs::remove_file(&path).map_err(failed("remove", &path))?;
            }
        }
        Ok(Journal {
            directory,
            departed,
            entries: Mutex::new(entries),
            deciding: Mutex::default(),
            promising: tokio::sync::Mutex::default(),
        })
    }

    fn entries(&self) -> MutexGuard<'_, HashMap<VmName, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps everybody else from deciding about a machine, as long as the answer is held. Who becomes its owner, and who
    /// throws it away, hold it while they look at the record and act on what it says; so of two that would do both, the
    /// second sees what the first has done.
    pub(crate) async fn decide(&self, name: &VmName) -> tokio::sync::OwnedMutexGuard<()> {
        let lock = {
            let mut deciding = self.deciding.lock().unwrap_or_else(PoisonError::into_inner);
            // Names come from peers: those that nobody decides about just now are not kept.
            deciding.retain(|_, lock| Arc::strong_count(lock) > 1);
            Arc::clone(deciding.entry(name.clone()).or_default())
        };
        lock.lock_owned().await
    }

    /// Keeps everybody else from promising this host's room, as long as the answer is held: from the look at what is
    /// free to the claim that takes it.
    pub(crate) async fn promise(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.promising.lock().await
    }

    fn path(&self, name: &VmName) -> PathBuf {
        self.directory.join(format!("{name}.journal"))
    }

    /// Takes a name for a new machine.
    ///
    /// # Errors
    /// [`JournalError::NameTaken`], or what the system said.
    pub fn claim(&self, record: Record) -> Result<(), JournalError> {
        let mut entries = self.entries();
        if entries.contains_key(&record.name) {
            return Err(JournalError::NameTaken(record.name));
        }
        let name = record.name.clone();
        let path = self.path(&name);
        let entry = Entry::create(&path, record)?;
        let durable = File::open(&self.directory).and_then(|directory| directory.sync_all());
        if let Err(source) = durable {
            // Not claimed, so no later start may find it.
            let _ = std::fs::remove_file(&path);
            return Err(JournalError::Io { action: "make durable", path, source });
        }
        entries.insert(name, entry);
        Ok(())
    }

    /// Replaces a machine's record. It is durable when this returns.
    ///
    /// # Errors
    /// [`JournalError`]; which of the two records a later start will find is then not known.
    pub fn update(&self, record: &Record) -> Result<(), JournalError> {
        let mut entries = self.entries();
        let entry =
            entries.get_mut(&record.name).ok_or_else(|| JournalError::Unknown(record.name.clone()))?;
        entry.write(record, &self.path(&record.name))
    }

    /// Forgets a machine. Nothing happens when there is none of the name.
    ///
    /// What is not forgotten, for ninety days, is the hand-over by which it had become this host's: its source may
    /// not have heard of it yet, and must never be told that the machine is nowhere and may run there.
    ///
    /// # Errors
    /// What the system said. The record then still stands.
    pub fn remove(&self, name: &VmName) -> Result<(), JournalError> {
        let mut entries = self.entries();
        let Some(entry) = entries.get(name) else { return Ok(()) };
        // One that was never seen to run is not remembered either: when a person throws it away, its source may run it.
        let was_ours =
            !matches!(entry.record.ownership, Ownership::Incoming { .. }) && !entry.record.resuming;
        if let Some(session) = entry.record.arrived_by.filter(|_| was_ours) {
            let path = self.departed.join(session.to_string());
            let Record { post_copy, supplied, .. } = &entry.record;
            let departed = Departed { lacked: post_copy.is_some(), supplied: *supplied };
            write_durably(&path, &serde_json::to_vec(&departed).unwrap_or_default())
                .and_then(|()| File::open(&self.departed)?.sync_all())
                .map_err(|source| JournalError::Io { action: "create", path, source })?;
        }
        if entries.remove(name).is_some() {
            let path = self.path(name);
            std::fs::remove_file(&path)
                .and_then(|()| File::open(&self.directory)?.sync_all())
                .map_err(|source| JournalError::Io { action: "remove", path, source })?;
        }
        Ok(())
    }

    /// Whether a machine became this host's by this hand-over, and has left or ended since.
    #[must_use]
    pub fn has_departed(&self, session: Uuid) -> bool {
        self.departed.join(session.to_string()).exists()
    }

    /// What is remembered of a machine that became this host's by this hand-over, and has left or ended since. A mark
    /// without content, as of a crash or of an earlier version, says no more than that it has.
    #[must_use]
    pub fn departed(&self, session: Uuid) -> Option<Departed> {
        let mark = File::open(self.departed.join(session.to_string())).ok()?;
        let mut content = Vec::new();
        let read = mark.take(LONGEST_MARK).read_to_end(&mut content);
        Some(read.ok().and_then(|_| serde_json::from_slice(&content).ok()).unwrap_or_default())
    }

    /// A machine's record.
    #[must_use]
    pub fn get(&self, name: &VmName) -> Option<Record> {
        self.entries().get(name).map(|entry| entry.record.clone())
    }

    /// All records, by name.
    #[must_use]
    pub fn all(&self) -> Vec<Record> {
        let mut records: Vec<Record> = self.entries().values().map(|entry| entry.record.clone()).collect();
        records.sort_by(|a, b| a.name.cmp(&b.name));
        records
    }
}

/// Bytes that a mark of a hand-over is read to.
const LONGEST_MARK: u64 = 4096;

fn write_durably(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(content)?;
    file.sync_all()
}

/// Removes the marks of hand-overs that nobody asks about any more. One that stays does no harm.
fn forget_old(departed: &Path) {
    let Ok(marks) = std::fs::read_dir(departed) else { return };
    for mark in marks.flatten() {
        let age = mark.metadata().and_then(|mark| mark.modified()).map(|at| at.elapsed().unwrap_or_default());
        if age.is_ok_and(|age| age > REMEMBERED) {
            let _ = std::fs::remove_file(mark.path());
        }
    }
}

impl Entry {
    fn create(path: &Path, record: Record) -> Result<Entry, JournalError> {
        let new = path.with_extension("new");
        let failed = |action| {
            let path = path.to_owned();
            move |source| JournalError::Io { action, path, source }
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)
            .map_err(failed("create"))?;
        // Written, not merely sized: later writes then change no block map.
        file.write_all_at(&vec![0; 2 * SLOT as usize], 0).map_err(failed("write"))?;
        let mut entry = Entry { record: record.clone(), file, sequence: 0 };
        entry.write(&record, path)?;
        entry.file.sync_all().map_err(failed("make durable"))?;
        std::fs::rename(&new, path).map_err(failed("create"))?;
        Ok(entry)
    }

    fn write(&mut self, record: &Record, path: &Path) -> Result<(), JournalError> {
        let json = serde_json::to_vec(record).map_err(|e| JournalError::Io {
            action: "encode",
            path: path.to_owned(),
            source: e.into(),
        })?;
        if json.len() + HEADER > SLOT as usize {
            return Err(JournalError::TooLarge { name: record.name.clone(), length: json.len() });
        }
        let sequence = self.sequence + 1;
        let mut slot = Vec::with_capacity(HEADER + json.len());
        slot.extend_from_slice(&MAGIC);
        slot.extend_from_slice(&sequence.to_le_bytes());
        slot.extend_from_slice(&(json.len() as u64).to_le_bytes());
        slot.extend_from_slice(&checksum(sequence, &json).to_le_bytes());
        slot.extend_from_slice(&json);
        self.file
            .write_all_at(&slot, sequence % 2 * SLOT)
            .and_then(|()| self.file.sync_data())
            .map_err(|source| JournalError::Io { action: "write", path: path.to_owned(), source })?;
        self.sequence = sequence;
        self.record = record.clone();
        Ok(())
    }

    fn load(path: &Path) -> Result<Entry, JournalError> {
        let failed = |source| JournalError::Io { action: "read", path: path.to_owned(), source };
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(failed)?;
        let slots = [0, 1].map(|slot| read_slot(&file, slot));
        let newest = slots.into_iter().flatten().max_by_key(|(sequence, _)| *sequence);
        let (sequence, record) = newest.ok_or_else(|| JournalError::Corrupt(path.to_owned()))?;
        Ok(Entry { record, file, sequence })
    }
}

/// A slot's sequence number and record, if it holds a whole one.
fn read_slot(file: &File, slot: u64) -> Option<(u64, Record)> {
    let mut header = [0; HEADER];
    file.read_exact_at(&mut header, slot * SLOT).ok()?;
    let field = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| header[at + i]));
    let (sequence, length) = (field(8), field(16));
    if header[..8] != MAGIC || length > SLOT - HEADER as u64 {
        return None;
    }
    let mut json = vec![0; usize::try_from(length).ok()?];
    file.read_exact_at(&mut json, slot * SLOT + HEADER as u64).ok()?;
    let sum = u128::from_le_bytes(std::array::from_fn(|i| header[24 + i]));
    if sum != checksum(sequence, &json) {
        return None;
    }
    Some((sequence, serde_json::from_slice(&json).ok()?))
}

fn checksum(sequence: u64, json: &[u8]) -> u128 {
    // The sequence number is the seed, so a slot's header cannot be taken for that of another writing.
    twox_hash::XxHash3_128::oneshot_with_seed(sequence, json)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::{Made, Origin, Ownership};

    fn record(name: &str, generation: u64) -> Record {
        Record {
            name: name.parse().unwrap(),
            generation,
            ownership: Ownership::Owner,
            origin: Origin::Run,
            arrived_by: None,
            arrived_from: None,
            outgoing: None,
            post_copy: None,
            supplied: None,
            supplies: false,
            pauses: false,
            resuming: false,
            process: None,
            argv: vec!["qemu".into(), "x".repeat(generation as usize * 10)],
            qmp_socket: "/run/x".into(),
            memory: 5,
            handed_in: Vec::new(),
            made: Made::default(),
        }
    }

    #[test]
    fn what_was_written_is_there_after_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let journal = Journal::open(directory.path()).unwrap();
        journal.claim(record("a", 1)).unwrap();
        journal.claim(record("b", 1)).unwrap();
        for generation in 2..9 {
            journal.update(&record("a", generation)).unwrap();
        }
        journal.remove(&"b".parse().unwrap()).unwrap();
        drop(journal);
        let journal = Journal::open(directory.path()).unwrap();
        assert_eq!(journal.all(), [record("a", 8)]);
        assert!(matches!(journal.claim(record("a", 1)), Err(JournalError::NameTaken(_))));
        assert!(matches!(journal.update(&record("b", 1)), Err(JournalError::Unknown(_))));
    }

    #[test]
    fn a_hand_over_is_not_forgotten_with_its_machine() {
        let directory = tempfile::tempdir().unwrap();
        let (owned, copied) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let journal = Journal::open(directory.path()).unwrap();
        journal.claim(Record { arrived_by: Some(owned), ..record("a", 1) }).unwrap();
        let ownership = Ownership::Incoming { session: copied, from: "host".into(), ready: true };
        journal.claim(Record { arrived_by: Some(copied), ownership, ..record("b", 1) }).unwrap();
        assert!(!journal.has_departed(owned), "it is still here");
        journal.remove(&"a".parse().unwrap()).unwrap();
        journal.remove(&"b".parse().unwrap()).unwrap();
        let journal = Journal::open(directory.path()).unwrap();
        assert!(journal.has_departed(owned));
        assert!(!journal.has_departed(copied), "it never was this host's");
    }

    #[test]
    fn a_machine_that_ended_while_it_lacked_memory_is_not_remembered_as_one_that_had_all() {
        let directory = tempfile::tempdir().unwrap();
        let journal = Journal::open(directory.path()).unwrap();
        let post_copy = crate::vm::PostCopy { descriptor: 7, missing: "/run/a.missing".into(), given: None };
        let supplied = crate::vm::Supplied { faults: 3, longest_us: 5, total_us: 9, taken_over: false };
        let [lacking, whole, neither] = [1, 2, 3].map(Uuid::from_u128);
        let arrived = |name, session| Record { arrived_by: Some(session), ..record(name, 1) };
        journal.claim(Record { post_copy: Some(post_copy), ..arrived("a", lacking) }).unwrap();
        journal.claim(Record { supplied: Some(supplied), ..arrived("b", whole) }).unwrap();
        journal.claim(arrived("c", neither)).unwrap();
        for name in ["a", "b", "c"] {
            assert_eq!(journal.departed(lacking).is_some(), name != "a");
            journal.remove(&name.parse().unwrap()).unwrap();
        }
        let journal = Journal::open(directory.path()).unwrap();
        assert_eq!(journal.departed(lacking), Some(Departed { lacked: true, supplied: None }));
        assert_eq!(journal.departed(whole), Some(Departed { lacked: false, supplied: Some(supplied) }));
        assert_eq!(journal.departed(neither), Some(Departed::default()));
        // A mark as earlier versions made it.
        std::fs::write(directory.path().join("departed").join(whole.to_string()), "").unwrap();
        assert_eq!(journal.departed(whole), Some(Departed::default()));
    }

    #[test]
    fn a_torn_write_leaves_the_record_before_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vms/a.journal");
        for torn_at in [0, 8, 20, 30, HEADER as u64, HEADER as u64 + 50] {
            let journal = Journal::open(directory.path()).unwrap();
            let name: VmName = "a".parse().unwrap();
            journal.remove(&name).unwrap();
            journal.claim(record("a", 1)).unwrap();
            journal.update(&record("a", 2)).unwrap();
            journal.update(&record("a", 3)).unwrap();
            drop(journal);
            // The third writing, sequence 3, is in slot 1.
            let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
            let mut byte = [0];
            file.read_exact_at(&mut byte, SLOT + torn_at).unwrap();
            file.write_all_at(&[!byte[0]], SLOT + torn_at).unwrap();
            assert_eq!(Journal::open(directory.path()).unwrap().all(), [record("a", 2)], "torn at {torn_at}");
        }
    }

    #[test]
    fn a_journal_without_any_whole_record_is_not_passed_over() {
        let directory = tempfile::tempdir().unwrap();
        drop(Journal::open(directory.path()).unwrap());
        std::fs::write(directory.path().join("vms/a.journal"), vec![7; 2 * SLOT as usize]).unwrap();
        assert!(matches!(Journal::open(directory.path()), Err(JournalError::Corrupt(_))));
    }
}
