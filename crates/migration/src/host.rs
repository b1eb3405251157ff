//! The host a controller runs on: what it may use, and what it allows its peers.

#[cfg(test)]
pub(crate) mod testing;

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use qemu::User;
use qemu::spec::render::{Allowed, Permissions};
use serde::{Deserialize, Serialize};

use crate::destination::PostCopies;
use crate::fence::Fence;
use crate::forward::Forwards;
use crate::hooks::Hooks;
use crate::left_images::LeftImages;
use crate::lifecycle::Lingering;
use crate::logs::Logs;
use crate::neighbourhood::Neighbourhood;
use crate::recovering::Recovering;
use crate::room::RamFiles;
use crate::vm::Journal;
use cgroup::CgroupParent;
use network::nft::NftPattern;

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
    /// Arguments of QEMU's that are passed on as they are.
    pub arguments: Vec<Allowed>,
    /// Directories with files that a machine's QEMU may write: consoles, logs.
    pub output_dirs: Vec<PathBuf>,
    /// Directories where a machine's sockets get the names by which its users know them, and with sockets that it may connect to.
    pub socket_dirs: Vec<PathBuf>,
    /// Block drivers beyond those that only read and write the file that they are given.
    pub disk_drivers: Vec<String>,
    /// Addresses on which a machine's displays and consoles may listen.
    pub listen: Vec<IpAddr>,
    /// As whom the QEMUs of machines that come here run, where the agent is root.
    pub user: Option<User>,
    /// A QEMU that was under no seccomp filter where it comes from is under none here.
    pub unsandboxed: bool,
}

impl Allow {
    /// As whom the QEMUs of machines that come here run, if not as the agent's own user.
    #[must_use]
    pub fn other_user(&self) -> Option<&User> {
        self.user.as_ref().filter(|user| !user.is_ours())
    }

    /// What of it is about command lines.
    #[must_use]
    pub fn permissions(&self) -> Permissions {
        Permissions {
            arguments: self.arguments.clone(),
            file_dirs: self.disk_dirs.clone(),
            output_dirs: self.output_dirs.clone(),
            socket_dirs: self.socket_dirs.clone(),
            disk_drivers: self.disk_drivers.clone(),
            listen: self.listen.clone(),
            unsandboxed: self.unsandboxed,
        }
    }
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
    /// Sockets, pid files.
    pub run_dir: PathBuf,
    /// QEMU's output.
    pub logs: Logs,
    /// A tmpfs or hugetlbfs for guest RAM.
    pub ram_dir: PathBuf,
    /// What peers may ask for.
    pub allow: Allow,
    /// Programs of the operator's that make a network follow a machine.
    pub hooks: Hooks,
    /// What of its firewall moves with a machine.
    pub firewall: Firewall,
    /// Seccomp filters of QEMUs let pass what is done to track them: the operator's word, where the agent may not put them aside.
    pub trust_seccomp: bool,
    /// What all mirrors that leave this host may send together; they share it equally.
    pub bandwidth: Arc<link::Bandwidth>,
    /// What a switch-over away from here costs.
    pub switch_cost: Arc<SwitchCost>,
    /// By what addresses the machines here are known.
    pub neighbourhood: Arc<Neighbourhood>,
    /// Machines here whose memory is not complete.
    pub post_copies: PostCopies,
    /// Machines that were to be forgotten, and of which a process may run on.
    pub lingering: Lingering,
    /// Machines that are still looked for since the agent started.
    pub recovering: Recovering,
    /// The RAM files of its machines.
    pub ram_files: Arc<RamFiles>,
    /// Images that machines have left here.
    pub left: Arc<LeftImages>,
    /// Images here of machines that are not, locked so that nothing opens them.
    pub fence: Arc<Fence>,
    /// Machines that have left, and that stay in the network here.
    pub forwards: Arc<Forwards>,
    /// UDP port of the tunnels for that.
    pub forward_port: u16,
    /// TCP port of its end of the link, by which peers can ask it; none until it listens.
    pub link_port: Arc<OnceLock<u16>>,
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
