//! What QEMU says of itself: its state when asked, and what happens to it by itself.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::time::Duration;

use ownership::VmName;
use qemu::Qmp;
use tokio::time::{Instant, MissedTickBehavior};

use crate::api::types::{EventKind, VmState};

/// How long QEMU may take to say how it is. Its main thread may be busy, but not for this long.
const ANSWER: Duration = Duration::from_secs(1);

/// How often a QEMU is asked whether its guest runs while nobody wants to know, and how long after it came under the agent's care at the
/// earliest: a list of many then need not ask each of them.
const ASKED_EVERY: Duration = Duration::from_secs(10);
pub(crate) const ASKED_FIRST: Duration = Duration::from_secs(5);

/// For how long QEMU is not asked again whether its guest runs, in a list of all, if it has told nothing since. One that hangs is listed as
/// if it did not for no longer than that.
const KNOWN: Duration = Duration::from_secs(20);

/// Process id of a QEMU.
pub(crate) fn pid(process: &qemu::Process) -> u32 {
    process.pid
}

/// What the machine does now, with QEMU's own word for it.
pub(crate) async fn state(qmp: &Qmp) -> (VmState, Option<String>) {
    match tokio::time::timeout(ANSWER, qmp.status()).await {
        Ok(Ok(state)) => (state_of(&state.status), Some(state.status)),
        Ok(Err(_)) | Err(_) => (VmState::Unreachable, None),
    }
}

/// The same, if it need not be asked for it: a moment ago the machine ran, and nothing has happened to it since.
pub(crate) fn known(qmp: &Qmp) -> Option<(VmState, Option<String>)> {
    qmp.is_known_to_run(KNOWN).then(|| (state_of(RUNNING), Some(RUNNING.to_owned())))
}

/// The run state of a machine that runs.
const RUNNING: &str = "running";

/// QEMU's run states, from `qapi/run-state.json` of QEMU 10.
fn state_of(status: &str) -> VmState {
    match status {
        RUNNING => VmState::Running,
        "guest-panicked" => VmState::Panicked,
        "io-error" | "internal-error" | "watchdog" => VmState::Broken,
        // debug, inmigrate, postmigrate, prelaunch, finish-migrate, paused, restore-vm, save-vm, shutdown,
        // suspended, colo: none of them runs the guest, and none is an accident.
        _ => VmState::Paused,
    }
}

/// Asks QEMU now and then, whenever that is welcome, without an end. Each machine has a time of its own for it, so that not all are asked
/// at once.
pub(crate) async fn keep_asking(qmp: &Qmp, name: &VmName, is_welcome: impl Fn() -> bool) {
    let mut hasher = DefaultHasher::new();
    name.hash(&mut hasher);
    let share = hasher.finish() as f64 / u64::MAX as f64;
    let first = Instant::now() + ASKED_FIRST + ASKED_EVERY.mul_f64(share);
    let mut times = tokio::time::interval_at(first, ASKED_EVERY);
    times.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        times.tick().await;
        if is_welcome() {
            // The connection keeps what it answers.
            let _ = state(qmp).await;
        }
    }
}

/// Tells what happens to the machine until QEMU's monitor closes.
pub(crate) async fn listen(qmp: &Qmp, tell: impl Fn(EventKind)) {
    let mut events = qmp.events();
    loop {
        match events.recv().await {
            Ok(event) => {
                // A moment's stop for a scan is nothing that happens to the machine.
                if let Some(kind) = kind(&event.name).filter(|_| !event.ours) {
                    tell(kind);
                }
            }
            Err(tokio::sync::broadcast::error::RecvError::Lagged(missed)) => {
                tracing::debug!(missed, "events of QEMU came faster than they were looked at");
            }
            Err(tokio::sync::broadcast::error::RecvError::Closed) => return,
        }
    }
}

/// Which of our events one of QEMU's is.
fn kind(name: &str) -> Option<EventKind> {
    match name {
        "STOP" => Some(EventKind::VmPaused),
        "RESUME" => Some(EventKind::VmResumed),
        "GUEST_PANICKED" => Some(EventKind::VmPanicked),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_that_does_not_run_is_never_called_running() {
        for status in
            ["paused", "prelaunch", "inmigrate", "postmigrate", "finish-migrate", "shutdown", "suspended"]
        {
            assert_eq!(state_of(status), VmState::Paused, "{status}");
        }
        assert_eq!(state_of("running"), VmState::Running);
        assert_eq!(state_of("guest-panicked"), VmState::Panicked);
        assert_eq!(state_of("io-error"), VmState::Broken);
    }
}
