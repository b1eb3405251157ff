//! A migration at the host that a machine comes to: what it needs is reserved, its copy is held, and it becomes this host's when told.
//!
//! ```text
//!            Reserve                    Load                     Commit
//!   (nothing) ─────► copy, mirrored ─────────► ready, paused ──────────► owner, runs
//!                         │ Cancel, any failure      │ Cancel
//!                         ▼                          ▼
//!                     (nothing)                  (nothing)
//! ```
//!
//! A copy that is not ready is thrown away whatever goes wrong. A copy that is ready is not: the source may have handed
//! the machine over, and the word of it may be on its way. It stays paused until the source, on a new connection if
//! need be, or a person says what it is to be.
//!
//! `controller` goes through a session; `source` is the other end of it, and `end` why it ended. The `reservation` says whether the machine can
//! be here, and sets everything aside. The `copy` takes in memory and disks (`storage`, `images`) until it is complete; where its memory is
//! not, a `tail` of it is `waiting` for the rest ([`post_copy`]). The `owner` is told to run it, and puts it into the [`network`]. A host that
//! takes machines in is a [`ReceivingHost`].

mod arrivals;
mod boot_files;
mod controller;
mod copy;
mod end;
mod events;
pub mod forwarded;
#[cfg(fuzzing)]
pub mod fuzzing;
mod health;
mod images;
pub mod network;
mod owner;
pub mod post_copy;
mod receiving;
mod relay;
mod reservation;
mod sender;
mod source;
mod storage;
mod tail;
mod waiting;

pub use arrivals::DataConnections;
pub use controller::serve;
pub use receiving::ReceivingHost;
pub use tail::PostCopies;
