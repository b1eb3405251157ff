//! What a rehearsal of a migration came to.

use serde::{Deserialize, Serialize};

use crate::report::DiskMode;
use finding::Finding;

/// What a rehearsal of a migration came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Readiness {
    /// Name of the destination agent.
    pub destination: String,
    /// Every reason why a migration would fail; none: it would not.
    pub findings: Vec<Finding>,
    /// What would become of its disks; empty where something stands in the way.
    pub disks: Vec<PlannedDisk>,
    /// What is not as it should be, though it keeps no migration from being begun.
    pub warnings: Vec<Finding>,
}

/// A disk of a machine that could migrate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedDisk {
    /// The image's path as the machine's command line names it.
    pub name: String,
    /// Bytes, as the guest sees them.
    pub size: u64,
    /// Whether it would be copied.
    pub mode: DiskMode,
    /// There is an image at the destination.
    pub exists: bool,
}
