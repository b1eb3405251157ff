//! The two hosts of a lane.

use testbed::Host;

use crate::Pair;

/// One of the two hosts of a lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Host A.
    A,
    /// Host B.
    B,
}

impl Side {
    /// The other one.
    #[must_use]
    pub fn other(self) -> Side {
        match self {
            Side::A => Side::B,
            Side::B => Side::A,
        }
    }
}

impl Pair {
    /// The host of that side.
    #[must_use]
    pub fn host(&self, side: Side) -> &Host {
        match side {
            Side::A => self.a(),
            Side::B => self.b(),
        }
    }
}
