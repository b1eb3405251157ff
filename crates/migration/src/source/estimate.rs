//! The estimate: how long the guest would be down if the switch-over began now.
//!
//! `remaining bytes / measured throughput + measured fixed cost`. What remains at the pause is what the guest dirties
//! between the last live scan and the pause: at the measured dirty rate, over the time that a round takes.

use std::time::Duration;

use mirror::layout::PAGE_SIZE;
use mirror::memory::round::Sent;

use session::options::Options;
use session::report::Estimated;

/// Rounds of fewer pages say more about latency than about throughput.
const TELLING_PAGES: u64 = 256;
/// And of fewer bytes.
const TELLING_BYTES: u64 = 1 << 20;
/// So many rounds in a row that did not shrink mean that they will not.
const STUBBORN: usize = 3;
/// A round that is not at least this much smaller than the one before does not count as shrinking.
const SHRINKING: f64 = 0.9;

/// Measurements of the rounds so far, and what follows from them.
#[derive(Debug, Clone, Default)]
pub(super) struct Estimate {
    /// Guest memory taken care of, in bytes per second.
    pub(super) throughput: f64,
    /// What the link carried, in bytes per second. None before anything was sent that says so.
    pub(super) wire_rate: Option<f64>,
    /// In bytes per second.
    pub(super) dirty_rate: f64,
    /// What a switch-over costs beside the last pages.
    pub(super) fixed: Duration,
    last_round: Duration,
    stubborn: usize,
    last_due: Option<u64>,
    rounds: u32,
}

/// What to do after a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Advice {
    /// Another round makes it better.
    GoOn,
    /// The predicted downtime is as asked for.
    Switch,
    /// Rounds do not shrink any more; the predicted downtime is still within the limit.
    SwitchWithinLimit,
    /// Rounds do not shrink any more, and the predicted downtime is above the limit.
    DoesNotConverge,
}

impl Estimate {
    /// Before any round. `fixed` is what a switch-over costs beside the last pages.
    pub(super) fn new(fixed: Duration) -> Estimate {
        Estimate { fixed, ..Estimate::default() }
    }

    /// Takes in a round that the destination has acknowledged. `took` is from its scan to the acknowledgement,
    /// `since` from the scan before to this one's.
    pub(super) fn learn(&mut self, sent: &Sent, took: Duration, since: Option<Duration>) {
        let bytes = |pages: u64| (pages * PAGE_SIZE as u64) as f64;
        // What is withheld is not sent, and costs nothing.
        if sent.due >= TELLING_PAGES && sent.counts.withheld == 0 {
            self.throughput = bytes(sent.due) / took.as_secs_f64().max(1e-6);
        }
        if sent.counts.wire_bytes >= TELLING_BYTES && sent.counts.withheld == 0 {
            self.wire_rate = Some(sent.counts.wire_bytes as f64 / took.as_secs_f64().max(1e-6));
        }
        if let Some(since) = since {
            self.dirty_rate = bytes(sent.scanned) / since.as_secs_f64().max(1e-6);
        }
        // The first round is everything and says nothing of what follows.
        if self.rounds >= 1 {
            // What was deferred would have been due, had it not been so hot.
            let due = sent.due + sent.deferred;
            let shrank = self.last_due.is_none_or(|last| (due as f64) < last as f64 * SHRINKING);
            self.stubborn = if shrank { 0 } else { self.stubborn + 1 };
            self.last_due = Some(due);
        }
        self.last_round = took;
        self.rounds += 1;
    }

    /// Something was done about it. The next round still has what the guest dirtied before; the one after that tells whether
    /// it was enough.
    pub(super) fn try_again(&mut self) {
        self.stubborn = self.stubborn.min(STUBBORN - 2);
    }

    /// Bytes that would remain at a pause that began now.
    pub(super) fn remaining(&self) -> f64 {
        self.dirty_rate * self.last_round.as_secs_f64()
    }

    /// The downtime if the switch-over began now. `None` before two rounds.
    pub(super) fn downtime(&self) -> Option<Duration> {
        if self.rounds < 2 || self.throughput <= 0.0 {
            return None;
        }
        Some(self.fixed + Duration::from_secs_f64((self.remaining() / self.throughput).min(1e6)))
    }

    /// The time until nothing but what a round takes remains, at the measured rates. `None` where the guest outruns the mirror.
    pub(super) fn time_left(&self) -> Option<Duration> {
        let gained = self.throughput - self.dirty_rate;
        (gained > 0.0).then(|| Duration::from_secs_f64((self.remaining() / gained).min(1e6)))
    }

    /// All of it, for the report.
    pub(super) fn told(&self) -> Estimated {
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        Estimated {
            dirty_rate: self.dirty_rate,
            throughput: self.throughput,
            downtime_ms: self.downtime().map(ms),
            time_left_ms: self.time_left().map(ms),
        }
    }

    /// What to do next.
    pub(super) fn advice(&self, options: &Options) -> Advice {
        match self.downtime() {
            None => Advice::GoOn,
            Some(downtime) if downtime <= options.downtime => Advice::Switch,
            Some(_) if self.stubborn < STUBBORN => Advice::GoOn,
            Some(downtime) if downtime <= options.max_downtime => Advice::SwitchWithinLimit,
            Some(_) => Advice::DoesNotConverge,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mirror::memory::round::Counts;

    fn sent(due: u64, scanned: u64) -> Sent {
        Sent {
            number: 0,
            due,
            scanned,
            deferred: 0,
            counts: Counts::default(),
            sums: Vec::new(),
            disk_sums: Vec::new(),
            scan: Duration::ZERO,
            elapsed: Duration::ZERO,
        }
    }

    /// A guest that dirties `rate` pages a second, over a link of `speed` pages a second.
    fn advice_after(rounds: usize, rate: f64, speed: f64, options: &Options) -> Advice {
        let mut estimate = Estimate::new(Duration::from_millis(9));
        let (mut due, mut since) = (262_144.0, None);
        for _ in 0..rounds {
            let took = Duration::from_secs_f64(due / speed + 0.001);
            let scanned = since.map_or(due, |since: Duration| since.as_secs_f64() * rate);
            estimate.learn(&sent(due as u64, scanned as u64), took, since);
            (due, since) = (took.as_secs_f64() * rate, Some(took));
        }
        estimate.advice(options)
    }

    #[test]
    fn a_round_that_withholds_says_nothing_of_the_link() {
        let mut estimate = Estimate::new(Duration::ZERO);
        let counts = Counts { plain: 1000, wire_bytes: 4 << 20, ..Counts::default() };
        estimate.learn(&Sent { counts, ..sent(1000, 1000) }, Duration::from_secs(2), None);
        let (throughput, wire_rate) = (estimate.throughput, estimate.wire_rate);
        assert_eq!((throughput, wire_rate), (1000.0 * 4096.0 / 2.0, Some(f64::from(2 << 20))));
        let counts = Counts { withheld: 500_000, wire_bytes: 2 << 20, ..Counts::default() };
        let quickly = Duration::from_millis(1);
        estimate.learn(&Sent { counts, ..sent(500_000, 500_000) }, quickly, Some(quickly));
        assert_eq!((estimate.throughput, estimate.wire_rate), (throughput, wire_rate));
    }

    #[test]
    fn an_idle_guest_is_switched_after_the_second_round() {
        let options = Options::default();
        assert_eq!(advice_after(1, 100.0, 300_000.0, &options), Advice::GoOn);
        assert_eq!(advice_after(2, 100.0, 300_000.0, &options), Advice::Switch);
    }

    #[test]
    fn a_guest_that_dirties_slower_than_the_link_is_waited_for() {
        let options = Options::default();
        assert_eq!(advice_after(2, 150_000.0, 300_000.0, &options), Advice::GoOn);
        assert_eq!(advice_after(9, 150_000.0, 300_000.0, &options), Advice::Switch);
    }

    #[test]
    fn a_guest_that_outruns_the_link_is_told_of_and_never_switched() {
        let options = Options::default();
        for rounds in 6..40 {
            assert_eq!(advice_after(rounds, 400_000.0, 300_000.0, &options), Advice::DoesNotConverge);
        }
    }

    #[test]
    fn rounds_that_shrink_no_more_are_accepted_within_the_limit() {
        // Asked for less than the fixed cost: it cannot be had, but the limit can.
        let options = Options { downtime: Duration::from_millis(1), ..Options::default() };
        assert_eq!(advice_after(12, 100.0, 300_000.0, &options), Advice::SwitchWithinLimit);
    }
}
