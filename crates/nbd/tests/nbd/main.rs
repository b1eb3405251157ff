//! The Network Block Device protocol: our client against our server, and either against QEMU.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod memory_export;
mod ours;
mod place;
mod qemu;
