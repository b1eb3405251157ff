//! What ties a machine to its host by its command line and by the version of QEMU, as either host of a migration finds it.

use qemu::qmp::Version;
use qemu::{NicKind, Qmp, Spec};

use crate::blockers;
use finding::Finding;

/// The names of the features that a machine's CPUs have.
///
/// # Errors
/// If QEMU does not answer.
pub async fn features_on(qmp: &Qmp) -> Result<Vec<String>, qemu::QmpError> {
    Ok(qmp.cpu_features().await?.into_iter().filter(|(_, on)| *on).map(|(name, _)| name).collect())
}

/// The oldest QEMU whose stream without shared RAM, and whose pause before it, are known to work.
const OLDEST_QEMU: (u32, u32) = (7, 2);

/// A QEMU that is too old, on either side.
#[must_use]
pub fn too_old(host: &str, version: &Version) -> Option<Finding> {
    let (major, minor) = OLDEST_QEMU;
    ((version.major, version.minor) < OLDEST_QEMU).then(|| {
        Finding::new(
            "qemu-version",
            format!("QEMU on {host} is {version}, older than {major}.{minor}"),
            "run the VM with a newer QEMU",
        )
    })
}

/// What ties a machine to this host. With `accept_disconnect`, but for networks whose connections end with the move.
#[must_use]
pub fn unmovable(spec: &Spec, accept_disconnect: bool) -> Vec<Finding> {
    let device = |device: String| {
        Finding::new(
            "host-device",
            format!("{device} is tied to this host"),
            "detach it, or start the VM without it",
        )
    };
    let nic = |nic: qemu::Nic| match nic.kind {
        NicKind::User | NicKind::Socket(_) if accept_disconnect => None,
        NicKind::User => Some(Finding::new(
            "user-networking",
            format!("network {} is user-mode: its connections would break", nic.netdev),
            "use a tap on a bridge, or `-nic none`, or accept that with --accept-disconnect",
        )),
        NicKind::Socket(kind) => Some(Finding::new(
            "network-kind",
            format!("network {} is of kind {kind}: its connections would break", nic.netdev),
            "use a tap on a bridge, or accept that with --accept-disconnect",
        )),
        NicKind::Vhost(kind) | NicKind::Other(kind) => Some(Finding::new(
            "network-kind",
            format!("network {} is of kind {kind}, which cannot be carried over", nic.netdev),
            "use a tap on a bridge",
        )),
        _ => None,
    };
    let mut findings: Vec<Finding> = spec.host_devices().into_iter().map(device).collect();
    findings.extend(blockers::on_command_line(spec));
    findings.extend(spec.nics().into_iter().filter_map(nic));
    findings
}
