//! What is said of a machine's network.

use network::interfaces::{macvtap, port};
use prost::Message;

/// A tap interface as it is at the source.
#[derive(Clone, PartialEq, Message)]
pub struct Tap {
    /// The back end that uses it.
    #[prost(string, tag = "1")]
    pub netdev: String,
    /// Name of the interface.
    #[prost(string, tag = "2")]
    pub ifname: String,
    /// The bridge it is a port of; empty for none.
    #[prost(string, tag = "3")]
    pub bridge: String,
    /// Bytes.
    #[prost(uint32, tag = "4")]
    pub mtu: u32,
    /// More than one queue.
    #[prost(bool, tag = "5")]
    pub multi_queue: bool,
    /// The guest's card, where the command line says it.
    #[prost(string, tag = "6")]
    pub mac: String,
    /// Its settings as a port of the bridge.
    #[prost(message, optional, tag = "7")]
    pub port: Option<Port>,
    /// Frames that may wait for the guest; 0 where the source does not say.
    #[prost(uint32, tag = "8")]
    pub queue_length: u32,
    /// It is a macvtap.
    #[prost(message, optional, tag = "11")]
    pub macvtap: Option<Macvtap>,
}

/// What is special about a macvtap.
#[derive(Clone, PartialEq, Message)]
pub struct Macvtap {
    /// The interface that it is on.
    #[prost(string, tag = "1")]
    pub lower: String,
    /// 1: private. 2: vepa. 4: bridge. 8: passthru.
    #[prost(uint32, tag = "2")]
    pub mode: u32,
    /// Its own MAC address.
    #[prost(string, tag = "3")]
    pub mac: String,
}

/// Tunnels between the two hosts, one for each tap that is a port of a bridge: VXLAN between the two ends of the connection that this
/// comes by, with identifiers that follow from the session.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct Forward {
    /// UDP port, of both.
    #[prost(uint32, tag = "1")]
    pub port: u32,
}

/// The settings of a bridge's port.
#[derive(Clone, PartialEq, Message)]
pub struct Port {
    /// A bit for each switch that is known: hairpin, guard, isolated, learning, flooding of unicast, multicast and broadcast, multicast
    /// to unicast, fast leave, neighbour suppression.
    #[prost(uint32, tag = "1")]
    pub known: u32,
    /// Those that are on.
    #[prost(uint32, tag = "2")]
    pub on: u32,
    /// VLANs; none where the bridge does not look at tags.
    #[prost(message, repeated, tag = "3")]
    pub vlans: Vec<Vlan>,
}

/// A VLAN that a port is in.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct Vlan {
    /// Its number.
    #[prost(uint32, tag = "1")]
    pub vid: u32,
    /// 1: frames without a tag are of it. 2: its frames leave without a tag.
    #[prost(uint32, tag = "2")]
    pub flags: u32,
}

/// By what a guest is known to its neighbours.
#[derive(Clone, PartialEq, Message)]
pub struct Neighbour {
    /// The back end of its card.
    #[prost(string, tag = "1")]
    pub netdev: String,
    /// The card's MAC address; empty where it is not known.
    #[prost(string, tag = "2")]
    pub mac: String,
    /// IP addresses, as text.
    #[prost(string, repeated, tag = "3")]
    pub addresses: Vec<String>,
}

/// What is known of a guest outside of it.
#[derive(Clone, PartialEq, Message)]
pub struct Known {
    /// By what its interfaces are known; only in the first of several.
    #[prost(message, repeated, tag = "1")]
    pub neighbours: Vec<Neighbour>,
    /// Connections of its that the source's firewall knows, or some of them.
    #[prost(message, optional, tag = "2")]
    pub flows: Option<::network::conntrack::wire::Flows>,
}

impl From<&port::Port> for Port {
    fn from(port: &port::Port) -> Port {
        let (known, on) = port.switches();
        Port { known, on, vlans: port.vlans().map(|(vid, flags)| Vlan { vid: vid.into(), flags }).collect() }
    }
}

impl Port {
    /// What it says. None where it makes no sense.
    pub fn checked(&self) -> Option<port::Port> {
        port::Port::of(self.known, self.on, self.vlans.iter().map(|vlan| (vlan.vid, vlan.flags)))
    }
}

impl Macvtap {
    /// None of one that is on nothing of this host's, or in a mode that is more than its number.
    pub fn of(macvtap: &macvtap::Macvtap) -> Option<Macvtap> {
        Some(Macvtap { lower: macvtap.lower.clone()?, mode: macvtap.number()?, mac: macvtap.mac.to_string() })
    }

    /// What it says. None where it makes no sense.
    pub fn checked(&self) -> Option<macvtap::Macvtap> {
        macvtap::Macvtap::of(&self.lower, self.mode, &self.mac)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn settings_of_a_port_come_as_they_were_sent(
            known: u32, on: u32, vlans in proptest::collection::btree_map(1..=4094_u32, 0..4_u32, 0..20)
        ) {
            let port = port::Port::of(known, on, vlans).unwrap();
            prop_assert_eq!(Port::from(&port).checked(), Some(port));
        }
    }

    #[test]
    fn a_macvtap_comes_as_it_was_sent() {
        for mode in [1, 2, 4, 8] {
            let sent = Macvtap { lower: "eth0".into(), mode, mac: "52:54:00:00:00:01".into() };
            assert_eq!(sent.checked().as_ref().and_then(Macvtap::of), Some(sent));
        }
    }
}
