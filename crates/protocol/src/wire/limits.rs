//! What is said of the limits of a machine's process.

use cgroup::{CpuWeight, Limits, Quota};
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

impl CgroupLimits {
    /// What is sent of them; nothing where there are none.
    pub fn of(limits: &Limits) -> Option<CgroupLimits> {
        let (weight, shares) = match limits.weight {
            Some(CpuWeight::V2(weight)) => (Some(weight), None),
            Some(CpuWeight::V1(shares)) => (None, Some(shares)),
            None => (None, None),
        };
        (!limits.are_none()).then_some(CgroupLimits {
            cpu_time: limits.quota.map(|quota| quota.time),
            cpu_period: limits.quota.map(|quota| quota.period),
            cpu_weight: weight,
            cpu_shares: shares,
            memory_max: limits.memory_max,
            memory_high: limits.memory_high,
        })
    }

    /// What was sent; none where it makes no sense.
    pub fn checked(&self) -> Option<Limits> {
        let quota = match (self.cpu_time, self.cpu_period) {
            (Some(time @ 1..), Some(period @ 1..)) => Some(Quota { time, period }),
            (None, None) => None,
            _ => return None,
        };
        let weight = match (self.cpu_weight, self.cpu_shares) {
            (Some(weight), None) => Some(CpuWeight::V2(weight)),
            (None, Some(shares)) => Some(CpuWeight::V1(shares)),
            (None, None) => None,
            (Some(_), Some(_)) => return None,
        };
        let is_sound = weight.is_none_or(CpuWeight::is_sound);
        is_sound.then_some(Limits {
            quota,
            weight,
            memory_max: self.memory_max,
            memory_high: self.memory_high,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn limits_that_cannot_be_are_refused() {
        let all = Limits {
            quota: Some(Quota { time: 50_000, period: 100_000 }),
            weight: Some(CpuWeight::V2(100)),
            memory_max: Some(1 << 30),
            memory_high: Some(1 << 29),
        };
        let good = CgroupLimits::of(&all).unwrap();
        assert_eq!(good.checked(), Some(all));
        for bad in [
            CgroupLimits { cpu_time: None, ..good },
            CgroupLimits { cpu_period: Some(0), ..good },
            CgroupLimits { cpu_weight: Some(0), ..good },
            CgroupLimits { cpu_weight: Some(10_001), ..good },
            CgroupLimits { cpu_shares: Some(1024), ..good },
            CgroupLimits { cpu_weight: None, cpu_shares: Some(1), ..good },
        ] {
            assert_eq!(bad.checked(), None, "{bad:?}");
        }
        assert_eq!(CgroupLimits::of(&Limits::default()), None);
    }

    proptest! {
        #[test]
        fn limits_come_as_they_were_sent(
            quota in prop::option::of((1u64.., 1..=1_000_000u64)),
            weight in prop::option::of(prop_oneof![
                (1..=10_000u64).prop_map(CpuWeight::V2),
                (2..=262_144u64).prop_map(CpuWeight::V1)
            ]),
            memory_max: Option<u64>,
            memory_high: Option<u64>,
        ) {
            let quota = quota.map(|(time, period)| Quota { time, period });
            let limits = Limits { quota, weight, memory_max, memory_high };
            let sent = CgroupLimits::of(&limits);
            prop_assert_eq!(sent.is_none(), limits.are_none());
            prop_assert_eq!(sent.map_or(Some(Limits::default()), |sent| sent.checked()), Some(limits));
        }
    }
}
