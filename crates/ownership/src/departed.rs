//! What is remembered of a machine that is not here any more.

use serde::{Deserialize, Serialize};

/// How it went for a machine until it lacked nothing any more.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Supplied {
    /// Pages that the guest had to wait for.
    pub faults: u64,
    /// Its longest wait, in microseconds.
    pub longest_us: u64,
    /// All its waits together, in microseconds.
    pub total_us: u64,
    /// An agent that ended has not told its part of them.
    pub taken_over: bool,
}

/// What is remembered of a machine that was this host's, beyond its record.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Departed {
    /// It ended while it lacked memory.
    #[serde(default)]
    pub lacked: bool,
    /// Its memory came after the hand-over, all of it.
    #[serde(default)]
    pub supplied: Option<Supplied>,
}
