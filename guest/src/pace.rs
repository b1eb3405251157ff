//! When writes are due, at a set rate.

use std::time::{Duration, Instant};

/// How often a writer looks at most whether writes are due.
pub(crate) const TICK: Duration = Duration::from_millis(5);
/// How often it looks at least, to hear of another rate. An emulated machine that wakes as often as every tick is never at rest.
const SELDOM: Duration = Duration::from_millis(50);
/// What a writer that fell behind, or stood still with the machine, makes up for at most: so a pause is not followed by a burst. One
/// write is always made up for.
const BACKLOG: Duration = Duration::from_millis(100);

/// Writes due by the clock.
#[derive(Debug)]
pub(crate) struct Pace {
    since: Instant,
}

impl From<Instant> for Pace {
    /// Writes become due from then on.
    fn from(since: Instant) -> Self {
        Self { since }
    }
}

impl Pace {
    /// How many writes are due at `now` at that rate; the time they stand for counts as spent.
    pub(crate) fn due(&mut self, now: Instant, rate: u64) -> u64 {
        let elapsed = now.saturating_duration_since(self.since);
        let backlog = BACKLOG.max(between(rate));
        if elapsed > backlog {
            self.since = now - backlog;
        }
        let owed = now.saturating_duration_since(self.since);
        let due = (owed.as_nanos() * u128::from(rate) / 1_000_000_000) as u64;
        if let Some(spent) = (u128::from(due) * 1_000_000_000).checked_div(u128::from(rate)) {
            self.since += Duration::from_nanos(spent as u64);
        }
        due
    }
}

/// The time from one write to the next, rounded up; none where there are no writes.
fn between(rate: u64) -> Duration {
    Duration::from_nanos(1_000_000_000_u64.checked_div(rate).map_or(0, |nanos| nanos + 1))
}

/// How long a writer rests between two looks.
pub(crate) fn rest(rate: u64) -> Duration {
    if rate == 0 { SELDOM } else { between(rate).clamp(TICK, SELDOM) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_holds_over_uneven_ticks() {
        let start = Instant::now();
        let mut pace = Pace { since: start };
        let total: u64 = [3, 9, 10, 50, 51, 99, 120, 200]
            .into_iter()
            .map(|at| pace.due(start + Duration::from_millis(at), 1000))
            .sum();
        assert_eq!(total, 200);
    }

    #[test]
    fn a_pause_is_not_followed_by_a_burst() {
        let start = Instant::now();
        let mut pace = Pace { since: start };
        assert_eq!(pace.due(start + Duration::from_secs(3600), 1000), 100);
    }

    #[test]
    fn a_rate_below_what_is_made_up_for_holds() {
        let start = Instant::now();
        let mut pace = Pace { since: start };
        let total: u64 = (1..=200).map(|tick| pace.due(start + SELDOM * tick, 2)).sum();
        assert!((19..=20).contains(&total), "{total} of 2 a second in ten seconds");
    }

    #[test]
    fn a_writer_looks_as_often_as_there_is_something_to_write() {
        assert_eq!(rest(0), SELDOM);
        assert_eq!(rest(1), SELDOM);
        assert_eq!(rest(1_000_000), TICK);
        assert!((9..=11).contains(&rest(100).as_millis()));
    }

    #[test]
    fn no_rate_no_writes() {
        let start = Instant::now();
        let mut pace = Pace { since: start };
        assert_eq!(pace.due(start + Duration::from_secs(1), 0), 0);
    }
}
