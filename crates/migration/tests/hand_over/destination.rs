//! The destination's rules, mirrored from `src/destination.rs`, `src/reservation.rs`, `src/journal.rs` and `src/lifecycle.rs`.

use super::state::{
    CopyState, DestinationRecord, Generation, HostState, Reply, Request, SessionId, SourceQemu, SourceRecord,
    State, Task,
};
use super::{Defect, HandOver};

/// What the destination may do. The number is the connection's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum DestinationAction {
    /// Reads the next request of this connection.
    Hear(usize),
    NoteReady(usize),
    SayReady(usize),
    Resume(usize),
    /// QEMU refuses to resume.
    ResumeFails(usize),
    SayRunning(usize),
    /// QEMU does not load its devices.
    LoadFails(usize),
    /// Finds that the source has left, or the connection is broken.
    NoticeEnd(usize),
    Recover,
    /// The machine is moved on to a third host, or powered off.
    Leave,
    /// QEMU has died as the owner's.
    ForgetEnded,
    ResolvedToRunHere,
    ResolvedToGiveUp,
}

impl HandOver {
    pub(crate) fn destination_actions(&self, state: &State, actions: &mut Vec<DestinationAction>) {
        let destination = &state.destination;
        match destination.host {
            HostState::Lost => return,
            HostState::Down => return actions.push(DestinationAction::Recover),
            HostState::Up => {}
        }
        for (at, link) in state.links.iter().enumerate() {
            let next = link.requests.first();
            match link.task {
                Task::Fresh | Task::AwaitingCommit(_) if next.is_some() => {
                    actions.push(DestinationAction::Hear(at));
                }
                Task::Mirroring(_) if next.is_some() => {
                    actions.push(DestinationAction::Hear(at));
                    if next == Some(&Request::Load) {
                        actions.push(DestinationAction::LoadFails(at));
                    }
                }
                Task::Fresh | Task::Mirroring(_) | Task::AwaitingCommit(_) => {}
                // Loading does not look at the connection: `Copy::load` goes on to its end.
                Task::Loaded(_) => actions.push(DestinationAction::NoteReady(at)),
                Task::ReadyOnRecord(_) => actions.push(DestinationAction::SayReady(at)),
                Task::Owner(_) => {
                    actions.push(DestinationAction::Resume(at));
                    actions.push(DestinationAction::ResumeFails(at));
                }
                Task::Resumed(_) => actions.push(DestinationAction::SayRunning(at)),
                Task::Done => {}
            }
            let looks = matches!(link.task, Task::Fresh | Task::Mirroring(_) | Task::AwaitingCommit(_));
            if looks && next.is_none() && (link.broken || !link.source) {
                actions.push(DestinationAction::NoticeEnd(at));
            }
        }
        let quiet = !state.links.iter().any(|link| link.task.session().is_some());
        match (destination.record, destination.qemu) {
            (Some(DestinationRecord::Owner { resuming: false, .. }), Some((_, CopyState::Running))) => {
                actions.push(DestinationAction::Leave);
            }
            (Some(DestinationRecord::Owner { resuming: false, .. }), Some((_, CopyState::Dead))) => {
                actions.push(DestinationAction::ForgetEnded);
            }
            (Some(DestinationRecord::Incoming { ready: true, session, .. }), Some((_, copy))) if quiet => {
                // A person who looks first: the source has handed it over or is no more, and it runs nowhere else.
                let given = matches!(state.source.record, Some(SourceRecord::HandedOver { session: s, .. }) if s == session);
                let no_source = state.source.qemu == SourceQemu::Gone;
                if copy == CopyState::Loaded && (given || no_source) && state.running() == 0 {
                    actions.push(DestinationAction::ResolvedToRunHere);
                }
                if !no_source {
                    actions.push(DestinationAction::ResolvedToGiveUp);
                }
            }
            // Whether it ran before it died is not known here; a person can know from the source.
            (Some(DestinationRecord::Owner { resuming: true, .. }), Some((_, CopyState::Dead))) if quiet => {
                actions.push(DestinationAction::ResolvedToGiveUp);
            }
            _ => {}
        }
    }

    pub(crate) fn destination_acts(&self, state: &mut State, action: DestinationAction) -> Option<()> {
        match action {
            DestinationAction::Hear(at) => self.destination_hears(state, at)?,
            // Source::mirror: on record before it is told.
            DestinationAction::NoteReady(at) => {
                let Task::Loaded(session) = state.links[at].task else { return None };
                match &mut state.destination.record {
                    Some(DestinationRecord::Incoming { session: s, ready, .. }) if *s == session => {
                        *ready = true;
                        state.links[at].task = Task::ReadyOnRecord(session);
                    }
                    _ => end(state, at, Reply::Failed),
                }
            }
            DestinationAction::SayReady(at) => {
                let Task::ReadyOnRecord(session) = state.links[at].task else { return None };
                state.links[at].answer(Reply::Ready);
                state.links[at].task = Task::AwaitingCommit(session);
            }
            // Source::become_owner, after the journal.
            DestinationAction::Resume(at) => {
                let Task::Owner(session) = state.links[at].task else { return None };
                if self.defect == Some(Defect::ResumesBeforeItIsOnRecord) {
                    self.own(state)?;
                    state.links[at].task = Task::Resumed(session);
                    return Some(());
                }
                match state.destination.qemu {
                    Some((s, CopyState::Loaded)) if s == session => state.run_at_destination(session),
                    _ => return self.resume_failed(state, at),
                }
                state.links[at].task = Task::Resumed(session);
            }
            DestinationAction::ResumeFails(at) => {
                let Task::Owner(session) = state.links[at].task else { return None };
                if state.destination.qemu != Some((session, CopyState::Loaded)) {
                    return None;
                }
                self.resume_failed(state, at)?;
            }
            DestinationAction::SayRunning(at) => {
                if let Some(DestinationRecord::Owner { resuming, .. }) = &mut state.destination.record {
                    *resuming = false;
                }
                end(state, at, Reply::Running);
            }
            DestinationAction::LoadFails(at) => {
                let Task::Mirroring(session) = state.links[at].task else { return None };
                forget(state, session);
                end(state, at, Reply::Failed);
            }
            // Source::session: an incomplete copy goes, a ready one waits.
            DestinationAction::NoticeEnd(at) => {
                if let Task::Mirroring(session) = state.links[at].task {
                    self.forget_late(state, session);
                }
                state.links[at].task = Task::Done;
            }
            DestinationAction::Recover => self.destination_recovers(state),
            DestinationAction::Leave => {
                state.past.elsewhere = true;
                self.depart(state);
            }
            DestinationAction::ForgetEnded => self.depart(state),
            // lifecycle::resolve.
            DestinationAction::ResolvedToRunHere => {
                let Some(DestinationRecord::Incoming { session, generation, .. }) = state.destination.record
                else {
                    return None;
                };
                state.past.handed_over |= 1 << session;
                state.destination.record =
                    Some(DestinationRecord::Owner { session, generation: generation + 1, resuming: false });
                state.run_at_destination(session);
            }
            DestinationAction::ResolvedToGiveUp => {
                if let Some(DestinationRecord::Owner { session, .. }) = state.destination.record {
                    // Its memory is lost; whoever gives it up accepts the older state that the source still has.
                    state.past.copies_run &= !(1 << session);
                }
                state.destination.record = None;
                state.destination.qemu = None;
            }
        }
        Some(())
    }

    fn destination_hears(&self, state: &mut State, at: usize) -> Option<()> {
        let request = state.links[at].requests.remove(0);
        match (state.links[at].task, request) {
            // A request of a source that has left meanwhile would make way for nobody.
            (Task::Fresh, Request::Reserve(..)) if !state.links[at].source => {
                state.links[at].task = Task::Done
            }
            (Task::Fresh, Request::Reserve(session, generation)) => {
                self.reserve(state, at, session, generation);
            }
            (Task::Fresh, Request::Commit(session, generation)) => {
                self.settle(state, at, session, generation)
            }
            // Source::abandon.
            (Task::Fresh, Request::Cancel(session)) => match state.destination.record {
                Some(DestinationRecord::Owner { session: s, .. }) if s == session => {
                    end(state, at, Reply::Running);
                }
                _ => {
                    forget(state, session);
                    end(state, at, Reply::Cancelled);
                }
            },
            (Task::Mirroring(session), Request::Load) => {
                if state.destination.qemu == Some((session, CopyState::Incomplete)) {
                    state.destination.qemu = Some((session, CopyState::Loaded));
                    state.links[at].task = Task::Loaded(session);
                } else {
                    self.forget_late(state, session);
                    end(state, at, Reply::Failed);
                }
            }
            (Task::Mirroring(session) | Task::AwaitingCommit(session), Request::Cancel(_)) => {
                forget(state, session);
                end(state, at, Reply::Cancelled);
            }
            // Source::await_commit.
            (Task::AwaitingCommit(session), Request::Commit(s, generation)) if s == session => {
                self.become_owner(state, at, session, generation);
            }
            _ => {}
        }
        Some(())
    }

    /// Request::reserve: makes way for a session of the same source, unless the machine is this host's.
    fn reserve(&self, state: &mut State, at: usize, session: SessionId, generation: Generation) {
        let in_the_way = match state.destination.record {
            None => false,
            Some(DestinationRecord::Incoming { generation: g, .. }) => g > generation,
            Some(DestinationRecord::Owner { .. }) => true,
        };
        if in_the_way {
            return end(state, at, Reply::Failed);
        }
        state.destination.record = Some(DestinationRecord::Incoming { session, generation, ready: false });
        state.destination.qemu = Some((session, CopyState::Incomplete));
        state.links[at].answer(Reply::Reserved);
        state.links[at].task = Task::Mirroring(session);
    }

    /// Source::settle.
    fn settle(&self, state: &mut State, at: usize, session: SessionId, generation: Generation) {
        if state.destination.departed & 1 << session != 0 {
            return end(state, at, Reply::Running);
        }
        // QEMU's monitor takes one client: a task that still has it makes the settlement fail, and be tried again.
        let taken = state.links.iter().any(|link| link.task.session() == Some(session));
        match state.destination.record {
            Some(DestinationRecord::Incoming { session: s, ready: true, .. }) if s == session && taken => {
                end(state, at, Reply::Failed);
            }
            Some(DestinationRecord::Incoming { session: s, ready: true, .. }) if s == session => {
                self.become_owner(state, at, session, generation);
            }
            Some(DestinationRecord::Owner { session: s, resuming: true, .. })
                if s == session && self.defect != Some(Defect::RunningFromRecord) =>
            {
                // A QEMU that is paused has never run; of one that has died it is not known.
                match state.destination.qemu {
                    Some((_, CopyState::Loaded)) if !taken => state.links[at].task = Task::Owner(session),
                    Some((_, CopyState::Running)) if !taken => state.links[at].task = Task::Resumed(session),
                    _ => end(state, at, Reply::Failed),
                }
            }
            Some(DestinationRecord::Owner { session: s, .. }) if s == session => {
                end(state, at, Reply::Running)
            }
            _ => end(state, at, Reply::NoCopy),
        }
    }

    fn become_owner(&self, state: &mut State, at: usize, session: SessionId, generation: Generation) {
        match state.destination.record {
            Some(DestinationRecord::Incoming { session: s, generation: g, ready: true })
                if s == session && g + 1 == generation =>
            {
                if self.defect == Some(Defect::ResumesBeforeItIsOnRecord) {
                    state.destination.qemu = Some((session, CopyState::Running));
                    state.past.copies_run |= 1 << session;
                } else {
                    self.own(state);
                }
                state.links[at].task = Task::Owner(session);
            }
            _ => end(state, at, Reply::NoCopy),
        }
    }

    /// The journal says OWNER.
    fn own(&self, state: &mut State) -> Option<()> {
        let Some(DestinationRecord::Incoming { session, generation, .. }) = state.destination.record else {
            return None;
        };
        state.destination.record =
            Some(DestinationRecord::Owner { session, generation: generation + 1, resuming: true });
        Some(())
    }

    /// The copy has not run and, its QEMU ended, never will: the source may have the machine back.
    fn resume_failed(&self, state: &mut State, at: usize) -> Option<()> {
        if self.defect == Some(Defect::RunningFromRecord) {
            end(state, at, Reply::Failed);
            return Some(());
        }
        state.destination.record = None;
        state.destination.qemu = None;
        end(state, at, Reply::NoCopy);
        Some(())
    }

    /// A session that ends late, when another may have the name.
    fn forget_late(&self, state: &mut State, session: SessionId) {
        if self.defect == Some(Defect::ForgetsByName) {
            state.destination.record = None;
            state.destination.qemu = None;
        } else {
            forget(state, session);
        }
    }

    /// lifecycle::recover.
    fn destination_recovers(&self, state: &mut State) {
        state.destination.host = HostState::Up;
        match state.destination.record {
            Some(DestinationRecord::Incoming { session, ready: false, .. }) => forget(state, session),
            Some(DestinationRecord::Owner { session, generation, resuming: true }) => {
                match state.destination.qemu {
                    Some((_, CopyState::Dead)) => {
                        if self.defect == Some(Defect::DepartsUnrun) {
                            self.depart(state);
                        }
                    }
                    _ => {
                        if state.destination.qemu == Some((session, CopyState::Loaded)) {
                            state.run_at_destination(session);
                        }
                        state.destination.record =
                            Some(DestinationRecord::Owner { session, generation, resuming: false });
                    }
                }
            }
            _ => {}
        }
    }

    /// Journal::remove of a machine that was this host's.
    fn depart(&self, state: &mut State) {
        if let Some(DestinationRecord::Owner { session, .. }) = state.destination.record
            && self.defect != Some(Defect::ForgetsHandOvers)
        {
            state.destination.departed |= 1 << session;
        }
        state.destination.record = None;
        state.destination.qemu = None;
    }
}

impl Task {
    /// The session whose QEMU this task talks to.
    fn session(self) -> Option<SessionId> {
        match self {
            Task::Mirroring(session)
            | Task::Loaded(session)
            | Task::ReadyOnRecord(session)
            | Task::AwaitingCommit(session)
            | Task::Owner(session)
            | Task::Resumed(session) => Some(session),
            Task::Fresh | Task::Done => None,
        }
    }
}

/// Throws the copy of this session away, if it is here and this host does not own it.
fn forget(state: &mut State, session: SessionId) {
    if matches!(state.destination.record, Some(DestinationRecord::Incoming { session: s, .. }) if s == session)
    {
        state.destination.record = None;
        state.destination.qemu = None;
    }
}

fn end(state: &mut State, at: usize, reply: Reply) {
    state.links[at].answer(reply);
    state.links[at].task = Task::Done;
}
