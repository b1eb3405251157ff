//! Lets work on the disks happen, or not.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

/// Open at first.
#[derive(Debug, Default)]
pub struct Gate {
    paused: AtomicBool,
    closed: RwLock<bool>,
}

/// A piece of work that was let in; over when this is dropped.
#[derive(Debug)]
pub struct Inside<'a>(#[expect(dead_code, reason = "held, not read")] RwLockReadGuard<'a, bool>);

impl Gate {
    /// For one piece of work, if any is wanted.
    pub fn enter(&self) -> Option<Inside<'_>> {
        if self.paused.load(Relaxed) {
            return None;
        }
        let closed = self.closed.read().unwrap_or_else(PoisonError::into_inner);
        (!*closed).then_some(Inside(closed))
    }

    /// Lets nothing in until told otherwise. What is inside is not waited for.
    pub fn pause(&self, paused: bool) {
        self.paused.store(paused, Relaxed);
    }

    /// Lets nothing in any more, and waits for what is inside.
    pub fn close(&self) {
        *self.closed.write().unwrap_or_else(PoisonError::into_inner) = true;
    }

    /// Whether it was closed.
    pub fn is_closed(&self) -> bool {
        // Somebody who waits to close it is not to be waited for.
        self.closed.try_read().is_ok_and(|closed| *closed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_ends_and_a_close_does_not() {
        let gate = Gate::default();
        assert!(gate.enter().is_some() && !gate.is_closed());
        gate.pause(true);
        assert!(gate.enter().is_none());
        gate.pause(false);
        assert!(gate.enter().is_some());
        gate.close();
        gate.pause(false);
        assert!(gate.enter().is_none() && gate.is_closed());
    }

    #[test]
    fn closing_waits_for_what_is_inside() {
        let gate = Gate::default();
        let inside = gate.enter().unwrap();
        std::thread::scope(|scope| {
            let closing = scope.spawn(|| gate.close());
            std::thread::sleep(std::time::Duration::from_millis(50));
            assert!(!closing.is_finished());
            drop(inside);
        });
        assert!(gate.is_closed());
    }
}
