//! How long cells will take, so that none is begun that does not fit.

use std::time::{Duration, Instant};

use crate::cell::{Cell, Dirtying, Link};
use crate::contender::Contender;
use crate::outcome::Sitting;
use crate::record::Method;

/// Guests' boot, for each GiB of RAM of one of them, and whatever the size.
const BOOT: Duration = Duration::from_secs(8);
const BOOT_PER_GIB: Duration = Duration::from_secs(8);
/// A trial beside the migration itself: heartbeats before and after, the workload's beginning, the destination's QEMU.
const AROUND: Duration = Duration::from_millis(3500);
/// MiB per second that a migration brings over a link that is not shaped, and QEMU's default anywhere.
const UNSHAPED: u64 = 300;
const DEFAULT: u64 = 128;

/// How long a cell will take, guessed: most of what is guessed is corrected by [`Budget`] once there is something to correct it by.
pub fn estimate(cell: &Cell, sitting: &Sitting) -> Duration {
    let patience = Duration::from_secs(sitting.patience_s);
    let boot = BOOT + BOOT_PER_GIB.mul_f64(cell.memory_mib as f64 / 1024.0);
    let each = |contender: &Contender| {
        let once = AROUND + transfer(cell, *contender);
        if !converges(cell, *contender) {
            // It is not tried again.
            return AROUND + patience;
        }
        once.min(AROUND + patience) * sitting.runs
    };
    // Both images are written first.
    let boot = boot + cell.disk.map_or(Duration::ZERO, |disk| Duration::from_secs(disk.mib / 512));
    boot + sitting.contenders.iter().map(each).sum::<Duration>()
}

fn transfer(cell: &Cell, contender: Contender) -> Duration {
    let link = match cell.link {
        Link::Unshaped => UNSHAPED,
        Link::Mbit(mbit) => ((mbit * 1_000_000 / 8) >> 20).clamp(1, UNSHAPED),
    };
    let rate = if contender.method == Method::QemuDefault { link.min(DEFAULT) } else { link };
    let disk_mib = cell.disk.map_or(0, |disk| disk.mib / 2);
    let once = (cell.fill_mib() + disk_mib) as f64 / rate as f64;
    // Then what was written meanwhile, with what the writing leaves of the link.
    let again = match cell.dirtying {
        Dirtying::OfLink(percent) if percent < 100 => {
            cell.working_set_mib() as f64 / rate as f64 * 100.0 / (100 - percent) as f64
        }
        _ => 0.0,
    };
    Duration::from_secs(1) + Duration::from_secs_f64(once + again)
}

/// Whether QEMU's pre-copy can come to an end by itself; the others are made for it.
fn converges(cell: &Cell, contender: Contender) -> bool {
    let outrun = matches!(cell.dirtying, Dirtying::OfLink(percent) if percent >= 100);
    !outrun || matches!(contender.method, Method::Vmirror | Method::QemuPostCopy)
}

/// The time that a run may take.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    began: Instant,
    limit: Option<Duration>,
    guessed: Duration,
    took: Duration,
}

impl Budget {
    /// From now on; without a limit everything fits.
    pub fn new(limit: Option<Duration>) -> Self {
        Self { began: Instant::now(), limit, guessed: Duration::ZERO, took: Duration::ZERO }
    }

    /// Whether there is time left for a cell.
    pub fn has_room_for(&self, cell: &Cell, sitting: &Sitting) -> bool {
        let needed = estimate(cell, sitting).mul_f64(self.correction());
        self.limit.is_none_or(|limit| self.began.elapsed() + needed <= limit)
    }

    /// Notes how long a cell really took.
    pub fn learn(&mut self, cell: &Cell, sitting: &Sitting, took: Duration) {
        self.guessed += estimate(cell, sitting);
        self.took += took;
    }

    /// What guesses of this machine are to be multiplied by.
    fn correction(&self) -> f64 {
        if self.guessed.is_zero() { 1.0 } else { self.took.as_secs_f64() / self.guessed.as_secs_f64() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sitting(contenders: &[Contender], runs: u32, patience_s: u64) -> Sitting {
        Sitting { contenders: contenders.to_vec(), runs, patience_s, ..Sitting::default() }
    }

    #[test]
    fn more_runs_larger_guests_and_those_that_do_not_converge_take_longer() {
        let contenders = &Contender::ALL[..11];
        let trials = |runs, patience| sitting(contenders, runs, patience);
        let short = estimate(&Cell::named("idle"), &trials(1, 300));
        assert!(estimate(&Cell::named("idle"), &trials(5, 300)) > short * 3);
        assert!(estimate(&Cell::named("idle-4g"), &trials(1, 300)) > short * 2);
        let waiting = estimate(&Cell::named("counters-150"), &trials(1, 300));
        assert!(waiting > Duration::from_secs(8 * 300), "{waiting:?}");
        assert!(estimate(&Cell::named("counters-150"), &trials(1, 30)) < waiting / 4);
    }

    #[test]
    fn a_cell_that_does_not_fit_is_not_begun_and_slow_machines_are_known_by_what_they_did() {
        let trials = sitting(&Contender::ALL[..1], 3, 30);
        let idle = Cell::named("idle");
        let one = estimate(&idle, &trials);
        let mut budget = Budget::new(Some(one * 3));
        assert!(budget.has_room_for(&idle, &trials));
        budget.learn(&idle, &trials, one * 4);
        assert!(!budget.has_room_for(&idle, &trials));
        assert!(Budget::new(None).has_room_for(&idle, &trials));
    }
}
