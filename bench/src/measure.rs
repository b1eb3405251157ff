//! Measuring: CPU time of threads that come and go, heartbeats around something, medians.

use std::collections::HashMap;
use std::fs;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use testbed::{Client, cpu};

use crate::error::BenchError;
use crate::run::Run;

/// How often a thread's CPU time is read: a thread that ends takes its time with it, at most this much is missed.
const SAMPLE_EVERY: Duration = Duration::from_millis(2);
/// Every how many samples new threads are looked for, once there is one.
const LOOK_EVERY: u32 = 10;
/// Heartbeats per second: they show a pause to the millisecond.
const PER_SECOND: u32 = 1000;
/// Heartbeats sent before what is measured, and after it: QEMU announces the guest for half a second.
const BEFORE: Duration = Duration::from_millis(500);
const AFTER: Duration = Duration::from_millis(600);
/// The end of that, in which an answer must come from a guest that is still heard.
const AT_END: Duration = Duration::from_millis(400);

/// Milliseconds of a time.
pub(crate) fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// A number of bytes that was measured, for people.
pub(crate) fn bytes(bytes: f64) -> String {
    readable::bytes(bytes as u64)
}

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
    pub fn stop(self) -> T {
        self.stop.store(true, Relaxed);
        self.looks.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

/// Sums up the CPU time from now on of those of a process's threads whose names fit, while it is there, those included that come
/// and go meanwhile.
pub fn watch_threads(pid: i32, fits: fn(&str) -> bool) -> Watch<Duration> {
    let before: HashMap<i32, Duration> =
        cpu::thread_times(pid).into_iter().map(|thread| (thread.thread, thread.time)).collect();
    Watch::start(move |stop| sample(pid, fits, &before, stop))
}

fn sample(pid: i32, fits: fn(&str) -> bool, before: &HashMap<i32, Duration>, stop: &AtomicBool) -> Duration {
    let mut seen: HashMap<i32, Duration> = HashMap::new();
    let mut round = 0;
    loop {
        // The last sample is taken after the word to stop.
        let last = stop.load(Relaxed);
        if last || seen.is_empty() || round % LOOK_EVERY == 0 {
            let fitting = cpu::thread_times(pid).into_iter().filter(|thread| fits(&thread.name));
            seen.extend(fitting.map(|thread| (thread.thread, thread.time)));
        } else {
            for (thread, time) in &mut seen {
                *time = time_of(pid, *thread).unwrap_or(*time);
            }
        }
        if last {
            let since = |(thread, time): (&i32, &Duration)| {
                time.saturating_sub(before.get(thread).copied().unwrap_or_default())
            };
            return seen.iter().map(since).sum();
        }
        round += 1;
        thread::sleep(SAMPLE_EVERY);
    }
}

/// The CPU time of one thread; none when it has ended.
fn time_of(pid: i32, thread: i32) -> Option<Duration> {
    let schedstat = fs::read_to_string(format!("/proc/{pid}/task/{thread}/schedstat")).ok()?;
    Some(Duration::from_nanos(schedstat.split(' ').next()?.parse().ok()?))
}

/// What the client noticed of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Beats {
    /// Heartbeats sent.
    pub sent: u64,
    /// Heartbeats that never came back.
    pub lost: u64,
    /// The longest time between two answers, in milliseconds.
    pub longest_gap_ms: f64,
    /// Whether answers still came at the end: if not, the guest was not heard again, and the gap is no measure of it.
    pub heard_again: bool,
}

impl Beats {
    /// The gap, where it ended.
    pub fn gap_ms(&self) -> Option<f64> {
        self.heard_again.then_some(self.longest_gap_ms)
    }
}

/// Does something while the client sends a guest heartbeats, from a while before to a while after.
///
/// Without a client there are none, and no waiting.
pub fn with_heartbeats<T>(
    client: Option<&Client>,
    guest: Ipv4Addr,
    run: &Run,
    act: impl FnOnce() -> Result<T, BenchError>,
) -> Result<(T, Option<Beats>), BenchError> {
    let Some(client) = client else { return Ok((act()?, None)) };
    let heartbeats = client.heartbeats(guest, PER_SECOND)?;
    run.sleep(BEFORE)?;
    let done = act()?;
    run.sleep(AFTER)?;
    let before = heartbeats.report().received;
    run.sleep(AT_END)?;
    let report = heartbeats.stop();
    let longest_gap_ms = ms(report.longest_gap);
    let heard_again = report.received > before;
    Ok((done, Some(Beats { sent: report.sent, lost: report.lost, longest_gap_ms, heard_again })))
}

/// A figure measured several times.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// The middle one; of an even number, the mean of the two in the middle.
    pub median: f64,
    /// The smallest.
    pub least: f64,
    /// The largest.
    pub most: f64,
    /// How many.
    pub count: usize,
}

impl Spread {
    /// Of these; none where there are none.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let (least, most) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = if values.len().is_multiple_of(2) {
            values[middle - 1].midpoint(values[middle])
        } else {
            values[middle]
        };
        Some(Self { median, least, most, count: values.len() })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    #[test]
    fn a_median_is_in_the_middle() {
        assert_eq!(Spread::of([]), None);
        assert_eq!(
            Spread::of([3.0, 1.0, 8.0]),
            Some(Spread { median: 3.0, least: 1.0, most: 8.0, count: 3 })
        );
        assert_eq!(Spread::of([4.0, 1.0, 2.0, 100.0]).map(|spread| spread.median), Some(3.0));
    }

    #[test]
    fn threads_that_fit_are_counted_from_the_start_of_the_watch_and_others_are_not() {
        const WORK: Duration = Duration::from_millis(60);
        let pid = std::process::id().cast_signed();
        let watch = watch_threads(pid, |name| name == "bench-busy");
        // They stay until the watch has ended, so that the sampler cannot come too late.
        let both = Arc::new(Barrier::new(3));
        let ended = Arc::new(Barrier::new(3));
        let threads = ["bench-busy", "bench-other"].map(|name| {
            let (both, ended) = (Arc::clone(&both), Arc::clone(&ended));
            let run = move || {
                let own = rustix::thread::gettid().as_raw_nonzero().get();
                while time_of(pid, own).unwrap() < WORK {
                    std::hint::black_box((0..100_000u64).sum::<u64>());
                }
                both.wait();
                ended.wait();
            };
            thread::Builder::new().name(name.into()).spawn(run).unwrap()
        });
        both.wait();
        let time = watch.stop();
        ended.wait();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert!(time >= WORK && time < 2 * WORK, "{time:?}");
    }
}
