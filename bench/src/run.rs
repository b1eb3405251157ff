//! A run and its end: SIGINT and SIGTERM are noted, and every wait looks for the note, so that all that was made is taken away
//! by the same destructors as at a normal end.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{SignalKind, signal};

use crate::error::BenchError;

/// How soon a wait notices.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Exit status of a program that was interrupted, as a shell has it for SIGINT.
const INTERRUPTED: u8 = 130;
/// Exit status after bad usage.
const USAGE: u8 = 2;

/// What waits in a run, and whether somebody has asked for its end. Clones share the answer.
#[derive(Clone, Debug)]
pub struct Run {
    runtime: Arc<Runtime>,
    ends: Arc<AtomicBool>,
}

impl Run {
    /// One that only ends by itself.
    pub fn new() -> Result<Self, BenchError> {
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = Arc::new(runtime.map_err(BenchError::file("runtime"))?);
        Ok(Self { runtime, ends: Arc::default() })
    }

    /// The run of a whole program, from its beginning to its exit status: what it does says whether it has succeeded. SIGINT and
    /// SIGTERM are noted from now on, instead of dying of them.
    pub fn main(act: impl FnOnce(&Self) -> Result<bool, BenchError>) -> ExitCode {
        let ended = Self::new().and_then(|run| {
            if let Err(error) = run.catch() {
                eprintln!(
                    "warning: signals cannot be caught, an interrupted run is cleaned up by the next: {error}"
                );
            }
            act(&run)
        });
        match ended {
            Ok(true) => ExitCode::SUCCESS,
            Ok(false) => ExitCode::FAILURE,
            Err(BenchError::Interrupted) => INTERRUPTED.into(),
            Err(error) => {
                eprintln!("error: {}", error.chain());
                if matches!(error, BenchError::Usage(_)) { USAGE.into() } else { ExitCode::FAILURE }
            }
        }
    }

    fn catch(&self) -> std::io::Result<()> {
        let _inside = self.runtime.enter();
        for kind in [SignalKind::interrupt(), SignalKind::terminate()] {
            let mut signals = signal(kind)?;
            let ends = Arc::clone(&self.ends);
            self.runtime.spawn(async move {
                while signals.recv().await.is_some() {
                    ends.store(true, Relaxed);
                }
            });
        }
        Ok(())
    }

    /// Waits for something that does not take long.
    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(future)
    }

    /// Goes on, unless it is to end.
    pub fn check(&self) -> Result<(), BenchError> {
        if self.ends.load(Relaxed) { Err(BenchError::Interrupted) } else { Ok(()) }
    }

    /// Sleeps, until it is to end.
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

    /// Waits until there is an answer, or none in time.
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
        let run = Run::new().unwrap();
        let mut asked = 0;
        let answer = run.wait("it", Duration::from_secs(60), || {
            asked += 1;
            Ok((asked == 3).then_some(asked))
        });
        assert_eq!(answer.unwrap(), 3);
        let other = run.clone();
        other.ends.store(true, Relaxed);
        assert!(matches!(run.sleep(Duration::from_secs(3600)), Err(BenchError::Interrupted)));
        let never = run.wait("it", Duration::from_secs(3600), || Ok(None::<()>));
        assert!(matches!(never, Err(BenchError::Interrupted)));
    }

    #[test]
    fn what_does_not_happen_is_named() {
        let never = Run::new().unwrap().wait("the moon", Duration::ZERO, || Ok(None::<()>));
        assert!(never.unwrap_err().to_string().ends_with("for the moon"));
    }
}
