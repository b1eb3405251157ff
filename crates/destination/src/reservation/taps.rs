//! Taps of a machine that is to come: whether there is a place for them, and made.

use super::{Request, macvtaps};
use crate::forwarded::Tunnels;
use finding::{Finding, chain};
use host::Host;
use host::Record;
use network::interfaces::{self, Interfaces};
use protocol::wire;

/// The longest queue of a tap that is made here, in frames.
const MAX_QUEUE: u32 = 65_536;

impl Request {
    /// Finds every reason for which the machine cannot have its interfaces here.
    pub(super) async fn examine_taps(&self, host: &Host, findings: &mut Vec<Finding>) {
        if self.taps.is_empty() {
            return;
        }
        let interfaces = match Interfaces::open() {
            Ok(interfaces) => interfaces,
            Err(e) => {
                findings.push(Finding::new("network", chain(&e), "let the agent use netlink"));
                return;
            }
        };
        if let Some(tunnels) = &self.forward {
            examine_forwarding(host, tunnels, findings);
        }
        for tap in &self.taps {
            let mut refuse = |kind: &str, message: String, hint: &str| {
                findings.push(Finding::new(kind, message, hint));
            };
            if tap.ifname.is_empty() || tap.ifname.len() > interfaces::MAX_NAME {
                refuse("protocol", format!("{:?} cannot name an interface", tap.ifname), "update the agents");
                continue;
            }
            if let Some(macvtap) = &tap.macvtap {
                findings.extend(macvtaps::examine(tap, macvtap, host, &interfaces).await);
                continue;
            }
            // What is forwarded needs no bridge of this host's.
            let wanted = (self.forward.is_none() && !tap.bridge.is_empty()).then_some(tap.bridge.as_str());
            if let Some(bridge) = wanted
                && !host.allow.bridges.iter().any(|allowed| allowed == bridge)
            {
                refuse(
                    "bridge-not-allowed",
                    format!("{} does not allow bridge {bridge}", host.name),
                    "add it to [allow] bridges in that agent's configuration",
                );
            } else if let Some(bridge) = wanted
                && !matches!(interfaces.exists(bridge).await, Ok(true))
            {
                refuse(
                    "bridge-missing",
                    format!("{} has no bridge {bridge}", host.name),
                    "make the bridge there, or rename it",
                );
            }
            let port = tap.port.as_ref().map(wire::Port::checked);
            if matches!(port, Some(None)) {
                refuse(
                    "protocol",
                    format!("interface {} is in no VLAN that there is", tap.ifname),
                    "update the agents",
                );
                continue;
            }
            if port.flatten().is_some_and(|port| port.has_vlans())
                && let Some(bridge) = wanted
                && !matches!(interfaces.looks_at_tags(bridge).await, Ok(true))
            {
                refuse(
                    "vlan-filtering",
                    format!(
                        "bridge {bridge} on {} does not look at VLAN tags, as it does at the source",
                        host.name
                    ),
                    "turn vlan_filtering on there",
                );
            }
            if let Some(name) = wanted
                && let Ok(Some(bridge)) = interfaces.describe(name).await
                && bridge.mtu < tap.mtu
            {
                refuse(
                    "mtu-too-small",
                    format!(
                        "bridge {} on {} passes frames of {} bytes, the VM's interface {} has {}",
                        tap.bridge, host.name, bridge.mtu, tap.ifname, tap.mtu
                    ),
                    "give the bridge there, and what it leads to, the same MTU",
                );
            }
            if let Ok(Some(there)) = interfaces.describe(&tap.ifname).await {
                let free = interfaces::is_free(&tap.ifname, tap.multi_queue).unwrap_or(false);
                if !free || there.bridge.as_deref() != wanted || self.forward.is_some() {
                    refuse(
                        "interface-taken",
                        format!(
                            "{} already has an interface {} that the VM cannot have",
                            host.name, tap.ifname
                        ),
                        "remove it there, or give the VM's tap another name",
                    );
                }
            }
        }
    }

    /// Makes those that are not there, and leaves them down.
    pub(super) async fn make_taps(&self, host: &Host, record: &mut Record) -> Result<(), Vec<Finding>> {
        if self.taps.is_empty() {
            return Ok(());
        }
        let failed = |e: &dyn std::error::Error| {
            vec![Finding::new("network", chain(e), "let the agent make interfaces (CAP_NET_ADMIN)")]
        };
        let interfaces = Interfaces::open().map_err(|e| failed(&e))?;
        for (number, tap) in self.taps.iter().enumerate() {
            if interfaces.exists(&tap.ifname).await.map_err(|e| failed(&e))? {
                continue;
            }
            // On record before it exists: a crash in between leaves nothing that nobody knows of.
            host.journal
                .amend(record, |now| now.made.taps.push(tap.ifname.clone()))
                .map_err(|e| failed(&e))?;
            let bridge = match &self.forward {
                Some(tunnels) => {
                    let made =
                        tunnels.make(&interfaces, &host.journal, record, (self.session, number), tap).await;
                    made.map_err(|e| failed(&e))?
                }
                None => tap.bridge.clone(),
            };
            let bridge = (!bridge.is_empty()).then_some(bridge.as_str());
            // Each takes 8 bytes, of every queue.
            let length = Some(tap.queue_length.min(MAX_QUEUE)).filter(|length| *length > 0);
            if let Some(macvtap) = &tap.macvtap {
                let made = macvtaps::make(tap, macvtap, length, &interfaces).await;
                made.map_err(|e| failed(&e))?;
                continue;
            }
            let owner = host.allow.other_user().map(qemu::User::uid);
            let made = interfaces.make(&tap.ifname, bridge, tap.mtu, length, tap.multi_queue, owner).await;
            made.map_err(|e| failed(&e))?;
            if let Some(port) = tap
                .port
                .as_ref()
                .and_then(wire::Port::checked)
                .filter(|_| bridge.is_some() && self.forward.is_none())
            {
                interfaces.set_port(&tap.ifname, &port).await.map_err(|e| failed(&e))?;
            }
        }
        Ok(())
    }
}

/// Whether this host lets a machine stay in its source's network.
fn examine_forwarding(host: &Host, tunnels: &Tunnels, findings: &mut Vec<Finding>) {
    let name = &host.name;
    if !host.allow.forward {
        findings.push(Finding::new(
            "forward-not-allowed",
            format!("{name} does not allow VMs that stay in their source's network"),
            format!("set forward = true in [allow] in the configuration of {name}"),
        ));
    }
    if tunnels.port != host.forward_port {
        findings.push(Finding::new(
            "forward-port",
            format!("{name} forwards by UDP port {}, the source by {}", host.forward_port, tunnels.port),
            "set the same [network] forward_port in the configuration of both agents",
        ));
    }
}
