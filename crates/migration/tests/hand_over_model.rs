//! The hand-over, model-checked: every order of steps, crashes, lost messages and operator's decisions, for two
//! migrations in a row of one machine from one host to another.
//!
//! The model mirrors the rules of the code: `hand_over/source.rs` those of the source's controller, its settlement and
//! recovery; `hand_over/destination.rs` those of the destination's. A step of the model is what the code does between two
//! moments at which a crash makes a difference: a journal entry, a command to QEMU, a message.
//!
//! It is the rules as they must be. Each [`Defect`] is one left out, among them mistakes that the code has had: the first
//! step when code and model differ is to see which of them is right.
//!
//! What it takes for granted: a journal entry is durable when it was made; connections deliver in order, or break; a
//! QEMU that was killed is gone; and the person who decides follows docs/operations.md (see
//! `person_may_run_at_source`). That tests can fail is shown by leaving out one rule at a time.

mod hand_over;

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use hand_over::state::{HostState, State};
use hand_over::{Action, COMMIT_FIRST, Defect, HandOver, NEVER_TWO, NO_OLD_STATE, NOTHING_THROWN_AWAY};
use stateright::{Checker, HasDiscoveries, Model};

const SOUND: HandOver = HandOver { sessions: 2, defect: None };

#[test]
fn never_two_and_nothing_lost_whatever_happens_when() {
    let checked = SOUND.checker().threads(2).spawn_bfs().join();
    eprintln!("{} states, {} steps deep", checked.unique_state_count(), checked.max_depth());
    checked.assert_properties();
    assert!(checked.unique_state_count() > 10_000, "a model this small leaves something out");
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
        let first = State::first();
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
    let graph = Graph::of(&SOUND);
    eprintln!("{} states", graph.states.len());
    let somebody_can_help = graph.stuck(true, |state| !state.beyond_help());
    assert!(somebody_can_help.is_none(), "nobody can help:\n{}", somebody_can_help.unwrap_or_default());
    // Where neither host is lost and no QEMU has died, nobody is needed.
    let intact = |state: &State| {
        use hand_over::state::CopyState;
        !state.beyond_help()
            && !state.past.source_lost
            && state.source.host != HostState::Lost
            && state.destination.host != HostState::Lost
            && !matches!(state.destination.qemu, Some((_, CopyState::Dead)))
    };
    let alone = graph.stuck(false, intact);
    assert!(alone.is_none(), "it does not settle by itself:\n{}", alone.unwrap_or_default());
}

/// The checker must find that the property does not hold without the rule.
fn misses(defect: Defect, property: &'static str) {
    let model = HandOver { defect: Some(defect), ..SOUND };
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
    misses(Defect::CommitBeforeItIsOnRecord, NEVER_TWO);
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
    misses(Defect::ForgetsHandOvers, NEVER_TWO);
    misses(Defect::ForgetsHandOvers, NO_OLD_STATE);
}

#[test]
fn a_destination_that_counts_an_unrun_machine_as_gone_is_missed() {
    misses(Defect::DepartsUnrun, NOTHING_THROWN_AWAY);
}

#[test]
fn a_person_who_only_looks_is_missed() {
    misses(Defect::PersonOnlyLooks, NEVER_TWO);
}
