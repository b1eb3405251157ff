//! The host a controller runs on: what it may use, and what it allows its peers.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::cgroup::CgroupParent;
use crate::destination::PostCopies;
use crate::forward::Forwards;
use crate::hooks::Hooks;
use crate::journal::Journal;
use crate::neighbourhood::Neighbourhood;
use crate::nft::NftPattern;
use crate::remnants::Remnants;

/// What a peer may ask this host to run: the `[allow]` table of the agent's configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub struct Allow {
    /// Names, as in their certificates, of agents that may send machines here.
    pub peers: Vec<String>,
    /// Directories under which disks and boot files may lie.
    pub disk_dirs: Vec<PathBuf>,
    /// Bridges that a machine's taps may join.
    pub bridges: Vec<String>,
    /// Interfaces that a machine's macvtaps may be on.
    pub macvtap: Vec<String>,
    /// Upper limit of guest RAM of all machines together, in bytes.
    pub max_memory: u64,
    /// QEMU binaries that may be run.
    pub qemu: Vec<PathBuf>,
    /// Machines may come that stay in their source's network, through a tunnel to there.
    pub forward: bool,
    /// Where cgroups may be made for machines that have limits.
    pub cgroup: Option<CgroupParent>,
}

/// What of the host's firewall moves with a machine: the `[network]` table of the agent's configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Firewall {
    /// Connections of its addresses that the kernel tracks.
    pub conntrack: bool,
    /// A table of nftables of its own.
    pub nft_table: Option<NftPattern>,
}

impl Default for Firewall {
    fn default() -> Firewall {
        Firewall { conntrack: true, nft_table: None }
    }
}

/// The host a controller runs on.
#[derive(Debug, Clone)]
pub struct Host {
    /// This agent's name.
    pub name: String,
    /// Its end of the link.
    pub endpoint: link::Endpoint,
    /// Who owns what.
    pub journal: Arc<Journal>,
    /// Sockets, pid files, QEMU's output.
    pub run_dir: PathBuf,
    /// A tmpfs or hugetlbfs for guest RAM.
    pub ram_dir: PathBuf,
    /// What peers may ask for.
    pub allow: Allow,
    /// Programs of the operator's that make a network follow a machine.
    pub hooks: Hooks,
    /// What of its firewall moves with a machine.
    pub firewall: Firewall,
    /// What all mirrors that leave this host may send together; they share it equally.
    pub bandwidth: Arc<link::Bandwidth>,
    /// What a switch-over away from here costs.
    pub switch_cost: Arc<SwitchCost>,
    /// By what addresses the machines here are known.
    pub neighbourhood: Arc<Neighbourhood>,
    /// Machines here whose memory is not complete.
    pub post_copies: PostCopies,
    /// Images that migrations have left here.
    pub remnants: Arc<Remnants>,
    /// Machines that have left, and that stay in the network here.
    pub forwards: Arc<Forwards>,
    /// UDP port of the tunnels for that.
    pub forward_port: u16,
}

/// What a switch-over of the mirror costs beside the last pages: QEMU's saving and loading of devices, messages, the journal. It is
/// measured at each, and the last one is what the next is expected to cost; but one that took far longer than expected may have had a
/// bad moment of the machine, and counts as twice what was expected.
#[derive(Debug)]
pub struct SwitchCost {
    microseconds: AtomicU64,
}

impl SwitchCost {
    /// Before anything was measured: 6 to 9 ms were seen with small guests.
    const UNMEASURED: Duration = Duration::from_millis(9);

    /// What the next one is expected to cost.
    #[must_use]
    pub fn expected(&self) -> Duration {
        Duration::from_micros(self.microseconds.load(Ordering::Relaxed))
    }

    /// What was measured last keeps a migration from being tried: half of what it is above the usual is forgotten, so that one bad
    /// measurement does not decide for ever.
    pub(crate) fn doubt(&self) {
        let expected = self.expected();
        if expected > Self::UNMEASURED {
            self.expect(Self::UNMEASURED + (expected - Self::UNMEASURED) / 2);
        }
    }

    /// Takes in what one has cost.
    pub(crate) fn measured(&self, cost: Duration) {
        self.expect(cost.min(self.expected() * 2));
    }

    fn expect(&self, cost: Duration) {
        self.microseconds.store(u64::try_from(cost.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}

impl Default for SwitchCost {
    fn default() -> SwitchCost {
        let cost = SwitchCost { microseconds: AtomicU64::new(0) };
        cost.expect(Self::UNMEASURED);
        cost
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bad_switch_over_does_not_decide_and_several_do() {
        let cost = SwitchCost::default();
        cost.measured(Duration::from_millis(12));
        cost.measured(Duration::from_secs(2));
        assert_eq!(cost.expected(), Duration::from_millis(24));
        (0..7).for_each(|_| cost.measured(Duration::from_secs(2)));
        assert_eq!(cost.expected(), Duration::from_secs(2));
        cost.measured(Duration::from_millis(10));
        assert_eq!(cost.expected(), Duration::from_millis(10));
    }
}
