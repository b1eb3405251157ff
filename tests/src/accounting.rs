//! What must add up in the report of every migration that completed.

use session::report::Verdict;
use session::{Outcome, Phase, Report};

use crate::{Guest, PAGE};

/// All phases, in their order.
pub const PHASES: [Phase; 9] = [
    Phase::Initialize,
    Phase::Reserve,
    Phase::Prepare,
    Phase::Synchronize,
    Phase::Verify,
    Phase::SwitchOver,
    Phase::Resume,
    Phase::CleanUp,
    Phase::Complete,
];

/// Asserts that the migration of this guest completed, that gate and proof hold over all of its memory, that every page of every
/// round is accounted for, and that no phase is missing or out of order.
///
/// # Panics
/// If any of that is not so.
#[track_caller]
pub fn report_adds_up(report: &Report, guest: &Guest) {
    assert_eq!((report.outcome, &report.error), (Outcome::Completed, &None), "{report:#?}");
    assert_eq!(report.vm, guest.name);

    let verification = &report.verification;
    assert_eq!((verification.gate, verification.proof), (Verdict::Match, Verdict::Match), "{verification:?}");
    assert_eq!((verification.proof_pages, verification.mismatches), (guest.pages(), 0), "{verification:?}");
    assert_eq!((report.memory.pages, report.memory.page_size), (guest.pages(), PAGE), "{:?}", report.memory);

    assert_eq!(report.rounds[0].dirty_pages, guest.pages(), "the first round is all of the memory");
    for (number, round) in report.rounds.iter().enumerate() {
        assert_eq!(round.n as usize, number, "{round:?}");
        let sent =
            round.zero + round.unchanged + round.delta + round.duplicate + round.plain + round.withheld;
        assert_eq!(round.dirty_pages, sent, "pages that nobody knows what became of: {round:?}");
        assert_eq!(round.raw_bytes, round.dirty_pages * PAGE, "{round:?}");
    }
    assert!(
        report.rounds.last().unwrap().paused,
        "the last round is that of the paused guest: {:?}",
        report.rounds
    );
    let sum = |bytes: fn(&session::report::Round) -> u64| report.rounds.iter().map(bytes).sum::<u64>();
    assert_eq!(report.memory.raw_bytes, sum(|round| round.raw_bytes), "{report:#?}");
    assert_eq!(report.memory.wire_bytes, sum(|round| round.wire_bytes), "{report:#?}");

    let names: Vec<Phase> = report.phases.iter().map(|phase| phase.name).collect();
    assert_eq!(names, PHASES);
    for pair in report.phases.windows(2) {
        assert!(pair[0].start_ms + pair[0].duration_ms <= pair[1].start_ms + 0.001, "{:?}", report.phases);
    }
    assert!(report.downtime_ms > 0.0 && report.downtime_ms < report.total_ms, "{report:#?}");
}
