//! The mirroring module: memory, disks and device state of a running machine kept equal at the destination, and
//! proved so.
//!
//! The two sides of every kind of state stand side by side, with the same verbs:
//!
//! | state | source | destination |
//! | --- | --- | --- |
//! | memory | [`memory::source::MemorySource`] scans, reads, sends | [`memory::destination::MemoryDestination`] receives, checks, writes |
//! | disks | [`storage::source::StorageSource`] serves QEMU's copy jobs, sends | [`storage::destination::StorageDestination`] receives, checks, writes |
//! | devices | [`device::source::DeviceSource`] takes QEMU's stream | [`device::destination::DeviceDestination`] feeds it to QEMU |
//!
//! What both sides agree on is the [`layout`] of guest RAM, the [`hash`] secret of the mirror, and, kept up to
//! date by every page sent and every page written, the [`ledger`]. The ledger is what everything is verified
//! against: the rolling [`audit`] on either side, the gate before the hand-over, and the proof after it.
//!
//! This crate knows nothing of QMP, phases or policies; it can mirror the memory of any process that maps a
//! shared file and is tracked by [`dirty_tracker`].

pub mod audit;
pub mod device;
pub mod hash;
pub mod heap;
pub mod layout;
pub mod ledger;
mod meeting;
pub mod memory;
mod row;
pub mod storage;
