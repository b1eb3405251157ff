//! By what addresses the machines of this host are known: listened to for as long as they are here, as a guest that says nothing while
//! it is mirrored has said it before.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use network::mac::Mac;
use network::snoop::{Side, Snoop};
use qemu::Spec;

use crate::vm::Record;
use ownership::VmName;

/// By what a guest is known to its neighbours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    /// The back end of its card.
    pub netdev: String,
    /// The card's MAC address; empty where it is not known.
    pub mac: String,
    /// IP addresses, as text.
    pub addresses: Vec<String>,
}

/// The addresses of machines, by name.
#[derive(Default)]
pub struct GuestAddresses(Mutex<HashMap<VmName, Machine>>);

/// What is known of one.
#[derive(Default)]
struct Machine {
    /// Heard here, by tap.
    heard: HashMap<String, Snoop>,
    /// Told by the host that it comes from.
    told: Vec<Neighbour>,
}

impl std::fmt::Debug for GuestAddresses {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.lock().keys()).finish()
    }
}

impl GuestAddresses {
    /// Listens from now on, if it does not already. Without `CAP_NET_RAW` nothing is heard.
    pub fn listen(&self, record: &Record, spec: &Spec) {
        let name = &record.name;
        let mut machines = self.lock();
        let heard = &mut machines.entry(name.clone()).or_default().heard;
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
    pub fn addresses(&self, name: &VmName, tap: &str) -> Vec<IpAddr> {
        self.lock().get(name).and_then(|it| it.heard.get(tap)).map(Snoop::addresses).unwrap_or_default()
    }

    /// The host that a machine comes from has said by what it is known there.
    pub fn tell(&self, name: &VmName, neighbours: Vec<Neighbour>) {
        self.lock().entry(name.clone()).or_default().told = neighbours;
    }

    /// By what a machine is known, as far as was told or heard; at least its cards' own addresses, where the command line has them.
    pub fn known(&self, record: &Record, spec: &Spec) -> Vec<Neighbour> {
        let machines = self.lock();
        let machine = machines.get(&record.name);
        let neighbour = |nic: qemu::Nic| {
            let tap = record.interface(&nic)?;
            let told = machine.and_then(|it| it.told.iter().find(|told| told.netdev == nic.netdev));
            let heard = machine.and_then(|it| it.heard.get(&tap)).map(Snoop::addresses).unwrap_or_default();
            // What it has said itself since is what counts: it may have given up others.
            let mut addresses: BTreeSet<String> = heard.iter().map(IpAddr::to_string).collect();
            if addresses.is_empty() {
                addresses.extend(told.iter().flat_map(|told| told.addresses.iter().cloned()));
            }
            let mac = nic.mac.or_else(|| told.map(|told| told.mac.clone()))?;
            Some(Neighbour { netdev: nic.netdev, mac, addresses: addresses.into_iter().collect() })
        };
        spec.nics().into_iter().filter_map(neighbour).collect()
    }

    /// Listens no more.
    pub(crate) fn forget(&self, name: &VmName) {
        let forgotten = self.lock().remove(name);
        // Its threads are waited for, and not under the lock.
        drop(forgotten);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<VmName, Machine>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
