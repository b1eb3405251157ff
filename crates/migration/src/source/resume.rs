//! QEMU's way back from a switch-over that does not come about.

use std::time::{Duration, Instant};

use protocol::deadlines::RESUME;
use qemu::{Qmp, QmpError};

use finding::chain;
use host::handed_over;

/// Between looks at a QEMU that is going back.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// Brings a machine that a switch-over has paused back to running. Nothing else may have been told to run it. A migration that there may be
/// of one whose devices are saved `alone` is not ours.
pub(crate) async fn resume_here(qmp: &Qmp, alone: bool) -> Result<(), QmpError> {
    if !alone {
        end_migration(qmp, Instant::now() + RESUME).await?;
        return run_here(qmp).await;
    }
    run_here(qmp).await
}

/// Takes out of a machine's QEMU what says that it is about to leave, and what its devices were saved to: it stays, and runs.
pub(crate) async fn unmark(qmp: &Qmp) {
    if let Err(e) = handed_over::unmark(qmp).await {
        tracing::warn!(error = chain(&e), "QEMU keeps the mark of a hand-over that did not come about");
    }
    if let Err(e) = qmp.close_saved_devices().await {
        tracing::warn!(
            error = chain(&e),
            "QEMU keeps the state of its devices that was saved for a hand-over"
        );
    }
}

async fn run_here(qmp: &Qmp) -> Result<(), QmpError> {
    let deadline = Instant::now() + RESUME;
    loop {
        if qmp.status().await?.running {
            return Ok(());
        }
        match qmp.cont().await {
            // QEMU refuses while the last of its migration is being taken down.
            Err(e) if Instant::now() < deadline => {
                tracing::debug!(error = chain(&e), "QEMU is not yet ready to resume");
                tokio::time::sleep(LOOK_AGAIN).await;
            }
            Err(e) => return Err(e),
            Ok(()) if Instant::now() < deadline => tokio::time::sleep(LOOK_AGAIN).await,
            // It was told, and stopped again: a full disk, a panic. That is the guest's state, not the migration's.
            Ok(()) => return Ok(()),
        }
    }
}

/// Ends a migration of ours that may be under way.
async fn end_migration(qmp: &Qmp, deadline: Instant) -> Result<(), QmpError> {
    let migration = qmp.query_migrate().await?.status;
    if migration.is_none_or(|status| is_over(&status)) {
        return Ok(());
    }
    // Whatever it says, `cont` decides.
    let _ = qmp.migrate_cancel().await;
    while qmp.query_migrate().await?.status.is_some_and(|status| !is_over(&status)) {
        if Instant::now() > deadline {
            tracing::error!("QEMU does not end its migration");
            break;
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
    Ok(())
}

/// Ends a migration of ours of a guest that somebody else has stopped meanwhile, and leaves it so. There is none of ours where devices are
/// saved `alone`.
pub(crate) async fn leave_stopped(qmp: &Qmp, alone: bool) -> Result<(), QmpError> {
    if alone {
        return Ok(());
    }
    end_migration(qmp, Instant::now() + RESUME).await
}

/// Whether what QEMU says of a migration is that there is none under way.
pub(super) fn is_over(status: &str) -> bool {
    ["completed", "failed", "cancelled", "none"].contains(&status)
}
