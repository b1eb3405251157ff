use finding::{Failure, Finding, Stage};
use session::report::{Estimated, Health, Memory, Pause, PhaseTime, Round, Verification};
use session::{Goal, Phase, Progress};

use super::*;

/// A migration under way.
pub(crate) fn progress() -> Progress {
    Progress {
        id: "0b9e5b0c-6d1f-4c4e-9f57-0d3b8f6b1a11".to_owned(),
        vm: "web1".to_owned(),
        source: "host-a".to_owned(),
        destination: "host-b".to_owned(),
        goal: Goal::Migrate,
        phase: Phase::Synchronize,
        elapsed_ms: 1500.0,
        rounds: 2,
        total_bytes: 512 << 20,
        remaining_bytes: 20 << 20,
        raw_bytes: 600 << 20,
        wire_bytes: 150 << 20,
        throughput: 1.2e9,
        dirty_rate: 2e7,
        predicted_downtime_ms: Some(12.5),
        time_left_ms: Some(800.0),
        in_sync: false,
        verification: Verification::default(),
        warning: None,
        throttle: 0.0,
        disks: Vec::new(),
    }
}

/// A migration that completed.
pub(crate) fn report() -> Report {
    let phase = |name, start_ms, duration_ms| PhaseTime { name, start_ms, duration_ms };
    let round = |n, dirty_pages, plain, duration_ms, paused| Round {
        n,
        dirty_pages,
        zero: dirty_pages - plain,
        plain,
        raw_bytes: dirty_pages * 4096,
        wire_bytes: plain * 2000,
        duration_ms,
        scan_ms: 0.4,
        merged: 0,
        paused,
        estimate: (!paused).then(|| Estimated {
            dirty_rate: 2e7,
            throughput: 1.2e9,
            downtime_ms: (n > 0).then_some(11.0),
            time_left_ms: Some(12.0),
        }),
        ..Round::default()
    };
    Report {
        id: "0b9e5b0c-6d1f-4c4e-9f57-0d3b8f6b1a11".to_owned(),
        vm: "web1".to_owned(),
        source: "host-a".to_owned(),
        destination: "host-b".to_owned(),
        started_unix_ms: 1_763_845_060_000,
        engine: "mirror".to_owned(),
        outcome: Outcome::Completed,
        error: None,
        total_ms: 1790.0,
        downtime_ms: 8.74,
        downtime_asked_ms: 50.0,
        downtime_predicted_ms: 11.0,
        pause: Pause {
            disks_ms: 0.0,
            stopped_ms: 0.2,
            last_round_ms: 1.9,
            device_state_ms: 4.1,
            gate_ms: 4.9,
            ready_ms: 7.7,
            handed_over_ms: 8.1,
            running_ms: 8.74,
        },
        tracking_hold_ms: 0.42,
        phases: vec![
            phase(Phase::Initialize, 0.0, 30.0),
            phase(Phase::Reserve, 30.0, 120.0),
            phase(Phase::Prepare, 150.0, 20.0),
            phase(Phase::Synchronize, 170.0, 1200.0),
            phase(Phase::SwitchOver, 1370.0, 9.0),
            phase(Phase::Resume, 1379.0, 200.0),
            phase(Phase::Complete, 1579.0, 211.0),
        ],
        rounds: vec![
            round(0, 131_072, 51_072, 900.0, false),
            round(1, 4_000, 3_990, 40.0, false),
            round(2, 55, 55, 1.1, true),
        ],
        memory: Memory { pages: 131_072, page_size: 4096, raw_bytes: 553_484_288, wire_bytes: 110_234_000 },
        disks: Vec::new(),
        network: session::report::Network::default(),
        device_state_bytes: 290_123,
        verification: Verification {
            audited_pages: 140_000,
            repaired_pages: 0,
            gate: Verdict::Match,
            proof: Verdict::Match,
            proof_pages: 131_072,
            mismatches: 0,
            ..Verification::default()
        },
        post_copy: None,
        throttle: None,
        quiesced: None,
        health: Some(Health { watched_ms: 200.0, vcpus: 2, vcpus_progressing: 2 }),
    }
}

/// One that the destination refused.
pub(crate) fn refused() -> Report {
    let finding = Finding::new("no-room", "ram_dir of host-b has 1.0 GiB free", "make room there");
    Report {
        outcome: Outcome::Failed,
        error: Some(Failure { stage: Stage::Refused, finding, more: Vec::new() }),
        rounds: Vec::new(),
        memory: Memory::default(),
        verification: Verification::default(),
        health: None,
        device_state_bytes: 0,
        ..report()
    }
}

#[test]
fn a_completed_migration_ends_with_what_an_operator_asks_first() {
    insta::assert_snapshot!(of(&report(), Some("10.9.0.3:7600")), @r"
    web1 now runs on host-b (10.9.0.3:7600)
      downtime  8.7 ms (50.0 ms asked, 11.0 ms predicted)
      total     1.79 s
      memory    512.0 MiB in 3 rounds, 105.1 MiB sent
      devices   283.3 KiB
      verified  gate match, proof match over 131,072 pages; 140,000 pages audited, 0 repaired
      health    2 of 2 vCPUs made progress in 200 ms
      report    vmirror report 0b9e5b0c
    ");
}

#[test]
fn what_was_not_as_asked_or_not_heard_is_said() {
    let text = of(&Report { downtime_ms: 1420.0, health: None, ..report() }, None);
    assert!(text.contains("downtime  1.42 s, LONGER than asked (50.0 ms asked"), "{text}");
    assert!(text.contains("health    nothing was heard of it at the destination"), "{text}");
}

#[test]
fn a_failed_one_says_where_the_machine_runs_and_claims_nothing_else() {
    let text = of(&refused(), Some("10.9.0.3:7600"));
    assert!(text.starts_with("web1 was not moved to host-b; it runs on host-a as before\n"), "{text}");
    for claim in ["downtime", "verified", "health", "memory"] {
        assert!(!text.contains(claim), "{claim} in {text}");
    }
}

#[test]
fn a_mismatch_is_loud() {
    let mut report = report();
    report.verification.proof = Verdict::Mismatch;
    report.verification.mismatches = 3;
    assert!(of(&report, None).contains("proof MISMATCH in 3 of 131,072 pages"));
}

#[test]
fn in_full_there_are_phases_the_pause_and_rounds() {
    let begun = moment(report().started_unix_ms);
    insta::assert_snapshot!(in_full(&report()).replace(&begun, "BEGUN"), @r"
    web1 now runs on host-b
      id        0b9e5b0c-6d1f-4c4e-9f57-0d3b8f6b1a11
      begun     BEGUN
      engine    mirror
      downtime  8.7 ms (50.0 ms asked, 11.0 ms predicted)
      total     1.79 s
      memory    512.0 MiB in 3 rounds, 105.1 MiB sent
      devices   283.3 KiB
      verified  gate match, proof match over 131,072 pages; 140,000 pages audited, 0 repaired
      health    2 of 2 vCPUs made progress in 200 ms
      held      0.42 ms when tracking began

    PHASE          BEGAN     TOOK
    initialize      0 ms  30.0 ms
    reserve      30.0 ms   120 ms
    prepare       150 ms  20.0 ms
    synchronize   170 ms   1.20 s
    switch-over   1.37 s   9.0 ms
    resume        1.38 s   200 ms
    complete      1.58 s   211 ms

    IN THE PAUSE             AT
    stop seen           0.20 ms
    last pages there     1.9 ms
    device state saved   4.1 ms
    gate passed          4.9 ms
    loaded there         7.7 ms
    handed over          8.1 ms
    runs there           8.7 ms

    ROUND    DIRTY    ZERO  SAME  DELTA  COPY   PLAIN       READ       SENT     SCAN     TOOK     DIRTIED     PAUSE
        0  131,072  80,000     0      0     0  51,072  512.0 MiB   97.4 MiB  0.40 ms   900 ms  19.1 MiB/s
        1    4,000      10     0      0     0   3,990   15.6 MiB    7.6 MiB  0.40 ms  40.0 ms  19.1 MiB/s  ~11.0 ms
        2       55       0     0      0     0      55  220.0 KiB  107.4 KiB  0.40 ms   1.1 ms                        paused
    ");
    let failed = in_full(&refused());
    assert!(
        failed.contains("because   ram_dir of host-b has 1.0 GiB free\n            make room there"),
        "{failed}"
    );
}
