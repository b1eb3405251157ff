//! A guest that is to be where it was, or to have moved, whatever happens to its migration.

use testbed::guest_spec::{GuestSpec, Pattern};
use testbed::{Host, Inventory, Status};

use crate::{Guest, Pair, UnderWay, report_adds_up, until};

/// A guest that writes, on host A, and what both hosts held before its migration.
#[derive(Debug)]
pub struct Scene {
    /// The hosts.
    pub pair: Pair,
    /// The guest.
    pub guest: Guest,
    /// What it said before.
    pub before: Status,
    /// What each host held before.
    pub held: [Inventory; 2],
}

impl Default for Scene {
    fn default() -> Scene {
        Scene::on(Pair::start())
    }
}

impl Scene {
    /// With a guest of 128 MiB.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn on(pair: Pair) -> Scene {
        let spec = pair.spec("vm", 128);
        Scene::of(pair, spec)
    }

    /// With such a guest.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn of(pair: Pair, spec: GuestSpec) -> Scene {
        // What it writes cannot be compressed: a slow link stays one.
        let spec = GuestSpec { rate: 500, pattern: Pattern::Incompressible, ..spec };
        let guest = pair.run(pair.a(), "vm", &spec);
        let before = guest.status();
        // An agent that has started a QEMU holds it by more than one that has found it again, as these do sooner or later.
        pair.a().stop_agent().unwrap();
        pair.a().start_agent().unwrap();
        let held = [pair.a().inventory().unwrap(), pair.b().inventory().unwrap()];
        Scene { pair, guest, before, held }
    }

    /// Where the guest is first.
    #[must_use]
    pub fn a(&self) -> &Host {
        self.pair.a()
    }

    /// Where it is to go.
    #[must_use]
    pub fn b(&self) -> &Host {
        self.pair.b()
    }

    /// Begins its migration.
    #[must_use]
    pub fn begin(&self, options: &[&str]) -> UnderWay<'_> {
        self.pair.begin("vm", self.a(), self.b(), options)
    }

    /// Asserts that the guest runs on at the source, and that both hosts hold what they held before.
    ///
    /// # Panics
    /// If not.
    pub fn stays(&self) {
        self.guest.runs_on();
        assert!(self.pair.runs_on("vm", self.a()), "{}", self.pair.logs());
        self.pair.holds(self.b(), &self.held[1]);
        self.pair.holds_but_for_growth(self.a(), &self.held[0]);
        let _ = self.guest.sane_since(&self.before);
    }

    /// Asserts that the guest runs at the destination and nowhere else, and has lost nothing.
    ///
    /// # Panics
    /// If not.
    pub fn has_moved(&self) {
        until("the guest runs at the destination", || self.pair.runs_on("vm", self.b()));
        until("the source has let go", || self.pair.show("vm", self.a()).is_none());
        self.pair.holds_nothing(self.a());
        let _ = self.guest.sound_since(&self.before);
    }

    /// Asserts that the guest can be migrated right after, and has lost nothing.
    ///
    /// # Panics
    /// If not.
    pub fn moves_after_all(&self) {
        let report = self.pair.migrate("vm", self.a(), self.b(), &[]);
        report_adds_up(&report, &self.guest);
        self.has_moved();
    }
}
