//! The model of the hand-over: what the two sides and the world may do.

pub(crate) mod destination;
pub(crate) mod source;
pub(crate) mod state;

use stateright::{Model, Property};

use destination::DestinationAction;
use source::SourceAction;
use state::{CopyState, HostState, Rule, SessionId, SourceQemu, SourceRecord, SourceStep, State, Task};

/// The system to be checked.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HandOver {
    /// How many migrations may be begun.
    pub(crate) sessions: SessionId,
    /// Which rule is left out, to see that the checker misses it.
    pub(crate) defect: Option<Defect>,
}

/// A rule left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Defect {
    /// The source says Commit before its journal says HANDED OVER.
    CommitBeforeItIsOnRecord,
    /// The destination resumes the machine before its journal says OWNER.
    ResumesBeforeItIsOnRecord,
    /// The source runs the machine again when it has heard nothing for long enough.
    ResumesAfterDeadline,
    /// The destination says that the machine runs because its journal says that it owns it.
    RunningFromRecord,
    /// A session that ends late throws away whatever has its machine's name.
    ForgetsByName,
    /// The destination forgets that it has owned a machine when that has left.
    ForgetsHandOvers,
    /// The destination counts a machine as gone that it owned and may never have run.
    DepartsUnrun,
    /// The person at the source only looks whether the machine runs at the destination.
    PersonOnlyLooks,
}

/// One step of anybody.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    Source(SourceAction),
    Destination(DestinationAction),
    Fault(Fault),
}

/// What may happen at any time and helps nobody.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Fault {
    /// Whatever is under way on this connection is lost.
    Break(usize),
    SourceAgentDies,
    DestinationAgentDies,
    SourcePowerFails,
    DestinationPowerFails,
    SourceLostForGood,
    DestinationLostForGood,
    /// QEMU at the destination dies by itself.
    CopyDies,
}

impl Action {
    /// Whether it belongs to the way out of trouble and not to the trouble.
    pub(crate) fn helps(self) -> bool {
        !matches!(
            self,
            Action::Fault(_)
                | Action::Destination(DestinationAction::ResumeFails(_) | DestinationAction::LoadFails(_))
        )
    }

    /// Whether a person does it.
    pub(crate) fn by_a_person(self) -> bool {
        matches!(
            self,
            Action::Source(SourceAction::ResolvedToRunHere)
                | Action::Destination(
                    DestinationAction::ResolvedToRunHere | DestinationAction::ResolvedToGiveUp
                )
        )
    }
}

impl HandOver {
    fn faults(&self, state: &State, actions: &mut Vec<Fault>) {
        let breakable = |link: &state::Link| !link.broken && link.source && link.task != Task::Done;
        let links = state.links.iter().enumerate().filter(|(_, link)| breakable(link));
        actions.extend(links.map(|(at, _)| Fault::Break(at)));
        if state.source.host == HostState::Up {
            actions.push(Fault::SourceAgentDies);
        }
        if state.destination.host == HostState::Up {
            actions.push(Fault::DestinationAgentDies);
        }
        if state.source.host != HostState::Lost {
            actions.extend([Fault::SourcePowerFails, Fault::SourceLostForGood]);
        }
        if state.destination.host != HostState::Lost {
            actions.extend([Fault::DestinationPowerFails, Fault::DestinationLostForGood]);
        }
        if matches!(state.destination.qemu, Some((_, CopyState::Loaded | CopyState::Running))) {
            actions.push(Fault::CopyDies);
        }
    }

    fn strike(&self, state: &mut State, fault: Fault) {
        match fault {
            Fault::Break(at) => {
                let link = &mut state.links[at];
                link.broken = true;
                link.requests.clear();
                link.replies.clear();
            }
            Fault::SourceAgentDies => source_agent_dies(state, HostState::Down),
            Fault::DestinationAgentDies => destination_agent_dies(state, HostState::Down),
            Fault::SourcePowerFails | Fault::SourceLostForGood => {
                let lost = fault == Fault::SourceLostForGood;
                source_agent_dies(state, if lost { HostState::Lost } else { HostState::Down });
                if state.source.qemu != SourceQemu::Gone {
                    match state.source.record {
                        Some(SourceRecord::Owner { .. }) => state.past.ended = true,
                        _ => state.past.source_lost = true,
                    }
                    state.source.qemu = SourceQemu::Gone;
                }
            }
            Fault::DestinationPowerFails | Fault::DestinationLostForGood => {
                let lost = fault == Fault::DestinationLostForGood;
                destination_agent_dies(state, if lost { HostState::Lost } else { HostState::Down });
                copy_dies(state);
            }
            Fault::CopyDies => copy_dies(state),
        }
    }
}

/// Nothing survives but the journal and QEMU. What the kernel has taken for sending may still arrive.
fn source_agent_dies(state: &mut State, host: HostState) {
    state.source.host = host;
    state.source.step = SourceStep::Idle;
    state.source.abandon = None;
    state.links.iter_mut().for_each(|link| link.source = false);
}

fn destination_agent_dies(state: &mut State, host: HostState) {
    state.destination.host = host;
    for link in &mut state.links {
        link.task = Task::Done;
        link.broken = true;
    }
}

fn copy_dies(state: &mut State) {
    if let Some((_, copy)) = &mut state.destination.qemu {
        state.past.ended |= *copy == CopyState::Running;
        *copy = CopyState::Dead;
    }
}

impl Model for HandOver {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State::first()]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        let (mut source, mut destination, mut faults) = (Vec::new(), Vec::new(), Vec::new());
        self.source_actions(state, &mut source);
        self.destination_actions(state, &mut destination);
        self.faults(state, &mut faults);
        actions.extend(source.into_iter().map(Action::Source));
        actions.extend(destination.into_iter().map(Action::Destination));
        actions.extend(faults.into_iter().map(Action::Fault));
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        match action {
            Action::Source(action) => self.source_acts(&mut state, action)?,
            Action::Destination(action) => self.destination_acts(&mut state, action)?,
            Action::Fault(fault) => self.strike(&mut state, fault),
        }
        state.tidy();
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        fn kept(state: &State, rule: Rule) -> bool {
            state.past.broken != Some(rule)
        }
        vec![
            Property::always(NEVER_TWO, |_, state: &State| state.running() <= 1),
            Property::always(COMMIT_FIRST, |_, state: &State| kept(state, Rule::ResumedWithoutCommit)),
            Property::always(WORD_KEPT, |_, state: &State| {
                kept(state, Rule::ResumedWithoutTheDestinationsWord)
            }),
            Property::always(GENERATIONS_GROW, |_, state: &State| {
                kept(state, Rule::RanUnderAStaleGeneration)
            }),
            Property::always(NO_OLD_STATE, |_, state: &State| kept(state, Rule::RanOnFromAnOldState)),
            Property::always(NOTHING_THROWN_AWAY, |_, state: &State| {
                kept(state, Rule::ThrownAwayBeforeTheCopyRan)
            }),
            Property::sometimes("it moves and nothing is left at the source", |_, state: &State| {
                state.source.record.is_none()
                    && state.source.qemu == SourceQemu::Gone
                    && state.source.host == HostState::Up
                    && matches!(state.destination.qemu, Some((_, CopyState::Running)))
            }),
            Property::sometimes(
                "it comes back after a hand-over that failed, and moves then",
                |_, state: &State| {
                    state.past.ran_at_source & 1 << 2 != 0 && state.past.copies_run & 1 << 2 != 0
                },
            ),
        ]
    }
}

pub(crate) const NEVER_TWO: &str = "never two";
pub(crate) const COMMIT_FIRST: &str = "a destination never resumes without Commit or a person";
pub(crate) const WORD_KEPT: &str = "the source resumes only what its journal says is its own";
pub(crate) const GENERATIONS_GROW: &str = "no stale generation runs";
pub(crate) const NO_OLD_STATE: &str =
    "what has run at the destination never runs on from the source's older state";
pub(crate) const NOTHING_THROWN_AWAY: &str = "the source throws nothing away before the copy has run";
