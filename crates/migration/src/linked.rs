//! A host with its end of the link: what a migration uses beside what the host is by itself.

#[cfg(test)]
pub(crate) mod testing;

use std::ops::Deref;
use std::sync::{Arc, OnceLock};

use crate::destination::PostCopies;
use crate::switch_cost::SwitchCost;
use host::Host;

/// The host a controller runs on. Whatever takes a [`Host`] is given this one's.
#[derive(Debug, Clone)]
pub struct LinkedHost {
    /// What it is by itself. Its [`post_copy_memory`](Host::post_copy_memory) are these [`post_copies`](LinkedHost::post_copies).
    pub host: Host,
    /// Its end of the link.
    pub endpoint: link::Endpoint,
    /// TCP port of that, by which peers can ask it; none until it listens.
    pub link_port: Arc<OnceLock<u16>>,
    /// What all mirrors that leave this host may send together; they share it equally.
    pub bandwidth: Arc<link::Bandwidth>,
    /// What a switch-over away from here costs.
    pub switch_cost: Arc<SwitchCost>,
    /// Machines here whose memory is not complete.
    pub post_copies: PostCopies,
}

impl Deref for LinkedHost {
    type Target = Host;

    fn deref(&self) -> &Host {
        &self.host
    }
}
