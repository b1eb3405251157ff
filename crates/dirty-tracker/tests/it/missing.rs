//! A process that runs without its memory waits for it, and never reads what it was not given.

use crate::tracee::{PAGE, Ram, Tracee};
use crate::unharmed::open_files;
use dirty_tracker::{DescriptorSource, Fault, MissingPages};
use std::ops::Range;
use std::time::{Duration, Instant};

const PAGES: u64 = 64;
/// How long the process may take to reach its next access.
const PATIENCE: Duration = Duration::from_secs(20);

fn tracee() -> (Ram, Tracee, Range<u64>) {
    let ram = Ram::new(PAGES);
    let mut tracee = Tracee::start("memory", &[ram.path().to_str().unwrap()]);
    assert_eq!(tracee.line(), "ready");
    let range = tracee.range_of(&ram.path());
    (ram, tracee, range)
}

/// As root, the tracee may make a userfaultfd that kernel accesses wait for; without privileges nobody can.
fn attach(tracee: &Tracee, range: &Range<u64>) -> MissingPages {
    MissingPages::attach(tracee.pid(), std::slice::from_ref(range), DescriptorSource::Injected).unwrap()
}

/// The page that the process waits for.
fn asked_for(missing: &MissingPages) -> u64 {
    let (begin, mut faults) = (Instant::now(), Vec::new());
    while faults.is_empty() {
        assert!(begin.elapsed() < PATIENCE, "the process asks for nothing");
        missing.wait(Duration::from_millis(100), &mut faults).unwrap();
    }
    let Fault { range, offset } = faults[0];
    assert_eq!(range, 0);
    offset / PAGE
}

fn page(byte: u8) -> Vec<u8> {
    vec![byte; PAGE as usize]
}

#[test]
fn an_access_waits_for_its_page_be_it_the_kernels() {
    let (_ram, mut tracee, range) = tracee();
    let missing = attach(&tracee, &range);
    for (number, verb) in [(3, "byte"), (4, "pipe")] {
        tracee.say(&format!("{verb} {number}"));
        assert_eq!(asked_for(&missing), number);
        missing.supply(0, number * PAGE, &page(7)).unwrap();
        assert_eq!(tracee.line(), "7");
    }
    tracee.say("byte 5");
    assert_eq!(asked_for(&missing), 5);
    missing.supply_zeros(0, 5 * PAGE, PAGE).unwrap();
    assert_eq!(tracee.line(), "0");
}

#[test]
fn what_the_process_has_written_is_never_overwritten() {
    let (_ram, mut tracee, range) = tracee();
    let missing = attach(&tracee, &range);
    missing.supply(0, 2 * PAGE, &page(10)).unwrap();
    assert_eq!(tracee.ask("write 2"), "done");
    // A run of pages of which one is there, and not as it was supplied.
    missing.supply(0, 0, &page(20).repeat(4)).unwrap();
    missing.supply_zeros(0, PAGE, 3 * PAGE).unwrap();
    for (number, expected) in [(0, "20"), (1, "20"), (2, "11"), (3, "20")] {
        assert_eq!(tracee.ask(&format!("byte {number}")), expected, "page {number}");
    }
}

#[test]
fn a_supplier_that_is_gone_leaves_the_process_waiting_and_not_reading_zeros() {
    let (_ram, mut tracee, range) = tracee();
    let missing = attach(&tracee, &range);
    let number = missing.number();
    tracee.say("byte 9");
    assert_eq!(asked_for(&missing), 9);
    drop(missing);
    let next = MissingPages::resume(tracee.pid(), std::slice::from_ref(&range), number).unwrap();
    next.supply(0, 9 * PAGE, &page(42)).unwrap();
    assert_eq!(tracee.line(), "42", "it was given to by the next one");
}

#[test]
fn what_a_supplier_had_read_of_when_it_ended_is_asked_for_again() {
    let (_ram, mut tracee, range) = tracee();
    let missing = attach(&tracee, &range);
    tracee.say("byte 9");
    assert_eq!(asked_for(&missing), 9, "the kernel does not tell it a second time");
    let number = missing.number();
    drop(missing);
    let next = MissingPages::resume(tracee.pid(), std::slice::from_ref(&range), number).unwrap();
    assert_eq!(asked_for(&next), 9);
    next.supply(0, 9 * PAGE, &page(42)).unwrap();
    assert_eq!(tracee.line(), "42");
}

#[test]
fn a_descriptor_that_is_closed_or_another_by_now_is_not_read_from() {
    let (_ram, tracee, range) = tracee();
    let missing = attach(&tracee, &range);
    let number = missing.number();
    missing.finish();
    // Its standard output, and one that it does not have.
    for number in [1, number] {
        match MissingPages::resume(tracee.pid(), std::slice::from_ref(&range), number) {
            Err(dirty_tracker::AttachError::NotWaiting { number: refused, .. }) => {
                assert_eq!(refused, number)
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn the_end_leaves_no_descriptor_behind() {
    let (_ram, mut tracee, range) = tracee();
    let before = open_files(tracee.pid());
    let missing = attach(&tracee, &range);
    assert_ne!(open_files(tracee.pid()), before, "the process keeps one while it may have to wait");
    missing.finish();
    assert_eq!(open_files(tracee.pid()), before);
    assert_eq!(tracee.ask("byte 1"), "0", "and waits for nothing any more");
    // Nothing is in the way of whoever comes next.
    attach(&tracee, &range).finish();
}

#[test]
fn the_end_of_the_process_is_told() {
    let (_ram, mut tracee, range) = tracee();
    let missing = attach(&tracee, &range);
    tracee.kill();
    let begin = Instant::now();
    loop {
        match missing.wait(Duration::from_millis(100), &mut Vec::new()) {
            Err(dirty_tracker::SupplyError::Gone { pid }) => break assert_eq!(pid, tracee.pid()),
            other => assert!(begin.elapsed() < PATIENCE, "{other:?}"),
        }
    }
    assert!(missing.supply(0, 0, &page(1)).is_err());
}
