//! The settings of a bridge's port: what it lets through, and in which VLANs. They are the interface's as much as its MTU is.

use std::collections::BTreeMap;

use futures::TryStreamExt;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::link::{
    AfSpecBridge, BridgeVlanInfoFlags, InfoBridge, InfoBridgePort, InfoData, InfoPortData, LinkAttribute,
    LinkExtentMask, LinkInfo, LinkMessage,
};
use rtnetlink::{LinkBridgePort, LinkBridgeVlan};

use serde::{Deserialize, Serialize};

use super::{Interfaces, TapError};

/// What is on or off at a port. Their places are their bits on the wire: a new one comes last.
const SWITCHES: [fn(bool) -> InfoBridgePort; 10] = [
    InfoBridgePort::HairpinMode,
    InfoBridgePort::Guard,
    InfoBridgePort::Isolated,
    InfoBridgePort::Learning,
    InfoBridgePort::UnicastFlood,
    InfoBridgePort::MulticastFlood,
    InfoBridgePort::BroadcastFlood,
    InfoBridgePort::MulticastToUnicast,
    InfoBridgePort::FastLeave,
    InfoBridgePort::NeighSupress,
];
/// Frames without a tag are of this VLAN; those of it leave without a tag.
const PVID: u32 = 1;
const UNTAGGED: u32 = 2;
/// VLANs are numbered from 1 to this.
const LAST_VLAN: u32 = 4094;

/// The settings of a port.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Port {
    /// Which switches are known, and which of them are on.
    known: u32,
    on: u32,
    /// VLANs with what is special about them; empty where the bridge does not look at tags.
    vlans: BTreeMap<u16, u32>,
}

impl Port {
    /// Settings that were told by their bits. None where they make no sense.
    pub fn of(known: u32, on: u32, vlans: impl IntoIterator<Item = (u32, u32)>) -> Option<Port> {
        let vlan = |(vid, flags): (u32, u32)| {
            let makes_sense = (1..=LAST_VLAN).contains(&vid) && flags & !(PVID | UNTAGGED) == 0;
            Some((u16::try_from(vid).ok()?, flags)).filter(|_| makes_sense)
        };
        Some(Port { known, on, vlans: vlans.into_iter().map(vlan).collect::<Option<_>>()? })
    }

    /// A bit for each switch that is known, and those that are on.
    pub fn switches(&self) -> (u32, u32) {
        (self.known, self.on)
    }

    /// VLANs that it is in, with their flags. 1: frames without a tag are of it. 2: its frames leave without a tag.
    pub fn vlans(&self) -> impl Iterator<Item = (u16, u32)> {
        self.vlans.iter().map(|(vid, flags)| (*vid, *flags))
    }

    /// Whether its bridge must look at tags.
    pub fn has_vlans(&self) -> bool {
        !self.vlans.is_empty()
    }
}

fn flags(vlan: u32) -> BridgeVlanInfoFlags {
    let mut flags = BridgeVlanInfoFlags::empty();
    flags.set(BridgeVlanInfoFlags::Pvid, vlan & PVID != 0);
    flags.set(BridgeVlanInfoFlags::Untagged, vlan & UNTAGGED != 0);
    flags
}

/// The switches of a port, as the kernel describes the interface.
fn switches(link: &LinkMessage) -> (u32, u32) {
    let (mut known, mut on) = (0, 0);
    for attribute in &link.attributes {
        let LinkAttribute::LinkInfo(info) = attribute else { continue };
        for info in info {
            let LinkInfo::PortData(InfoPortData::BridgePort(settings)) = info else { continue };
            for (bit, switch) in SWITCHES.iter().enumerate() {
                let is = |state| settings.contains(&switch(state));
                known |= u32::from(is(true) || is(false)) << bit;
                on |= u32::from(is(true)) << bit;
            }
        }
    }
    (known, on)
}

impl Interfaces {
    /// The settings of a port of that bridge.
    pub async fn port(&self, name: &str, bridge: &str) -> Result<Port, TapError> {
        let link = self.find(name).await?.ok_or_else(|| TapError::Missing(name.to_owned()))?;
        let (known, on) = switches(&link);
        let vlans = match self.looks_at_tags(bridge).await? {
            true => self.vlans(name, link.header.index).await?,
            false => BTreeMap::new(),
        };
        Ok(Port { known, on, vlans })
    }

    /// Whether a bridge looks at VLAN tags.
    pub async fn looks_at_tags(&self, bridge: &str) -> Result<bool, TapError> {
        let Some(link) = self.find(bridge).await? else { return Ok(false) };
        Ok(link.attributes.iter().any(|attribute| {
            let LinkAttribute::LinkInfo(info) = attribute else { return false };
            info.iter().any(|info| {
                matches!(info, LinkInfo::Data(InfoData::Bridge(settings))
                    if settings.contains(&InfoBridge::VlanFiltering(true)))
            })
        }))
    }

    async fn vlans(&self, name: &str, index: u32) -> Result<BTreeMap<u16, u32>, TapError> {
        let failed =
            |source| TapError::Request { action: "list the VLANs of", name: name.to_owned(), source };
        let all = self.handle.link().get();
        let mut all = all.set_filter_mask(AddressFamily::Bridge, vec![LinkExtentMask::Brvlan]).execute();
        let mut vlans = BTreeMap::new();
        while let Some(link) = all.try_next().await.map_err(failed)? {
            if link.header.index != index {
                continue;
            }
            for attribute in &link.attributes {
                let LinkAttribute::AfSpecBridge(specs) = attribute else { continue };
                for spec in specs {
                    let AfSpecBridge::VlanInfo(vlan) = spec else { continue };
                    let pvid = u32::from(vlan.flags.contains(BridgeVlanInfoFlags::Pvid)) * PVID;
                    let untagged = u32::from(vlan.flags.contains(BridgeVlanInfoFlags::Untagged)) * UNTAGGED;
                    vlans.insert(vlan.vid, pvid | untagged);
                }
            }
        }
        Ok(vlans)
    }

    /// Gives a port of a bridge these settings.
    pub async fn set_port(&self, name: &str, port: &Port) -> Result<(), TapError> {
        let index = self.index(name).await?;
        let switches = SWITCHES.iter().enumerate().filter(|(bit, _)| port.known & (1 << bit) != 0);
        let change = switches.fold(LinkBridgePort::new(index), |change, (bit, switch)| {
            change.append_info_data(switch(port.on & (1 << bit) != 0))
        });
        let failed = |action| move |source| TapError::Request { action, name: name.to_owned(), source };
        // The kernel takes these only from who would make an interface.
        let set = self.handle.link().set_port(change.build()).execute().await;
        set.map_err(failed("set the bridge port of"))?;
        if !port.has_vlans() {
            return Ok(());
        }
        // A new port is in the bridge's own default VLAN.
        let there = self.vlans(name, index).await?;
        let gone = there.keys().filter(|vid| !port.vlans.contains_key(vid));
        let change = gone
            .clone()
            .fold(LinkBridgeVlan::new(index), |change, vid| change.vlan(*vid, BridgeVlanInfoFlags::empty()));
        if gone.count() > 0 {
            let removal = self.handle.link().del_with_message(change.build());
            removal.execute().await.map_err(failed("take VLANs from"))?;
        }
        let change = port
            .vlans
            .iter()
            .fold(LinkBridgeVlan::new(index), |change, (vid, vlan)| change.vlan(*vid, flags(*vlan)));
        self.change("put into VLANs", name, change.build()).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vlans_that_there_are_not_are_no_settings() {
        for (vid, flags) in [(0, 0), (4095, 0), (70_000, 0), (7, 4)] {
            assert_eq!(Port::of(0, 0, [(vid, flags)]), None, "{vid} {flags}");
        }
    }
}
