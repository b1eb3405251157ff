//! Which versions of the protocol two agents speak.

use std::fmt;

/// Protocol versions that an agent speaks: from the lowest to the highest, all in between included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VersionRange {
    min: u32,
    max: u32,
}

impl VersionRange {
    /// The versions this build speaks.
    pub const SPOKEN: Self = Self { min: 1, max: 1 };

    /// A range; `None` if it is empty or has version 0 in it, which is no version.
    #[must_use]
    pub const fn new(min: u32, max: u32) -> Option<Self> {
        if min == 0 || min > max { None } else { Some(Self { min, max }) }
    }

    /// The lowest version.
    #[must_use]
    pub const fn min(self) -> u32 {
        self.min
    }

    /// The highest version.
    #[must_use]
    pub const fn max(self) -> u32 {
        self.max
    }

    /// Whether a version is among them.
    #[must_use]
    pub const fn contains(self, version: u32) -> bool {
        self.min <= version && version <= self.max
    }

    /// The highest version that both speak.
    #[must_use]
    pub fn shared(self, other: Self) -> Option<u32> {
        let highest = self.max.min(other.max);
        (highest >= self.min.max(other.min)).then_some(highest)
    }
}

impl fmt::Display for VersionRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.min == self.max {
            write!(f, "version {}", self.min)
        } else {
            write!(f, "versions {} to {}", self.min, self.max)
        }
    }
}
