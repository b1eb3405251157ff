//! The life of a machine on one host: started or taken in, given what it needs there, looked after, ended, and forgotten with all that
//! was made for it. A host that a machine leaves and one that it comes to use it alike.
//!
//! It knows QEMU, disks, files, processes, cgroups and whose a machine is. It knows no connection to another agent, no phase of a
//! migration, no message and no report: what belongs to those is above it.
//!
//! * [`lifecycle`] starts, adopts, ends and forgets machines; [`vm`] is what is kept of each.
//! * What is made for a machine: [`guest_ram`], [`places`] of its sockets, [`firewall`], [`logs`], [`forward`]; [`paths`] are where, and [`room`] is what
//!   can still be promised.
//! * [`images`] and [`drives`] are what it has of disks, [`boot_files`] what it boots from without one; [`left_images`] what it has left of
//!   them, and [`fence`] keeps that locked. [`guest_addresses`] are by what its guest is known.
//! * Whether it would run twice: [`second_copy`], [`supervised`], [`handed_over`].
//! * [`hooks`] are programs of the operator's, run when a machine's network moves.

pub mod boot_files;
mod deadlines;
pub mod drives;
pub mod fence;
pub mod firewall;
pub mod forward;
#[cfg(fuzzing)]
pub mod fuzzing;
pub mod guest_addresses;
pub mod guest_ram;
pub mod handed_in;
pub mod handed_over;
pub mod hooks;
mod host;
pub mod identity;
pub mod images;
pub mod left_images;
pub mod lifecycle;
mod lingering;
pub mod logs;
pub mod paths;
pub mod places;
mod post_copy_memory;
mod ram_files;
mod recovering;
pub mod room;
mod same_file;
pub mod second_copy;
pub mod settings;
mod state_file;
pub mod supervised;
pub mod vm;
mod which_file;

pub use deadlines::{KILL_GRACE, POWER_OFF, QUIT_GRACE};
pub use fence::Fence;
pub use forward::Forwards;
pub use hooks::Hooks;
pub use host::{Allow, Firewall, Host};
pub use left_images::LeftImages;
pub use lingering::Lingering;
pub use logs::Logs;
pub use post_copy_memory::PostCopyMemory;
pub use ram_files::RamFiles;
pub use recovering::Recovering;
pub use vm::{Journal, Made, Origin, Record, Vm};
pub use which_file::WhichFile;
