//! The migration controller: what happens when a machine moves from one host to another, in which order, and what is
//! done when any step fails.
//!
//! * [`source`] is the controller where a machine leaves; that where it comes to is the crate [`destination`], and what they say to each other the
//!   crate [`protocol`].
//! * [`recover`] finds a machine again after a crash, and [`resolve`] carries out what a person decides about one in doubt.
//! * What an operator asks for and gets is the crate [`session`].
//!
//! Memory and device state are moved by the crate [`mirror`] over the crate [`link`]; QEMU is spoken to through the
//! crate [`qemu`]. What a machine is on one host is the crate [`host`]'s. Which host owns a machine, through any crash, is the crate [`ownership`]'s.

mod disks;
mod hardware;
mod linked;
mod machine;
mod recover;
pub mod release;
mod resolve;
pub mod source;
mod switch_cost;

pub use linked::LinkedHost;
pub use recover::{Recovered, When, recover};
pub use resolve::{Resolution, ResolveError, resolve};
pub use source::Settled;
pub use switch_cost::SwitchCost;
