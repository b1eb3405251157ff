//! Tunnels between two hosts by which a guest stays in a network that its new host is not in: VXLAN (RFC 7348) with one peer, as a port
//! of the bridge whose frames it carries.

use std::net::IpAddr;

use rtnetlink::packet_route::link::InfoBridge;
use rtnetlink::{LinkBridge, LinkUnspec, LinkVxlan};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Interfaces, TapError, silence};

/// Network identifiers have 24 bits, and 0 is none.
const IDENTIFIERS: u32 = (1 << 24) - 1;

/// One end of a tunnel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tunnel {
    /// VXLAN network identifier.
    pub identifier: u32,
    /// Address of this host, and of the other.
    pub local: IpAddr,
    /// Its other end.
    pub remote: IpAddr,
    /// UDP port, of both.
    pub port: u16,
    /// The bridge here that it is a port of.
    pub bridge: String,
    /// Bytes. What does not fit the path to the other host with 50 bytes more (70 over IPv6) is fragmented.
    pub mtu: u32,
}

/// The network identifier of a machine's tap: both hosts know it by the migration.
pub fn identifier(session: Uuid, tap: usize) -> u32 {
    let [a, b, c, ..] = session.into_bytes();
    let tap = u32::try_from(tap).unwrap_or(0) % IDENTIFIERS;
    (u32::from_be_bytes([0, a, b, c]) + tap) % IDENTIFIERS + 1
}

impl Tunnel {
    /// The name of the interface.
    pub fn name(&self) -> String {
        format!("vmf{:06x}", self.identifier)
    }

    /// The name of a bridge that is made for it.
    pub fn own_bridge(identifier: u32) -> String {
        format!("vmb{identifier:06x}")
    }
}

impl Interfaces {
    /// Makes a bridge that this host has nothing to say on.
    pub async fn make_bridge(&self, name: &str, mtu: u32) -> Result<(), TapError> {
        let bridge = LinkBridge::new(name)
            .down()
            .append_info_data(InfoBridge::ForwardDelay(0))
            .append_info_data(InfoBridge::MulticastSnooping(false));
        self.add(name, bridge.mtu(mtu).build()).await?;
        silence(name);
        self.raise(name).await
    }

    /// Makes an end of a tunnel, in its bridge and down; or nothing.
    pub async fn make_tunnel(&self, tunnel: &Tunnel) -> Result<(), TapError> {
        let name = tunnel.name();
        let link = LinkVxlan::new(&name, tunnel.identifier).port(tunnel.port).learning(false);
        let link = match (tunnel.local, tunnel.remote) {
            (IpAddr::V4(local), IpAddr::V4(remote)) => link.local(local).remote(remote),
            (IpAddr::V6(local), IpAddr::V6(remote)) => link.local6(local).remote6(remote),
            // No connection is between two families.
            _ => return Err(TapError::Missing(tunnel.remote.to_string())),
        };
        self.add(&name, link.build()).await?;
        silence(&name);
        let set_up = async {
            let change = LinkUnspec::new_with_index(self.index(&name).await?)
                .mtu(tunnel.mtu)
                .controller(self.index(&tunnel.bridge).await?);
            self.change("set up", &name, change.build()).await
        };
        let set_up = set_up.await;
        if set_up.is_err() {
            // Why it is not whole is the error that counts.
            let _ = self.remove(&name).await;
        }
        set_up
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn identifiers_are_such_and_differ_from_tap_to_tap(session: [u8; 16], tap in 0..1000_usize) {
            let session = Uuid::from_bytes(session);
            let found = identifier(session, tap);
            prop_assert!((1..=IDENTIFIERS).contains(&found));
            prop_assert_ne!(found, identifier(session, tap + 1));
            prop_assert!(Tunnel::own_bridge(found).len() <= super::super::MAX_NAME);
        }
    }
}
