//! A host: what is known of it, what machines may use there, and what others may ask it to run.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use qemu::User;
use qemu::spec::render::{Allowed, Permissions};
use serde::{Deserialize, Serialize};

use crate::fence::Fence;
use crate::forward::Forwards;
use crate::guest_addresses::GuestAddresses;
use crate::hooks::Hooks;
use crate::left_images::LeftImages;
use crate::lingering::Lingering;
use crate::logs::Logs;
use crate::post_copy_memory::PostCopyMemory;
use crate::ram_files::RamFiles;
use crate::recovering::Recovering;
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

/// A host, as far as its machines are concerned.
#[derive(Debug, Clone)]
pub struct Host {
    /// This agent's name.
    pub name: String,
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
    /// By what addresses the machines here are known.
    pub guest_addresses: Arc<GuestAddresses>,
    /// What brings the rest of the memory of machines that run here before it is complete.
    pub post_copy_memory: Arc<dyn PostCopyMemory>,
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
}
