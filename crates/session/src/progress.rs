//! What can be seen of a mirror while it works.

use serde::{Deserialize, Serialize};

use crate::options::Goal;
use crate::report::{Phase, Verification};

/// A snapshot of one mirror's progress.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Identity of the migration.
    pub id: String,
    /// Name of the machine.
    pub vm: String,
    /// Name of the source agent.
    pub source: String,
    /// Name of the destination agent; its address until that is known.
    pub destination: String,
    /// What it is to lead to.
    pub goal: Goal,
    /// The step it is in.
    pub phase: Phase,
    /// Since the command, in milliseconds.
    pub elapsed_ms: f64,
    /// Rounds that the destination has acknowledged.
    pub rounds: u32,
    /// Guest RAM, in bytes. This and the other bytes here are of memory; those of disks are with the disks.
    pub total_bytes: u64,
    /// Not yet equal at the destination, in bytes: the lag.
    pub remaining_bytes: u64,
    /// Guest memory read so far, in bytes.
    pub raw_bytes: u64,
    /// Written to the data streams so far, in bytes.
    pub wire_bytes: u64,
    /// Measured over the last round, in bytes of guest memory per second.
    pub throughput: f64,
    /// How fast the guest dirties memory, measured over the last round, in bytes per second.
    pub dirty_rate: f64,
    /// The downtime if the switch-over began now, in milliseconds.
    pub predicted_downtime_ms: Option<f64>,
    /// Until the switch-over, in milliseconds, where it can be told.
    pub time_left_ms: Option<f64>,
    /// The mirror has caught up.
    pub in_sync: bool,
    /// What the audit has found so far.
    pub verification: Verification,
    /// The mirror does not converge, or memory is not supplied that is missing, and why, in words.
    pub warning: Option<String>,
    /// The share of the time for which the guest's CPUs are stopped, because it outran the mirror; 0 to 0.99.
    #[serde(default)]
    pub throttle: f64,
    /// The disks that are mirrored.
    #[serde(default)]
    pub disks: Vec<DiskProgress>,
}

/// How far the mirror of one disk is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DiskProgress {
    /// The image's path as the guest's command line names it.
    pub name: String,
    /// Size in bytes.
    pub size: u64,
    /// Not yet known to be equal at the destination, in bytes.
    pub remaining_bytes: u64,
    /// Bytes copied from it or written to it so far.
    pub raw_bytes: u64,
    /// Sent for that so far, in bytes.
    pub wire_bytes: u64,
}
