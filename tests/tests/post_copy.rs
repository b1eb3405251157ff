//! A guest that outruns its mirror is handed over before its memory is complete, and must never see what it was not given.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use end_to_end::{Guest, PAGE, Pair, UnderWay, until};
use migration::Report;
use migration::report::Verdict;
use testbed::guest_spec::{GuestSpec, Pattern};
use testbed::{Host, Status, Wire, root_or_skip};

const MBIT: u64 = 1_000_000;

/// A guest that was handed over and lacks memory for some seconds more: the link has become slow.
struct Lacking<'a> {
    pair: &'a Pair,
    guest: Guest,
    before: Status,
    migration: UnderWay<'a>,
}

impl Lacking<'_> {
    fn begin(pair: &Pair) -> Lacking<'_> {
        let guest = pair.run(pair.a(), "vm", &outrun(pair));
        let before = guest.status();
        let migration = pair.begin("vm", pair.a(), pair.b(), &["--on-diverge", "post-copy"]);
        migration.reaches("synchronize");
        until("QEMU at the destination waits for memory", || logged(pair.b(), "QEMU loads its devices"));
        for host in [pair.a(), pair.b()] {
            pair.testbed().set_rate(host, Wire::Link, 30 * MBIT).unwrap();
        }
        until("the guest runs there", || logged(pair.b(), "a VM has arrived and runs"));
        Lacking { pair, guest, before, migration }
    }

    /// Asserts that it comes to have everything, there and only there, and that nothing was lost.
    fn lacks_nothing_at_last(&self) {
        let Lacking { pair, guest, before, .. } = self;
        until("it lacks nothing", || logged(pair.b(), "nothing is missing any more"));
        until("it is listed there", || pair.runs_on("vm", pair.b()));
        until("the source has let go", || pair.show("vm", pair.a()).is_none());
        pair.holds_nothing(pair.a());
        guest.sound_since(before);
    }
}

fn logged(host: &Host, words: &str) -> bool {
    std::fs::read_to_string(host.agent_log()).unwrap().contains(words)
}

/// Two hosts with a link of 200 Mbit/s between them, and a guest that dirties four times that, in pages that neither
/// deltas nor compression make smaller.
fn outrun(pair: &Pair) -> GuestSpec {
    let link = 200 * MBIT;
    for host in [pair.a(), pair.b()] {
        pair.testbed().set_rate(host, Wire::Link, link).unwrap();
    }
    GuestSpec {
        fill_mib: 64,
        working_set_mib: Some(32),
        rate: link / 8 * 4 / PAGE,
        pattern: Pattern::Incompressible,
        ..pair.spec("vm", 256)
    }
}

/// What a report of a post-copy has to say.
fn supplied(report: &Report) {
    let verification = &report.verification;
    assert_eq!((verification.gate, verification.proof), (Verdict::Match, Verdict::Match), "{report:#?}");
    assert_eq!(verification.proof_pages, report.memory.pages);
    let post_copy = report.post_copy.as_ref().unwrap_or_else(|| panic!("no post-copy: {report:#?}"));
    assert!(post_copy.pages > 0 && post_copy.faults > 0, "{post_copy:?}");
    assert!(post_copy.longest_fault_ms >= post_copy.mean_fault_ms, "{post_copy:?}");
}

#[test]
fn a_guest_that_outruns_the_link_arrives_and_lacks_nothing() {
    const NAME: &str = "a_guest_that_outruns_the_link_arrives_and_lacks_nothing";
    if !root_or_skip(NAME) {
        return;
    }
    let pair = Pair::start();
    let guest = pair.run(pair.a(), "vm", &outrun(&pair));
    let before = guest.status();
    for (from, to) in [(pair.a(), pair.b()), (pair.b(), pair.a())] {
        let report = pair.migrate("vm", from, to, &["--on-diverge", "post-copy"]);
        supplied(&report);
        eprintln!("downtime {:.1} ms, {:?}", report.downtime_ms, report.post_copy);
        pair.holds_nothing(from);
    }
    guest.sound_since(&before);
}

#[test]
fn a_link_that_is_lost_makes_the_guest_wait_and_loses_nothing() {
    const NAME: &str = "a_link_that_is_lost_makes_the_guest_wait_and_loses_nothing";
    if !root_or_skip(NAME) {
        return;
    }
    let pair = Pair::start();
    let lacking = Lacking::begin(&pair);
    pair.testbed().cut(pair.a(), Wire::Link).unwrap();
    until("the link is given up", || logged(pair.a(), "the link was lost while memory was supplied"));
    assert!(lacking.guest.is_silent_for(Duration::from_secs(3)), "it runs on without its memory");
    pair.testbed().mend(pair.a(), Wire::Link).unwrap();
    lacking.lacks_nothing_at_last();
    let report = lacking.migration.ended().report();
    supplied(&report);
    assert!(report.post_copy.unwrap().links > 1);
}

#[test]
fn a_destination_agent_that_is_killed_makes_the_guest_wait_and_loses_nothing() {
    const NAME: &str = "a_destination_agent_that_is_killed_makes_the_guest_wait_and_loses_nothing";
    if !root_or_skip(NAME) {
        return;
    }
    let pair = Pair::start();
    let lacking = Lacking::begin(&pair);
    pair.b().kill_agent().unwrap();
    assert!(lacking.guest.is_silent_for(Duration::from_secs(3)), "it runs on without its memory");
    pair.b().start_agent().unwrap();
    lacking.lacks_nothing_at_last();
    assert_eq!(lacking.migration.ended().code, Some(0), "{}", pair.logs());
}

#[test]
fn a_source_agent_that_is_killed_makes_the_guest_wait_and_loses_nothing() {
    const NAME: &str = "a_source_agent_that_is_killed_makes_the_guest_wait_and_loses_nothing";
    if !root_or_skip(NAME) {
        return;
    }
    let pair = Pair::start();
    let lacking = Lacking::begin(&pair);
    pair.a().kill_agent().unwrap();
    assert!(lacking.guest.is_silent_for(Duration::from_secs(3)), "it runs on without its memory");
    pair.a().start_agent().unwrap();
    lacking.lacks_nothing_at_last();
}
