//! A host with one core must not be a host without migration.

use end_to_end::{Pair, report_adds_up};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use testbed::guest_spec::{GuestSpec, Pattern};
use testbed::root_or_skip;

/// Keeps this thread, and all that it starts from now on, on one core.
fn on_one_core() {
    let allowed = sched_getaffinity(None).unwrap();
    let core = (0..CpuSet::MAX_CPU).find(|core| allowed.is_set(*core)).unwrap();
    let mut one = CpuSet::new();
    one.set(core);
    sched_setaffinity(None, &one).unwrap();
}

/// How many cores a process may use.
fn cores(pid: i32) -> usize {
    let pid = rustix::process::Pid::from_raw(pid);
    let allowed = sched_getaffinity(pid).unwrap();
    allowed.count() as usize
}

#[test]
fn both_agents_and_the_guest_on_one_core_are_enough() {
    on_one_core();
    let pair = Pair::start();
    let spec = GuestSpec { rate: 1000, pattern: Pattern::Random, ..pair.spec("vm", 192) };
    let guest = pair.run(pair.a(), "vm", &spec);
    for pid in [pair.a().agent_pid().unwrap(), pair.b().agent_pid().unwrap(), pair.qemu(pair.a()).unwrap()] {
        assert_eq!(cores(pid), 1);
    }
    let before = guest.status();
    for (from, to) in [(pair.a(), pair.b()), (pair.b(), pair.a())] {
        report_adds_up(&pair.migrate("vm", from, to, &[]), &guest);
        pair.holds_nothing(from);
    }
    guest.sound_since(&before);
}

#[test]
fn a_guest_that_lacks_memory_gets_it_on_one_core() {
    const NAME: &str = "a_guest_that_lacks_memory_gets_it_on_one_core";
    if !root_or_skip(NAME) {
        return;
    }
    on_one_core();
    let pair = Pair::start();
    let spec = pair.outrun_by(pair.spec("vm", 192));
    let guest = pair.run(pair.a(), "vm", &spec);
    let before = guest.status();
    let report = pair.migrate("vm", pair.a(), pair.b(), &["--on-diverge", "post-copy"]);
    assert!(report.post_copy.is_some_and(|late| late.pages > 0), "{:#?}", report.rounds);
    pair.holds_nothing(pair.a());
    guest.sound_since(&before);
}
