//! A guest that outruns its mirror is handed over before its memory is complete, and must never see what it was not given.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use end_to_end::{PAGE, Pair};
use migration::Report;
use migration::report::Verdict;
use testbed::guest_spec::{GuestSpec, Pattern};
use testbed::{Wire, root_or_skip};

const MBIT: u64 = 1_000_000;

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
