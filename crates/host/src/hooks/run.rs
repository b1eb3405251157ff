//! The operator's hooks, run for a machine with what this host knows of it.

use qemu::Spec;
use uuid::Uuid;

use crate::hooks::{Hook, HookContext, HookInterface, Side};
use crate::host::Host;
use crate::vm::Record;
use finding::{Finding, chain};
use network::interfaces::Interfaces;
use ownership::Ownership;

/// Runs a hook for a machine that moves; nothing where there is none.
///
/// # Errors
/// What the operator has to see to.
pub async fn run(host: &Host, hook: Hook, record: &Record, rehearsal: bool) -> Result<(), Finding> {
    if host.hooks.directory.is_none() {
        return Ok(());
    }
    let Some((session, peer, side)) = about(record) else { return Ok(()) };
    let interfaces = interfaces(record).await;
    let name = &host.name;
    let context =
        HookContext { vm: &record.name, host: name, peer, session, side, rehearsal, interfaces: &interfaces };
    host.hooks.run(hook, &context).await.map_err(|e| e.finding(name))
}

/// The migration that a machine is in, with whom, and on which side of it this host is.
fn about(record: &Record) -> Option<(Uuid, &str, Side)> {
    match &record.ownership {
        Ownership::Incoming { session, from, .. } => Some((*session, from, Side::Destination)),
        Ownership::HandedOver { session, to, .. } => Some((*session, to, Side::Source)),
        Ownership::Owner => Some((record.arrived_by?, record.arrived_from.as_deref()?, Side::Destination)),
    }
}

/// A machine's taps as they are.
async fn interfaces(record: &Record) -> Vec<HookInterface> {
    let nics = Spec::parse(&record.argv).map(|spec| spec.nics()).unwrap_or_default();
    let kernel =
        Interfaces::open().inspect_err(|e| tracing::warn!(error = chain(e), "a hook is not told of taps"));
    let Ok(kernel) = kernel else { return Vec::new() };
    let mut interfaces = Vec::new();
    for nic in nics {
        let Some(ifname) = record.interface(&nic) else { continue };
        let Ok(Some(tap)) = kernel.describe(&ifname).await else { continue };
        interfaces.push(HookInterface {
            netdev: nic.netdev,
            ifname,
            mac: nic.mac,
            bridge: tap.bridge,
            mtu: tap.mtu,
        });
    }
    interfaces
}
