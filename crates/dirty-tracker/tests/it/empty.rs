//! What a process has never touched of memory of its own is empty; what it loses because it ends is not.

use std::ops::Range;

use dirty_tracker::Resident;

use crate::tracee::{PAGE, Tracee};

const PAGES: usize = 16 * 1024;
/// From here on nothing is touched.
const TOUCHED: usize = PAGES / 2;

/// The role of a process with memory of its own, half of which it has written. It tells where that is.
pub(crate) fn own() {
    let page = PAGE as usize;
    let mut memory = vec![0_u8; PAGES * page];
    for number in 0..TOUCHED {
        memory[number * page] = 1;
    }
    println!("{}", memory.as_ptr() as usize);
    let _ = std::io::stdin().lines().next();
    drop(memory);
}

fn start() -> (Tracee, Resident, Range<u64>) {
    let mut tracee = Tracee::start("own", &[]);
    let address: u64 = tracee.line().parse().unwrap();
    let resident = Resident::open(tracee.pid()).unwrap();
    let first = address / PAGE * PAGE;
    (tracee, resident, first..first + PAGES as u64 * PAGE)
}

#[test]
fn what_was_never_touched_is_empty_and_nothing_else() {
    let (tracee, resident, range) = start();
    let middle = range.start + TOUCHED as u64 * PAGE;
    assert!(!resident.is_empty(&(range.start..range.start + 64 * PAGE)).unwrap());
    assert!(!resident.is_empty(&(middle - 2 * PAGE..middle + 64 * PAGE)).unwrap());
    assert!(resident.is_empty(&(range.end - 64 * PAGE..range.end)).unwrap());
    let mut found = 0;
    resident.empty(&range, |run| found += run.end - run.start).unwrap();
    // Huge pages may have been given to it as a whole.
    assert!(found <= range.end - middle && found > 0, "{found}");
    tracee.finish();
}

#[test]
fn memory_that_is_gone_because_its_process_ends_is_not_empty() {
    for _ in 0..10 {
        let (mut tracee, resident, range) = start();
        let touched = range.start..range.start + TOUCHED as u64 / 2 * PAGE;
        tracee.kill();
        while let Ok(empty) = resident.is_empty(&touched) {
            assert!(!empty, "what it has written has been taken for zeros");
        }
    }
}
