//! The ledgers that a mirror of disks begins with.

use super::layout::{BlockIndex, CHUNK_BLOCKS, DiskLayout};
use crate::hash::Secret;
use crate::ledger::{Ledger, Ledgers};

/// A ledger for each stream, which knows of some disks that they are all zero, and of the others nothing.
pub(super) fn new_ledgers(layout: &DiskLayout, secret: &Secret, zero: &[bool]) -> Ledgers<BlockIndex> {
    let unknown = |_| Ledger::unknown(layout.end(), CHUNK_BLOCKS, layout.streams());
    let mut ledgers: Vec<_> = (0..layout.streams()).map(unknown).collect();
    for (disk, _) in layout.disks().iter().zip(zero).filter(|(_, zero)| **zero) {
        for block in disk.blocks.clone().map(BlockIndex) {
            ledgers[usize::from(layout.stream_of(block))].record(block, secret.zero_block());
        }
    }
    ledgers.into()
}
