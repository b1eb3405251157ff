//! Limits of CPU and memory of a machine's process, which move with it: cgroups of version 1 and 2.
//!
//! [`read`] finds at the source what limits belong to the process alone, [`make`] gives it the same at the destination, and
//! [`hierarchy`] says where on a host either version is.

mod hierarchy;
pub(crate) mod make;
pub(crate) mod read;
#[cfg(test)]
mod tests;

use std::io;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::wire;
use hierarchy::Controller;

/// Where the kernel tells of processes and mounts.
const PROC: &str = "/proc";
/// What a cgroup of version 2 weighs, and how many shares one of version 1 has, where nobody says otherwise.
const DEFAULT_WEIGHT: u64 = 100;
const DEFAULT_SHARES: u64 = 1024;
/// What the kernel takes.
const WEIGHTS: std::ops::RangeInclusive<u64> = 1..=10_000;
const SHARES: std::ops::RangeInclusive<u64> = 2..=262_144;

/// CPU time that may be used in each period, both in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Quota {
    pub(crate) time: u64,
    pub(crate) period: u64,
}

impl Quota {
    /// The one that allows less.
    fn tighter(self, other: Quota) -> Quota {
        let scaled = |quota: Quota, by: Quota| u128::from(quota.time) * u128::from(by.period);
        if scaled(other, self) < scaled(self, other) { other } else { self }
    }
}

/// What part of the CPU time a cgroup has beside its siblings, in the unit of the version where it was set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CpuWeight {
    /// `cpu.weight`.
    V2(u64),
    /// `cpu.shares`.
    V1(u64),
}

/// The scheduler counts in shares, and `cpu.weight` is converted as the kernel does it (`sched_weight_from_cgroup` in
/// kernel/sched/sched.h): the default of one version is that of the other.
impl CpuWeight {
    fn weight(self) -> u64 {
        match self {
            CpuWeight::V2(weight) => weight,
            CpuWeight::V1(shares) => {
                let weight = (shares * DEFAULT_WEIGHT + DEFAULT_SHARES / 2) / DEFAULT_SHARES;
                weight.clamp(*WEIGHTS.start(), *WEIGHTS.end())
            }
        }
    }

    fn shares(self) -> u64 {
        match self {
            CpuWeight::V1(shares) => shares,
            CpuWeight::V2(weight) => (weight * DEFAULT_SHARES + DEFAULT_WEIGHT / 2) / DEFAULT_WEIGHT,
        }
    }
}

/// Limits of one process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Limits {
    pub(crate) quota: Option<Quota>,
    pub(crate) weight: Option<CpuWeight>,
    /// Bytes; what would take more is ended.
    pub(crate) memory_max: Option<u64>,
    /// Bytes; what takes more is slowed. Version 2 only.
    pub(crate) memory_high: Option<u64>,
}

impl Limits {
    pub(crate) fn are_none(&self) -> bool {
        *self == Limits::default()
    }

    /// Whether a controller has something to do for them.
    fn need(&self, controller: Controller) -> bool {
        match controller {
            Controller::Cpu => self.quota.is_some() || self.weight.is_some(),
            Controller::Memory => self.memory_max.is_some() || self.memory_high.is_some(),
        }
    }

    /// With those of a cgroup further up, which hold as well. Only the weight of the lower one is the process's own: the other is
    /// shared out among whatever else comes there.
    fn below(self, upper: Limits) -> Limits {
        let least = |a: Option<u64>, b: Option<u64>| a.into_iter().chain(b).min();
        Limits {
            quota: self.quota.into_iter().chain(upper.quota).reduce(Quota::tighter),
            weight: self.weight.or(upper.weight),
            memory_max: least(self.memory_max, upper.memory_max),
            memory_high: least(self.memory_high, upper.memory_high),
        }
    }

    /// What is sent of them; nothing where there are none.
    pub(crate) fn wire(&self) -> Option<wire::CgroupLimits> {
        let (weight, shares) = match self.weight {
            Some(CpuWeight::V2(weight)) => (Some(weight), None),
            Some(CpuWeight::V1(shares)) => (None, Some(shares)),
            None => (None, None),
        };
        (!self.are_none()).then_some(wire::CgroupLimits {
            cpu_time: self.quota.map(|quota| quota.time),
            cpu_period: self.quota.map(|quota| quota.period),
            cpu_weight: weight,
            cpu_shares: shares,
            memory_max: self.memory_max,
            memory_high: self.memory_high,
        })
    }

    /// What was sent; none where it makes no sense.
    pub(crate) fn decode(wire: &wire::CgroupLimits) -> Option<Limits> {
        let quota = match (wire.cpu_time, wire.cpu_period) {
            (Some(time @ 1..), Some(period @ 1..)) => Some(Quota { time, period }),
            (None, None) => None,
            _ => return None,
        };
        let weight = match (wire.cpu_weight, wire.cpu_shares) {
            (Some(weight), None) if WEIGHTS.contains(&weight) => Some(CpuWeight::V2(weight)),
            (None, Some(shares)) if SHARES.contains(&shares) => Some(CpuWeight::V1(shares)),
            (None, None) => None,
            _ => return None,
        };
        Some(Limits { quota, weight, memory_max: wire.memory_max, memory_high: wire.memory_high })
    }
}

/// The cgroup below which those of machines are made, by its path from the root of either version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct CgroupParent(String);

/// A path that is no cgroup's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not the path of a cgroup from the root of all, such as \"machines\" or \"vms.slice/vmirror\""
)]
pub struct BadCgroup(pub String);

impl TryFrom<String> for CgroupParent {
    type Error = BadCgroup;

    fn try_from(path: String) -> Result<CgroupParent, BadCgroup> {
        let mut parts = Path::new(&path).components().peekable();
        let fits = parts.peek().is_some() && parts.all(|part| matches!(part, Component::Normal(_)));
        if fits && !path.contains(char::is_control) { Ok(CgroupParent(path)) } else { Err(BadCgroup(path)) }
    }
}

impl FromStr for CgroupParent {
    type Err = BadCgroup;

    fn from_str(path: &str) -> Result<CgroupParent, BadCgroup> {
        CgroupParent::try_from(path.to_owned())
    }
}

impl From<CgroupParent> for String {
    fn from(parent: CgroupParent) -> String {
        parent.0
    }
}

impl AsRef<Path> for CgroupParent {
    fn as_ref(&self) -> &Path {
        Path::new(&self.0)
    }
}

/// Why limits cannot be read or made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CgroupError {
    #[error("cannot read {}", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} is not of the expected form: {text:?}", path.display())]
    Form { path: PathBuf, text: String },
    #[error("there are no cgroups with the controller {controller}, or none that the agent can see")]
    NoController { controller: &'static str },
    #[error("cgroups of version 1 have no memory.high, which the VM has ({0} bytes)")]
    NoHigh(u64),
    #[error("cannot make {}", path.display())]
    Make {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot write {value:?} to {}", path.display())]
    Write {
        path: PathBuf,
        value: String,
        #[source]
        source: io::Error,
    },
}

impl CgroupError {
    /// What to do about it.
    pub(crate) fn hint(&self) -> &'static str {
        match self {
            CgroupError::Read { .. } | CgroupError::Form { .. } => "see to the cgroups of that host",
            CgroupError::NoController { .. } => {
                "mount them there, in the agent's mount namespace, or take the VM's limits off"
            }
            CgroupError::NoHigh(_) => "use a host with cgroups of version 2, or take that limit off",
            CgroupError::Make { source, .. } | CgroupError::Write { source, .. } => match source.kind() {
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                    "let the agent there write to its [allow] cgroup, or run it as root"
                }
                io::ErrorKind::ResourceBusy => {
                    "name a cgroup without processes of its own in [allow] cgroup there"
                }
                _ => "name a cgroup in [allow] cgroup there that has room for the VM's limits",
            },
        }
    }
}
