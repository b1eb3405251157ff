//! Storage: what is written to a machine's disks, mirrored in one pass while the machine runs.
//!
//! QEMU's own copy job reads each disk once, from its beginning to its end, and forwards whatever the guest writes meanwhile, in
//! order. Its target is a server of the Network Block Device protocol ([`nbd`]) in the source's agent. From there on everything is the
//! mirror's: blocks are numbered ([`layout`]), wait for their stream ([`queue`](self), the guest's writes first), are compared
//! with the ledger, compressed and written between the frames of memory ([`codec`]), checked and written to the image at the
//! destination ([`image`]).
//!
//! What a guest writes need not be a whole block. The rest of the block is not known on the way, so the hash of the whole is told
//! later: the source reads the block from its own image, and the destination compares that with what it reads back. The same way
//! goes whatever could not be sent when it was written.

pub mod codec;
pub mod destination;
pub mod image;
mod item;
pub(crate) mod lane;
pub mod layout;
mod queue;
pub mod source;

use crate::hash::Secret;
use crate::ledger::{Ledger, Ledgers};
use layout::{BlockIndex, CHUNK_BLOCKS, DiskLayout};

pub use lane::Lane;

/// A ledger for each stream, which knows of some disks that they are all zero, and of the others nothing.
fn new_ledgers(layout: &DiskLayout, secret: &Secret, zero: &[bool]) -> Ledgers<BlockIndex> {
    let unknown = |_| Ledger::unknown(layout.end(), CHUNK_BLOCKS, layout.streams());
    let mut ledgers: Vec<_> = (0..layout.streams()).map(unknown).collect();
    for (disk, _) in layout.disks().iter().zip(zero).filter(|(_, zero)| **zero) {
        for block in disk.blocks.clone().map(BlockIndex) {
            ledgers[usize::from(layout.stream_of(block))].record(block, secret.zero_block());
        }
    }
    ledgers.into()
}

#[cfg(test)]
mod tests;
