//! The host a controller runs on: what it may use, and what it allows its peers.

use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::journal::Journal;

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
    /// Upper limit of guest RAM of all machines together, in bytes.
    pub max_memory: u64,
    /// QEMU binaries that may be run.
    pub qemu: Vec<PathBuf>,
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
}
