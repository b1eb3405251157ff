//! The cables of the testbed: their speed, and cutting them.

use crate::TestbedError;
use crate::namespace::Namespace;
use crate::tool::run;

/// One of a host's two cables to the switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wire {
    /// The guests' network: from the host's `br0` to the switch's.
    Uplink,
    /// The agents' network.
    Link,
}

/// What is wrong with what comes out of a cable at a host's end, the other direction being sound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disturbance {
    /// Nothing comes.
    Silence,
    /// Of every so many TCP segments with data one comes with another byte in it, whose checksum is right all the same.
    Corruption(u32),
}

/// Host and client end of the guests' cable.
pub(crate) const UPLINK: &str = "uplink";
/// Host end of the agents' cable.
pub(crate) const LINK: &str = "link0";
/// The bridge of the guests' network, at the hosts and at the switch.
pub(crate) const BRIDGE: &str = "br0";
/// The bridge of the agents' network, at the switch.
pub(crate) const LINK_BRIDGE: &str = "br1";
/// The same two of a host that is in other networks.
const OTHER_BRIDGE: &str = "br2";
pub(crate) const OTHER_LINK_BRIDGE: &str = "br3";

impl Wire {
    pub(crate) fn device(self) -> &'static str {
        match self {
            Self::Uplink => UPLINK,
            Self::Link => LINK,
        }
    }

    /// The switch's port for that cable of `station`.
    pub(crate) fn port(self, station: &str) -> String {
        match self {
            Self::Uplink => format!("guests-{station}"),
            Self::Link => format!("link-{station}"),
        }
    }

    fn bridge(self) -> &'static str {
        match self {
            Self::Uplink => BRIDGE,
            Self::Link => LINK_BRIDGE,
        }
    }
}

/// Makes a bridge that forwards at once and floods multicast.
pub(crate) fn add_bridge(namespace: &Namespace, name: &str) -> Result<(), TestbedError> {
    namespace.ip(&[
        "link",
        "add",
        name,
        "type",
        "bridge",
        "forward_delay",
        "0",
        "stp_state",
        "0",
        "mcast_snooping",
        "0",
    ])?;
    namespace.ip(&["link", "set", name, "up"])?;
    Ok(())
}

/// Lays a cable from the switch to a station; the station's end is up and has no address yet.
pub(crate) fn connect(
    switch: &Namespace,
    station: &Namespace,
    name: &str,
    wire: Wire,
) -> Result<(), TestbedError> {
    let port = wire.port(name);
    switch.ip(&[
        "link",
        "add",
        &port,
        "type",
        "veth",
        "peer",
        "name",
        wire.device(),
        "netns",
        station.name(),
    ])?;
    switch.ip(&["link", "set", &port, "master", wire.bridge(), "up"])?;
    station.ip(&["link", "set", wire.device(), "up"])?;
    Ok(())
}

/// Puts both cables of a host into networks of their own.
pub(crate) fn separate(switch: &Namespace, name: &str) -> Result<(), TestbedError> {
    for (wire, bridge) in [(Wire::Uplink, OTHER_BRIDGE), (Wire::Link, OTHER_LINK_BRIDGE)] {
        add_bridge(switch, bridge)?;
        switch.ip(&["link", "set", &wire.port(name), "master", bridge])?;
    }
    Ok(())
}

/// Limits a cable to that many bits per second, in each direction.
pub(crate) fn set_rate(
    switch: &Namespace,
    station: &Namespace,
    name: &str,
    wire: Wire,
    bits_per_second: u64,
) -> Result<(), TestbedError> {
    // The bucket holds at least two of the largest packets a veth carries (64 KiB), and 4 ms of the rate: less could not
    // reach it on a kernel that ticks 250 times a second. The queue behind it holds 50 ms, as a switch port would.
    let burst = (bits_per_second / 8 / 250).max(128 << 10);
    let arguments = |device: &str| {
        ["qdisc", "replace", "dev", device, "root", "tbf", "rate"]
            .map(str::to_owned)
            .into_iter()
            .chain([
                format!("{bits_per_second}bit"),
                "burst".into(),
                format!("{burst}b"),
                "latency".into(),
                "50ms".into(),
            ])
            .collect::<Vec<_>>()
    };
    for (namespace, device) in [(switch, wire.port(name)), (station, wire.device().to_owned())] {
        let arguments = arguments(&device);
        namespace.tc(&arguments.iter().map(String::as_str).collect::<Vec<_>>())?;
    }
    Ok(())
}

/// Takes the limit away. A cable that has none is left as it is.
pub(crate) fn clear_rate(
    switch: &Namespace,
    station: &Namespace,
    name: &str,
    wire: Wire,
) -> Result<(), TestbedError> {
    for (namespace, device) in [(switch, wire.port(name)), (station, wire.device().to_owned())] {
        if namespace.tc(&["qdisc", "show", "dev", &device])?.contains(" tbf ") {
            namespace.tc(&["qdisc", "del", "dev", &device, "root"])?;
        }
    }
    Ok(())
}

/// The port behind which the guests' network has a station, as far as it has learned.
pub(crate) fn port_of(switch: &Namespace, mac: &str) -> Result<Option<String>, TestbedError> {
    let known = run("bridge", &["-n", switch.name(), "fdb", "show", "br", BRIDGE])?;
    let mut lines = known.lines().filter(|line| line.starts_with(mac));
    Ok(lines.find_map(|line| line.split(" dev ").nth(1)?.split(' ').next()).map(str::to_owned))
}

/// Cuts a cable in the switch, or mends it. Neither end notices but by silence: the worst way for a link to fail.
pub(crate) fn set_connected(
    switch: &Namespace,
    name: &str,
    wire: Wire,
    connected: bool,
) -> Result<(), TestbedError> {
    // The states of a bridge port: 0 disabled, 3 forwarding (linux/if_bridge.h).
    let state = if connected { "3" } else { "0" };
    run("bridge", &["-n", switch.name(), "link", "set", "dev", &wire.port(name), "state", state])?;
    Ok(())
}

/// Disturbs what comes out of a cable at the station's end, in the switch.
pub(crate) fn disturb(
    switch: &Namespace,
    name: &str,
    wire: Wire,
    disturbance: Disturbance,
) -> Result<(), TestbedError> {
    let port = wire.port(name);
    // Behind all headers of a segment, within the first record of TLS in it. A frame of a veth has no checksum that would tell.
    let what = match disturbance {
        Disturbance::Silence => "drop".to_owned(),
        Disturbance::Corruption(of) => format!("ip protocol tcp numgen inc mod {of} 0 @th,384,8 set 0x5a"),
    };
    let chain = "type filter hook forward priority 0; policy accept;";
    let table = disturbing(name, wire);
    // On lines of their own: nft 1.0.6 takes no closing brace behind another on one line.
    let rules =
        format!("table bridge {table} {{\nchain disturbed {{ {chain} oifname \"{port}\" {what}\n}}\n}}");
    switch.nft(&rules)
}

/// Nothing disturbs it any more. One that nothing disturbs is left as it is.
pub(crate) fn undisturb(switch: &Namespace, name: &str, wire: Wire) -> Result<(), TestbedError> {
    let table = disturbing(name, wire);
    // Made first, so that it is there to be deleted.
    switch.nft(&format!("table bridge {table} {{ }}\ndelete table bridge {table}"))
}

fn disturbing(name: &str, wire: Wire) -> String {
    wire.port(name).replace('-', "_")
}
