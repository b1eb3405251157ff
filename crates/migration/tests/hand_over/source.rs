//! The source's rules, mirrored from `src/source/controller.rs`, `src/source/settlement.rs` and `src/lifecycle.rs`.

use super::state::{
    HostState, Link, Purpose, Reply, Request, Rule, SessionId, SourceQemu, SourceRecord, SourceStep, State,
};
use super::{Defect, HandOver};

/// Most connections at a time: a session's, and one about it.
const LINKS: usize = 2;

/// What the source may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum SourceAction {
    Begin,
    Offer,
    Pause,
    /// Reads the next reply of this connection.
    Hear(usize),
    HandOver,
    Commit,
    /// A deadline has passed, a connection is found broken, or the operator cancels.
    GiveUpWaiting,
    Ask,
    Keep,
    Resume,
    Release,
    Forget,
    AskToAbandon,
    Recover,
    /// A person decides that it runs here.
    ResolvedToRunHere,
}

impl HandOver {
    pub(crate) fn source_actions(&self, state: &State, actions: &mut Vec<SourceAction>) {
        let source = &state.source;
        match source.host {
            HostState::Lost => return,
            HostState::Down => return actions.push(SourceAction::Recover),
            HostState::Up => {}
        }
        let reachable = state.destination.host == HostState::Up && state.links.len() < LINKS;
        match source.step {
            SourceStep::Idle
                if matches!(source.record, Some(SourceRecord::Owner { .. }))
                    && source.qemu == SourceQemu::Running
                    && state.sessions < self.sessions
                    && reachable =>
            {
                actions.push(SourceAction::Begin);
            }
            SourceStep::Idle => {}
            SourceStep::Mirroring(_) => actions.extend([SourceAction::Offer, SourceAction::GiveUpWaiting]),
            SourceStep::Offered(_) => actions.extend([SourceAction::Pause, SourceAction::GiveUpWaiting]),
            SourceStep::Ready(_) => actions.extend([SourceAction::HandOver, SourceAction::GiveUpWaiting]),
            SourceStep::AwaitingReserved(_)
            | SourceStep::AwaitingReady(_)
            | SourceStep::AwaitingRunning(_)
            | SourceStep::Asked(_)
            | SourceStep::Undoing(_) => actions.push(SourceAction::GiveUpWaiting),
            SourceStep::HandedOver(_) => actions.push(SourceAction::Commit),
            SourceStep::InDoubt(_) => {
                if reachable {
                    actions.push(SourceAction::Ask);
                }
                if self.person_may_run_at_source(state) {
                    actions.push(SourceAction::ResolvedToRunHere);
                }
            }
            SourceStep::Kept => actions.push(SourceAction::Keep),
            SourceStep::KeptOnRecord => actions.push(SourceAction::Resume),
            SourceStep::Given(_) => actions.push(SourceAction::Release),
            SourceStep::Released => actions.push(SourceAction::Forget),
        }
        let about = |link: &Link| link.source && link.purpose == Purpose::Abandon;
        if source.abandon.is_some() && reachable && !state.links.iter().any(about) {
            actions.push(SourceAction::AskToAbandon);
        }
        let heard = |(at, link): (usize, &Link)| {
            (link.source && !link.replies.is_empty()).then_some(SourceAction::Hear(at))
        };
        actions.extend(state.links.iter().enumerate().filter_map(heard));
    }

    /// `vmirror resolve --run-here` at the source, by a person who has done what docs/operations.md asks for: the copy at
    /// the destination was given up, or its host is gone for good. A look at whether it runs there is not enough,
    /// because a `Commit` may be on its way.
    fn person_may_run_at_source(&self, state: &State) -> bool {
        let there = &state.destination;
        if self.defect == Some(Defect::PersonOnlyLooks) {
            return !matches!(there.qemu, Some((_, super::state::CopyState::Running)))
                && !state.past.elsewhere;
        }
        there.host == HostState::Lost && state.past.copies_run == 0
    }

    pub(crate) fn source_acts(&self, state: &mut State, action: SourceAction) -> Option<()> {
        match action {
            SourceAction::Begin => {
                let generation = owned(state)?;
                state.sessions += 1;
                let session = state.sessions;
                state.links.push(Link::new(Purpose::Migrate, Request::Reserve(session, generation)));
                state.source.step = SourceStep::AwaitingReserved(session);
            }
            // Controller::switch_over: `outgoing` is durable before a complete copy can exist.
            SourceAction::Offer => {
                let SourceStep::Mirroring(session) = state.source.step else { return None };
                let generation = owned(state)?;
                state.source.record = Some(SourceRecord::Owner { generation, outgoing: Some(session) });
                state.source.step = SourceStep::Offered(session);
            }
            // switch::prepare and finish: the pause, the last pages, `Load`.
            SourceAction::Pause => {
                let SourceStep::Offered(session) = state.source.step else { return None };
                state.source.qemu = SourceQemu::Paused;
                link(state, Purpose::Migrate)?.ask(Request::Load);
                state.source.step = SourceStep::AwaitingReady(session);
            }
            SourceAction::Hear(at) => self.source_hears(state, at)?,
            // Controller::hand_over: on record first, then told.
            SourceAction::HandOver => {
                let SourceStep::Ready(session) = state.source.step else { return None };
                if self.defect == Some(Defect::CommitBeforeItIsOnRecord) {
                    commit(state, session)?;
                } else {
                    give(state, session)?;
                }
                state.source.step = SourceStep::HandedOver(session);
            }
            SourceAction::Commit => {
                let SourceStep::HandedOver(session) = state.source.step else { return None };
                if self.defect == Some(Defect::CommitBeforeItIsOnRecord) {
                    give(state, session)?;
                } else {
                    commit(state, session)?;
                }
                state.source.step = SourceStep::AwaitingRunning(session);
            }
            SourceAction::GiveUpWaiting => self.source_gives_up_waiting(state)?,
            // settlement::settle: the Commit again, as the first message of a new connection.
            SourceAction::Ask => {
                let SourceStep::InDoubt(session) = state.source.step else { return None };
                let generation = handed_over(state)?;
                state.links.push(Link::new(Purpose::Settle, Request::Commit(session, generation)));
                state.source.step = SourceStep::Asked(session);
            }
            // Controller::settle, lifecycle::resolve: back under a generation that no copy has.
            SourceAction::Keep => {
                let generation = handed_over(state)? + 1;
                state.source.record = Some(SourceRecord::Owner { generation, outgoing: None });
                state.source.step = SourceStep::KeptOnRecord;
            }
            SourceAction::Resume => {
                if state.source.qemu == SourceQemu::Paused {
                    state.run_at_source();
                }
                state.source.step = SourceStep::Idle;
            }
            // Controller::clean_up, lifecycle::forget: QEMU first, the record last.
            SourceAction::Release => {
                let SourceStep::Given(session) = state.source.step else { return None };
                if state.past.copies_run & 1 << session == 0 {
                    state.breaks(Rule::ThrownAwayBeforeTheCopyRan);
                }
                state.source.qemu = SourceQemu::Gone;
                state.source.step = SourceStep::Released;
            }
            SourceAction::Forget => {
                state.source.record = None;
                state.source.step = SourceStep::Idle;
            }
            // settlement::abandon.
            SourceAction::AskToAbandon => {
                let session = state.source.abandon?;
                state.links.push(Link::new(Purpose::Abandon, Request::Cancel(session)));
            }
            SourceAction::Recover => recover(state),
            SourceAction::ResolvedToRunHere => state.source.step = SourceStep::Kept,
        }
        Some(())
    }

    fn source_hears(&self, state: &mut State, at: usize) -> Option<()> {
        let link = state.links.get_mut(at)?;
        let reply = link.replies.remove(0);
        if link.purpose == Purpose::Abandon {
            if reply != Reply::Running {
                state.source.abandon = None;
            }
            link.source = false;
            return Some(());
        }
        match (state.source.step, reply) {
            (SourceStep::AwaitingReserved(session), Reply::Reserved) => {
                state.source.step = SourceStep::Mirroring(session);
            }
            (SourceStep::AwaitingReady(session), Reply::Ready) => {
                state.source.step = SourceStep::Ready(session)
            }
            (SourceStep::Mirroring(_) | SourceStep::Offered(_) | SourceStep::AwaitingReady(_), _) => {
                undo(state)?
            }
            (SourceStep::AwaitingRunning(session) | SourceStep::Asked(session), Reply::Running) => {
                hang_up(state);
                state.source.step = SourceStep::Given(session);
            }
            // settlement::settle: only an answer to a question asked anew counts as "no copy".
            (SourceStep::Asked(_), Reply::NoCopy) => {
                hang_up(state);
                state.source.step = SourceStep::Kept;
            }
            (SourceStep::AwaitingRunning(session) | SourceStep::Asked(session), _) => {
                hang_up(state);
                state.source.step = SourceStep::InDoubt(session);
            }
            (SourceStep::Undoing(session), Reply::Cancelled | Reply::NoCopy | Reply::Failed) => {
                end_undo(state, session, true);
            }
            _ => {}
        }
        Some(())
    }

    fn source_gives_up_waiting(&self, state: &mut State) -> Option<()> {
        match state.source.step {
            SourceStep::Undoing(session) => end_undo(state, session, false),
            SourceStep::AwaitingRunning(_) if self.defect == Some(Defect::ResumesAfterDeadline) => {
                let generation = handed_over(state)? + 1;
                hang_up(state);
                state.source.record = Some(SourceRecord::Owner { generation, outgoing: None });
                state.source.step = SourceStep::KeptOnRecord;
            }
            SourceStep::AwaitingRunning(session) | SourceStep::Asked(session) => {
                hang_up(state);
                state.source.step = SourceStep::InDoubt(session);
            }
            _ => undo(state)?,
        }
        Some(())
    }
}

/// The journal says HANDED OVER.
fn give(state: &mut State, session: SessionId) -> Option<()> {
    let generation = owned(state)? + 1;
    state.source.record = Some(SourceRecord::HandedOver { generation, session });
    state.past.handed_over |= 1 << session;
    Some(())
}

/// The destination is told so.
fn commit(state: &mut State, session: SessionId) -> Option<()> {
    let generation = owned(state).map_or_else(|| handed_over(state), |generation| Some(generation + 1))?;
    link(state, Purpose::Migrate)?.ask(Request::Commit(session, generation));
    Some(())
}

/// Controller::undo: the machine first, then the destination.
fn undo(state: &mut State) -> Option<()> {
    let (SourceStep::AwaitingReserved(session)
    | SourceStep::Mirroring(session)
    | SourceStep::Offered(session)
    | SourceStep::AwaitingReady(session)
    | SourceStep::Ready(session)) = state.source.step
    else {
        return None;
    };
    if state.source.qemu == SourceQemu::Paused {
        state.run_at_source();
    }
    link(state, Purpose::Migrate)?.ask(Request::Cancel(session));
    state.source.step = SourceStep::Undoing(session);
    Some(())
}

fn end_undo(state: &mut State, session: SessionId, told: bool) {
    hang_up(state);
    if let Some(SourceRecord::Owner { outgoing, .. }) = &mut state.source.record
        && outgoing.take().is_some()
        && !told
    {
        state.source.abandon = Some(session);
    }
    state.source.step = SourceStep::Idle;
}

/// lifecycle::recover and reconnect.
fn recover(state: &mut State) {
    state.source.host = HostState::Up;
    match state.source.record {
        Some(SourceRecord::Owner { .. }) if state.source.qemu == SourceQemu::Gone => {
            state.source.record = None
        }
        Some(SourceRecord::Owner { generation, outgoing }) => {
            if state.source.qemu == SourceQemu::Paused {
                state.run_at_source();
            }
            state.source.record = Some(SourceRecord::Owner { generation, outgoing: None });
            state.source.abandon = outgoing;
        }
        Some(SourceRecord::HandedOver { session, .. }) => state.source.step = SourceStep::InDoubt(session),
        None => {}
    }
}

fn owned(state: &State) -> Option<u8> {
    match state.source.record? {
        SourceRecord::Owner { generation, .. } => Some(generation),
        SourceRecord::HandedOver { .. } => None,
    }
}

fn handed_over(state: &State) -> Option<u8> {
    match state.source.record? {
        SourceRecord::HandedOver { generation, .. } => Some(generation),
        SourceRecord::Owner { .. } => None,
    }
}

/// The source's end of the connection of its session.
fn link(state: &mut State, purpose: Purpose) -> Option<&mut Link> {
    state.links.iter_mut().find(|link| link.source && link.purpose == purpose)
}

/// Leaves the connection of the session, or the one that settles it.
fn hang_up(state: &mut State) {
    for link in state.links.iter_mut().filter(|link| link.purpose != Purpose::Abandon) {
        link.source = false;
    }
}
