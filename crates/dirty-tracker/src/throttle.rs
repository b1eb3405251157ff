//! Threads of another process made to stand still for a part of the time.

use crate::inject::ptrace::{Stop, Thread};
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// No stop is meant to be longer than this. It is what a guest is asked to bear at a time.
pub const LONGEST_STOP: Duration = Duration::from_millis(10);
/// What a stop is planned for at most: half of that, as what runs on this host besides may hold the end of it up.
const PLANNED_STOP: Duration = Duration::from_millis(5);
/// The least time between two stops: with [`PLANNED_STOP`], 99 % of the time is stood still.
const LEAST_RUN: Duration = Duration::from_micros(50);
/// How long to wait between looks whether a thread has stopped.
const LOOK: Duration = Duration::from_micros(50);
/// The same for a thread that did not stop in time, and that nobody waits for.
const GLANCE: Duration = Duration::from_millis(1);

/// Why threads cannot be slowed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ThrottleError {
    /// The kernel lets nobody, or not us, stop it.
    #[error("not permitted to stop thread {thread}: is a debugger attached, or is it another user's?")]
    NotPermitted {
        /// The thread.
        thread: u32,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// No thread could be started here.
    #[error("cannot start the thread that slows others")]
    Start(#[source] io::Error),
}

/// How much was stood still.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slowed {
    /// How often.
    pub stops: u64,
    /// All stops together.
    pub stopped: Duration,
    /// The longest one, from the first thread asked to the last one let go.
    pub longest: Duration,
}

/// Stops threads, a few milliseconds at a time, for a share of the time that can be changed. They notice nothing but
/// the time; signals reach them after the stop.
///
/// They are let go when it is dropped, or by the kernel when this program ends, however it ends.
#[derive(Debug)]
pub struct Throttle {
    shared: Arc<Shared>,
    worker: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// Of the time, between 0 and 0.99.
    share: f64,
    ended: bool,
    slowed: Slowed,
}

impl Throttle {
    /// Slows threads of a process, by their numbers. `share` is that of the time in which they are to stand still; 0.99 is
    /// the most.
    ///
    /// # Errors
    /// [`ThrottleError`] when the first stop fails. A thread that ends later is simply not stopped any more.
    pub fn start(threads: &[u32], share: f64) -> Result<Self, ThrottleError> {
        let mut threads: Vec<u32> = threads.to_vec();
        threads.sort_unstable();
        threads.dedup();
        let state = State { share: bounded(share), ended: false, slowed: Slowed::default() };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let working = Arc::clone(&shared);
        let (tell, first) = std::sync::mpsc::channel();
        // All of it on one thread: only it is then the others' tracer.
        let worker = std::thread::Builder::new()
            .name("throttle".into())
            .spawn(move || {
                // So that the end of a stop is not late; a refusal costs nothing but that.
                let _ = rustix::process::nice(-10);
                work(&working, threads, |outcome| drop(tell.send(outcome)));
            })
            .map_err(ThrottleError::Start)?;
        let throttle = Self { shared, worker: Some(worker) };
        match first.recv() {
            Ok(Err(error)) => Err(error),
            _ => Ok(throttle),
        }
    }

    /// Changes the share of the time in which the threads stand still.
    pub fn set(&self, share: f64) {
        self.shared.lock().share = bounded(share);
        self.shared.changed.notify_all();
    }

    /// The share now.
    #[must_use]
    pub fn share(&self) -> f64 {
        self.shared.lock().share
    }

    /// How much they have stood still so far.
    #[must_use]
    pub fn slowed(&self) -> Slowed {
        self.shared.lock().slowed
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        self.shared.lock().ended = true;
        self.shared.changed.notify_all();
        if let Some(worker) = self.worker.take() {
            let _ = worker.join();
        }
    }
}

fn bounded(share: f64) -> f64 {
    if share.is_nan() { 0.0 } else { share.clamp(0.0, 0.99) }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits so long, or until something is changed; returns whether it goes on.
    fn pause(&self, time: Duration) -> bool {
        let state = self.lock();
        if state.ended {
            return false;
        }
        let (state, _) = self.changed.wait_timeout(state, time).unwrap_or_else(PoisonError::into_inner);
        !state.ended
    }
}

/// How long to stop, and to let run, for a share of the time.
fn plan(share: f64) -> (Duration, Duration) {
    let run = PLANNED_STOP.mul_f64((1.0 - share) / share.max(1e-9));
    if run < Duration::from_secs(1) {
        (PLANNED_STOP, run.max(LEAST_RUN))
    } else {
        (Duration::ZERO, Duration::from_secs(1))
    }
}

/// Stops and lets go, again and again. The outcome of the first stop is told.
fn work(shared: &Shared, mut threads: Vec<u32>, tell: impl FnOnce(Result<(), ThrottleError>)) {
    let mut tell = Some(tell);
    let mut asleep = Vec::new();
    loop {
        let share = shared.lock().share;
        let (stop, run) = plan(share);
        if !stop.is_zero() {
            let begin = Instant::now();
            let held = hold(&mut threads, &mut asleep, begin + stop, shared);
            let held = match (held, tell.take()) {
                (Ok(held), tell) => {
                    if let Some(tell) = tell {
                        tell(Ok(()));
                    }
                    held
                }
                (Err(error), Some(tell)) => return tell(Err(error)),
                // Whoever holds it now does so for a moment, or ends the slowing for good.
                (Err(_), None) => Vec::new(),
            };
            let goes_on = shared.pause(stop.saturating_sub(begin.elapsed()));
            let_go(held);
            let took = begin.elapsed();
            let mut state = shared.lock();
            state.slowed.stops += 1;
            state.slowed.stopped += took;
            state.slowed.longest = state.slowed.longest.max(took);
            if !goes_on || state.ended {
                return;
            }
        } else if let Some(tell) = tell.take() {
            tell(Ok(()));
        }
        if threads.is_empty() || !let_run(shared, share, run, &mut asleep) {
            return;
        }
    }
}

/// Lets the threads run for so long, or until something is changed; those that stop late are let go at once. Returns whether it goes on.
fn let_run(shared: &Shared, share: f64, run: Duration, asleep: &mut Vec<Thread>) -> bool {
    let end = Instant::now() + run;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let step = if asleep.is_empty() { left } else { left.min(GLANCE) };
        if !shared.pause(step) {
            return false;
        }
        let_go(stopped(asleep));
        let is_over = asleep.is_empty() || left.is_zero();
        if is_over || (shared.lock().share - share).abs() > f64::EPSILON {
            return true;
        }
    }
}

/// Stops all threads, but for those that do not stop in time: these are `asleep`. In a sleep that nothing interrupts, as for storage, a
/// thread stands still by itself, and stops when that ends; the others do not wait for it. Those that have ended are forgotten. Returns
/// those that stand still, each with the signal that it was about to receive.
///
/// Should this thread end before one that is asleep has stopped, the kernel takes the wish back.
fn hold(
    threads: &mut Vec<u32>,
    asleep: &mut Vec<Thread>,
    until: Instant,
    shared: &Shared,
) -> Result<Vec<(Thread, i32)>, ThrottleError> {
    let mut refused = None;
    threads.retain(|&number| {
        let thread = Thread(number.cast_signed());
        if asleep.iter().any(|asked| asked.0 == thread.0) {
            return true;
        }
        match thread.seize_only().and_then(|()| thread.interrupt()) {
            Ok(()) => asleep.push(thread),
            Err(libc::ESRCH) => return false,
            Err(errno) => refused = Some((number, errno)),
        }
        true
    });
    let mut held = stopped(asleep);
    while !asleep.is_empty() && Instant::now() < until && !shared.lock().ended {
        std::thread::sleep(LOOK);
        held.extend(stopped(asleep));
    }
    match refused {
        None => Ok(held),
        Some((thread, errno)) => {
            let_go(held);
            Err(ThrottleError::NotPermitted { thread, source: io::Error::from_raw_os_error(errno) })
        }
    }
}

/// Takes out those that have stopped by now, and those that have ended.
fn stopped(asleep: &mut Vec<Thread>) -> Vec<(Thread, i32)> {
    let mut held = Vec::new();
    asleep.retain(|thread| match thread.stopped() {
        Ok(Some(Stop::Signal(signal))) => {
            held.push((*thread, signal));
            false
        }
        Ok(Some(_)) => {
            held.push((*thread, 0));
            false
        }
        Ok(None) => true,
        Err(_) => false,
    });
    held
}

fn let_go(held: Vec<(Thread, i32)>) {
    for (thread, signal) in held {
        // Fails only for a thread that has ended.
        let _ = thread.detach_with(signal);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_share_of_the_time_plans_a_stop_that_is_too_long() {
        for share in [0.0, 0.001, 0.05, 0.2, 0.5, 0.9, 0.99] {
            let (stop, run) = plan(share);
            assert!(stop <= PLANNED_STOP && PLANNED_STOP * 2 <= LONGEST_STOP, "{share}");
            let planned = stop.as_secs_f64() / (stop + run).as_secs_f64();
            assert!((planned - share).abs() < 0.01, "{share}: {planned}");
        }
        assert_eq!([bounded(f64::NAN), bounded(-1.0), bounded(2.0)], [0.0, 0.0, 0.99]);
    }
}
