//! Ending early: SIGINT and SIGTERM are noted, and every wait looks for the note, so that all that was made is taken away
//! by the same destructors as at a normal end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use tokio::signal::unix::{SignalKind, signal};

use crate::BenchError;

/// How soon a wait notices.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Whether somebody has asked for the end. Clones share the answer.
#[derive(Clone, Debug, Default)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Notes SIGINT and SIGTERM from now on, instead of dying of them.
    ///
    /// # Errors
    /// Where the system does not let signals be caught. To be called inside a tokio runtime.
    pub fn catch() -> std::io::Result<Self> {
        let interrupt = Self::default();
        for kind in [SignalKind::interrupt(), SignalKind::terminate()] {
            let mut signals = signal(kind)?;
            let noted = interrupt.clone();
            tokio::spawn(async move {
                while signals.recv().await.is_some() {
                    noted.0.store(true, Relaxed);
                }
            });
        }
        Ok(interrupt)
    }

    /// Goes on, unless it is to end.
    ///
    /// # Errors
    /// [`BenchError::Interrupted`]
    pub fn check(&self) -> Result<(), BenchError> {
        if self.0.load(Relaxed) { Err(BenchError::Interrupted) } else { Ok(()) }
    }

    /// Sleeps.
    ///
    /// # Errors
    /// [`BenchError::Interrupted`], at once.
    pub fn sleep(&self, time: Duration) -> Result<(), BenchError> {
        let start = Instant::now();
        loop {
            self.check()?;
            let left = time.saturating_sub(start.elapsed());
            if left.is_zero() {
                return Ok(());
            }
            thread::sleep(left.min(LOOK_EVERY));
        }
    }

    /// Waits until there is an answer.
    ///
    /// # Errors
    /// [`BenchError::Interrupted`], [`BenchError::Timeout`], or what the question fails with.
    pub fn wait<T>(
        &self,
        what: &str,
        within: Duration,
        mut ask: impl FnMut() -> Result<Option<T>, BenchError>,
    ) -> Result<T, BenchError> {
        let start = Instant::now();
        loop {
            if let Some(answer) = ask()? {
                return Ok(answer);
            }
            if start.elapsed() > within {
                return Err(BenchError::Timeout { what: what.to_owned(), waited: start.elapsed() });
            }
            self.sleep(LOOK_EVERY)?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_ends_with_its_answer_or_with_the_interruption() {
        let interrupt = Interrupt::default();
        let mut asked = 0;
        let answer = interrupt.wait("it", Duration::from_secs(60), || {
            asked += 1;
            Ok((asked == 3).then_some(asked))
        });
        assert_eq!(answer.unwrap(), 3);
        let other = interrupt.clone();
        other.0.store(true, Relaxed);
        assert!(matches!(interrupt.sleep(Duration::from_secs(3600)), Err(BenchError::Interrupted)));
        let never = interrupt.wait("it", Duration::from_secs(3600), || Ok(None::<()>));
        assert!(matches!(never, Err(BenchError::Interrupted)));
    }

    #[test]
    fn what_does_not_happen_is_named() {
        let never = Interrupt::default().wait("the moon", Duration::ZERO, || Ok(None::<()>));
        assert!(never.unwrap_err().to_string().ends_with("for the moon"));
    }
}
