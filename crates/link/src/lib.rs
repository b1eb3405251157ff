//! The communication infrastructure between two agents: mutual TLS, control messages, data streams, bandwidth.
//!
//! Two agents are joined by one control connection and any number of data connections, all to the same TCP
//! port, all TLS 1.3 with certificates on both sides:
//!
//! ```text
//!  source agent                                        destination agent
//!   Endpoint::connect ──── control: prost messages ───► Listener::accept → Incoming::Control
//!   Endpoint::open_data ══ data stream 0: bytes ══════► Listener::accept → Incoming::Data
//!   Endpoint::open_data ══ data stream 1: bytes ══════► …
//! ```
//! Control is for tokio tasks; data is for plain threads, since at several gigabits per second a stream keeps a
//! core busy with encryption alone. What is sent over either is no business of this crate.
//!
//! - [`identity`]: who this agent is; [`certificates`] makes what is needed for that
//! - [`endpoint`], [`listener`]: connecting and being connected to
//! - [`control`]: framed messages, with pings underneath
//! - [`data`]: byte streams; [`bandwidth`]: the limit that all of them share
//! - [`deadlines`], [`versions`], [`peer`]: what both directions go by, and whom they talk to
//! - [`error`]: what can go wrong, told apart

#![forbid(unsafe_code)]

pub mod bandwidth;
pub mod certificates;
pub mod control;
pub mod data;
pub mod deadlines;
pub mod endpoint;
pub mod error;
mod fair_queue;
#[cfg(fuzzing)]
pub mod fuzzing;
mod hello;
pub mod identity;
pub mod listener;
pub mod peer;
mod socket;
pub mod versions;
mod wire;

pub use bandwidth::Bandwidth;
pub use control::{Control, ControlReceiver, ControlSender};
pub use data::{AbortHandle, DataReceiver, DataSender, InFlight};
pub use deadlines::Deadlines;
pub use endpoint::{Endpoint, EndpointError};
pub use error::{AcceptError, ConnectError, HelloError, LinkError, Step, TlsError};
pub use hello::{DataHello, Purpose};
pub use identity::{Identity, IdentityError};
pub use listener::{Admission, Incoming, Listener, ListenerLimits};
pub use peer::Peer;
pub use versions::VersionRange;
