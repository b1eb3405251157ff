//! Interfaces that a QEMU was given by descriptor: its command line has a number, and only its process knows which interface that is.

use network::tap::interface_behind;
use qemu::{NicKind, Process, Spec};
use serde::{Deserialize, Serialize};

use network::interfaces::{Interfaces, Kind, Tap};

/// An interface that a QEMU was given by descriptor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandedIn {
    /// The network back end that uses it.
    pub netdev: String,
    /// Its name.
    pub ifname: String,
    /// The MAC address that it has while the machine runs here, of a macvtap.
    #[serde(default)]
    pub macvtap: Option<String>,
}

/// Those of a QEMU that runs. One that cannot be found out is left out.
pub async fn to(process: &Process, spec: &Spec) -> Vec<HandedIn> {
    let interfaces = Interfaces::open().ok();
    let mut all = Vec::new();
    for nic in spec.nics() {
        let NicKind::Tap { descriptors, .. } = nic.kind else { continue };
        let mut found = None;
        for number in descriptors {
            match interface_behind(process.pid, number) {
                // All queues are of one interface.
                Ok(ifname) if found.is_none() || found.as_ref() == Some(&ifname) => found = Some(ifname),
                Ok(ifname) => {
                    tracing::warn!(netdev = nic.netdev, ifname, "a network has queues of several interfaces");
                    found = None;
                    break;
                }
                Err(e) => {
                    tracing::warn!(netdev = nic.netdev, number, error = %e, "it is not known what a network is connected to");
                    found = None;
                    break;
                }
            }
        }
        let Some(ifname) = found else { continue };
        let described = match &interfaces {
            Some(interfaces) => interfaces.describe(&ifname).await,
            None => Ok(None),
        };
        let macvtap = match described {
            Ok(Some(Tap { kind: Kind::Macvtap(macvtap), .. })) => Some(macvtap.mac.to_string()),
            _ => None,
        };
        all.push(HandedIn { netdev: nic.netdev, ifname, macvtap });
    }
    all
}
