//! How long a guest waits for its disk, as its client sees it.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use testbed::Journal;

/// How often it is looked.
const POLL: Duration = Duration::from_millis(5);

/// Watches a journal whose records the guest writes and syncs one by one, and acknowledges.
#[derive(Debug)]
pub struct Writes {
    journal: Arc<Journal>,
    longest: Arc<Mutex<Duration>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Writes {
    /// Begins to watch.
    ///
    /// # Panics
    /// If there is no thread to be had.
    #[must_use]
    pub fn watch(journal: Journal) -> Writes {
        let (journal, longest, stop) = (Arc::new(journal), Arc::<Mutex<Duration>>::default(), Arc::default());
        let (watched, told, stopped) = (Arc::clone(&journal), Arc::clone(&longest), Arc::clone(&stop));
        let thread = thread::spawn(move || {
            let (mut last, mut since) = (watched.acknowledged(), Instant::now());
            while !AtomicBool::load(&stopped, Relaxed) {
                thread::sleep(POLL);
                let now = watched.acknowledged();
                let mut longest = told.lock().unwrap_or_else(PoisonError::into_inner);
                *longest = since.elapsed().max(*longest);
                if now != last {
                    (last, since) = (now, Instant::now());
                }
            }
        });
        Writes { journal, longest, stop, thread: Some(thread) }
    }

    /// The journal.
    #[must_use]
    pub fn journal(&self) -> &Journal {
        &self.journal
    }

    /// The longest time without a record since this was last asked.
    #[must_use]
    pub fn longest_wait(&self) -> Duration {
        std::mem::take(&mut *self.longest.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for Writes {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
