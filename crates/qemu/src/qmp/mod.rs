//! QEMU's monitor protocol, QMP: JSON lines over a unix socket.
//!
//! The framing here is our own. The `qapi` crate types the commands, but its event type is an enum of what QEMU 7
//! knew, and its reader fails at the first event that is not in it; the stream must survive a newer QEMU.

pub mod block;
mod commands;
mod connection;

pub use commands::{
    Blocks, CpuidWord, GivenDescriptor, MemoryDevice, MigrationState, QomProperty, RunState, VcpuThread,
    Version,
};
pub use connection::{Event, Qmp, QmpError};
