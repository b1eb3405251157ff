//! A look at something again and again, while something else is done.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::{self, JoinHandle};

/// A thread that looks again and again until it is told to stop, and then gives back what it has seen.
#[derive(Debug)]
pub struct Watch<T> {
    stop: Arc<AtomicBool>,
    looks: JoinHandle<T>,
}

impl<T: Send + 'static> Watch<T> {
    /// From now on.
    pub fn start(look: impl FnOnce(&AtomicBool) -> T + Send + 'static) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        Self { stop, looks: thread::spawn(move || look(&stopped)) }
    }

    /// What it has seen.
    ///
    /// # Panics
    /// As it panicked.
    pub fn stop(self) -> T {
        self.stop.store(true, Relaxed);
        self.looks.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}
