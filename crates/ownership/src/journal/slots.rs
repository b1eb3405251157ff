//! A record's file: two slots, of which one holds whatever happens while the other is written.
//!
//! Only a checksum that is wrong means that a slot was being written when the power went, and that the other one holds. A slot that
//! cannot be read, or is whole and not understood, may say that the machine was given away: then nothing is known of it.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use super::error::JournalError;
use super::on_record::OnRecord;

/// Bytes of a slot: enough for a command line of a hundred devices.
pub(super) const SLOT: u64 = 256 * 1024;
/// magic 8 · sequence 8 · length 8 · checksum 16
pub(super) const HEADER: usize = 40;
/// What all versions of the format begin with; the version's digit follows.
const FAMILY: [u8; 7] = *b"vmirror";
const VERSION: u8 = b'1';

/// The file, and which of its slots is current.
#[derive(Debug)]
pub(super) struct Slots {
    file: File,
    sequence: u64,
}

/// What a slot holds.
enum Slot<R> {
    /// Nothing was ever written to it, or it was being written when the power went.
    Nothing,
    Record(u64, Box<R>),
    /// It is whole, and of a later version.
    NotUnderstood(u64, serde_json::Error),
}

impl Slots {
    /// Makes the file of a machine. It has its name only when its record is durable.
    pub(super) fn create(path: &Path, record: &impl OnRecord) -> Result<Slots, JournalError> {
        let new = path.with_extension("new");
        let failed = |action| {
            let path = path.to_owned();
            move |source| JournalError::Io { action, path, source }
        };
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(true).mode(0o600);
        let file = options.open(&new).map_err(failed("create"))?;
        // Written, not merely sized: later writes then change no block map.
        file.write_all_at(&vec![0; 2 * SLOT as usize], 0).map_err(failed("write"))?;
        let mut slots = Slots { file, sequence: 0 };
        slots.write(record, path)?;
        slots.file.sync_all().map_err(failed("make durable"))?;
        std::fs::rename(&new, path).map_err(failed("create"))?;
        Ok(slots)
    }

    /// Writes a record into the slot that is not current, and makes it so. After an error the same slot is written next time: it may
    /// hold the new record all the same.
    pub(super) fn write(&mut self, record: &impl OnRecord, path: &Path) -> Result<(), JournalError> {
        let failed = |action, source| JournalError::Io { action, path: path.to_owned(), source };
        let json = serde_json::to_vec(record).map_err(|e| failed("encode", e.into()))?;
        if json.len() + HEADER > SLOT as usize {
            return Err(JournalError::TooLarge { name: record.name().clone(), length: json.len() });
        }
        // No journal has written so much: a header that says so was made up.
        let next = self.sequence.checked_add(1);
        let sequence = next.ok_or_else(|| JournalError::Corrupt(path.to_owned()))?;
        let mut slot = Vec::with_capacity(HEADER + json.len());
        slot.extend_from_slice(&FAMILY);
        slot.push(VERSION);
        slot.extend_from_slice(&sequence.to_le_bytes());
        slot.extend_from_slice(&(json.len() as u64).to_le_bytes());
        slot.extend_from_slice(&checksum(sequence, &json).to_le_bytes());
        slot.extend_from_slice(&json);
        let written = self.file.write_all_at(&slot, sequence % 2 * SLOT).and_then(|()| self.file.sync_data());
        written.map_err(|e| failed("write", e))?;
        self.sequence = sequence;
        Ok(())
    }

    /// Opens the file of a machine, and reads the newer of its records.
    pub(super) fn load<R: OnRecord>(path: &Path) -> Result<(Slots, R), JournalError> {
        let failed = |source| JournalError::Io { action: "read", path: path.to_owned(), source };
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(failed)?;
        let (sequence, record) = newest(&file, path)?;
        Ok((Slots { file, sequence }, record))
    }
}

/// The newer of a file's two records, with its number.
pub(super) fn newest<R: OnRecord>(file: &impl FileExt, path: &Path) -> Result<(u64, R), JournalError> {
    let mut newest = Slot::Nothing;
    for number in [0, 1] {
        let slot = read(file, number, path)?;
        if slot.sequence() > newest.sequence() {
            newest = slot;
        }
    }
    match newest {
        Slot::Record(sequence, record) => Ok((sequence, *record)),
        Slot::NotUnderstood(_, source) => {
            Err(JournalError::NotUnderstood { path: path.to_owned(), source: Some(source) })
        }
        Slot::Nothing => Err(JournalError::Corrupt(path.to_owned())),
    }
}

impl<R> Slot<R> {
    fn sequence(&self) -> u64 {
        match self {
            Slot::Nothing => 0,
            Slot::Record(sequence, _) | Slot::NotUnderstood(sequence, _) => *sequence,
        }
    }
}

fn read<R: OnRecord>(file: &impl FileExt, number: u64, path: &Path) -> Result<Slot<R>, JournalError> {
    let failed = |source| JournalError::Io { action: "read", path: path.to_owned(), source };
    let mut slot = vec![0; SLOT as usize];
    let length = read_as_far_as_it_goes(file, &mut slot, number * SLOT).map_err(failed)?;
    slot.truncate(length);
    if slot.len() > FAMILY.len() && slot[..FAMILY.len()] == FAMILY && slot[FAMILY.len()] != VERSION {
        return Err(JournalError::NotUnderstood { path: path.to_owned(), source: None });
    }
    Ok(parse(&slot))
}

/// A file that was cut off has nothing in the slots that it lacks.
fn read_as_far_as_it_goes(file: &impl FileExt, buffer: &mut [u8], offset: u64) -> std::io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(filled)
}

fn parse<R: OnRecord>(slot: &[u8]) -> Slot<R> {
    let Some((header, rest)) = slot.split_at_checked(HEADER) else { return Slot::Nothing };
    if header[..FAMILY.len()] != FAMILY {
        return Slot::Nothing;
    }
    let field = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| header[at + i]));
    let (sequence, length) = (field(8), field(16));
    let Some(json) = usize::try_from(length).ok().and_then(|length| rest.get(..length)) else {
        return Slot::Nothing;
    };
    let sum = u128::from_le_bytes(std::array::from_fn(|i| header[24 + i]));
    if sum != checksum(sequence, json) {
        return Slot::Nothing;
    }
    match serde_json::from_slice(json) {
        Ok(record) => Slot::Record(sequence, Box::new(record)),
        Err(error) => Slot::NotUnderstood(sequence, error),
    }
}

fn checksum(sequence: u64, json: &[u8]) -> u128 {
    // The sequence number is the seed, so a slot's header cannot be taken for that of another writing.
    twox_hash::XxHash3_128::oneshot_with_seed(sequence, json)
}

#[cfg(any(test, fuzzing))]
pub(super) fn whole(sequence: u64, json: &[u8]) -> Vec<u8> {
    let length = json.len() as u64;
    [
        &FAMILY[..],
        &[VERSION],
        &sequence.to_le_bytes(),
        &length.to_le_bytes(),
        &checksum(sequence, json).to_le_bytes(),
        json,
    ]
    .concat()
}
