//! Rounds: what one scan found and what became of it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::ledger::Sum;

/// Counts of one round. Pages are of [`PAGE_SIZE`](crate::layout::PAGE_SIZE).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Sent as zero.
    pub zero: u64,
    /// Not sent: the destination holds this content already.
    pub unchanged: u64,
    /// Sent as what has changed since they were last sent.
    pub delta: u64,
    /// Sent as what another page holds already.
    pub duplicate: u64,
    /// Sent whole.
    pub plain: u64,
    /// Not sent: the destination is to be without them for now.
    pub withheld: u64,
    /// Bytes of guest memory that were looked at.
    pub raw_bytes: u64,
    /// Bytes written to the streams, before encryption.
    pub wire_bytes: u64,
}

impl Counts {
    /// Adds another stream's counts.
    pub fn add(&mut self, other: &Counts) {
        self.zero += other.zero;
        self.unchanged += other.unchanged;
        self.delta += other.delta;
        self.duplicate += other.duplicate;
        self.plain += other.plain;
        self.withheld += other.withheld;
        self.raw_bytes += other.raw_bytes;
        self.wire_bytes += other.wire_bytes;
    }

    /// Every page is exactly one of these.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.zero + self.unchanged + self.delta + self.duplicate + self.plain + self.withheld
    }
}

/// What has gone through a mirror so far, rounds under way included. Counted by the workers, batch by batch.
#[derive(Debug, Default)]
pub struct Flow {
    raw_bytes: AtomicU64,
    wire_bytes: AtomicU64,
    disk_bytes: AtomicU64,
}

impl Flow {
    pub(super) fn add(&self, raw_bytes: u64, wire_bytes: u64) {
        self.raw_bytes.fetch_add(raw_bytes, Ordering::Relaxed);
        self.wire_bytes.fetch_add(wire_bytes, Ordering::Relaxed);
    }

    /// So many bytes were written to the streams for disks.
    pub(super) fn add_disk(&self, bytes: u64) {
        self.disk_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes written to the streams, for memory and for disks: what the link shows of its speed.
    pub(super) fn all_bytes(&self) -> u64 {
        self.wire_bytes() + self.disk_bytes.load(Ordering::Relaxed)
    }

    /// Bytes of guest memory that were looked at.
    #[must_use]
    pub fn raw_bytes(&self) -> u64 {
        self.raw_bytes.load(Ordering::Relaxed)
    }

    /// Bytes of memory written to the streams, before encryption.
    #[must_use]
    pub fn wire_bytes(&self) -> u64 {
        self.wire_bytes.load(Ordering::Relaxed)
    }
}

/// Whether the guest runs during a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guest {
    /// It runs: what is found is protected again before it is read.
    Running,
    /// It is paused: nothing needs protection any more.
    Paused,
}

/// A round as the source knows it when everything has been written to the streams.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sent {
    /// Number of the round, and of the barrier that ends it on every stream.
    pub number: u32,
    /// Pages that were due: found by the scan, owed from before, or asked for again by an audit; less those deferred.
    pub due: u64,
    /// Hot pages that the guest had written again before their turn came: left to a later round.
    pub deferred: u64,
    /// Pages that the scan alone found.
    pub scanned: u64,
    /// What became of them.
    pub counts: Counts,
    /// The source's ledger sums at the barrier, by stream. The destination's must be the same.
    pub sums: Vec<Sum>,
    /// Those of disks.
    pub disk_sums: Vec<Sum>,
    /// How long the scan took.
    pub scan: Duration,
    /// From the scan's beginning to the last byte given to the streams.
    pub elapsed: Duration,
}
