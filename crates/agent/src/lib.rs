//! The daemon on each host.
//!
//! It keeps the host's virtual machines, moves them to its peers and takes in what peers send, and offers an
//! API on a unix socket. Machines outlive it: it starts QEMU detached, and finds its machines again.
//!
//! - [`config`]: what it is told; [`daemon`]: what it opens, in which order, and how it ends
//! - [`vms`]: the machines and what is being done to each; [`sessions`]: migrations under way
//! - [`history`]: migrations that have ended; [`events`]: what happens, numbered
//! - [`api`]: HTTP and JSON; [`api::types`] is shared with every client

#![forbid(unsafe_code)]

pub mod api;
pub mod config;
pub mod daemon;
mod descriptors;
pub mod error;
pub mod events;
mod findings;
mod heap;
pub mod history;
mod lock;
mod logs;
mod monitor;
pub mod sessions;
pub mod vms;

pub use config::{Config, ConfigError};
pub use daemon::{Daemon, StartError};
pub use descriptors::raise_descriptor_limit;
pub use error::AgentError;
pub use host::fence::Keeper;
pub use lock::LockError;
