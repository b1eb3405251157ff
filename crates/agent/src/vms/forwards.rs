//! Machines that stay in the network of a host that they have left.

use std::time::Duration;

use host::Origin;
use host::forward::Forward;
use migration::release::{self, Released};
use ownership::VmName;

use super::{Entry, Vms};
use crate::api::types::{ForwardView, VmState, VmView};
use crate::error::AgentError;

/// How often it is looked whether tunnels are as they should be.
const LOOK: Duration = Duration::from_secs(10);

impl Vms {
    /// Keeps the tunnels of machines that have left as they should be, for ever.
    pub(super) async fn keep_forwarding(&self) {
        self.host().forwards.restore(&self.host().journal).await;
        loop {
            tokio::time::sleep(LOOK).await;
            self.host().forwards.repair(&self.host().journal).await;
        }
    }

    /// Those that have left and are in the network here, as they are listed.
    pub(super) fn forwarded(&self) -> Vec<VmView> {
        let entries = self.entries();
        let forwards = self.host().forwards.all();
        forwards.iter().filter(|forward| !entries.contains_key(&forward.vm)).map(view).collect()
    }

    /// Ends the forwarding of a machine, on both hosts; with `force`, here whatever the other says.
    ///
    /// # Errors
    /// Why it stays as it is.
    pub async fn release(&self, name: &VmName, force: bool) -> Result<Released, AgentError> {
        let here = self.entries().contains_key(name);
        if here {
            self.with_idle(name, |here| here.held = Some("put into the network of this host"))?;
        }
        let released = release::forwarding(self.host(), name, force).await;
        if here {
            if let Some(Entry::Here(here)) = self.entries().get_mut(name)
                && let Some(record) = self.host().journal.get(name)
            {
                here.vm.record = record;
            }
            self.let_go(name);
        }
        released.map_err(AgentError::Refused)
    }
}

fn view(forward: &Forward) -> VmView {
    VmView {
        name: forward.vm.to_string(),
        state: VmState::Forwarded,
        qemu_status: None,
        origin: Origin::Arrived,
        generation: 0,
        pid: None,
        memory: forward.memory,
        qmp_socket: std::path::PathBuf::new(),
        argv: Vec::new(),
        files: Vec::new(),
        log: None,
        taps: forward.interfaces(),
        session: None,
        doubt: None,
        problem: None,
        warnings: Vec::new(),
        forward: Some(ForwardView {
            to: forward.to.clone(),
            address: forward.address.clone(),
            since_unix_ms: crate::events::unix_ms_of(forward.since),
        }),
        network_of: None,
        kept: None,
    }
}
