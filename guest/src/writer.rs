//! The workload: dirties the working set at a set rate.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use crate::memory::Memory;
use crate::pace::{Pace, rest};
use crate::status::Counters;
use crate::workload::Order;

/// What the writer is told while it runs.
#[derive(Debug)]
pub struct Control {
    /// Pages to write per second.
    pub rate: AtomicU64,
    /// Whether to write none for now.
    pub paused: AtomicBool,
}

impl Control {
    /// At that rate, not paused.
    pub fn new(rate: u64) -> Self {
        Self { rate: AtomicU64::new(rate), paused: AtomicBool::new(false) }
    }
}

/// Writes pages in that order, for ever.
pub fn run(memory: &Memory, mut order: Order, control: &Control, counters: &Counters) -> ! {
    let mut pace = Pace::from(Instant::now());
    loop {
        let rate = control.rate.load(Relaxed);
        let due = pace.due(Instant::now(), rate);
        if !control.paused.load(Relaxed) {
            write(memory, &mut order, due, counters);
        }
        std::thread::sleep(rest(rate));
    }
}

fn write(memory: &Memory, order: &mut Order, pages: u64, counters: &Counters) {
    for _ in 0..pages {
        let generation = memory.write(order.next_page());
        counters.writes.fetch_add(1, Relaxed);
        counters.generation_max.fetch_max(generation, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::Content;
    use crate::workload::Pattern;

    #[test]
    fn writes_are_counted_and_leave_the_area_whole() {
        let memory = crate::memory::tests::memory(10, Content::Noise);
        let counters = Counters::default();
        write(&memory, &mut Order::new(Pattern::Sequential, 5, 1), 12, &counters);
        let status = counters.status("", 0, 10);
        assert_eq!((status.writes, status.generation_max), (12, 4));
        for page in 0..10 {
            assert_eq!(memory.check(page), Ok(()));
        }
    }
}
