//! Memory: scanned, read, sent on the source; received, checked, written on the destination.
//!
//! Workers are plain threads, one per stream and side. On the source a worker takes the dirty runs of its chunks,
//! reads them into a buffer of its own (so hash and copy see the same bytes, whatever the guest does meanwhile),
//! classifies each page against the ledger and what was last sent of it ([`delta`]), and writes a batch, compressed
//! where that is worth it ([`compression`]). On the destination a worker checks each page's hash,
//! writes it (with `pwrite`, or into huge pages) and records it. The formats in between are in [`codec`].

pub mod codec;
pub mod delta;
pub mod destination;
mod heat;
mod holes;
mod huge;
pub mod pages;
pub mod post_copy;
mod proof;
mod ram;
pub mod round;
mod sender;
mod sent;
pub mod source;
pub(crate) mod source_error;
mod twins;
pub(crate) mod writer;

pub use ram::{Ram, RamError, RamFile, RamProcess};
