//! A host that takes machines in: what that uses beside what the host is by itself.

use std::ops::Deref;

use crate::tail::PostCopies;
use host::Host;

/// The host that a destination's controller runs on. Whatever takes a [`Host`] is given this one's.
#[derive(Debug, Clone)]
pub struct ReceivingHost {
    /// What it is by itself. Its [`post_copy_memory`](Host::post_copy_memory) are these [`post_copies`](ReceivingHost::post_copies).
    pub host: Host,
    /// Machines here whose memory is not complete.
    pub post_copies: PostCopies,
}

impl Deref for ReceivingHost {
    type Target = Host;

    fn deref(&self) -> &Host {
        &self.host
    }
}
