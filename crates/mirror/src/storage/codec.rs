//! What a data stream carries of disks: two more kinds of [frame](crate::memory::codec), between those of memory.
//!
//! | kind | meaning | `number` | table and payload |
//! | --- | --- | --- | --- |
//! | 4 | blocks | 0 | as below |
//! | 5 | sync | 0 | none |
//!
//! The table's entries are 24 bytes, little-endian: what u64 (class 8 bits, offset 16, block index 40, from the top) ·
//! value u128. The payload follows in the table's order, encoded as a whole.
//!
//! | class | meaning | offset | value | payload |
//! | --- | --- | --- | --- | --- |
//! | 0 | invalid | | | |
//! | 1 | zero run | 0 | how many blocks | none |
//! | 2 | whole block | 0 | the content hash | the block: 64 KiB, or what a disk's last block has |
//! | 3 | part of a block | where it begins | length u32 · 0 u32 · fingerprint u64 | so many bytes |
//! | 4 | check | 0 | the content hash | none |
//!
//! A guest writes parts of blocks, and the source does not have the rest: it tells the hash of the whole block later, in a
//! *check*, which the destination compares with what it reads back. A *sync* asks that everything before it is put on
//! stable storage soon.

use compression::Encoding;

use super::layout::{BLOCK_SIZE, BlockIndex, CHUNK_BLOCKS, DiskLayout};
use crate::hash::ContentHash;
use crate::memory::codec::{KIND_BLOCKS, KIND_SYNC, header};
use crate::row::Row;

/// Most bytes of a frame's payload: 1 MiB, as for memory.
pub const MAX_PAYLOAD: usize = 1 << 20;
/// Most entries of a frame.
pub const MAX_ENTRIES: usize = 4096;

const CLASS_ZERO: u8 = 1;
const CLASS_WHOLE: u8 = 2;
const CLASS_PART: u8 = 3;
const CLASS_CHECK: u8 = 4;

/// What a frame says about one block, or one run of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// So many blocks, beginning here, are zero.
    Zero {
        /// The first.
        block: BlockIndex,
        /// How many; never more than a chunk holds.
        count: u64,
    },
    /// The block's content is in the payload.
    Whole {
        /// The block.
        block: BlockIndex,
        /// The hash of its content.
        hash: ContentHash,
        /// Bytes of the payload: the block's length.
        length: usize,
    },
    /// A part of the block is in the payload.
    Part {
        /// The block.
        block: BlockIndex,
        /// Where in the block the part begins, in bytes.
        offset: usize,
        /// Its length in bytes.
        length: usize,
        /// A fingerprint of the part.
        fingerprint: u64,
    },
    /// The block's content should have this hash by now.
    Check {
        /// The block.
        block: BlockIndex,
        /// The hash of its content.
        hash: ContentHash,
    },
}

impl Entry {
    /// Bytes of the payload, before it is encoded as a whole.
    #[must_use]
    pub fn payload(&self) -> usize {
        match self {
            Entry::Whole { length, .. } | Entry::Part { length, .. } => *length,
            Entry::Zero { .. } | Entry::Check { .. } => 0,
        }
    }
}

/// A table that breaks the protocol.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum TableError {
    /// Not a kind of entry.
    #[error("entry of unknown class {0}")]
    Class(u8),
    /// Blocks that are none, or do not belong to this stream.
    #[error("{count} blocks from {block} are not this stream's")]
    Blocks {
        /// The first.
        block: u64,
        /// How many.
        count: u128,
    },
    /// A part that goes beyond its block, or is none.
    #[error("a part of {length} bytes at {offset} of block {block}")]
    Part {
        /// The block.
        block: u64,
        /// Where the part begins.
        offset: usize,
        /// Its length.
        length: u64,
    },
    /// More than a frame may hold.
    #[error("a table that describes more than {MAX_PAYLOAD} bytes of payload")]
    Payload,
}

/// Appends the header and table of a frame of disk blocks to `out`. The payload, of so many bytes, is to follow on the stream.
pub fn encode_blocks(out: &mut Vec<u8>, entries: &[Entry], encoding: Encoding, payload: usize) {
    let bounded = |n: usize| u32::try_from(n).expect("a frame is bounded");
    debug_assert!(payload <= MAX_PAYLOAD && entries.len() <= MAX_ENTRIES);
    header(out, KIND_BLOCKS, encoding, bounded(entries.len()), bounded(payload), 0);
    encode_table(out, entries);
}

/// Appends a sync frame to `out`.
pub fn encode_sync(out: &mut Vec<u8>) {
    header(out, KIND_SYNC, Encoding::None, 0, 0, 0);
}

/// Appends a table to `out`.
pub fn encode_table(out: &mut Vec<u8>, entries: &[Entry]) {
    for entry in entries {
        let (class, block, detail, value) = match *entry {
            Entry::Zero { block, count } => (CLASS_ZERO, block, 0, u128::from(count)),
            Entry::Whole { block, hash, .. } => (CLASS_WHOLE, block, 0, hash.bits()),
            Entry::Check { block, hash } => (CLASS_CHECK, block, 0, hash.bits()),
            Entry::Part { block, offset, length, fingerprint } => {
                let offset = u16::try_from(offset).expect("a part begins within its block, of 64 KiB");
                (CLASS_PART, block, offset, length as u128 | u128::from(fingerprint) << 64)
            }
        };
        Row { class, detail, index: block.0, value }.put(out);
    }
}

/// Understands a table, and checks that its blocks are this stream's. Returns the bytes of payload that it describes, at most
/// [`MAX_PAYLOAD`].
///
/// # Errors
/// [`TableError`] for the first entry that is wrong.
pub fn decode_table(
    bytes: &[u8],
    layout: &DiskLayout,
    stream: u16,
    entries: &mut Vec<Entry>,
) -> Result<usize, TableError> {
    entries.clear();
    let mut described = 0;
    for Row { class, detail, index, value } in Row::all(bytes) {
        let (block, hash) = (BlockIndex(index), ContentHash::from_bits(value));
        let foreign = TableError::Blocks { block: block.0, count: value };
        let place = layout.locate(block).filter(|_| layout.stream_of(block) == stream);
        let Some(place) = place else { return Err(foreign) };
        let entry = match class {
            CLASS_ZERO => match u64::try_from(value) {
                Ok(count) if count <= CHUNK_BLOCKS && layout.in_one_chunk(block, count) => {
                    Entry::Zero { block, count }
                }
                _ => return Err(foreign),
            },
            CLASS_WHOLE => Entry::Whole { block, hash, length: place.length },
            CLASS_CHECK => Entry::Check { block, hash },
            CLASS_PART => {
                let offset = usize::from(detail);
                let length = value as u64;
                let fits = length > 0 && length <= BLOCK_SIZE as u64;
                if !fits || offset + length as usize > place.length {
                    return Err(TableError::Part { block: block.0, offset, length });
                }
                Entry::Part { block, offset, length: length as usize, fingerprint: (value >> 64) as u64 }
            }
            class => return Err(TableError::Class(class)),
        };
        described += entry.payload();
        if described > MAX_PAYLOAD {
            return Err(TableError::Payload);
        }
        entries.push(entry);
    }
    Ok(described)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Two streams; stream 0 has chunks 0 and 2. The second disk's last block is short.
    fn layout() -> DiskLayout {
        DiskLayout::new([2 << 20, (4 << 20) + 100], 2).unwrap()
    }

    fn entry() -> impl Strategy<Value = Entry> {
        let block = (0u64..30).prop_map(BlockIndex);
        let hash = (1u128..).prop_map(ContentHash::from_bits);
        prop_oneof![
            (block.clone(), 1u64..3).prop_map(|(block, count)| Entry::Zero { block, count }),
            (block.clone(), hash.clone()).prop_map(|(block, hash)| Entry::Whole {
                block,
                hash,
                length: BLOCK_SIZE
            }),
            (block.clone(), hash).prop_map(|(block, hash)| Entry::Check { block, hash }),
            (block, 0usize..1000, 1usize..1000, any::<u64>()).prop_map(
                |(block, offset, length, fingerprint)| { Entry::Part { block, offset, length, fingerprint } }
            ),
        ]
    }

    proptest! {
        #[test]
        fn what_was_encoded_is_decoded(entries in prop::collection::vec(entry(), 0..15)) {
            let mut bytes = Vec::new();
            encode_table(&mut bytes, &entries);
            let mut decoded = Vec::new();
            let payload = decode_table(&bytes, &layout(), 0, &mut decoded).unwrap();
            prop_assert_eq!(payload, entries.iter().map(Entry::payload).sum::<usize>());
            prop_assert_eq!(decoded, entries);
        }

        #[test]
        fn no_bytes_of_a_peer_name_what_is_not_there(bytes in prop::collection::vec(any::<u8>(), 0..240)) {
            let (layout, mut entries) = (layout(), Vec::new());
            if let Ok(payload) = decode_table(&bytes, &layout, 0, &mut entries) {
                prop_assert!(payload <= MAX_PAYLOAD);
                for entry in entries {
                    let (block, count, end) = match entry {
                        Entry::Zero { block, count } => (block, count, 0),
                        Entry::Whole { block, length, .. } => (block, 1, length),
                        Entry::Part { block, offset, length, .. } => (block, 1, offset + length),
                        Entry::Check { block, .. } => (block, 1, 0),
                    };
                    prop_assert!(layout.in_one_chunk(block, count) && layout.stream_of(block) == 0);
                    prop_assert!(end <= layout.locate(block).unwrap().length);
                }
            }
        }
    }

    #[test]
    fn a_disks_last_block_is_as_long_as_it_is() {
        let layout = DiskLayout::new([100], 1).unwrap();
        let (block, hash) = (BlockIndex(0), ContentHash::from_bits(7));
        let table = |entry| {
            let mut bytes = Vec::new();
            encode_table(&mut bytes, &[entry]);
            let mut entries = Vec::new();
            decode_table(&bytes, &layout, 0, &mut entries).map(|payload| (payload, entries[0]))
        };
        let short = Entry::Whole { block, hash, length: 100 };
        assert_eq!(table(short), Ok((100, short)));
        let beyond = Entry::Part { block, offset: 90, length: 11, fingerprint: 0 };
        assert_eq!(table(beyond), Err(TableError::Part { block: 0, offset: 90, length: 11 }));
        let zero = Entry::Zero { block, count: 2 };
        assert!(matches!(table(zero), Err(TableError::Blocks { .. })));
    }
}
