//! By what addresses the machines of this host are known: listened to for as long as they are here, as a guest that says nothing while
//! it is mirrored has said it before.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use mirror::network::mac::Mac;
use mirror::network::snoop::{Side, Snoop};
use qemu::Spec;

use crate::vm::{Record, VmName};

/// The addresses of machines, by name and tap.
#[derive(Default)]
pub struct Neighbourhood(Mutex<HashMap<VmName, HashMap<String, Snoop>>>);

impl std::fmt::Debug for Neighbourhood {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.lock().keys()).finish()
    }
}

impl Neighbourhood {
    /// Listens from now on, if it does not already. Without `CAP_NET_RAW` nothing is heard.
    pub(crate) fn listen(&self, record: &Record, spec: &Spec) {
        let name = &record.name;
        let mut machines = self.lock();
        let heard = machines.entry(name.clone()).or_default();
        for nic in spec.nics() {
            let Some(tap) = record.interface(&nic) else { continue };
            let side = if record.has_macvtap(&nic) { Side::Own } else { Side::Guest };
            // Of a card whose address is not on the command line nobody knows which frames are its own.
            let Some(mac) = nic.mac.and_then(|mac| mac.parse::<Mac>().ok()) else { continue };
            if heard.contains_key(&tap) {
                continue;
            }
            match Snoop::start(&tap, mac, side) {
                Ok(snoop) => drop(heard.insert(tap, snoop)),
                Err(e) => {
                    tracing::debug!(vm = %name, tap, error = %e, "its guest's addresses are not learned")
                }
            }
        }
    }

    /// What has been heard at a tap of a machine.
    pub(crate) fn addresses(&self, name: &VmName, tap: &str) -> Vec<IpAddr> {
        self.lock().get(name).and_then(|heard| heard.get(tap)).map(Snoop::addresses).unwrap_or_default()
    }

    /// Listens no more.
    pub(crate) fn forget(&self, name: &VmName) {
        let forgotten = self.lock().remove(name);
        // Its threads are waited for, and not under the lock.
        drop(forgotten);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<VmName, HashMap<String, Snoop>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
