//! A pair of hosts and a guest that goes from cell to cell for as long as it lives.

use std::fs::{self, File};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use session::points;
use testbed::disk::{self, Format};
use testbed::guest_spec::{GuestSpec, Io, Nic, Pattern, Ram, TestDisk, Work};
use testbed::{AgentOptions, Difference, Inventory, Programs, Shim, Status, Testbed, TestbedError, Wire};

use super::cell::Kind;
use super::side::Side;
use super::watch::Watch;
use crate::{Guest, OUTRUN, Pair, outrunning, vmirror};

/// What all of them are called, one after the other: a name has a history on both hosts.
pub(super) const NAME: &str = "vm";
const TAP: &str = "tap0";
const MIB: u64 = 1 << 20;
/// Room for the state of an agent.
const STATE: u64 = 8 * MIB;

/// A host that holds the same for so long holds nothing that is about to be given back.
const GIVEN_BACK: Duration = Duration::from_secs(2);

/// What has come or gone, but for RAM in use: a guest uses more of it as it likes.
pub(super) fn difference(held: &Inventory, now: &Inventory) -> Option<Difference> {
    Inventory { ram_bytes: now.ram_bytes, ..held.clone() }.difference(now).err()
}

/// A guest that lives.
#[derive(Debug)]
pub(super) struct Living {
    pub(super) guest: Guest,
    pub(super) nic: Nic,
    pub(super) at: Side,
}

/// Two hosts whose agents can be held at points and be given faults, and a guest on one of them.
#[derive(Debug)]
pub struct Lane {
    // First, so that it ends before what it watches.
    pub(super) watch: Watch,
    pub(super) pair: Arc<Pair>,
    kind: Kind,
    pub(super) shims: [Shim; 2],
    pub(super) points: [PathBuf; 2],
    options: [AgentOptions; 2],
    pub(super) living: Option<Living>,
    booted: u32,
    /// What a host holds that has the guest: as it was booted there, as it came there, and as an agent finds it that was started again.
    pub(super) holding: [Vec<Inventory>; 2],
    /// Where the guest was booted by hand, and what such a host holds when it has left.
    private_at: Option<Side>,
    left: [Option<Inventory>; 2],
}

impl Lane {
    /// With nothing on it yet.
    ///
    /// # Errors
    /// Whatever keeps it from being made.
    pub fn new(kind: Kind) -> Result<Lane, TestbedError> {
        let testbed = Testbed::with(&Programs::find())?;
        let mut parts = Vec::new();
        for host in testbed.hosts() {
            host.limit_state(STATE)?;
            let points = host.directory().join("points");
            fs::create_dir(&points).unwrap();
            let shim = Shim::new(host.directory(), &host.state_dir())?;
            let directory = (points::DIRECTORY.to_owned(), points.to_string_lossy().into_owned());
            let environment = [shim.environment(), &[directory]].concat();
            let options = AgentOptions { environment, local: kind == Kind::Disk, ..AgentOptions::default() };
            host.start_agent_with(&options)?;
            parts.push((shim, points, options));
        }
        let [(shim_a, points_a, options_a), (shim_b, points_b, options_b)] =
            <[_; 2]>::try_from(parts).unwrap_or_else(|_| unreachable!("there are two hosts"));
        let pair = Arc::new(Pair::with_running_agents(testbed));
        let lane = Lane {
            watch: Watch::begin(&pair),
            pair,
            kind,
            shims: [shim_a, shim_b],
            points: [points_a, points_b],
            options: [options_a, options_b],
            living: None,
            booted: 0,
            holding: [Vec::new(), Vec::new()],
            private_at: None,
            left: [None, None],
        };
        lane.set_rate(None);
        Ok(lane)
    }

    /// Its hosts.
    #[must_use]
    pub fn pair(&self) -> &Pair {
        &self.pair
    }

    /// Where its guest is, if it has one.
    #[must_use]
    pub fn guest_at(&self) -> Option<Side> {
        self.living.as_ref().map(|living| living.at)
    }

    pub(super) fn shim(&self, side: Side) -> &Shim {
        &self.shims[side as usize]
    }

    /// Starts an agent as the first one was.
    pub(super) fn start_agent(&self, side: Side) -> Result<(), TestbedError> {
        self.pair.host(side).start_agent_with(&self.options[side as usize])
    }

    /// Limits the link to that many bits per second, or to what it has by itself.
    pub(super) fn set_rate(&self, rate: Option<u64>) {
        let rate = rate.or((self.kind == Kind::PostCopy).then_some(OUTRUN));
        for host in [self.pair.a(), self.pair.b()] {
            let testbed = self.pair.testbed();
            match rate {
                Some(rate) => testbed.set_rate(host, Wire::Link, rate).unwrap(),
                None => testbed.clear_rate(host, Wire::Link).unwrap(),
            }
        }
    }

    /// What a migration of this kind of guest is begun with.
    pub(super) fn migrate_options(&self) -> &'static [&'static str] {
        match self.kind {
            Kind::Diskless | Kind::Disk | Kind::Private => &[],
            Kind::PostCopy => &["--on-diverge", "post-copy"],
        }
    }

    /// Has the guest on that side: one that lives, or a new one.
    pub(super) fn bring_to(&mut self, side: Side) -> Result<(), String> {
        if self.kind == Kind::Private {
            return self.bring_private_to(side);
        }
        if self.living.is_none() {
            self.boot(side)?;
        }
        if self.living.as_ref().is_some_and(|living| living.at != side) {
            self.move_over()?;
        }
        Ok(())
    }

    /// Moves the guest to the other side, which must complete.
    fn move_over(&mut self) -> Result<(), String> {
        let Some(living) = &self.living else { return Err("there is no guest".to_owned()) };
        let from = living.at;
        let (source, destination) = (self.pair.host(from), self.pair.host(from.other()));
        let said = self.pair.try_migrate(NAME, source, destination, self.migrate_options());
        if said.code != Some(0) {
            return Err(format!("a migration without any fault fails: {said:?}"));
        }
        if let Some(living) = &mut self.living {
            living.at = from.other();
        }
        Ok(())
    }

    /// Boots a guest on a host, and has it go there and back once: then all its parts are made by agents, and it is known what a host
    /// holds that has it.
    fn boot(&mut self, side: Side) -> Result<(), String> {
        self.forget_console();
        self.booted += 1;
        let host = self.pair.host(side);
        host.add_tap(TAP).map_err(|e| e.to_string())?;
        let nic = Nic::new(TAP, 10);
        let spec = self.spec(side, nic.clone());
        let guest = self.pair.run(host, NAME, &spec);
        self.living = Some(Living { guest, nic, at: side });
        self.move_over()?;
        // Whoever comes to a host from now on has the tap that the agent makes.
        self.pair.host(side).remove_tap(TAP).map_err(|e| e.to_string())?;
        for _ in 0..2 {
            let at = self.living.as_ref().map_or(side, |living| living.at);
            if self.holding[at as usize].len() < 2 {
                self.note_twice(at)?;
            }
            self.move_over()?;
        }
        self.move_over()
    }

    /// Has a guest on that side whose memory is QEMU's own, as the one that has been moved has not any more.
    fn bring_private_to(&mut self, side: Side) -> Result<(), String> {
        if self.living.as_ref().is_some_and(|living| living.at == side && self.private_at == Some(side)) {
            return Ok(());
        }
        self.end()?;
        if self.left[side as usize].is_none() {
            self.boot_by_hand(side)?;
            self.note_twice(side)?;
            self.move_over()?;
            self.note_twice(side.other())?;
            self.left[side as usize] = Some(self.held(side));
            self.end()?;
        }
        self.boot_by_hand(side)
    }

    /// Boots a guest as its user would, and has it adopted.
    fn boot_by_hand(&mut self, side: Side) -> Result<(), String> {
        self.forget_console();
        let host = self.pair.host(side);
        host.add_tap(TAP).map_err(|e| e.to_string())?;
        let nic = Nic::new(TAP, 10);
        let qmp = host.directory().join("own.qmp");
        let mut spec =
            GuestSpec { ram: Ram::Private, qmp: Some(qmp.clone()), ..self.spec(side, nic.clone()) };
        spec.extra.push("-daemonize".into());
        let guest = Guest::by_hand(host, NAME, &spec);
        let said = vmirror(host, &["adopt", NAME, "--qmp", &qmp.to_string_lossy()]);
        if said.code != Some(0) {
            return Err(format!("it cannot be adopted: {said:?}"));
        }
        self.living = Some(Living { guest, nic, at: side });
        self.private_at = Some(side);
        Ok(())
    }

    /// Ends the guest, wherever it runs, and takes back what its user has made for it.
    fn end(&mut self) -> Result<(), String> {
        if let Some(living) = self.living.take() {
            let said = vmirror(self.pair.host(living.at), &["stop", NAME, "--force"]);
            if said.code != Some(0) {
                return Err(format!("it cannot be ended: {said:?}"));
            }
        }
        if let Some(side) = self.private_at.take() {
            self.pair.host(side).remove_tap(TAP).map_err(|e| e.to_string())?;
        }
        Ok(())
    }

    /// Notes what a host holds that has the guest, and then with an agent that was started again.
    fn note_twice(&mut self, side: Side) -> Result<(), String> {
        self.note(side);
        self.pair.host(side).stop_agent().map_err(|e| e.to_string())?;
        self.start_agent(side).map_err(|e| e.to_string())?;
        self.note(side);
        Ok(())
    }

    /// Notes what a host holds once it has held that for a while: the last of a migration is given back after its end, as a tap is when the
    /// guest has been announced some times.
    fn note(&mut self, side: Side) {
        let held = self.held(side);
        self.holding[side as usize].push(held);
    }

    fn held(&self, side: Side) -> Inventory {
        let host = self.pair.host(side);
        let (mut held, mut since) = (host.inventory().unwrap(), Instant::now());
        while since.elapsed() < GIVEN_BACK {
            std::thread::sleep(Duration::from_millis(100));
            let now = host.inventory().unwrap();
            if difference(&held, &now).is_some() {
                (held, since) = (now, Instant::now());
            }
        }
        held
    }

    /// What a host holds that has no guest: nothing, or what the guest's user has made for it there.
    pub(super) fn empty(&self, side: Side) -> &Inventory {
        let left = self.left[side as usize].as_ref().filter(|_| self.private_at == Some(side));
        left.unwrap_or_else(|| self.pair.empty(self.pair.host(side)))
    }

    fn spec(&self, side: Side, nic: Nic) -> GuestSpec {
        let spec = GuestSpec {
            nic: Some(nic),
            // The threads of its CPUs have names then.
            extra: vec!["-name".into(), format!("{NAME},debug-threads=on")],
            // Little to do for a machine that has many of them at once: all of it is checked within a second.
            fill_mib: 8,
            rate: 200,
            check_rate: Some(2048),
            ..self.pair.spec(NAME, 96)
        };
        match self.kind {
            Kind::Diskless | Kind::Private => spec,
            Kind::Disk => {
                // One that was left behind by a guest before would be taken for that.
                let name = format!("disk-{}", self.booted);
                disk::create(&crate::image(self.pair.host(side), &name), Format::Raw, 8 * MIB).unwrap();
                let work = Work::Blocks {
                    pattern: Pattern::Random,
                    io: Io::Direct,
                    rate: 50,
                    depth: 1,
                    check_rate: 50,
                };
                let disk = TestDisk {
                    roles: vec![work.in_the_rest()],
                    ..TestDisk::new(self.pair.host(side).local_dir().join(name), Format::Raw, "d")
                };
                GuestSpec { disks: vec![disk], ..spec }
            }
            Kind::PostCopy => outrunning(GuestSpec { check_rate: None, memory_mib: 160, ..spec }),
        }
    }

    /// What the guest said so far is not read over and over again.
    pub(super) fn forget_console(&self) {
        let _ = File::options().write(true).truncate(true).open(self.pair.a().serial(NAME));
    }

    /// The guest's status, from itself.
    pub(super) fn status(&self) -> Result<Status, String> {
        let living = self.living.as_ref().ok_or("there is no guest")?;
        let client = self.pair.client().ok_or("there is no client")?;
        client.status(living.nic.address).map_err(|e| format!("the guest does not answer: {e}"))
    }

    /// What a host lists of the guest: nothing where it does not, an error where its agent does not answer.
    pub(super) fn listed(&self, side: Side) -> Result<Option<serde_json::Value>, String> {
        let said = vmirror(self.pair.host(side), &["list", "--json"]);
        let list: serde_json::Value = match said.code {
            Some(0) => serde_json::from_str(&said.stdout).map_err(|e| e.to_string())?,
            _ => return Err(said.stderr),
        };
        // Of one that has left images are kept.
        let listed = |vm: &&serde_json::Value| vm["name"] == NAME && vm["state"] != "left";
        Ok(list.as_array().and_then(|list| list.iter().find(listed)).cloned())
    }
}
