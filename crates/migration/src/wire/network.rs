//! What is said of a machine's network.

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
    pub flows: Option<crate::conntrack::wire::Flows>,
}
