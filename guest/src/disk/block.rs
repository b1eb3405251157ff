//! A block of a disk that describes itself, as a [page] of memory does: which it is, of which disk, which write
//! it holds, and a checksum over all of it.
//!
//! | bytes | content |
//! | --- | --- |
//! | 0..8 | [`MAGIC`] |
//! | 8..16 | block number |
//! | 16..24 | generation: how many times the block was written since the guest booted, from 1 |
//! | 24..32 | a random number drawn at boot |
//! | 32..56 | the disk's serial number, zeros behind it |
//! | 56..4088 | body |
//! | 4088..4096 | XXH64 of the first 4088 bytes |
//!
//! Numbers are little-endian.

use std::ops::RangeInclusive;

use twox_hash::XxHash64;

use super::tally::Fault;
use crate::page::{self, Content, Identity, get, put};

/// Bytes of a block.
pub const SIZE: usize = 4096;
/// The first eight bytes of every block.
pub const MAGIC: u64 = u64::from_le_bytes(*b"VMIRRORb");

const NUMBER: usize = 8;
const GENERATION: usize = 16;
const BOOT: usize = 24;
const SERIAL: usize = 32;
const BODY: usize = 56;
const CHECKSUM: usize = SIZE - 8;

/// Writes the block `identity` of that disk.
///
/// # Panics
/// When `block` is not [`SIZE`] bytes long.
pub fn write(block: &mut [u8], serial: &str, identity: Identity, content: Content) {
    assert_eq!(block.len(), SIZE, "a block has {SIZE} bytes");
    put(block, 0, MAGIC);
    put(block, NUMBER, identity.number);
    put(block, GENERATION, identity.generation);
    put(block, BOOT, identity.boot);
    put_serial(&mut block[SERIAL..BODY], serial);
    page::fill_body(&mut block[BODY..CHECKSUM], identity, content);
    let checksum = checksum(&block[..CHECKSUM]);
    put(block, CHECKSUM, checksum);
}

/// Checks that the block is that of this disk and number, in one of the allowed generations.
///
/// What nobody has written in this boot, zeros or a block of another boot, is of generation 0.
///
/// # Errors
/// What is wrong with it.
///
/// # Panics
/// When `block` is not [`SIZE`] bytes long.
pub fn check(
    block: &[u8],
    serial: &str,
    number: u64,
    boot: u64,
    allowed: RangeInclusive<u64>,
) -> Result<(), Fault> {
    let found = match identify(block) {
        Some((identity, whose)) if identity.number != number || whose != serial => {
            return Err(Fault::Misplaced { serial: whose, number: identity.number });
        }
        Some((identity, _)) if identity.boot == boot => identity.generation,
        Some(_) => 0,
        None if block.iter().all(|byte| *byte == 0) => 0,
        None => return Err(Fault::Torn),
    };
    if found < *allowed.start() {
        Err(Fault::Lost { found })
    } else if found > *allowed.end() {
        Err(Fault::Ahead { found })
    } else {
        Ok(())
    }
}

/// Who the block is and of which disk, if it is a whole block of this format.
///
/// # Panics
/// When `block` is not [`SIZE`] bytes long.
pub fn identify(block: &[u8]) -> Option<(Identity, String)> {
    assert_eq!(block.len(), SIZE, "a block has {SIZE} bytes");
    if get(block, 0) != MAGIC || get(block, CHECKSUM) != checksum(&block[..CHECKSUM]) {
        return None;
    }
    let identity =
        Identity { number: get(block, NUMBER), generation: get(block, GENERATION), boot: get(block, BOOT) };
    Some((identity, serial_in(&block[SERIAL..BODY])))
}

/// Puts a serial number into a field that is longer than any.
pub(super) fn put_serial(field: &mut [u8], serial: &str) {
    field.fill(0);
    for (to, from) in field.iter_mut().zip(serial.bytes()) {
        *to = from;
    }
}

/// The serial number in such a field.
pub(super) fn serial_in(field: &[u8]) -> String {
    let length = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
    String::from_utf8_lossy(&field[..length]).into_owned()
}

pub(super) fn checksum(bytes: &[u8]) -> u64 {
    XxHash64::oneshot(MAGIC, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const IDENTITY: Identity = Identity { number: 7, generation: 3, boot: 99 };

    fn written(identity: Identity) -> Vec<u8> {
        let mut block = vec![0xee; SIZE];
        write(&mut block, "disk-1", identity, Content::Text);
        block
    }

    #[test]
    fn a_written_block_is_what_it_says() {
        let block = written(IDENTITY);
        assert_eq!(identify(&block), Some((IDENTITY, "disk-1".into())));
        assert_eq!(check(&block, "disk-1", 7, 99, 3..=3), Ok(()));
        assert_eq!(check(&block, "disk-1", 7, 99, 1..=9), Ok(()));
    }

    #[test]
    fn faults_are_told_apart() {
        let block = written(IDENTITY);
        let check = |block: &[u8], allowed| check(block, "disk-1", 7, 99, allowed);
        assert_eq!(check(&block, 4..=5), Err(Fault::Lost { found: 3 }));
        assert_eq!(check(&block, 1..=2), Err(Fault::Ahead { found: 3 }));
        assert_eq!(check(&[0; SIZE], 1..=2), Err(Fault::Lost { found: 0 }));
        assert_eq!(check(&written(Identity { boot: 1, ..IDENTITY }), 3..=3), Err(Fault::Lost { found: 0 }));
        let other = written(Identity { number: 8, ..IDENTITY });
        assert_eq!(check(&other, 3..=3), Err(Fault::Misplaced { serial: "disk-1".into(), number: 8 }));
        let mut mixed = written(Identity { generation: 4, ..IDENTITY });
        mixed[512..].copy_from_slice(&block[512..]);
        assert_eq!(check(&mixed, 3..=4), Err(Fault::Torn));
    }

    #[test]
    fn a_block_of_another_disk_is_misplaced() {
        let fault = check(&written(IDENTITY), "disk-2", 7, 99, 3..=3).unwrap_err();
        assert_eq!(fault, Fault::Misplaced { serial: "disk-1".into(), number: 7 });
    }

    proptest! {
        #[test]
        fn any_changed_byte_is_noticed(at in 0..SIZE, by in 1u8.., number: u64, boot: u64) {
            let mut block = written(Identity { number, generation: 1, boot });
            block[at] ^= by;
            prop_assert_eq!(check(&block, "disk-1", number, boot, 1..=1), Err(Fault::Torn));
        }
    }
}
