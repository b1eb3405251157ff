//! Whether an event is one that a command of ours has brought about.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

/// By how much QEMU's clock, which is ours, can be behind what we have read of it before. More is a clock that was set meanwhile; then the
/// order in which things come counts alone.
const CLOCK_SET: Duration = Duration::from_secs(1);

/// An event that a command of ours is to bring about.
#[derive(Debug, Default)]
pub(super) struct Expecting {
    awaited: Mutex<Option<Awaited>>,
}

#[derive(Debug)]
struct Awaited {
    event: &'static str,
    /// When the command was given to the socket. None: not yet.
    written: Option<SystemTime>,
    /// How often it has come since.
    seen: u32,
}

impl Expecting {
    /// A command is about to be sent.
    pub(super) fn begin(&self, event: &'static str) {
        *self.lock() = Some(Awaited { event, written: None, seen: 0 });
    }

    /// It is being written now.
    pub(super) fn written(&self) {
        if let Some(awaited) = self.lock().as_mut() {
            awaited.written = Some(SystemTime::now());
        }
    }

    /// Whether an event is the one that the command has brought about: of that name, and not from before the command was written,
    /// neither by when it was read nor by when QEMU says that it happened.
    pub(super) fn is(&self, event: &str, happened: Option<SystemTime>) -> bool {
        let mut awaited = self.lock();
        let Some(awaited) = awaited.as_mut().filter(|awaited| awaited.event == event) else { return false };
        let Some(written) = awaited.written else { return false };
        let before = happened.and_then(|happened| written.duration_since(happened).ok());
        // QEMU tells microseconds.
        let is_older = |before: Duration| before > Duration::from_micros(1) && before < CLOCK_SET;
        if before.is_some_and(is_older) {
            return false;
        }
        awaited.seen += 1;
        true
    }

    /// The command was answered. Whether it has brought the event about.
    pub(super) fn end(&self) -> bool {
        self.lock().take().is_some_and(|awaited| awaited.seen == 1)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Awaited>> {
        // Every change is a single assignment.
        self.awaited.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_was_set_does_not_make_our_own_stop_another_s() {
        let expecting = Expecting::default();
        expecting.begin("STOP");
        assert!(!expecting.is("STOP", Some(SystemTime::now())), "nothing was written yet");
        expecting.written();
        assert!(!expecting.is("RESUME", None));
        assert!(expecting.is("STOP", Some(SystemTime::now() - Duration::from_secs(3600))));
        assert!(expecting.end());
        expecting.begin("STOP");
        expecting.written();
        assert!(expecting.is("STOP", None), "QEMU could not read the clock");
        assert!(expecting.is("STOP", Some(SystemTime::now())));
        assert!(!expecting.end(), "two of them: one was not ours");
    }
}
