//! What a guest's network must not have noticed.

use testbed::client::{EchoReport, HeartbeatReport};

/// Asserts that every connection lives and has carried its bytes unchanged.
///
/// # Panics
/// If not.
#[track_caller]
pub fn unbroken(echo: &EchoReport) {
    assert!(echo.connections > 0 && echo.bytes > 0, "{echo:?}");
    assert_eq!((echo.mismatches, echo.broken.as_slice()), (0, &[][..]), "{echo:?}");
}

/// Asserts that every frame came back, and once.
///
/// # Panics
/// If not.
#[track_caller]
pub fn all_came_once(frames: &HeartbeatReport) {
    assert!(frames.sent > 0, "{frames:?}");
    assert_eq!((frames.lost, frames.repeated), (0, 0), "{frames:?}");
}
