//! A machine stopped by its user.

use qemu::QmpError;

use super::forget::{Forgotten, forget};
use crate::deadlines::POWER_OFF;
use crate::host::Host;
use crate::vm::Vm;
use finding::Finding;

/// Ends a machine: asks the guest to power off, or with `force` ends QEMU at once.
///
/// # Errors
/// [`QmpError`] when QEMU cannot be told; the machine then still runs.
pub async fn stop(host: &Host, vm: &Vm, force: bool) -> Result<Stopped, QmpError> {
    if let Some(process) = vm.record.process.as_ref().filter(|_| !force) {
        vm.qmp.execute_raw("system_powerdown", serde_json::json!({})).await?;
        if !process.wait_for_end(POWER_OFF).await {
            return Ok(Stopped::StillRuns);
        }
    }
    Ok(match forget(host, &vm.record, Some(&vm.qmp)).await {
        Forgotten::Done | Forgotten::Changed => Stopped::Ended,
        Forgotten::Lingers(why) => Stopped::Lingers(why),
    })
}

/// How [`stop`] ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stopped {
    /// The machine is gone.
    Ended,
    /// The guest did not follow the request to power off.
    StillRuns,
    /// A process of it does not end, or nobody can tell whether it has.
    Lingers(Finding),
}
