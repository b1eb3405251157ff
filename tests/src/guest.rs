//! A test guest under an agent, wherever it runs.

use std::time::Duration;

use guest::userland;
use testbed::guest_spec::GuestSpec;
use testbed::{Console, Host, Status};

use crate::PATIENCE;

/// Bytes in a page of its RAM.
pub const PAGE: u64 = 4096;

/// A test guest that is ready. Its serial console has all it ever said, on whichever host.
#[derive(Debug)]
pub struct Guest {
    /// What the agents call it.
    pub name: String,
    /// What it was started with.
    pub spec: GuestSpec,
    console: Console,
    boot_id: String,
}

impl Guest {
    /// Waits until the guest that was started with this specification is ready and has told its status.
    ///
    /// # Panics
    /// If it does not get there.
    #[must_use]
    #[track_caller]
    pub fn ready(name: &str, spec: &GuestSpec) -> Guest {
        let console = Console::new(&spec.serial);
        // A userland is booted before.
        let boot = spec.userland.as_ref().map_or(Duration::ZERO, |_| userland::BOOT);
        let first =
            console.wait_for("the guest to be ready", PATIENCE + boot, |_| console.is_ready()).unwrap();
        Guest { name: name.to_owned(), spec: spec.clone(), console, boot_id: first.boot_id }
    }

    /// Starts a guest as its user would, without any agent; its command line is to have `-daemonize`. Returns when the guest is ready.
    ///
    /// # Panics
    /// If it cannot be started, or never is.
    #[must_use]
    #[track_caller]
    pub fn by_hand(host: &Host, name: &str, spec: &GuestSpec) -> Guest {
        let line = spec.command_line();
        assert!(host.command(&line[0]).args(&line[1..]).status().unwrap().success());
        Guest::ready(name, spec)
    }

    /// What the guest says on its serial line.
    #[must_use]
    pub fn console(&self) -> &Console {
        &self.console
    }

    /// What it last said about itself.
    ///
    /// # Panics
    /// If it never did.
    #[must_use]
    pub fn status(&self) -> Status {
        self.console.status().unwrap()
    }

    /// Which boot of it this is, as it said when it was ready.
    #[must_use]
    pub fn boot_id(&self) -> &str {
        &self.boot_id
    }

    /// Pages of guest RAM.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.spec.memory_mib * (1 << 20) / PAGE
    }

    /// Waits until it says something again: it runs.
    ///
    /// # Panics
    /// If it stays silent.
    #[track_caller]
    pub fn runs_on(&self) -> Status {
        // A line that was on its way when this was asked is no proof; the one after it is.
        let last = self.status().uptime_ms;
        let newer =
            self.console.wait_for("the guest to go on", PATIENCE, |status| status.uptime_ms > last).unwrap();
        self.console
            .wait_for("the guest to go on", PATIENCE, |status| status.uptime_ms > newer.uptime_ms)
            .unwrap()
    }

    /// Waits until the guest has, after this call, gone through all of its memory once from beginning to end, and asserts that
    /// it is the same boot as at `before`, its clock never went back, and no page was ever torn, stale or lost.
    ///
    /// # Panics
    /// If any of that is not so.
    #[track_caller]
    pub fn sound_since(&self, before: &Status) -> Status {
        self.sane_since(before);
        // The pass under way now began before this call; the next one did not.
        let now = self.status();
        let what = "the guest to check all of its memory";
        let _ = self
            .console
            .wait_for(what, PATIENCE, |status| status.passes >= now.passes + 2 || status.faults() > 0);
        let after = self.sane_since(before);
        assert!(after.passes >= now.passes + 2, "{what}: {after:?}, was {now:?}");
        after
    }

    /// As [`Guest::sound_since`], without waiting for all of the memory: what it has found so far.
    ///
    /// # Panics
    /// If it is not the same boot, its clock went back, or it has found a fault.
    #[track_caller]
    pub fn sane_since(&self, before: &Status) -> Status {
        let text = self.console.text();
        let said: Vec<Status> = text.lines().filter_map(Status::from_serial_line).collect();
        let last = said.last().unwrap().clone();
        assert_eq!(last.faults(), 0, "the guest found faults in its memory: {last:?}\n{}", findings(&text));
        assert!(said.iter().all(|status| status.boot_id == before.boot_id), "the guest rebooted: {said:?}");
        assert!(said.is_sorted_by_key(|status| status.uptime_ms), "the guest's clock went back: {said:?}");
        assert!(said.is_sorted_by_key(|status| (status.writes, status.passes)), "time went back: {said:?}");
        assert!(last.uptime_ms >= before.uptime_ms && last.pages == before.pages, "{last:?}, was {before:?}");
        assert!(!text.contains("Kernel panic"), "{text}");
        last
    }

    /// Waits until it has written that many pages more.
    ///
    /// # Panics
    /// If it does not.
    #[track_caller]
    pub fn writes_on(&self, pages: u64) {
        let now = self.status().writes;
        self.console.wait_for("the guest to write", PATIENCE, |status| status.writes >= now + pages).unwrap();
    }

    /// Whether it says nothing for that long: it does not run anywhere.
    #[must_use]
    pub fn is_silent_for(&self, time: Duration) -> bool {
        let before = self.status();
        std::thread::sleep(time);
        before == self.status()
    }
}

/// The last lines of a console that are no status: what the checker found.
fn findings(text: &str) -> String {
    let lines: Vec<&str> = text.lines().filter(|line| Status::from_serial_line(line).is_none()).collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}
