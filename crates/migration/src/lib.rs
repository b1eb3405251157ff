//! The migration controller: what happens when a machine moves from one host to another, in which order, and what is
//! done when any step fails.
//!
//! * [`source`] and [`destination`] are the two controllers; [`wire`] is what they say to each other.
//! * [`journal`] keeps, through any crash, which host owns a machine: at any moment at most one copy may run, and one
//!   always can.
//! * [`lifecycle`] starts, adopts, finds again and ends machines on one host.
//! * `cgroup` carries the limits of CPU and memory of a machine's process.
//! * [`hooks`] are programs of the operator's, run when a machine's network moves.
//! * [`conntrack`] and [`nft`] are what a host's firewall knows of a machine.
//! * [`report`], [`progress`], [`failure`] and [`options`] are what an operator gives and gets.
//!
//! Memory and device state are moved by the crate [`mirror`] over the crate [`link`]; QEMU is spoken to through the
//! crate [`qemu`].

mod boot_files;
mod cgroup;
pub mod conntrack;
pub mod destination;
mod disks;
mod drives;
pub mod failure;
mod firewall;
pub mod forward;
mod handed_in;
mod health;
pub mod hooks;
pub mod host;
mod identity;
pub mod journal;
pub mod lifecycle;
mod machine;
pub mod neighbourhood;
pub mod nft;
mod occasion;
pub mod options;
mod plugged;
pub mod progress;
pub mod rate;
pub mod remnants;
pub mod report;
mod reservation;
pub mod room;
pub mod session;
pub mod source;
mod state_file;
pub mod tap;
pub mod vm;
pub mod wire;

pub use cgroup::{BadCgroup, CgroupParent};
pub use destination::{DataConnections, PostCopies};
pub use failure::{Failure, Finding, Stage};
pub use forward::Forwards;
pub use handed_in::HandedIn;
pub use hooks::{Hook, HookError, HookInterface, Hooks};
pub use host::{Allow, Firewall, Host, SwitchCost};
pub use journal::{Journal, JournalError};
pub use lifecycle::{Recovered, Resolution, RunError, Stopped};
pub use options::{Compress, DiskRoom, Disks, Engine, Goal, OnDiverge, OptionError, Options, Verify};
pub use progress::{DiskProgress, Progress};
pub use remnants::Remnants;
pub use report::{Outcome, Phase, Report};
pub use session::{Command, Ended, Session};
pub use source::{Readiness, Settled};
pub use vm::{BadName, Made, Origin, Ownership, Record, Vm, VmName};
