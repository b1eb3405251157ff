//! The migration controller: what happens when a machine moves from one host to another, in which order, and what is
//! done when any step fails.
//!
//! * [`source`] and [`destination`] are the two controllers; [`wire`] is what they say to each other.
//! * [`lifecycle`] starts, adopts, finds again and ends machines on one host.
//! * [`hooks`] are programs of the operator's, run when a machine's network moves.
//! * [`report`], [`progress`] and [`options`] are what an operator gives and gets.
//!
//! Memory and device state are moved by the crate [`mirror`] over the crate [`link`]; QEMU is spoken to through the
//! crate [`qemu`]. Which host owns a machine, through any crash, is the crate [`ownership`]'s.

mod blockers;
mod boot_files;
mod confinement;
mod deadlines;
pub mod destination;
mod disks;
mod drives;
pub mod fence;
mod firewall;
pub mod forward;
#[cfg(fuzzing)]
pub mod fuzzing;
pub mod guest_ram;
mod handed_in;
mod health;
pub mod hooks;
pub mod host;
mod identity;
mod images;
pub mod left_images;
pub mod lifecycle;
mod linked;
pub mod logs;
mod machine;
pub mod neighbourhood;
mod occasion;
pub mod options;
mod places;
mod plugged;
pub mod points;
pub mod progress;
pub mod rate;
pub mod recovering;
pub mod release;
pub mod report;
mod reservation;
pub mod rest;
pub mod room;
pub mod second_copy;
pub mod session;
mod settings;
pub mod source;
mod state_file;
pub mod supervised;
mod switch_cost;
pub mod vm;
mod which_file;
pub mod wire;

pub use cgroup::{BadCgroup, CgroupParent};
pub use deadlines::DECIDED;
pub use destination::{DataConnections, PostCopies};
pub use fence::Fence;
pub use finding::{Failure, Finding, Stage};
pub use forward::Forwards;
pub use handed_in::HandedIn;
pub use hooks::{Hook, HookError, HookInterface, Hooks};
pub use host::{Allow, Firewall, Host};
pub use left_images::LeftImages;
pub use lifecycle::{Recovered, Resolution, RunError, Stopped};
pub use linked::LinkedHost;
pub use logs::Logs;
pub use machine::tied;
pub use options::{Compress, DiskRoom, Disks, Engine, Goal, OnDiverge, OptionError, Options, Verify};
pub use ownership::{BadName, Claim, JournalError, Ownership, VmName};
pub use progress::{DiskProgress, Progress};
pub use recovering::Recovering;
pub use report::{Outcome, Phase, Report};
pub use room::RamFiles;
pub use session::{Command, Ended, Session};
pub use settings::Settings;
pub use source::{Readiness, Settled};
pub use switch_cost::SwitchCost;
pub use vm::{Journal, Made, Origin, Record, Vm};
pub use which_file::WhichFile;
