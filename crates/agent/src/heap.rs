//! Memory that migrations have taken, given back once they are over.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Several migrations that end soon after each other are one.
const SOON: Duration = Duration::from_secs(1);

/// Gives memory that is free back to the system, soon.
pub(crate) fn give_back() {
    static DUE: AtomicBool = AtomicBool::new(false);
    if DUE.swap(true, Ordering::Relaxed) {
        return;
    }
    tokio::spawn(async {
        tokio::time::sleep(SOON).await;
        DUE.store(false, Ordering::Relaxed);
        let _ = tokio::task::spawn_blocking(mirror::heap::give_back).await;
    });
}
