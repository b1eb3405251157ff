//! Slowing a guest that outruns its mirror.
//!
//! Its CPUs are stopped for some milliseconds at a time, for a share of the time that grows in steps until the rounds
//! shrink. Who stops them is the kernel's tracer of their threads: it lets go when the [`Throttle`] is dropped, however the
//! migration ends, and when this agent is killed.

use std::time::Instant;

use dirty_tracker::{Slowed, Throttle};

use super::estimate::Estimate;
use super::held::Controller;
use super::stop::Stop;
use finding::{Finding, chain};
use session::report;

/// The first step stops the CPUs for this share of the time at least, and each further one for so much more.
const FIRST: f64 = 0.2;
const STEP: f64 = 0.1;
/// The most that is done to a guest.
const MOST: f64 = 0.99;
/// What a guest may dirty of what can be sent: the less, the sooner rounds shrink.
const AIM: f64 = 0.7;

/// A guest that is being slowed.
pub(super) struct Throttling {
    throttle: Throttle,
    since: Instant,
    highest: f64,
}

impl Throttling {
    /// The share of the time for which the CPUs are stopped.
    pub(super) fn share(&self) -> f64 {
        self.throttle.share()
    }

    /// Lets the guest go. Returns what was done to it.
    pub(super) fn end(self) -> report::Throttle {
        let Slowed { stops, stopped, longest } = self.throttle.slowed();
        let ms = |time: std::time::Duration| time.as_secs_f64() * 1e3;
        report::Throttle {
            highest_share: self.highest,
            duration_ms: ms(self.since.elapsed()),
            stops,
            stopped_ms: ms(stopped),
            longest_stop_ms: ms(longest),
        }
    }
}

/// The next share of the time to stop the CPUs for. A guest dirties as much less as it is stopped more; where more than a
/// step is certain to be needed, it is taken at once.
fn next(share: f64, estimate: &Estimate) -> f64 {
    let unslowed = estimate.dirty_rate / (1.0 - share).max(0.01);
    let needed = 1.0 - AIM * estimate.throughput / unslowed.max(1.0);
    // Towards the end steps get smaller: each halves what is left to the guest.
    let step = if share < 0.8 { share + STEP } else { share + (1.0 - share) / 2.0 };
    step.max(FIRST).max(needed).min(MOST)
}

impl Controller {
    /// The rounds do not shrink: the guest is slowed, or slowed more.
    pub(super) async fn slow_down(&mut self) -> Result<(), Stop> {
        let estimate = &self.rounds()?.estimate;
        let before = self.held.throttling.as_ref().map_or(0.0, Throttling::share);
        let share = next(before, estimate);
        match &mut self.held.throttling {
            Some(throttling) => {
                throttling.throttle.set(share);
                throttling.highest = throttling.highest.max(share);
            }
            None => {
                let vcpus = self.vm.qmp.vcpus().await.map_err(Stop::qemu)?;
                let threads: Vec<u32> = vcpus.iter().map(|vcpu| vcpu.thread_id).collect();
                let started = tokio::task::spawn_blocking(move || Throttle::start(&threads, share)).await;
                let throttle = match started {
                    Ok(Ok(throttle)) => throttle,
                    Ok(Err(e)) => return Err(cannot(&e)),
                    Err(e) => return Err(cannot(&e)),
                };
                let since = Instant::now();
                self.held.throttling = Some(Throttling { throttle, since, highest: share });
            }
        }
        if share > before {
            tracing::info!(vm = %self.vm.record.name, share, "the guest outruns the mirror: its CPUs are slowed");
        }
        if let Some(rounds) = &mut self.held.rounds {
            rounds.estimate.try_again();
        }
        self.progress.send_modify(|progress| progress.throttle = share);
        Ok(())
    }

    /// Lets the guest go, if it was slowed.
    pub(super) fn let_go(&mut self) {
        if let Some(throttling) = self.held.throttling.take() {
            self.report.throttle = Some(throttling.end());
            self.progress.send_modify(|progress| progress.throttle = 0.0);
        }
    }
}

fn cannot(error: &dyn std::error::Error) -> Stop {
    Stop::Failed(Finding::new(
        "throttle",
        format!("the guest outruns the mirror, and its CPUs cannot be slowed: {}", chain(error)),
        "let the agent trace QEMU's threads, or use --on-diverge post-copy",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outrun(dirty_rate: f64, throughput: f64) -> Estimate {
        let mut estimate = Estimate::default();
        (estimate.dirty_rate, estimate.throughput) = (dirty_rate, throughput);
        estimate
    }

    #[test]
    fn a_guest_that_outruns_the_mirror_a_little_is_slowed_step_by_step() {
        let estimate = outrun(110.0, 100.0);
        let first = next(0.0, &estimate);
        assert!((0.2..0.4).contains(&first), "{first}");
        let mut share = first;
        for _ in 0..20 {
            // However much it was slowed, it dirties as much: writes that do not depend on its CPUs' time.
            let more = next(share, &estimate);
            assert!(more > share && more <= MOST || share == MOST, "{share} {more}");
            share = more;
        }
        assert!(share > 0.985, "{share}");
    }

    #[test]
    fn one_that_outruns_it_by_far_is_slowed_enough_at_once() {
        let share = next(0.0, &outrun(400.0, 100.0));
        assert!((1.0 - share) * 400.0 < 100.0, "{share}");
        assert!(share < 0.9, "and not more than that: {share}");
    }
}
