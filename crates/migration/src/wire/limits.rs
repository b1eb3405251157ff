//! What is said of the limits of a machine's process.

use prost::Message;

/// Limits of a process, each absent where there is none. The weight is in the unit of the source's cgroups.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct CgroupLimits {
    /// CPU time that may be used in each period, in microseconds.
    #[prost(uint64, optional, tag = "1")]
    pub cpu_time: Option<u64>,
    /// The period, in microseconds.
    #[prost(uint64, optional, tag = "2")]
    pub cpu_period: Option<u64>,
    /// Share of the CPU, as `cpu.weight` of version 2.
    #[prost(uint64, optional, tag = "3")]
    pub cpu_weight: Option<u64>,
    /// Share of the CPU, as `cpu.shares` of version 1.
    #[prost(uint64, optional, tag = "4")]
    pub cpu_shares: Option<u64>,
    /// Bytes of memory, `memory.max`.
    #[prost(uint64, optional, tag = "5")]
    pub memory_max: Option<u64>,
    /// Bytes of memory, `memory.high`.
    #[prost(uint64, optional, tag = "6")]
    pub memory_high: Option<u64>,
}
