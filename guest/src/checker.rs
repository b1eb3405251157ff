//! Goes through the entire area again and again, and counts every page that does not hold what it must.

use std::collections::HashMap;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use crate::memory::Memory;
use crate::page::Fault;
use crate::status::Counters;

/// Pages checked between two looks at the clock.
const STEP: u64 = 64;
/// A guest with that many faults has been heard; more would only flood its console.
const REPORTED_AT_MOST: usize = 64;

/// The state of a checker between steps.
#[derive(Debug, Default)]
pub struct Checker {
    next: u64,
    /// Faults already counted, by page, with the generation that was expected then.
    known: HashMap<u64, u64>,
}

/// A fault that was not known before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The page's number.
    pub page: u64,
    /// What is wrong with it.
    pub fault: Fault,
    /// The generation it should have.
    pub expected: u64,
}

impl Checker {
    /// Checks the next `pages` pages, round and round, and reports each new finding.
    pub fn step(
        &mut self,
        memory: &Memory,
        pages: u64,
        counters: &Counters,
        mut report: impl FnMut(Finding),
    ) {
        for _ in 0..pages {
            let page = self.next;
            if let Err((fault, expected)) = memory.check(page)
                && self.known.insert(page, expected) != Some(expected)
            {
                let counter = match fault {
                    Fault::Torn => &counters.torn,
                    Fault::Stale { .. } => &counters.stale,
                    Fault::Lost => &counters.lost,
                };
                counter.fetch_add(1, Relaxed);
                if self.known.len() <= REPORTED_AT_MOST {
                    report(Finding { page, fault, expected });
                }
            }
            counters.checked.fetch_add(1, Relaxed);
            self.next += 1;
            if self.next == memory.pages() {
                self.next = 0;
                counters.passes.fetch_add(1, Relaxed);
            }
        }
    }

    /// Checks for ever, at most `rate` pages per second (0: as fast as it goes).
    pub fn run(
        mut self,
        memory: &Memory,
        rate: u64,
        counters: &Counters,
        mut report: impl FnMut(Finding),
    ) -> ! {
        let mut due = Instant::now();
        loop {
            self.step(memory, STEP, counters, &mut report);
            let Some(nanos) = (STEP * 1_000_000_000).checked_div(rate) else { continue };
            due += Duration::from_nanos(nanos);
            let now = Instant::now();
            match due.checked_duration_since(now) {
                Some(early) => std::thread::sleep(early),
                // Late, by load or because the machine stood still: go on from here instead of catching up.
                None => due = now,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::tests::memory;
    use crate::page::Content;

    fn pass(checker: &mut Checker, memory: &Memory, counters: &Counters) -> Vec<Finding> {
        let mut findings = Vec::new();
        checker.step(memory, memory.pages(), counters, |finding| findings.push(finding));
        findings
    }

    #[test]
    fn a_sound_area_gives_no_findings() {
        let (memory, counters, mut checker) =
            (memory(100, Content::Text), Counters::default(), Checker::default());
        assert_eq!(pass(&mut checker, &memory, &counters), []);
        memory.write(5);
        assert_eq!(pass(&mut checker, &memory, &counters), []);
        let status = counters.status("", 0, 100);
        assert_eq!((status.passes, status.checked, status.faults()), (2, 200, 0));
    }

    #[test]
    fn each_fault_is_found_and_counted_once() {
        let (memory, counters, mut checker) =
            (memory(100, Content::Text), Counters::default(), Checker::default());
        let mut old = Vec::new();
        memory.damage(10, |page| old = page.to_vec());
        memory.write(10);
        memory.damage(10, |page| page.copy_from_slice(&old));
        memory.damage(20, |page| page[4095] ^= 0x80);
        memory.damage(99, |page| page.fill(0));
        let expected = [
            Finding { page: 10, fault: Fault::Stale { found: 1 }, expected: 2 },
            Finding { page: 20, fault: Fault::Torn, expected: 1 },
            Finding { page: 99, fault: Fault::Lost, expected: 1 },
        ];
        assert_eq!(pass(&mut checker, &memory, &counters), expected);
        assert_eq!(pass(&mut checker, &memory, &counters), []);
        let status = counters.status("", 0, 100);
        assert_eq!((status.stale, status.torn, status.lost), (1, 1, 1));
    }

    #[test]
    fn a_page_damaged_again_after_a_write_counts_again() {
        let (memory, counters, mut checker) =
            (memory(3, Content::Noise), Counters::default(), Checker::default());
        memory.damage(1, |page| page[100] ^= 1);
        assert_eq!(pass(&mut checker, &memory, &counters).len(), 1);
        memory.write(1);
        assert_eq!(pass(&mut checker, &memory, &counters), []);
        memory.damage(1, |page| page[100] ^= 1);
        assert_eq!(pass(&mut checker, &memory, &counters).len(), 1);
        assert_eq!(counters.torn.load(Relaxed), 2);
    }

    #[test]
    fn a_writer_at_full_speed_never_looks_like_a_fault() {
        let (memory, counters) = (memory(200, Content::Noise), Counters::default());
        std::thread::scope(|scope| {
            let writers: Vec<_> = (0..2u64)
                .map(|seed| {
                    let memory = &memory;
                    scope.spawn(move || {
                        let mut random = crate::page::Sequence::new(seed);
                        for _ in 0..20_000 {
                            memory.write(random.below(200));
                        }
                    })
                })
                .collect();
            let mut checker = Checker::default();
            while !writers.iter().all(std::thread::ScopedJoinHandle::is_finished) {
                assert_eq!(pass(&mut checker, &memory, &counters), []);
            }
        });
    }
}
