//! The source's controller: describes the machine, mirrors it, hands it over, gives everything back.
//!
//! `controller` is the flat list of phases; what a migration under way has `held` stands apart from it. The longer phases stand beside it:
//! `synchronize`, the `switch`-over, the `hand_over`. So does what they need: the `peer` at the other end of the link and the `request` to it,
//! the memory's `rounds`, the `disks`, the `estimate` that says when to switch over, QEMU's `capabilities`, the operator's `commands`, the
//! `reporting` that is given of it all, the copies of `earlier` migrations, and the `settlement` of a hand-over whose end was not heard of.
//! The `devices` and how they are saved, the `inbox` of what the destination says unasked, memory that is `supplying` after the hand-over.
//! `resume` is QEMU's way back, and a `rehearsal` is a migration that moves nothing.

mod boot_files;
pub(crate) mod capabilities;
mod commands;
mod controller;
pub(crate) mod devices;
pub(crate) mod disks;
mod earlier;
mod estimate;
mod forwarding;
mod hand_over;
mod health;
mod held;
mod inbox;
mod network;
mod peer;
mod post_copy;
mod rehearsal;
mod relay;
mod reporting;
mod request;
pub(crate) mod resume;
mod rounds;
mod settlement;
mod stop;
mod supplying;
mod switch;
mod synchronize;
mod throttle;

use std::sync::Arc;

pub(crate) use forwarding::unforward;
pub use post_copy::supply;
pub use rehearsal::check;
pub use settlement::{Settled, release, settle, supplied};
pub(crate) use settlement::{abandon_all, whose, withdraw};

use crate::linked::LinkedHost;
use held::Controller;
use host::Vm;
use session::Session;
use session::options::{Goal, Options};

/// Begins a migration, or a standing mirror. The session goes on whether or not its handle is kept.
#[must_use]
pub fn start(host: Arc<LinkedHost>, vm: Vm, to: String, goal: Goal, options: Options) -> Session {
    Controller::start(host, vm, to, goal, options)
}
