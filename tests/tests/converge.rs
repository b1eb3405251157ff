//! A guest that outruns its mirror is slowed until it does not, or stays where it is, as was asked.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use end_to_end::{PAGE, Pair, accounted, until, vmirror};
use migration::Outcome;
use testbed::guest_spec::{GuestSpec, Pattern};
use testbed::{Wire, root_or_skip};

const MBIT: u64 = 1_000_000;

/// Two hosts with a link of 200 Mbit/s between them, and a guest that dirties so much of it, in percent, in pages that
/// neither deltas nor compression make smaller.
fn outrun(percent: u64) -> (Pair, GuestSpec) {
    let pair = Pair::start();
    let link = 200 * MBIT;
    for host in [pair.a(), pair.b()] {
        pair.testbed().set_rate(host, Wire::Link, link).unwrap();
    }
    let spec = GuestSpec {
        fill_mib: 64,
        working_set_mib: Some(32),
        rate: link / 8 * percent / 100 / PAGE,
        pattern: Pattern::Incompressible,
        ..pair.spec("vm", 256)
    };
    (pair, spec)
}

#[test]
fn a_guest_that_outruns_the_link_is_slowed_until_it_does_not() {
    const NAME: &str = "a_guest_that_outruns_the_link_is_slowed_until_it_does_not";
    if !root_or_skip(NAME) {
        return;
    }
    for percent in [150, 400] {
        let (pair, spec) = outrun(percent);
        let guest = pair.run(pair.a(), "vm", &spec);
        let before = guest.status();
        let report =
            pair.migrate("vm", pair.a(), pair.b(), &["--downtime", "100ms", "--max-downtime", "300ms"]);
        accounted(&report, &guest);
        let slowed =
            report.throttle.unwrap_or_else(|| panic!("{percent} %: not slowed: {:#?}", report.rounds));
        assert!(slowed.highest_share >= 0.2 && slowed.stops > 0, "{slowed:?}");
        eprintln!(
            "{percent} %: downtime {:.0} ms, {slowed:?}, {} rounds",
            report.downtime_ms,
            report.rounds.len()
        );
        // Nothing slows it any more.
        guest.writes_on(spec.rate);
        guest.sound_since(&before);
    }
}

#[test]
fn with_fail_a_guest_that_outruns_the_link_stays_and_it_is_said_why() {
    const NAME: &str = "with_fail_a_guest_that_outruns_the_link_stays_and_it_is_said_why";
    if !root_or_skip(NAME) {
        return;
    }
    let (pair, spec) = outrun(300);
    let guest = pair.run(pair.a(), "vm", &spec);
    let before = guest.status();
    let said =
        pair.try_migrate("vm", pair.a(), pair.b(), &["--on-diverge", "fail", "--max-downtime", "100ms"]);
    assert_eq!(said.code, Some(1), "{said:?}");
    let report = said.report();
    let finding = &report.error.as_ref().unwrap().finding;
    assert_eq!((report.outcome, finding.kind.as_str()), (Outcome::Failed, "not-converged"));
    assert!(finding.message.contains("MiB/s can be sent"), "{finding:?}");
    assert_eq!(report.throttle, None);
    guest.runs_on();
    assert!(pair.runs_on("vm", pair.a()));
    pair.holds_nothing(pair.b());
    let _ = guest.sane_since(&before);
}

/// Whether somebody traces a thread of this process.
fn is_traced(pid: i32) -> bool {
    std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten().any(|task| {
        let status = std::fs::read_to_string(task.path().join("status")).unwrap_or_default();
        status.lines().any(|line| line.starts_with("TracerPid:") && !line.ends_with("\t0"))
    })
}

#[test]
fn a_guest_that_is_slowed_is_let_go_when_the_migration_is_cancelled_or_its_agent_killed() {
    const NAME: &str = "a_guest_that_is_slowed_is_let_go_when_the_migration_is_cancelled_or_its_agent_killed";
    if !root_or_skip(NAME) {
        return;
    }
    let (pair, spec) = outrun(400);
    let guest = pair.run(pair.a(), "vm", &spec);
    let before = guest.status();
    let pid = pair.qemu(pair.a()).unwrap();
    // So little downtime is not to be had: it is slowed more and more.
    let impossible = ["--downtime", "1ms", "--max-downtime", "1ms"];
    for end in ["cancel", "kill"] {
        let migration = pair.begin("vm", pair.a(), pair.b(), &impossible);
        migration.shows("it is slowed", |progress| progress["throttle"].as_f64() > Some(0.0));
        if end == "cancel" {
            let _ = vmirror(pair.a(), &["cancel", "vm"]).done();
            assert_eq!(migration.ended().report().outcome, Outcome::Cancelled);
        } else {
            pair.a().kill_agent().unwrap();
        }
        until("nobody traces it", || !is_traced(pid));
        guest.writes_on(spec.rate);
    }
    pair.a().start_agent().unwrap();
    assert!(pair.runs_on("vm", pair.a()));
    guest.runs_on();
    pair.holds_nothing(pair.b());
    let _ = guest.sane_since(&before);
}
