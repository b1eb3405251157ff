//! Who has run a guest, seen from outside: by the CPU time of the threads that run its CPUs.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::{Pair, Side};

/// Between looks.
const LOOK: Duration = Duration::from_millis(25);
/// Between looks for QEMUs that have come.
const LOOK_FOR_QEMU: Duration = Duration::from_millis(200);
/// A guest that runs uses more than that in a few looks, and a CPU that is only made, loaded or told to stop uses less.
const RUNS: Duration = Duration::from_millis(12);

/// Watches the guests of a pair of hosts that has one guest, from when this is made until it is dropped.
#[derive(Debug)]
pub struct Watch {
    seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// What was seen since it was last asked to begin.
#[derive(Debug, Default)]
struct Seen {
    /// The side that has the guest at the beginning.
    first: usize,
    /// CPU time of each side's guest.
    used: [Duration; 2],
    /// That of the first side, at the look after the one that saw the other to have run.
    used_before: Option<Duration>,
    doubled: Option<String>,
    begun: Option<Instant>,
    /// Looks since then.
    looks: u64,
}

impl Seen {
    /// Both sides have used so much since the last look, nobody knows in which order.
    ///
    /// Nor is a look one moment: this thread may wait for a CPU between one side's file and the other's, while the guest goes over. What a side
    /// had used before the other ran is therefore what the next look finds, all of which was read afterwards.
    fn add(&mut self, more: [Duration; 2]) {
        self.looks += 1;
        let (first, second) = (self.first, 1 - self.first);
        let has_gone_over = self.used[second] >= RUNS;
        for (used, more) in self.used.iter_mut().zip(more) {
            *used += more;
        }
        if !has_gone_over {
            return;
        }
        let before = *self.used_before.get_or_insert(self.used[first]);
        if self.used[first] - before >= RUNS && self.doubled.is_none() {
            let at = self.begun.map(|begun| begun.elapsed()).unwrap_or_default();
            self.doubled = Some(format!(
                "{at:.1?} after the beginning host {} is seen to run it though the other has: A {:?}, B {:?}",
                SIDES[first], self.used[0], self.used[1]
            ));
        }
    }
}

const SIDES: [&str; 2] = ["A", "B"];

impl Watch {
    /// Begins to watch.
    ///
    /// # Panics
    /// If there is no thread to be had.
    #[must_use]
    pub fn begin(pair: &Arc<Pair>) -> Watch {
        let (seen, stop) = (Arc::<Mutex<Seen>>::default(), Arc::<AtomicBool>::default());
        let (told, stopped, pair) = (Arc::clone(&seen), Arc::clone(&stop), Arc::downgrade(pair));
        let thread = thread::spawn(move || {
            let mut cpus: Vec<Cpu> = Vec::new();
            let mut looked: Option<Instant> = None;
            while !AtomicBool::load(&stopped, Relaxed) {
                if looked.is_none_or(|looked| looked.elapsed() > LOOK_FOR_QEMU) {
                    let Some(pair) = pair.upgrade() else { return };
                    look_for(&pair, &mut cpus);
                    looked = Some(Instant::now());
                }
                let mut more = [Duration::ZERO; 2];
                cpus.retain_mut(|cpu| match time(&cpu.file) {
                    Some(now) => {
                        more[cpu.side] += now.saturating_sub(cpu.used);
                        cpu.used = now;
                        true
                    }
                    None => false,
                });
                lock(&told).add(more);
                thread::sleep(LOOK);
            }
        });
        Watch { seen, stop, thread: Some(thread) }
    }

    /// Forgets what was seen, of a guest that is on this side now.
    pub fn anew(&self, first: Side) {
        // Not before all there is to be seen was seen.
        let looks = lock(&self.seen).looks;
        while lock(&self.seen).looks < looks + 2 {
            thread::sleep(LOOK);
        }
        *lock(&self.seen) = Seen { first: first as usize, begun: Some(Instant::now()), ..Seen::default() };
    }

    /// That the side that had the guest first has run it after the other, or at the same time: how that was seen.
    #[must_use]
    pub fn doubled(&self) -> Option<String> {
        lock(&self.seen).doubled.clone()
    }

    /// The sides that run the guest just now.
    #[must_use]
    pub fn running(&self) -> Vec<Side> {
        let before = lock(&self.seen).used;
        thread::sleep(LOOK * 12);
        let after = lock(&self.seen).used;
        // Little enough for a guest that hardly gets a CPU.
        let runs = |side: &Side| after[*side as usize] - before[*side as usize] >= RUNS / 4;
        [Side::A, Side::B].into_iter().filter(runs).collect()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A thread that runs a guest's CPU.
struct Cpu {
    side: usize,
    file: String,
    used: Duration,
}

fn look_for(pair: &Pair, cpus: &mut Vec<Cpu>) {
    for side in [Side::A, Side::B] {
        for pid in pair.host(side).processes_of("qemu-system") {
            let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
            for task in tasks {
                let file = task.path().join("schedstat").to_string_lossy().into_owned();
                let is_cpu = || {
                    let name = fs::read_to_string(task.path().join("comm")).unwrap_or_default();
                    name.starts_with("CPU ")
                };
                if cpus.iter().all(|cpu| cpu.file != file) && is_cpu() {
                    // What it has used so far counts: one that has just come has used it since.
                    cpus.push(Cpu { side: side as usize, used: Duration::ZERO, file });
                }
            }
        }
    }
}

/// The first word of schedstat: nanoseconds on a CPU (Documentation/scheduler/sched-stats.rst).
fn time(file: &str) -> Option<Duration> {
    let text = fs::read_to_string(file).ok()?;
    Some(Duration::from_nanos(text.split(' ').next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn doubled(looks: &[[u64; 2]]) -> bool {
        let mut seen = Seen::default();
        for look in looks {
            seen.add(look.map(Duration::from_millis));
        }
        seen.doubled.is_some()
    }

    #[test]
    fn a_guest_that_went_over_has_run_on_both_sides_and_never_on_two() {
        assert!(!doubled(&[[25, 0], [25, 0], [10, 15], [0, 25], [0, 25], [0, 25]]));
    }

    #[test]
    fn a_look_that_took_long_between_the_sides_sees_what_the_first_had_still_used_at_the_next() {
        assert!(!doubled(&[[25, 0], [25, 0], [5, 46], [30, 25], [0, 25], [0, 25]]));
    }

    #[test]
    fn a_guest_that_has_little_to_do_has_run_on_the_first_side_however_little_it_used_there() {
        assert!(!doubled(&[[6, 0], [5, 0], [0, 17], [0, 17], [1, 0], [0, 12], [0, 12]]));
    }

    #[test]
    fn one_that_runs_on_after_the_other_has_begun_is_seen() {
        assert!(doubled(&[[25, 0], [25, 0], [15, 15], [12, 12], [12, 12], [12, 12]]));
        assert!(doubled(&[[25, 0], [0, 25], [0, 25], [0, 25], [25, 0]]));
    }
}
