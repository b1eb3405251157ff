//! Taps of a machine that is to come: whether there is a place for them, and made.

use super::{Request, macvtaps};
use crate::failure::{Finding, chain};
use crate::host::Host;
use crate::tap::port::Port;
use crate::tap::{self, Interfaces};
use crate::vm::Record;

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
        for tap in &self.taps {
            let mut refuse = |kind: &str, message: String, hint: &str| {
                findings.push(Finding::new(kind, message, hint));
            };
            if tap.ifname.is_empty() || tap.ifname.len() > tap::MAX_NAME {
                refuse("protocol", format!("{:?} cannot name an interface", tap.ifname), "update the agents");
                continue;
            }
            if let Some(macvtap) = &tap.macvtap {
                findings.extend(macvtaps::examine(tap, macvtap, host, &interfaces).await);
                continue;
            }
            if !tap.bridge.is_empty() && !host.allow.bridges.contains(&tap.bridge) {
                refuse(
                    "bridge-not-allowed",
                    format!("{} does not allow bridge {}", host.name, tap.bridge),
                    "add it to [allow] bridges in that agent's configuration",
                );
            } else if !tap.bridge.is_empty() && !matches!(interfaces.exists(&tap.bridge).await, Ok(true)) {
                refuse(
                    "bridge-missing",
                    format!("{} has no bridge {}", host.name, tap.bridge),
                    "make the bridge there, or rename it",
                );
            }
            let port = tap.port.as_ref().map(Port::decode);
            if matches!(port, Some(None)) {
                refuse(
                    "protocol",
                    format!("interface {} is in no VLAN that there is", tap.ifname),
                    "update the agents",
                );
                continue;
            }
            if port.flatten().is_some_and(|port| port.has_vlans())
                && !matches!(interfaces.looks_at_tags(&tap.bridge).await, Ok(true))
            {
                refuse(
                    "vlan-filtering",
                    format!(
                        "bridge {} on {} does not look at VLAN tags, as it does at the source",
                        tap.bridge, host.name
                    ),
                    "turn vlan_filtering on there",
                );
            }
            if let Ok(Some(bridge)) = interfaces.describe(&tap.bridge).await
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
                let wanted = (!tap.bridge.is_empty()).then_some(tap.bridge.as_str());
                let free = tap::is_free(&tap.ifname, tap.multi_queue).unwrap_or(false);
                if !free || there.bridge.as_deref() != wanted {
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
        for tap in &self.taps {
            if interfaces.exists(&tap.ifname).await.map_err(|e| failed(&e))? {
                continue;
            }
            // On record before it exists: a crash in between leaves nothing that nobody knows of.
            record.made.taps.push(tap.ifname.clone());
            host.journal.update(record).map_err(|e| failed(&e))?;
            let bridge = (!tap.bridge.is_empty()).then_some(tap.bridge.as_str());
            // Each takes 8 bytes, of every queue.
            let length = Some(tap.queue_length.min(MAX_QUEUE)).filter(|length| *length > 0);
            if let Some(macvtap) = &tap.macvtap {
                let made = macvtaps::make(tap, macvtap, length, &interfaces).await;
                made.map_err(|e| failed(&e))?;
                continue;
            }
            let made = interfaces.make(&tap.ifname, bridge, tap.mtu, length, tap.multi_queue).await;
            made.map_err(|e| failed(&e))?;
            if let Some(port) = tap.port.as_ref().and_then(Port::decode).filter(|_| bridge.is_some()) {
                interfaces.set_port(&tap.ifname, &port).await.map_err(|e| failed(&e))?;
            }
        }
        Ok(())
    }
}
