//! What a switch-over away from this host costs, learned from each.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What a switch-over of the mirror costs beside the last pages: QEMU's saving and loading of devices, messages, the journal. It is
/// measured at each, and the last one is what the next is expected to cost; but one that took far longer than expected may have had a
/// bad moment of the machine, and counts as twice what was expected.
#[derive(Debug)]
pub struct SwitchCost {
    microseconds: AtomicU64,
}

impl SwitchCost {
    /// Before anything was measured: 6 to 9 ms were seen with small guests.
    const UNMEASURED: Duration = Duration::from_millis(9);

    /// What the next one is expected to cost.
    #[must_use]
    pub fn expected(&self) -> Duration {
        Duration::from_micros(self.microseconds.load(Ordering::Relaxed))
    }

    /// What was measured last keeps a migration from being tried: half of what it is above the usual is forgotten, so that one bad
    /// measurement does not decide for ever.
    pub(crate) fn doubt(&self) {
        let expected = self.expected();
        if expected > Self::UNMEASURED {
            self.expect(Self::UNMEASURED + (expected - Self::UNMEASURED) / 2);
        }
    }

    /// Takes in what one has cost.
    pub(crate) fn measured(&self, cost: Duration) {
        self.expect(cost.min(self.expected() * 2));
    }

    fn expect(&self, cost: Duration) {
        self.microseconds.store(u64::try_from(cost.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}

impl Default for SwitchCost {
    fn default() -> SwitchCost {
        let cost = SwitchCost { microseconds: AtomicU64::new(0) };
        cost.expect(Self::UNMEASURED);
        cost
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bad_switch_over_does_not_decide_and_several_do() {
        let cost = SwitchCost::default();
        cost.measured(Duration::from_millis(12));
        cost.measured(Duration::from_secs(2));
        assert_eq!(cost.expected(), Duration::from_millis(24));
        (0..7).for_each(|_| cost.measured(Duration::from_secs(2)));
        assert_eq!(cost.expected(), Duration::from_secs(2));
        cost.measured(Duration::from_millis(10));
        assert_eq!(cost.expected(), Duration::from_millis(10));
    }
}
