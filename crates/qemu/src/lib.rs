//! One QEMU process: its monitor, its start, its adoption, its images. Its command line is a [`Spec`], of [`command_line`].
//!
//! - [`launch`] starts a QEMU that outlives its starter; [`find`] finds it again; [`adopt`] takes in a running one.
//! - [`Qmp`] is QEMU's monitor protocol: typed commands through the [`qapi`] crate, events kept as they come, so that a
//!   newer QEMU's new events, fields and values break nothing.
//! - [`RamDirectory`] makes files for guest RAM that nobody else can open; [`ram_blocks`] finds guest RAM: its files, and where
//!   QEMU has mapped them.
//! - [`Qmp::mirror_disk`] and what goes with it mirrors a guest's disk into an NBD export and ends that without a trace;
//!   [`StorageDaemon`] makes images and serves them; [`probe_format`] and [`ImageLock`] know an image from outside.
//!
//! Linux only. Knows nothing of hosts, links or migration as a whole.

mod adopt;
mod descriptors;
mod detach;
#[cfg(fuzzing)]
pub mod fuzzing;
mod image;
mod image_lock;
mod keeper;
mod launch;
mod log;
mod maps;
mod probe;
mod process;
pub mod qmp;
mod ram;
mod ram_file;
mod ram_table;
mod storage_daemon;
mod user;

/// What names a command line by way of this crate finds it here.
pub use command_line as spec;
pub use command_line::{
    DeclaredDevice, Destination, Disk, FilePurpose, FileUse, Mirrorable, Nic, NicKind, NotMirrorable,
    ParseError, Protocol, RamBackend, RamKind, SizeError, Spec, huge_page_size,
};

pub use adopt::{AdoptError, Adopted, adopt, was_started_incoming};
pub use descriptors::{raise_descriptor_limit, with_former_descriptor_limit};
pub use image::{Image, ImageError, Qcow2, probe_format};
pub use image_lock::{ImageLock, ImageLockError, KeepOut, in_use};
pub use keeper::{KeeperError, keep_open};
pub use launch::{Launch, LaunchError, NotRecorded, START_DEADLINE, launch};
pub use log::{cut as cut_log, last_words};
pub use probe::{ProbeGuest, accelerator_works};
pub use process::{Kill, Look, Presence, Process, ProcessError, Vm, find, vcpu_cpu_time};
pub use qmp::{
    COMMAND_DEADLINE, CREATE_DEADLINE, EXPORT_DEADLINE, Event, GREETING_DEADLINE, JOB_DEADLINE, Qmp,
    QmpError, SAVE_DEVICES,
};
pub use ram::{Mapping, RamAddresses, RamBlock, RamError, ram_blocks};
pub use ram_file::{MadeRamFile, RamDirectory, RamFileError, open_to_others};
pub use ram_table::{LocateError, LocatedBlock, RamTable};
pub use storage_daemon::{
    Create, NewFormat, STORAGE_DAEMON_DEADLINE, Serve, ServedBacking, StorageDaemon, StorageDaemonError,
};
pub use user::{NoUser, User};
