//! Moments of a migration at which a test holds it: from host A to host B, of a machine that is known by its name.

use std::fs;
use std::time::Duration;

use testbed::fault::{self, Paused};
use testbed::{Host, Inventory};

use crate::{Pair, UnderWay, until, vmirror};

/// The paused guest is waited for.
const PATIENTLY: &[&str] = &["--bandwidth", "16MiB/s", "--max-downtime", "60s"];

impl Pair {
    /// A migration that has paused the guest and waits for the destination's QEMU, which is stopped.
    ///
    /// # Panics
    /// If it does not get there.
    #[must_use]
    #[track_caller]
    pub fn switching_over(&self, vm: &str) -> (UnderWay<'_>, Paused) {
        self.switching_over_with(vm, &[])
    }

    fn switching_over_with(&self, vm: &str, options: &[&str]) -> (UnderWay<'_>, Paused) {
        let before = said(self.b(), LOADS);
        let migration = self.begin(vm, self.a(), self.b(), &[PATIENTLY, options].concat());
        migration.reaches("synchronize");
        let stopped = fault::pause(self.qemu(self.b()).unwrap());
        migration.reaches("switch-over");
        until("everything waits for QEMU", || {
            assert!(!migration.has_ended(), "it ended before QEMU was given anything\n{}", self.logs());
            said(self.b(), LOADS) > before
        });
        (migration, stopped)
    }

    /// A migration whose source does nothing from the moment at which its guest is paused, and whose destination has become ready.
    /// The source's agent goes on when the second value is dropped.
    ///
    /// # Panics
    /// If it does not get there.
    #[must_use]
    #[track_caller]
    pub fn ready(&self, vm: &str) -> (UnderWay<'_>, Paused) {
        self.ready_with(vm, &[])
    }

    fn ready_with(&self, vm: &str, options: &[&str]) -> (UnderWay<'_>, Paused) {
        let (migration, stopped) = self.switching_over_with(vm, options);
        let source = fault::pause(self.a().agent_pid().unwrap());
        drop(stopped);
        until("the copy is ready", || {
            let record = journal(self.b(), vm);
            assert!(!record.is_empty(), "the copy was thrown away\n{}", self.logs());
            record.contains("\"ready\":true")
        });
        (migration, source)
    }

    /// A migration that was handed over, with a destination whose agent does nothing from when it was ready, and has the source's
    /// word waiting. It goes on when the second value is dropped.
    ///
    /// # Panics
    /// If it does not get there.
    #[must_use]
    #[track_caller]
    pub fn handed_over(&self, vm: &str) -> (UnderWay<'_>, Paused) {
        self.handed_over_with(vm, &[])
    }

    /// The same with options of the migration's.
    ///
    /// # Panics
    /// If it does not get there.
    #[must_use]
    #[track_caller]
    pub fn handed_over_with(&self, vm: &str, options: &[&str]) -> (UnderWay<'_>, Paused) {
        let before = said(self.b(), READY);
        let (migration, source) = self.ready_with(vm, options);
        until("the destination has said so", || said(self.b(), READY) > before);
        let destination = fault::pause(self.b().agent_pid().unwrap());
        drop(source);
        until("the source has handed over", || journal(self.a(), vm).contains("handed-over"));
        (migration, destination)
    }

    /// A migration that was handed over, with a destination that owns the machine and whose QEMU, which is stopped, has not resumed it
    /// yet. It goes on when the second value is dropped.
    ///
    /// # Panics
    /// If it does not get there.
    #[must_use]
    #[track_caller]
    pub fn resuming(&self, vm: &str) -> (UnderWay<'_>, Paused) {
        let before = said(self.b(), READY);
        let (migration, source) = self.ready(vm);
        until("the destination has said so", || said(self.b(), READY) > before);
        let qemu = fault::pause(self.qemu(self.b()).unwrap());
        drop(source);
        until("the destination owns it", || journal(self.b(), vm).contains("\"resuming\":true"));
        (migration, qemu)
    }

    /// A copy that is complete waits for the source's word, which may come by itself or may have to come from a person. `held` is
    /// what host B has when it is gone.
    ///
    /// # Panics
    /// If it is neither gone nor in doubt.
    pub fn give_up_if_in_doubt(&self, vm: &str, held: &Inventory) {
        let settled = || self.show(vm, self.b()).is_none();
        if self.b().settle(held, Duration::from_secs(10)).unwrap().is_err() && !settled() {
            eprintln!("the copy waits for a person's word");
            assert_eq!(self.show(vm, self.b()).unwrap()["state"], "uncertain");
            let _ = vmirror(self.b(), &["resolve", vm, "--give-up"]).done();
        }
    }
}

/// A destination's QEMU was given all of a machine to load.
const LOADS: &str = "QEMU loads its devices";
/// The source was told that a copy is ready.
const READY: &str = "the copy is ready";

/// How often that host's agent has said this in its log.
fn said(host: &Host, what: &str) -> usize {
    fs::read_to_string(host.agent_log()).unwrap().matches(what).count()
}

/// What a host has on record about a machine.
fn journal(host: &Host, vm: &str) -> String {
    let record = fs::read(host.state_dir().join(format!("vms/{vm}.journal"))).unwrap_or_default();
    String::from_utf8_lossy(&record).into_owned()
}
