//! A guest that outruns its mirror is slowed until it does not, or stays where it is, as was asked.

use end_to_end::{OUTRUN, PAGE, Pair, UnderWay, report_adds_up, until, vmirror};
use session::Outcome;
use testbed::guest_spec::GuestSpec;
use testbed::{Wire, root_or_skip};

/// Two hosts with a slow link between them, and a guest that dirties so much of it, in percent, in pages that neither deltas
/// nor compression make smaller.
fn outrun(percent: u64) -> (Pair, GuestSpec) {
    let pair = Pair::start();
    let spec = GuestSpec {
        fill_mib: 12,
        working_set_mib: Some(8),
        rate: OUTRUN / 8 * percent / 100 / PAGE,
        ..pair.outrun_by(pair.spec("vm", 128))
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
        report_adds_up(&report, &guest);
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
    // What limits is the link, or what was asked for.
    for (percent, more) in [(300, &[][..]), (80, &["--bandwidth", "2MiB/s"])] {
        let (pair, spec) = outrun(percent);
        let guest = pair.run(pair.a(), "vm", &spec);
        let before = guest.status();
        let options = [&["--on-diverge", "fail", "--max-downtime", "100ms"], more].concat();
        let said = pair.try_migrate("vm", pair.a(), pair.b(), &options);
        assert_eq!(said.code, Some(1), "{said:?}");
        let report = said.report();
        let finding = &report.error.as_ref().unwrap().finding;
        assert_eq!((report.outcome, finding.kind.as_str()), (Outcome::Failed, "not-converged"));
        assert!(finding.message.contains("MiB/s can be sent"), "{finding:?}");
        assert_eq!(report.throttle, None);
        // What was foreseen is told, round by round.
        let foreseen = report.rounds.iter().filter_map(|round| round.estimate.as_ref()?.downtime_ms);
        assert!(foreseen.max_by(f64::total_cmp) > Some(100.0), "{:#?}", report.rounds);
        guest.runs_on();
        assert!(pair.runs_on("vm", pair.a()));
        pair.holds_nothing(pair.b());
        let _ = guest.sane_since(&before);
    }
}

/// Whether somebody traces a thread of this process.
fn is_traced(pid: i32) -> bool {
    std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten().any(|task| {
        let status = std::fs::read_to_string(task.path().join("status")).unwrap_or_default();
        status.lines().any(|line| line.starts_with("TracerPid:") && !line.ends_with("\t0"))
    })
}

#[test]
fn a_guest_that_is_slowed_is_let_go_when_its_migration_is_cancelled_or_an_agent_dies() {
    const NAME: &str = "a_guest_that_is_slowed_is_let_go_when_its_migration_is_cancelled_or_an_agent_dies";
    if root_or_skip(NAME) {
        let_go_at(&["cancel", "destination dies", "agent dies"]);
    }
}

#[test]
#[ignore = "waits for deadlines: make test-full"]
fn a_guest_that_is_slowed_is_let_go_when_time_is_up_or_the_link_is_cut() {
    const NAME: &str = "a_guest_that_is_slowed_is_let_go_when_time_is_up_or_the_link_is_cut";
    if root_or_skip(NAME) {
        let_go_at(&["time is up", "link is cut", "agent dies"]);
    }
}

/// Asserts that a guest that is slowed is not slowed any more after a migration that ended so; the last one kills the agent.
fn let_go_at(ends: &[&str]) {
    let (pair, spec) = outrun(400);
    let guest = pair.run(pair.a(), "vm", &spec);
    let before = guest.status();
    let pid = pair.qemu(pair.a()).unwrap();
    // So little downtime is not to be had, and the guest is slowed more and more: next to nothing is left for memory beside what a switch-over takes.
    let impossible = ["--downtime", "10ms", "--max-downtime", "10ms"];
    for &end in ends {
        let mut options = impossible.to_vec();
        if end == "time is up" {
            options.extend(["--timeout", "40s"]);
        }
        let migration = pair.begin("vm", pair.a(), pair.b(), &options);
        migration.shows("it is slowed", |progress| progress["throttle"].as_f64() > Some(0.0));
        let failed = |migration: UnderWay<'_>, kind: &str| {
            let report = migration.ended().report();
            assert_eq!(report.outcome, Outcome::Failed, "{end}: {report:#?}");
            assert_eq!(report.error.as_ref().unwrap().finding.kind, kind, "{end}: {report:#?}");
            assert!(report.throttle.is_some_and(|slowed| slowed.stops > 0), "{end}");
        };
        match end {
            "cancel" => {
                let _ = vmirror(pair.a(), &["cancel", "vm"]).done();
                assert_eq!(migration.ended().report().outcome, Outcome::Cancelled);
            }
            "time is up" => failed(migration, "not-converged"),
            "destination dies" => {
                pair.b().kill_agent().unwrap();
                failed(migration, "link");
                pair.b().start_agent().unwrap();
            }
            "link is cut" => {
                pair.testbed().cut(pair.b(), Wire::Link).unwrap();
                failed(migration, "link");
                pair.testbed().mend(pair.b(), Wire::Link).unwrap();
            }
            _ => drop(pair.a().kill_agent().unwrap()),
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
