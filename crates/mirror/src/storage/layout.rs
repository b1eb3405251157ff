//! How the blocks of a machine's disks are numbered, and which stream carries which.
//!
//! As for [memory](crate::layout): the blocks of all disks form one index space, every disk begins at a multiple of
//! [`CHUNK_BLOCKS`], and a block always travels on the same stream, chunk number modulo streams.

use std::ops::Range;

use crate::layout::Index;

/// Bytes in a block of the ledger, and the granularity of QEMU's copy job.
pub const BLOCK_SIZE: usize = 64 << 10;

/// Blocks in a chunk: 2 MiB. What QEMU's copy job reads one after the other so spreads over the streams.
pub const CHUNK_BLOCKS: u64 = 32;

/// Upper limit of all disks of a machine together: 16 TiB. A peer's numbers are held against it before anything is
/// allocated; a ledger takes 16 bytes for each block.
pub const MAX_BLOCKS: u64 = 1 << 28;

/// Most disks of one machine.
pub const MAX_DISKS: usize = 64;

/// The number of a block in the index space of all disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockIndex(pub u64);

impl Index for BlockIndex {
    fn number(self) -> u64 {
        self.0
    }
}

/// One disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// Its size as the guest sees it, in bytes.
    pub size: u64,
    /// Its blocks, in the index space. The last may be a part only.
    pub blocks: Range<u64>,
}

/// The index space, and its division among streams.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskLayout {
    disks: Vec<Disk>,
    streams: u16,
}

/// Disks that cannot be described.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiskLayoutError {
    /// Beyond what is supported.
    #[error("more than {MAX_DISKS} disks, or more than {} TiB of them", (MAX_BLOCKS * BLOCK_SIZE as u64) >> 40)]
    TooLarge,
    /// A disk with no content has nothing to be mirrored.
    #[error("a disk of no size cannot be mirrored")]
    Empty,
    /// A mirror needs at least one stream.
    #[error("a mirror needs at least one stream")]
    NoStreams,
}

/// Where a block is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Which disk.
    pub disk: usize,
    /// Where on it the block begins, in bytes.
    pub offset: u64,
    /// How long the block is, in bytes: [`BLOCK_SIZE`], or less for a disk's last.
    pub length: usize,
}

impl DiskLayout {
    /// The layout of disks of these sizes, in bytes.
    ///
    /// # Errors
    /// [`DiskLayoutError`] when they exceed the limits.
    pub fn new(sizes: impl IntoIterator<Item = u64>, streams: u16) -> Result<DiskLayout, DiskLayoutError> {
        if streams == 0 {
            return Err(DiskLayoutError::NoStreams);
        }
        let mut layout = DiskLayout { disks: Vec::new(), streams };
        let mut next = 0u64;
        for size in sizes {
            if size == 0 {
                return Err(DiskLayoutError::Empty);
            }
            let end = next.saturating_add(size.div_ceil(BLOCK_SIZE as u64));
            if end > MAX_BLOCKS || layout.disks.len() == MAX_DISKS {
                return Err(DiskLayoutError::TooLarge);
            }
            layout.disks.push(Disk { size, blocks: next..end });
            next = end.next_multiple_of(CHUNK_BLOCKS);
        }
        Ok(layout)
    }

    /// The disks, in their order.
    #[must_use]
    pub fn disks(&self) -> &[Disk] {
        &self.disks
    }

    /// Number of streams.
    #[must_use]
    pub fn streams(&self) -> u16 {
        self.streams
    }

    /// Blocks of all disks.
    #[must_use]
    pub fn block_count(&self) -> u64 {
        self.disks.iter().map(|disk| disk.blocks.end - disk.blocks.start).sum()
    }

    /// One past the last block index.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.disks.last().map_or(0, |disk| disk.blocks.end)
    }

    /// Where a block is. `None` for an index that is no block.
    #[must_use]
    pub fn locate(&self, block: BlockIndex) -> Option<Place> {
        let disk = self.disks.partition_point(|disk| disk.blocks.end <= block.0);
        let Disk { size, blocks } = self.disks.get(disk)?;
        let offset = block.0.checked_sub(blocks.start)? * BLOCK_SIZE as u64;
        let length = usize::try_from((size - offset).min(BLOCK_SIZE as u64)).ok()?;
        Some(Place { disk, offset, length })
    }

    /// The block that holds this byte of a disk.
    #[must_use]
    pub fn block_at(&self, disk: usize, offset: u64) -> BlockIndex {
        BlockIndex(self.disks[disk].blocks.start + offset / BLOCK_SIZE as u64)
    }

    /// Whether all of a run of blocks is of one chunk of one disk, as everything that travels must be.
    #[must_use]
    pub fn in_one_chunk(&self, block: BlockIndex, count: u64) -> bool {
        let Some(last) = count.checked_sub(1).and_then(|more| block.0.checked_add(more)) else {
            return false;
        };
        block.0 / CHUNK_BLOCKS == last / CHUNK_BLOCKS
            && self.locate(block).is_some()
            && self.locate(BlockIndex(last)).is_some()
    }

    /// The stream that carries a block.
    #[must_use]
    pub fn stream_of(&self, block: BlockIndex) -> u16 {
        let stream = (block.0 / CHUNK_BLOCKS) % u64::from(self.streams);
        u16::try_from(stream).expect("a remainder of a u16 fits it")
    }

    /// All blocks, in order.
    pub fn blocks(&self) -> impl Iterator<Item = BlockIndex> + '_ {
        self.disks.iter().flat_map(|disk| disk.blocks.clone()).map(BlockIndex)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_byte_of_every_disk_is_in_exactly_one_block(
            sizes in prop::collection::vec(1u64..(9 << 20), 1..5), streams in 1u16..5,
        ) {
            let layout = DiskLayout::new(sizes.clone(), streams).unwrap();
            let mut covered = vec![0u64; sizes.len()];
            for block in layout.blocks() {
                let place = layout.locate(block).unwrap();
                prop_assert_eq!(place.offset, covered[place.disk]);
                prop_assert_eq!(layout.block_at(place.disk, place.offset), block);
                prop_assert_eq!(layout.block_at(place.disk, place.offset + place.length as u64 - 1), block);
                prop_assert!(layout.in_one_chunk(block, 1) && layout.stream_of(block) < streams);
                covered[place.disk] += place.length as u64;
            }
            prop_assert_eq!(covered, sizes);
        }
    }

    #[test]
    fn what_is_no_block_has_no_place() {
        let layout = DiskLayout::new([BLOCK_SIZE as u64 * 3 + 1, 512], 2).unwrap();
        assert_eq!(layout.locate(BlockIndex(3)), Some(Place { disk: 0, offset: 3 << 16, length: 1 }));
        assert_eq!(layout.locate(BlockIndex(4)), None);
        assert_eq!(layout.locate(BlockIndex(32)), Some(Place { disk: 1, offset: 0, length: 512 }));
        assert_eq!(layout.locate(BlockIndex(33)), None);
        assert!(!layout.in_one_chunk(BlockIndex(3), 2) && !layout.in_one_chunk(BlockIndex(u64::MAX), 2));
    }

    #[test]
    fn absurd_disks_are_refused_before_anything_is_allocated() {
        assert!(matches!(DiskLayout::new([u64::MAX], 1), Err(DiskLayoutError::TooLarge)));
        assert!(matches!(DiskLayout::new([1; MAX_DISKS + 1], 1), Err(DiskLayoutError::TooLarge)));
        assert!(matches!(DiskLayout::new([0], 1), Err(DiskLayoutError::Empty)));
        assert!(matches!(DiskLayout::new([1], 0), Err(DiskLayoutError::NoStreams)));
    }
}
