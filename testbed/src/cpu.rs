//! How much CPU time processes have used.

use std::collections::HashMap;
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use crate::watch::Watch;

/// How often a thread's CPU time is read: a thread that ends takes its time with it, at most this much is missed.
const SAMPLE_EVERY: Duration = Duration::from_millis(2);
/// Every how many samples new threads are looked for, once there is one.
const LOOK_EVERY: u32 = 10;

/// The CPU time of one thread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ThreadTime {
    /// The thread's id.
    pub thread: i32,
    /// Its name.
    pub name: String,
    /// What it used so far.
    pub time: Duration,
}

/// The CPU time of a process so far, ended threads included; none when it is gone.
pub fn process_time(pid: i32) -> Option<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // After the name: state is field 3 of proc(5), utime and stime are 14 and 15, in clock ticks.
    let words: Vec<&str> = stat.rsplit_once(") ")?.1.split(' ').collect();
    let ticks: u64 = words.get(11)?.parse::<u64>().ok()? + words.get(12)?.parse::<u64>().ok()?;
    Some(Duration::from_secs_f64(ticks as f64 / rustix::param::clock_ticks_per_second() as f64))
}

/// The CPU time of each living thread of a process, to the nanosecond; empty when it is gone.
pub fn thread_times(pid: i32) -> Vec<ThreadTime> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    tasks
        .filter_map(|task| {
            let thread = task.file_name().to_str()?.parse().ok()?;
            let name = fs::read_to_string(task.path().join("comm")).ok()?.trim().to_owned();
            Some(ThreadTime { thread, name, time: time_of(pid, thread)? })
        })
        .collect()
}

/// Sums up the CPU time from now on of those of a process's threads whose names fit, while it is there, those included that come
/// and go meanwhile.
pub fn watch_threads(pid: i32, fits: fn(&str) -> bool) -> Watch<Duration> {
    let before: HashMap<i32, Duration> =
        thread_times(pid).into_iter().map(|thread| (thread.thread, thread.time)).collect();
    Watch::start(move |stop| sample(pid, fits, &before, stop))
}

fn sample(pid: i32, fits: fn(&str) -> bool, before: &HashMap<i32, Duration>, stop: &AtomicBool) -> Duration {
    let mut seen: HashMap<i32, Duration> = HashMap::new();
    let mut round = 0;
    loop {
        // The last sample is taken after the word to stop.
        let last = stop.load(Relaxed);
        if last || seen.is_empty() || round % LOOK_EVERY == 0 {
            let fitting = thread_times(pid).into_iter().filter(|thread| fits(&thread.name));
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
    // The first word is the time on a CPU in nanoseconds (Documentation/scheduler/sched-stats.rst).
    let schedstat = fs::read_to_string(format!("/proc/{pid}/task/{thread}/schedstat")).ok()?;
    Some(Duration::from_nanos(schedstat.split(' ').next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Barrier};

    use super::*;

    #[test]
    fn work_shows_up_in_the_thread_that_did_it_and_in_the_process() {
        let pid = std::process::id().cast_signed();
        let start = process_time(pid).unwrap();
        let worker = std::thread::Builder::new().name("busy".into()).spawn(move || {
            let own = rustix::thread::gettid().as_raw_nonzero().get();
            let time = || thread_times(pid).into_iter().find(|other| other.thread == own).unwrap();
            while time().time < Duration::from_millis(60) {
                std::hint::black_box((0..100_000u64).sum::<u64>());
            }
            time().name
        });
        assert_eq!(worker.unwrap().join().unwrap(), "busy");
        // Ticks are 10 ms long as a rule.
        assert!(process_time(pid).unwrap() >= start + Duration::from_millis(40));
    }

    #[test]
    fn a_process_that_is_gone_has_no_time() {
        assert_eq!(process_time(i32::MAX), None);
        assert!(thread_times(i32::MAX).is_empty());
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
