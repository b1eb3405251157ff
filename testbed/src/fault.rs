//! Faults done to processes.

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::TestbedError;

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

/// Stops a process, as a host without CPU time would. None of its threads runs when this returns: on a busy host they may for long after
/// the signal was sent.
///
/// # Panics
/// If it does not stop.
pub fn pause(pid: i32) -> Paused {
    signal(pid, Signal::STOP);
    let paused = Paused(pid);
    let begun = Instant::now();
    while !rests(pid) {
        assert!(begun.elapsed() < UNTIL_STOPPED, "process {pid} does not stop");
        thread::sleep(Duration::from_millis(1));
    }
    paused
}

/// Longer than a busy host takes.
const UNTIL_STOPPED: Duration = Duration::from_secs(60);

/// Whether no thread of a process runs, or will before it is told to go on. One that waits in the kernel stops before it leaves it.
fn rests(pid: i32) -> bool {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let states: Vec<char> = tasks.filter_map(|task| state_in(&task.path())).collect();
    let stops = |state: &char| "TtZX".contains(*state);
    states.iter().all(|state| stops(state) || *state == 'D')
        && (states.is_empty() || states.iter().any(stops))
}

impl Drop for Paused {
    fn drop(&mut self) {
        signal(self.0, Signal::CONT);
    }
}

/// A process for which one system call on one file fails. It succeeds again when this is dropped.
#[derive(Debug)]
pub struct Failing(Child);

/// Lets every call of that name (`fdatasync`, `pwrite64`) that a process makes on a file, named as that process sees it, fail with
/// this error (`EIO`, `ENOSPC`), before it has done anything.
///
/// # Errors
/// Where there is no `strace`, or it does not get hold of the process.
pub fn fail(pid: i32, call: &str, file: &Path, error: &str) -> Result<Failing, TestbedError> {
    const STRACE: &str = "strace";
    let failed = |source| TestbedError::Start { program: STRACE.to_owned(), source };
    let mut strace = Command::new(STRACE)
        .args(["-f", "-p", &pid.to_string(), "-P", &file.to_string_lossy(), "-e"])
        .arg(format!("inject={call}:error={error}"))
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let said = strace.stderr.take();
    let failing = Failing(strace);
    let mut lines = BufReader::new(said.ok_or_else(|| failed(ErrorKind::BrokenPipe.into()))?).lines();
    // It has all threads of the process when it says so; what it says after that is of no interest, but has to go somewhere.
    let attached = lines.by_ref().map_while(Result::ok).find(|line| line.contains(" attached"));
    let message = || "did not get hold of the process".to_owned();
    attached.ok_or_else(|| TestbedError::Tool { command: STRACE.to_owned(), message: message() })?;
    thread::spawn(move || lines.for_each(drop));
    Ok(failing)
}

impl Drop for Failing {
    fn drop(&mut self) {
        // Asked, it puts right what it is amid.
        signal(self.0.id().cast_signed(), Signal::TERM);
        let _ = self.0.wait();
    }
}

/// Whether a process has ended and only waits to be noticed by its parent.
pub(crate) fn is_zombie(pid: i32) -> bool {
    state(pid) == Some('Z')
}

/// The state of a process as in `/proc/PID/stat`: `R`, `S`, `T` (stopped), `Z` and others; none when it is gone.
pub fn state(pid: i32) -> Option<char> {
    state_in(&Path::new("/proc").join(pid.to_string()))
}

/// The same of a process or thread with this directory.
fn state_in(directory: &Path) -> Option<char> {
    let stat = fs::read_to_string(directory.join("stat")).ok()?;
    // The name in parentheses may itself contain any of them.
    stat.rsplit_once(") ")?.1.chars().next()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reaches(pid: i32, wanted: char) -> bool {
        let start = Instant::now();
        while state(pid) != Some(wanted) && start.elapsed() < Duration::from_secs(10) {
            thread::sleep(Duration::from_millis(5));
        }
        state(pid) == Some(wanted)
    }

    #[test]
    fn a_paused_process_goes_on_and_a_killed_one_ends() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = child.id().cast_signed();
        let paused = pause(pid);
        assert_eq!(state(pid), Some('T'));
        drop(paused);
        assert!(reaches(pid, 'S'));
        kill(pid);
        assert!(reaches(pid, 'Z') && is_zombie(pid));
        assert!(!child.wait().unwrap().success());
        assert_eq!(state(pid), None);
    }
}
