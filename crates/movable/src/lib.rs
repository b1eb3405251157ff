//! Whether a machine can be moved at all, as either host of a migration finds it, and where its memory is for that.
//!
//! * [`compatibility`] is told by its command line and the version of its QEMU; [`blockers`] by what QEMU itself says.
//! * [`confinement`] are the seccomp filters that QEMU is under, through which its memory is to be tracked.
//! * [`nested`] is what a guest's own guests do to its memory that is not seen.
//! * [`ram`] is where a mirror finds that memory.
//!
//! What is to become of the machine, and where it is to go, is not known here.

pub mod blockers;
pub mod compatibility;
pub mod confinement;
pub mod nested;
pub mod ram;

use finding::Finding;
use host::{Host, Vm};

/// What would keep a machine of this host from leaving it, as far as that can be told without a destination and is not refused when it is
/// taken in: devices that QEMU cannot migrate, disks that are reached in a way that is not known to work, memory that cannot be tracked, or
/// not all of it.
pub async fn tied(host: &Host, vm: &Vm) -> Vec<Finding> {
    let mut findings = blockers::on_command_line(&vm.spec);
    // A QEMU that does not answer is told of elsewhere.
    findings.extend(blockers::told_by(&vm.qmp, &vm.spec).await.unwrap_or_default());
    findings.extend(nested::check(&vm.qmp).await.unwrap_or_default());
    findings.extend(confinement::check(host, &vm.record, &vm.spec).await);
    findings
}
