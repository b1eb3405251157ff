//! Faults done to processes.

use std::fs;

use rustix::process::{Pid, Signal, kill_process};

/// Kills a process, as a crash would. One that is gone already is no error.
pub fn kill(pid: i32) {
    signal(pid, Signal::KILL);
}

pub(crate) fn signal(pid: i32, signal: Signal) {
    if let Some(pid) = Pid::from_raw(pid).filter(|pid| *pid != Pid::INIT) {
        let _ = kill_process(pid, signal);
    }
}

/// A process that is stopped, and goes on when this is dropped.
#[derive(Debug)]
pub struct Paused(i32);

/// Stops a process, as a host without CPU time would.
pub fn pause(pid: i32) -> Paused {
    signal(pid, Signal::STOP);
    Paused(pid)
}

impl Drop for Paused {
    fn drop(&mut self) {
        signal(self.0, Signal::CONT);
    }
}

/// Whether a process has ended and only waits to be noticed by its parent.
pub(crate) fn is_zombie(pid: i32) -> bool {
    state(pid) == Some('Z')
}

/// The state of a process as in `/proc/PID/stat`: `R`, `S`, `T` (stopped), `Z` and others; none when it is gone.
pub fn state(pid: i32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may itself contain any of them.
    stat.rsplit_once(") ")?.1.chars().next()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;
    use std::time::{Duration, Instant};

    fn reaches(pid: i32, wanted: char) -> bool {
        let start = Instant::now();
        while state(pid) != Some(wanted) && start.elapsed() < Duration::from_secs(10) {
            std::thread::sleep(Duration::from_millis(5));
        }
        state(pid) == Some(wanted)
    }

    #[test]
    fn a_paused_process_goes_on_and_a_killed_one_ends() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = child.id().cast_signed();
        let paused = pause(pid);
        assert!(reaches(pid, 'T'));
        drop(paused);
        assert!(reaches(pid, 'S'));
        kill(pid);
        assert!(reaches(pid, 'Z') && is_zombie(pid));
        assert!(!child.wait().unwrap().success());
        assert_eq!(state(pid), None);
    }
}
