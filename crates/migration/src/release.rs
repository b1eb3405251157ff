//! A machine that stays in the network of the host that it has left is taken out of that, by either of the two.

use crate::linked::LinkedHost;
use crate::source::unforward;
use destination::forwarded;
use finding::{Finding, kind};
use host::Record;
use ownership::{Ownership, VmName};

/// What the end of a forwarding came to.
#[derive(Debug, Clone, PartialEq)]
pub enum Released {
    /// The machine is in the network of its new host, and nothing comes for it here any more.
    Whole,
    /// This host has done its part only: the other, of that name, has not been told.
    Here(String),
}

/// Ends the forwarding of a machine. At the host that it has left: the one that has it is told, and takes it into its own network; what
/// comes for it here gets there no more. At the host that has it: the same, and the one that it has left is not told.
///
/// With `force` this host does its part whatever the other says.
///
/// # Errors
/// Why not.
pub async fn forwarding(host: &LinkedHost, vm: &VmName, force: bool) -> Result<Released, Finding> {
    match host.journal.get(vm) {
        Some(record) if !record.made.forwarded.is_empty() && record.ownership == Ownership::Owner => {
            let former = record.arrived_from.clone().unwrap_or_default();
            forwarded::release(host, record, force).await?;
            Ok(Released::Here(former))
        }
        Some(Record { ownership: Ownership::HandedOver { to, .. }, .. }) => Err(Finding::new(
            "uncertain",
            format!("nobody knows yet whether {vm} runs on {to}"),
            "wait until that is settled, or settle it with `vmirror resolve`",
        )),
        None if host.forwards.of(vm).is_some() => forwarding_there(host, vm, force).await,
        _ => Err(Finding::new(
            kind::NOT_FORWARDED,
            format!("nothing that comes for {vm} is forwarded from here or to here"),
            "`vmirror list` shows what is",
        )),
    }
}

async fn forwarding_there(host: &LinkedHost, vm: &VmName, force: bool) -> Result<Released, Finding> {
    let mut released = Released::Whole;
    for forward in host.forwards.all().into_iter().filter(|forward| forward.vm == *vm) {
        match unforward(host, &forward).await {
            Ok(()) => {}
            Err(finding) if force => {
                tracing::warn!(vm = %vm, to = forward.to, why = finding.message, "released here only");
                released = Released::Here(forward.to);
            }
            Err(finding) => return Err(finding),
        }
    }
    host.forwards.end(vm).await;
    Ok(released)
}
