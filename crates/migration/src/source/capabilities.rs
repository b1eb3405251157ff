//! Capabilities of QEMU's migration that ours turns on.

use qemu::Qmp;

use finding::chain;

/// QEMU's stream carries no RAM, and waits before it pauses the guest for good.
pub(super) const DEVICES_ONLY: [&str; 3] = ["x-ignore-shared", "pause-before-switchover", "events"];
/// The capability by which QEMU slows a guest that it cannot follow.
pub(super) const THROTTLES: &str = "auto-converge";

/// Turns off what an agent of an earlier version has turned on, which has not put on record what was there before.
pub(crate) async fn reset(qmp: &Qmp) {
    let all = DEVICES_ONLY.into_iter().chain([THROTTLES]);
    let off: Vec<_> = all.map(|name| (name, false)).collect();
    if let Err(e) = qmp.set_capabilities(&off).await {
        tracing::warn!(error = chain(&e), "QEMU keeps its migration capabilities");
    }
}
