//! Limits of CPU and memory of a machine's process, which move with it: cgroups of version 1 and 2.
//!
//! [`read`] finds at the source what limits belong to the process alone, [`make`] gives it the same at the destination, and
//! `hierarchy` says where on a host either version is.

mod hierarchy;
pub mod make;
pub mod read;
#[cfg(test)]
mod tests;

use std::io;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

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
pub struct Quota {
    /// What may be used.
    pub time: u64,
    /// Of this.
    pub period: u64,
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
pub enum CpuWeight {
    /// `cpu.weight`.
    V2(u64),
    /// `cpu.shares`.
    V1(u64),
}

impl CpuWeight {
    /// One that the kernel takes.
    #[must_use]
    pub fn is_sound(self) -> bool {
        match self {
            CpuWeight::V2(weight) => WEIGHTS.contains(&weight),
            CpuWeight::V1(shares) => SHARES.contains(&shares),
        }
    }
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
pub struct Limits {
    /// Of CPU time.
    pub quota: Option<Quota>,
    /// Beside its siblings.
    pub weight: Option<CpuWeight>,
    /// Bytes; what would take more is ended.
    pub memory_max: Option<u64>,
    /// Bytes; what takes more is slowed. Version 2 only.
    pub memory_high: Option<u64>,
}

impl Limits {
    /// Whether it has none.
    #[must_use]
    pub fn are_none(&self) -> bool {
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
#[non_exhaustive]
pub enum CgroupError {
    /// The system would not have it read.
    #[error("cannot read {}", path.display())]
    Read {
        /// What.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The kernel says something else than is known here.
    #[error("{} is not of the expected form: {text:?}", path.display())]
    Form {
        /// Where.
        path: PathBuf,
        /// What it says.
        text: String,
    },
    /// No hierarchy has the controller.
    #[error("there are no cgroups with the controller {controller}, or none that the agent can see")]
    NoController {
        /// Which.
        controller: &'static str,
    },
    /// Version 1 knows no `memory.high`.
    #[error("cgroups of version 1 have no memory.high, which the VM has ({0} bytes)")]
    NoHigh(u64),
    /// A cgroup could not be made.
    #[error("cannot make {}", path.display())]
    Make {
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A limit could not be set.
    #[error("cannot write {value:?} to {}", path.display())]
    Write {
        /// Where.
        path: PathBuf,
        /// To what.
        value: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl CgroupError {
    /// What to do about it.
    pub fn hint(&self) -> &'static str {
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
