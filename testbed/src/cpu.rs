//! How much CPU time processes have used.

use std::fs;
use std::time::Duration;

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
            // The first word of schedstat is the time on a CPU in nanoseconds (Documentation/scheduler/sched-stats.rst).
            let schedstat = fs::read_to_string(task.path().join("schedstat")).ok()?;
            let time = Duration::from_nanos(schedstat.split(' ').next()?.parse().ok()?);
            Some(ThreadTime { thread, name, time })
        })
        .collect()
}

#[cfg(test)]
mod tests {
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
}
