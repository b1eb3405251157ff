//! The migration controller: what happens when a machine moves from one host to another, in which order, and what is
//! done when any step fails.
//!
//! * [`source`] and [`destination`] are the two controllers; what they say to each other is the crate [`protocol`].
//! * [`recover`] finds a machine again after a crash, and [`resolve`] carries out what a person decides about one in doubt.
//! * [`report`], [`progress`] and [`options`] are what an operator gives and gets.
//!
//! Memory and device state are moved by the crate [`mirror`] over the crate [`link`]; QEMU is spoken to through the
//! crate [`qemu`]. What a machine is on one host is the crate [`host`]'s. Which host owns a machine, through any crash, is the crate [`ownership`]'s.

mod boot_files;
pub mod destination;
mod disks;
#[cfg(fuzzing)]
pub mod fuzzing;
mod health;
mod linked;
mod machine;
pub mod options;
mod plugged;
pub mod points;
pub mod progress;
pub mod rate;
mod recover;
pub mod release;
pub mod report;
mod reservation;
mod resolve;
pub mod session;
pub mod source;
mod switch_cost;

pub use cgroup::{BadCgroup, CgroupParent};
pub use destination::{DataConnections, PostCopies};
pub use finding::{Failure, Finding, Stage};
pub use linked::LinkedHost;
pub use options::{Compress, DiskRoom, Disks, Engine, Goal, OnDiverge, OptionError, Options, Verify};
pub use ownership::{BadName, Claim, JournalError, Ownership, VmName};
pub use progress::{DiskProgress, Progress};
pub use recover::{Occasion, Recovered, recover};
pub use report::{Outcome, Phase, Report};
pub use resolve::{Resolution, ResolveError, resolve};
pub use session::{Command, Ended, Session};
pub use source::{Readiness, Settled};
pub use switch_cost::SwitchCost;
