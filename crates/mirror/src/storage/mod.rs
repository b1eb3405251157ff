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
mod ledgers;
mod queue;
mod shared;
pub mod source;

pub use lane::Lane;

#[cfg(test)]
mod tests;
