//! A migration under way, to be interfered with.

use std::process::{Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use testbed::{Host, Programs};

use crate::pair::log_of;
use crate::{PATIENCE, Pair, Said, vmirror};

/// A `vmirror` command that runs beside the test. Killed when dropped, if it has not ended.
#[derive(Debug)]
pub struct UnderWay<'a> {
    host: &'a Host,
    vm: String,
    process: Pid,
    waits: Option<JoinHandle<Said>>,
}

impl Pair {
    /// Begins a migration and returns at once.
    ///
    /// # Panics
    /// If `vmirror` cannot be started.
    #[must_use]
    pub fn begin<'a>(&self, name: &str, from: &'a Host, to: &Host, options: &[&str]) -> UnderWay<'a> {
        let mut command = from.command(Programs::find().vmirror.unwrap());
        command.args(["migrate", name, "--to", &to.listen().to_string(), "--json"]).args(options);
        UnderWay::start(from, name, command)
    }

    /// What a host tells of the migration of a machine; none where there is none.
    ///
    /// # Panics
    /// If it cannot be asked.
    #[must_use]
    pub fn progress(&self, name: &str, host: &Host) -> Option<Value> {
        let sessions = vmirror(host, &["status", "--json"]).done().json();
        sessions.as_array().unwrap().iter().find(|session| session["vm"] == name).cloned()
    }

    /// The QEMU process of a machine, or of a copy, on a host; none where there is none.
    #[must_use]
    pub fn qemu(&self, host: &Host) -> Option<i32> {
        let is_qemu = |pid: &i32| {
            let program = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
            program.to_string_lossy().contains("qemu-system")
        };
        host.processes().into_iter().find(is_qemu)
    }
}

impl<'a> UnderWay<'a> {
    fn start(host: &'a Host, vm: &str, mut command: Command) -> UnderWay<'a> {
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let process = Pid::from_child(&child);
        let waits = std::thread::spawn(move || child.wait_with_output().unwrap().into());
        UnderWay { host, vm: vm.to_owned(), process, waits: Some(waits) }
    }

    /// Waits until the migration is in this phase.
    ///
    /// # Panics
    /// If it ends before, or never gets there.
    #[track_caller]
    pub fn reaches(&self, phase: &str) {
        self.shows(phase, |progress| progress["phase"] == phase);
    }

    /// Waits until the progress of the migration is like that.
    ///
    /// # Panics
    /// If it ends before, or never gets there.
    #[track_caller]
    pub fn shows(&self, what: &str, fits: impl Fn(&Value) -> bool) {
        let start = Instant::now();
        let mut last = Value::Null;
        loop {
            let sessions = vmirror(self.host, &["status", "--json"]).done().json();
            if let Some(now) = sessions.as_array().unwrap().iter().find(|session| session["vm"] == *self.vm) {
                if fits(now) {
                    return;
                }
                last = now.clone();
            }
            assert!(!self.has_ended(), "it ended before it was seen in {what}; last: {last}");
            assert!(start.elapsed() < PATIENCE, "waited for {what}: {last}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Whether the command has ended.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.waits.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Presses Ctrl-C.
    pub fn interrupt(&self) {
        self.signal(Signal::INT);
    }

    fn signal(&self, signal: Signal) {
        if !self.has_ended() {
            // It may end at this moment, which is as good.
            let _ = kill_process(self.process, signal);
        }
    }

    /// Waits until the command ends.
    ///
    /// # Panics
    /// If it never does.
    #[must_use]
    #[track_caller]
    pub fn ended(mut self) -> Said {
        let start = Instant::now();
        while !self.has_ended() {
            assert!(start.elapsed() < PATIENCE, "the migration hangs\n{}", log_of(self.host));
            std::thread::sleep(Duration::from_millis(20));
        }
        self.waits.take().unwrap().join().unwrap()
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
    }
}
