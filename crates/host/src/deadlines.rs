//! How long the end of a process is waited for.

use std::time::Duration;

/// Until QEMU has ended that was asked to.
pub const QUIT_GRACE: Duration = Duration::from_secs(5);
/// Until a guest has powered off that was asked to.
pub const POWER_OFF: Duration = Duration::from_secs(30);
/// Until a process is gone that was killed.
pub const KILL_GRACE: Duration = Duration::from_secs(5);
