//! QEMU's monitor protocol, QMP: JSON lines over a unix socket.
//!
//! The framing here is our own. The `qapi` crate types the commands, but its event type is an enum of what QEMU 7
//! knew, and its reader fails at the first event that is not in it; the stream must survive a newer QEMU.

/// Defines commands with answers of our own.
macro_rules! commands {
    ($($name:ident $(<$life:lifetime>)? { $($field:ident : $kind:ty),* } = $wire:literal -> $ok:ty;)*) => {$(
        #[derive(Serialize)]
        #[serde(rename_all = "kebab-case")]
        struct $name $(<$life>)? { $($field: $kind),* }

        impl $(<$life>)? Command for $name $(<$life>)? {
            type Ok = $ok;
            const NAME: &'static str = $wire;
            const ALLOW_OOB: bool = false;
        }
    )*};
}

mod block;
mod commands;
mod connection;
mod error;
mod expecting;
mod export;
mod jobs;
mod quiesce;

pub use block::{BlockNode, Drive, NbdNode};
pub use commands::{
    Blocks, CpuidWord, GivenDescriptor, MemoryDevice, MigrationState, QomProperty, RunState, SAVE_DEVICES,
    VcpuThread, Version,
};
pub use connection::{COMMAND_DEADLINE, Event, GREETING_DEADLINE, Qmp};
pub use error::QmpError;
pub use export::{EXPORT_DEADLINE, ExportError};
pub use jobs::{BlockJob, CREATE_DEADLINE, JOB_DEADLINE, JobEvent, JobNews, MirrorEnd, MirrorJob, Sync};
