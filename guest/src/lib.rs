//! The test guest: a small Linux system whose only program knows what its memory must hold, and says when it does not.
//!
//! The guest's init (`guest-init`) fills memory with [pages that describe themselves](page), keeps
//! [dirtying](writer) some of them in a chosen [pattern](workload), [checks](checker) all of them from inside against a
//! record kept elsewhere, and [answers](service) heartbeats, echo connections and questions about its [status].
//! Where it has test [disks](disk), it writes to them, reads back what they hold, and tells what they have acknowledged.
//! Where it is given a Debian [userland], it boots it beside itself before it is ready, with a warm page cache or on a disk that
//! it writes.
//! `guest-image` packs it with the kernel modules it needs into an [initramfs](image).
//!
//! This crate depends on no other of the project: what it says about a migration owes nothing to the code that migrates.

pub mod checker;
pub mod command;
pub mod disk;
pub mod image;
pub mod memory;
mod pace;
pub mod page;
pub mod parameters;
mod rate;
pub mod reader;
pub mod service;
pub mod status;
pub mod system;
pub mod userland;
pub mod workload;
pub mod writer;
