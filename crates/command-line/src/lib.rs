//! A user's QEMU command line as typed data.
//!
//! A [`Spec`] keeps every argument verbatim and in order. Questions about it ([`Spec::disks`], [`Spec::nics`], …)
//! read the arguments; changes ([`Spec::make_mirrorable`], [`Spec::for_destination`]) touch only the properties
//! that have to change. So an option that this crate has never heard of reaches QEMU as the user wrote it.

mod argument;
mod destination;
mod devices;
mod disks;
mod drivers;
mod files;
mod known;
mod made;
mod memory;
mod mirrorable;
mod names;
mod network;
mod options;
mod parse;
mod paths;
mod ram_files;
pub mod render;
mod sockets;
mod spec;

pub use destination::Destination;
pub use devices::DeclaredDevice;
pub use disks::{Disk, Protocol, from_file_name};
pub use files::{FilePurpose, FileUse};
pub use known::BlockDriver;
pub use memory::{RamBackend, RamKind, SizeError};
pub use mirrorable::{Mirrorable, NotMirrorable};
pub use network::{Nic, NicKind};
pub use options::{Properties, escape};
pub use parse::ParseError;
pub use ram_files::{huge_page_size, ram_directory, ram_place};
pub use spec::Spec;
