//! The hand-over, model-checked: every order of steps, crashes, lost messages, failing disks and people's decisions.
//!
//! Whose the machine is after each event, and what is done then, is `ownership::on` itself, the function that the agent
//! uses. Mirrored by hand is what stands around it: the order in which a source's controller goes about a migration
//! (`hand_over/source.rs`), and how effects are carried out, step by step, with a crash possible between any two
//! (`hand_over/world.rs`).
//!
//! What it takes for granted: connections deliver in order, or break; a QEMU that was killed is gone; a state directory is not set back
//! to a moment between READY and OWNER, or between the beginning of the switch-over and HANDED OVER, but may be lost, or be one of before,
//! whatever has run since; who says `--force` has made sure of what docs/operations.md asks
//! for, and who starts a machine anew on a host that was restored has looked at the others. What people say without `--force` is never taken
//! for granted. That tests can fail is shown by leaving out one rule at a time.

mod hand_over;

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use hand_over::state::{Guest, Power, State};
use hand_over::{
    Action, COMMIT_FIRST, Defect, HandOver, ITS_OWN, NEVER_TWO, NO_OLD_STATE, NOTHING_ENDED,
    NOTHING_THROWN_AWAY, WAITS,
};
use stateright::{Checker, HasDiscoveries, Model};

const SOUND: HandOver =
    HandOver { hosts: 2, sessions: 2, faults: 1, post_copy: false, arrived: false, defect: None };
/// One migration, and more that goes wrong with it.
const STORMY: HandOver = HandOver { sessions: 1, faults: 2, ..SOUND };
/// One that has come to a host, and may go on to a third before the first has heard so.
const ON_THE_WAY: HandOver = HandOver { hosts: 3, arrived: true, ..SOUND };

fn holds(model: HandOver) {
    let checked = model.checker().threads(2).spawn_bfs().join();
    eprintln!("{model:?}: {} states, {} steps deep", checked.unique_state_count(), checked.max_depth());
    checked.assert_properties();
}

#[test]
fn never_two_and_nothing_lost_whatever_happens_when() {
    holds(STORMY);
    holds(SOUND);
}

#[test]
fn nor_on_three_hosts_without_faults() {
    holds(HandOver { hosts: 3, faults: 0, ..SOUND });
}

#[test]
fn nor_on_its_way_on_without_faults() {
    holds(HandOver { faults: 0, ..ON_THE_WAY });
}

#[test]
fn nor_before_its_memory_is_complete() {
    holds(HandOver { post_copy: true, ..STORMY });
}

#[test]
#[ignore = "slow: many millions of states"]
fn never_two_and_nothing_lost_with_more_of_everything() {
    holds(HandOver { faults: 3, ..STORMY });
    holds(HandOver { sessions: 2, ..STORMY });
    holds(HandOver { sessions: 3, ..SOUND });
    holds(HandOver { hosts: 3, ..SOUND });
    holds(ON_THE_WAY);
    holds(HandOver { post_copy: true, sessions: 2, ..STORMY });
}

/// Every reachable state, and which of them lead where.
struct Graph {
    states: Vec<State>,
    /// For each state, those from which one helpful step leads to it, and whether a person's step does.
    before: Vec<Vec<(u32, bool)>>,
    /// The state by which each was first found, for telling how one gets there.
    found_by: Vec<Option<(u32, Action)>>,
}

impl Graph {
    fn of(model: &HandOver) -> Graph {
        let first = model.first();
        let mut numbers = HashMap::from([(first.clone(), 0)]);
        let mut graph = Graph { states: vec![first], before: vec![Vec::new()], found_by: vec![None] };
        let mut at = 0;
        while at < graph.states.len() {
            let here = u32::try_from(at).expect("fewer states than 2^32");
            for (action, state) in model.next_steps(&graph.states[at]) {
                let next = u32::try_from(graph.states.len()).expect("fewer states than 2^32");
                let number = match numbers.entry(state) {
                    Entry::Occupied(known) => *known.get(),
                    Entry::Vacant(new) => {
                        graph.states.push(new.key().clone());
                        graph.before.push(Vec::new());
                        graph.found_by.push(Some((here, action)));
                        *new.insert(next)
                    }
                };
                if action.helps() {
                    graph.before[number as usize].push((here, action.by_a_person()));
                }
            }
            at += 1;
        }
        graph
    }

    /// From which states helpful steps can lead to where the machine runs.
    fn can_run(&self, with_a_person: bool) -> Vec<bool> {
        let mut can: Vec<bool> = self.states.iter().map(|state| state.running() == 1).collect();
        let mut reached: Vec<usize> = (0..can.len()).filter(|&at| can[at]).collect();
        while let Some(at) = reached.pop() {
            for &(before, by_a_person) in &self.before[at] {
                if !can[before as usize] && (with_a_person || !by_a_person) {
                    can[before as usize] = true;
                    reached.push(before as usize);
                }
            }
        }
        can
    }

    /// How one gets to the first state that is wanted and cannot lead to where the machine runs.
    fn stuck(&self, with_a_person: bool, wanted: impl Fn(&State) -> bool) -> Option<String> {
        let can = self.can_run(with_a_person);
        let stuck = (0..can.len()).find(|&at| !can[at] && wanted(&self.states[at]))?;
        let (mut at, mut way) = (stuck, Vec::new());
        while let Some((before, action)) = self.found_by[at] {
            way.push(format!("{action:?}"));
            at = before as usize;
        }
        way.reverse();
        Some(format!("{}\n{:#?}", way.join("\n"), self.states[stuck]))
    }
}

#[test]
fn never_none_for_ever() {
    let graph = Graph::of(&STORMY);
    eprintln!("{} states", graph.states.len());
    let somebody_can_help = graph.stuck(true, |state| !state.beyond_help());
    assert!(somebody_can_help.is_none(), "nobody can help:\n{}", somebody_can_help.unwrap_or_default());
    // Where neither host is lost and no QEMU has died, nobody is needed.
    let intact = |state: &State| {
        !state.beyond_help()
            && state
                .hosts
                .iter()
                .all(|host| host.up != Power::Lost && !matches!(host.qemu, Some((_, Guest::Dead))))
    };
    let alone = graph.stuck(false, intact);
    assert!(alone.is_none(), "it does not settle by itself:\n{}", alone.unwrap_or_default());
}

/// The checker must find that the property does not hold without the rule.
fn misses(defect: Defect, property: &'static str) {
    misses_in(STORMY, defect, property);
}

fn misses_in(model: HandOver, defect: Defect, property: &'static str) {
    let model = HandOver { defect: Some(defect), ..model };
    let until = HasDiscoveries::AllOf([property].into_iter().collect());
    let checked = model.checker().threads(2).finish_when(until).spawn_bfs().join();
    let way = checked.discovery(property);
    let way =
        way.unwrap_or_else(|| panic!("{property:?} holds in spite of {defect:?}: the model cannot fail"));
    eprintln!("{defect:?}:");
    way.into_actions().iter().for_each(|action| eprintln!("  {action:?}"));
}

#[test]
fn a_source_that_commits_before_its_journal_says_so_is_missed() {
    misses(Defect::CommitBeforeItIsOnRecord, COMMIT_FIRST);
}

#[test]
fn a_destination_that_resumes_before_its_journal_says_so_is_missed() {
    misses(Defect::ResumesBeforeItIsOnRecord, NO_OLD_STATE);
}

#[test]
fn a_source_that_resumes_after_a_deadline_is_missed() {
    misses(Defect::ResumesAfterDeadline, NEVER_TWO);
}

#[test]
fn a_destination_that_says_running_because_it_is_on_record_is_missed() {
    misses(Defect::RunningFromRecord, NOTHING_THROWN_AWAY);
}

#[test]
fn a_session_that_forgets_by_name_is_missed() {
    let model = HandOver { defect: Some(Defect::ForgetsByName), ..SOUND };
    let stuck = Graph::of(&model).stuck(true, |state| !state.beyond_help());
    assert!(stuck.is_some());
}

#[test]
fn a_destination_that_forgets_what_has_left_it_is_missed() {
    misses_in(SOUND, Defect::ForgetsHandOvers, NO_OLD_STATE);
}

#[test]
fn a_destination_that_answers_without_evidence_is_missed() {
    misses(Defect::NoCopyWithoutEvidence, NEVER_TWO);
}

#[test]
fn a_copy_that_is_confirmed_to_be_gone_by_an_earlier_look_is_missed() {
    misses(Defect::ConfirmsWhatItSawBefore, NEVER_TWO);
}

#[test]
fn a_destination_that_counts_an_unrun_machine_as_gone_is_missed() {
    misses(Defect::DepartsUnrun, NOTHING_THROWN_AWAY);
}

#[test]
fn a_person_who_takes_silence_for_leave_is_missed() {
    misses(Defect::PersonAsksNobody, NEVER_TWO);
}

#[test]
fn a_qemu_that_died_while_it_was_told_to_run_is_not_one_that_never_ran() {
    misses(Defect::NoCopyAfterALostResume, NO_OLD_STATE);
}

#[test]
fn a_source_that_acts_on_a_failed_write_is_missed() {
    misses(Defect::ActsOnAFailedWrite, NEVER_TWO);
}

#[test]
fn an_older_record_in_the_place_of_one_that_cannot_be_read_is_missed() {
    misses(Defect::OlderSlotYields, NEVER_TWO);
}

#[test]
fn a_machine_that_somebody_else_has_migrated_away_is_missed_when_it_is_resumed() {
    misses(Defect::ResumesForeign, ITS_OWN);
}

#[test]
fn a_source_that_keeps_what_the_destination_lacks_from_it_is_missed() {
    misses_in(HandOver { post_copy: true, ..STORMY }, Defect::DoesNotSupply, NOTHING_THROWN_AWAY);
}

#[test]
fn a_source_that_leaves_its_images_to_a_supervisor_is_missed() {
    misses(Defect::LeavesImagesUnlocked, NEVER_TWO);
}

#[test]
fn a_copy_that_gives_way_to_a_source_restored_from_a_backup_is_missed() {
    misses_in(SOUND, Defect::GivesWayToAny, WAITS);
}

#[test]
fn what_was_taken_back_and_is_given_up_as_if_it_never_had_run_is_missed() {
    misses_in(ON_THE_WAY, Defect::GivesUpWhatHasRun, NO_OLD_STATE);
}

#[test]
fn a_switch_over_that_is_on_record_while_somebody_else_may_migrate_is_missed() {
    misses(Defect::OffersBeforeItIsSetUp, ITS_OWN);
}

#[test]
fn what_has_run_and_is_ended_by_a_record_of_before_is_missed() {
    misses(Defect::EndsWhatHasRun, NOTHING_ENDED);
}
