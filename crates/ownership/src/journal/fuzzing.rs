//! The file of a record for the fuzz targets.

use super::slots::{SLOT, Slots, whole};
use super::{JournalError, OnRecord};
use crate::fuzzing::memory_file;

/// What is in a slot: bytes as they are, or with a header that fits them.
#[derive(Debug, Clone, Copy)]
pub enum Slot<'a> {
    /// Anything.
    Raw(&'a [u8]),
    /// Written whole, as the record of this number.
    Whole(u64, &'a [u8]),
}

/// Reads a record's file.
///
/// # Panics
/// If a record is believed beside a newer one, or is not the same once it was written again.
pub fn slots<R: OnRecord>(even: Slot<'_>, odd: Slot<'_>) {
    let bytes = |slot| match slot {
        Slot::Raw(bytes) => bytes.to_vec(),
        Slot::Whole(sequence, json) => whole(sequence, json),
    };
    let cut = |mut bytes: Vec<u8>| {
        bytes.truncate(SLOT as usize);
        bytes
    };
    let (first, second) = (cut(bytes(even)), cut(bytes(odd)));
    let (_file, path) = memory_file(&[(0, &first), (SLOT, &second)]);
    let loaded = Slots::load::<R>(&path);
    if let (Slot::Whole(one, json), Slot::Whole(two, other)) = (even, odd)
        && one != two
        && json.len().max(other.len()) < SLOT as usize - 100
    {
        let newest = if one > two { json } else { other };
        match (&loaded, serde_json::from_slice::<R>(newest)) {
            (Ok((_, found)), Ok(expected)) => assert_eq!(found, &expected, "not the newest"),
            (Err(JournalError::NotUnderstood { .. }), Err(_)) => {}
            (loaded, expected) => panic!("{loaded:?} of {expected:?}"),
        }
    }
    let Ok((mut slots, record)) = loaded else { return };
    if slots.write(&record, &path).is_err() {
        return;
    }
    let (_, again) = Slots::load::<R>(&path).expect("what was just written");
    assert_eq!(again, record);
}
