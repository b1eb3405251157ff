//! A host with its end of the link: what a migration uses beside what the host is by itself.

use std::ops::Deref;
use std::sync::{Arc, OnceLock};

use crate::switch_cost::SwitchCost;
use destination::ReceivingHost;

/// The host a controller runs on. Whatever takes a [`Host`](host::Host), or a [`ReceivingHost`], is given this one's.
#[derive(Debug, Clone)]
pub struct LinkedHost {
    /// What it is without that, as a destination uses it.
    pub host: Arc<ReceivingHost>,
    /// Its end of the link.
    pub endpoint: link::Endpoint,
    /// TCP port of that, by which peers can ask it; none until it listens.
    pub link_port: Arc<OnceLock<u16>>,
    /// What all mirrors that leave this host may send together; they share it equally.
    pub bandwidth: Arc<link::Bandwidth>,
    /// What a switch-over away from here costs.
    pub switch_cost: Arc<SwitchCost>,
}

impl Deref for LinkedHost {
    type Target = ReceivingHost;

    fn deref(&self) -> &ReceivingHost {
        &self.host
    }
}

#[cfg(test)]
impl LinkedHost {
    /// Such as a test has it.
    pub(crate) fn of(testing::Linked { host, endpoint }: testing::Linked) -> LinkedHost {
        LinkedHost {
            host: Arc::new(ReceivingHost { host, post_copies: destination::PostCopies::default() }),
            endpoint,
            link_port: Arc::default(),
            bandwidth: link::Bandwidth::new(None),
            switch_cost: Arc::default(),
        }
    }
}
