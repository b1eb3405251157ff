//! What is done to a migration, exactly; and what an operator's service manager does about it.

use std::thread;
use std::time::Duration;

use testbed::{BadDisk, Disturbance, Wire, fault};

use super::cell::{Cell, Fault, Role};
use super::chance::Chance;
use super::lane::Lane;
use crate::Side;

/// A year, in seconds.
const YEAR: i64 = 365 * 24 * 60 * 60;
/// A link that is slow, in bits per second.
const SLOW: u64 = 1_000_000;

/// A fault with all that a seed says of it.
#[derive(Debug, Clone)]
pub struct Strike {
    /// What is done.
    pub fault: Fault,
    /// To which host, where the fault leaves that open.
    pub at: Role,
    /// How long it lasts, or until what was killed is started again.
    pub lasts: Duration,
    /// By how much a clock jumps, in seconds.
    pub jump: i64,
    /// Of how many segments one is corrupted.
    pub one_of: u32,
}

impl Strike {
    /// What that cell is with that seed.
    #[must_use]
    pub fn new(cell: &Cell, seed: u64) -> Strike {
        let mut chance = Chance::new(seed, &cell.to_string());
        let at = *chance.one(&[Role::Source, Role::Destination]);
        // Most of what there is to see is seen at once; what is given up after some time, after more than 10 s.
        let lasts = Duration::from_millis(*chance.one(&[200, 500, 1000, 1000, 2000, 4000, 12_000]));
        let jump = *chance.one(&[YEAR, -YEAR]);
        let one_of = *chance.one(&[1, 3, 10, 40]);
        Strike { fault: cell.fault, at, lasts, jump, one_of }
    }

    /// Does it, to a migration from `from` that is held at a point; lets that go on, and puts right what an operator or a service
    /// manager would.
    pub(super) fn strike(&self, lane: &mut Lane, from: Side, release: impl FnOnce()) {
        let side = |role| match role {
            Role::Source => from,
            Role::Destination => from.other(),
        };
        let host = |side| lane.pair().host(side);
        match self.fault {
            Fault::KillAgent(role) => {
                host(side(role)).kill_agent().unwrap();
                release();
                thread::sleep(self.lasts);
                lane.start_agent(side(role)).unwrap();
            }
            Fault::KillQemu(role) => {
                host(side(role)).processes_of("qemu-system").into_iter().for_each(fault::kill);
                release();
            }
            Fault::StopAgent(role) => {
                let stopped = host(side(role)).agent_pid().map(fault::pause);
                release();
                thread::sleep(self.lasts);
                drop(stopped);
            }
            Fault::StopQemu(role) => {
                let stopped: Vec<_> =
                    host(side(role)).processes_of("qemu-system").into_iter().map(fault::pause).collect();
                release();
                thread::sleep(self.lasts);
                drop(stopped);
            }
            Fault::CutOneWay => self.disturb(lane, side(self.at), Disturbance::Silence, release),
            Fault::Corrupt => {
                self.disturb(lane, side(self.at), Disturbance::Corruption(self.one_of), release);
            }
            Fault::CutBothWays => {
                let (testbed, host) = (lane.pair().testbed(), host(side(self.at)));
                testbed.cut(host, Wire::Link).unwrap();
                release();
                thread::sleep(self.lasts);
                testbed.mend(host, Wire::Link).unwrap();
            }
            Fault::Slow => {
                lane.set_rate(Some(SLOW));
                release();
                thread::sleep(self.lasts);
                lane.set_rate(None);
            }
            Fault::StateFull => {
                let host = host(side(self.at));
                host.fill_state(true).unwrap();
                release();
                thread::sleep(self.lasts);
                host.fill_state(false).unwrap();
            }
            Fault::SyncFails => {
                let shim = lane.shim(side(self.at));
                shim.set_disk(BadDisk::FailsToSync).unwrap();
                release();
                thread::sleep(self.lasts);
                shim.set_disk(BadDisk::Sound).unwrap();
            }
            Fault::ReadsFail => {
                let side = side(self.at);
                lane.shim(side).set_disk(BadDisk::FailsToRead).unwrap();
                lane.pair().host(side).kill_agent().unwrap();
                release();
                // It may refuse to start, and is started again.
                let _ = lane.start_agent(side);
                thread::sleep(self.lasts);
                lane.shim(side).set_disk(BadDisk::Sound).unwrap();
                lane.pair().host(side).kill_agent().unwrap();
                lane.start_agent(side).unwrap();
            }
            Fault::ClockJumps => {
                let shim = lane.shim(side(self.at));
                shim.set_clock(self.jump).unwrap();
                release();
                thread::sleep(self.lasts);
                shim.set_clock(0).unwrap();
            }
            Fault::Reboot => {
                let side = side(Role::Destination);
                lane.pair().host(side).reboot().unwrap();
                release();
                thread::sleep(self.lasts);
                lane.start_agent(side).unwrap();
            }
        }
    }

    fn disturb(&self, lane: &Lane, side: Side, disturbance: Disturbance, release: impl FnOnce()) {
        let (testbed, host) = (lane.pair().testbed(), lane.pair().host(side));
        testbed.disturb(host, Wire::Link, disturbance).unwrap();
        release();
        thread::sleep(self.lasts);
        testbed.undisturb(host, Wire::Link).unwrap();
    }
}
