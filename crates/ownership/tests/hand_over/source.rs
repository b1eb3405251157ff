//! The source's controller, its settlement, and what people have it ask: the order of steps, mirrored.

use ownership::{Asked, Effect, Event, Response, SourceSays, Withdrawal};

use super::state::*;
use super::world::write;
use super::{Defect, HandOver, LINKS};

/// What a source may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum SourceAction {
    Begin(usize),
    Offer,
    Pause,
    /// Reads the next reply of this connection.
    Hear(u8),
    HandOver,
    /// Tries once more to write what could not be written.
    Settle,
    Commit,
    /// A deadline has passed, a connection is found broken, or the operator cancels.
    GiveUpWaiting,
    Ask,
    /// It is this host's again: has it run.
    Keep,
    /// Sends the memory that the destination lacks.
    Supply,
    Release,
    AskToAbandon(SessionId),
    /// The journal can be written again.
    JournalMends,
}

impl HandOver {
    pub(crate) fn source_actions(&self, state: &State, host: usize, actions: &mut Vec<SourceAction>) {
        let at = &state.hosts[host];
        let free = at.work.is_empty();
        let up = |other: usize| state.hosts[other].up == Power::On && state.links.len() < LINKS;
        if at.journal != JournalState::Works {
            actions.push(SourceAction::JournalMends);
        }
        match at.step {
            Step::Idle if at.owns() && at.runs() && free && state.sessions < self.sessions => {
                let others = (0..state.hosts.len()).filter(|&other| other != host && up(other));
                actions.extend(others.map(SourceAction::Begin));
            }
            Step::Mirroring(_) => actions.extend([SourceAction::Offer, SourceAction::GiveUpWaiting]),
            Step::Offered(_) => actions.extend([SourceAction::Pause, SourceAction::GiveUpWaiting]),
            Step::Ready(_) => actions.extend([SourceAction::HandOver, SourceAction::GiveUpWaiting]),
            Step::AwaitingReserved(_)
            | Step::AwaitingReady(_)
            | Step::AwaitingRunning(_)
            | Step::Asked(_)
            | Step::Undoing(_) => actions.push(SourceAction::GiveUpWaiting),
            Step::Withdrawing(_) | Step::AskingSource(_) if free => actions.push(SourceAction::GiveUpWaiting),
            Step::Unsettled(_) => actions.push(SourceAction::Settle),
            Step::HandedOver(_) => actions.push(SourceAction::Commit),
            Step::InDoubt(_) if free => {
                if at.handed_over().is_some_and(|(_, to)| up(to)) {
                    actions.push(SourceAction::Ask);
                }
            }
            Step::Keeping(_) if free => actions.push(SourceAction::Keep),
            Step::Given(_) if free => {
                let supplies = at.record.as_ref().is_some_and(|record| record.supplies);
                if supplies && self.defect != Some(Defect::DoesNotSupply) {
                    actions.push(SourceAction::Supply);
                } else {
                    actions.push(SourceAction::Release);
                }
            }
            Step::Idle
            | Step::InDoubt(_)
            | Step::Keeping(_)
            | Step::Given(_)
            | Step::Withdrawing(_)
            | Step::AskingSource(_) => {}
        }
        for &(session, to) in &at.abandon {
            let about =
                |link: &Link| link.from == host && link.open && link.purpose == Purpose::Abandon(session);
            if up(to) && !state.links.iter().any(about) {
                actions.push(SourceAction::AskToAbandon(session));
            }
        }
        // What a person wants is done by who has the decision.
        let waits = |link: &Link| matches!(link.purpose, Purpose::Withdraw | Purpose::Whose) && !free;
        let heard = |link: &Link| {
            let heard = link.from == host && link.open && !link.replies.is_empty() && !waits(link);
            heard.then_some(SourceAction::Hear(link.number))
        };
        actions.extend(state.links.iter().filter_map(heard));
    }

    pub(crate) fn source_acts(&self, state: &mut State, host: usize, action: SourceAction) -> Option<()> {
        let step = state.hosts[host].step;
        match (action, step) {
            (SourceAction::Begin(to), Step::Idle) => {
                // Controller::is_noted.
                if self.happen(state, host, Event::Resumed).is_none() {
                    return Some(());
                }
                let record = state.hosts[host].record.as_ref()?;
                let generation = record.generation;
                let abandoned = record.outgoing.iter().fold(0, |bits, to| bits | 1 << number(to.session));
                state.sessions += 1;
                let session = state.sessions;
                state.past.sources[usize::from(session)] = Some(host);
                state.past.generations[usize::from(session)] = generation;
                let reserve = Request::Reserve(session, generation, abandoned);
                state.connect(host, to, Purpose::Migrate, reserve);
                state.hosts[host].step = Step::AwaitingReserved(session);
            }
            // Controller::offer: durable before a complete copy can exist, and when QEMU is set up for no migration but ours.
            (SourceAction::Offer, Step::Mirroring(session)) => {
                if !state.hosts[host].runs() {
                    return self.undo(state, host, session);
                }
                let Some(to) = self.destination(state, host) else {
                    return self.undo(state, host, session);
                };
                let event = Event::Offered { session: uuid(session), to: name(to), address: name(to) };
                match self.happen(state, host, event) {
                    Some(_) => state.hosts[host].step = Step::Offered(session),
                    None => self.undo(state, host, session)?,
                }
            }
            (SourceAction::Pause, Step::Offered(session)) => {
                if !state.hosts[host].runs() {
                    return self.undo(state, host, session);
                }
                let (came, _) = state.hosts[host].qemu?;
                state.hosts[host].qemu = Some((came, Guest::Switched));
                if let Some(link) = migrates(state, host) {
                    link.ask(Request::Load);
                }
                state.hosts[host].step = Step::AwaitingReady(session);
            }
            (SourceAction::Hear(number), _) => self.source_hears(state, host, number)?,
            // Controller::hand_over: on record first, then told.
            (SourceAction::HandOver, Step::Ready(session)) => self.hand_over(state, host, session)?,
            (SourceAction::Settle, Step::Unsettled(session)) => {
                let record = state.hosts[host].record.clone();
                write(&mut state.hosts[host], record)?;
                self.undo(state, host, session)?;
            }
            (SourceAction::Commit, Step::HandedOver(session)) => {
                if self.defect == Some(Defect::CommitBeforeItIsOnRecord) {
                    self.give(state, host, session)?;
                } else {
                    self.commit_now(state, host, session);
                }
                state.hosts[host].step = Step::AwaitingRunning(session);
            }
            (SourceAction::GiveUpWaiting, _) => self.gives_up_waiting(state, host)?,
            (SourceAction::Ask, Step::InDoubt(session)) => {
                let (_, to) = state.hosts[host].handed_over()?;
                let generation = state.hosts[host].record.as_ref()?.generation;
                state.connect(host, to, Purpose::Settle, Request::Commit(session, generation));
                state.hosts[host].step = Step::Asked(session);
            }
            (SourceAction::Keep, Step::Keeping(_)) => {
                HandOver::carry_out(state, host, &[Effect::Resume, Effect::Abandon], None);
                state.hosts[host].step = Step::Idle;
            }
            (SourceAction::Supply, Step::Given(_)) => {
                self.happen(state, host, Event::Supplied)?;
            }
            (SourceAction::Release, Step::Given(session)) => self.release(state, host, session)?,
            (SourceAction::AskToAbandon(session), _) => {
                let (_, to) = *state.hosts[host].abandon.iter().find(|(of, _)| *of == session)?;
                state.connect(host, to, Purpose::Abandon(session), Request::Cancel(session));
            }
            (SourceAction::JournalMends, _) => state.hosts[host].journal = JournalState::Works,
            _ => return None,
        }
        Some(())
    }

    fn destination(&self, state: &State, host: usize) -> Option<usize> {
        let its = |link: &&Link| link.from == host && link.open && link.purpose == Purpose::Migrate;
        state.links.iter().find(its).map(|link| link.to)
    }

    fn hand_over(&self, state: &mut State, host: usize, session: SessionId) -> Option<()> {
        if self.defect == Some(Defect::CommitBeforeItIsOnRecord) {
            self.commit_now(state, host, session);
            state.hosts[host].step = Step::HandedOver(session);
            return Some(());
        }
        match self.give(state, host, session) {
            Some(()) => state.hosts[host].step = Step::HandedOver(session),
            None if self.defect == Some(Defect::ActsOnAFailedWrite) => self.undo(state, host, session)?,
            None => state.hosts[host].step = Step::Unsettled(session),
        }
        Some(())
    }

    /// The journal says HANDED OVER.
    fn give(&self, state: &mut State, host: usize, session: SessionId) -> Option<()> {
        let to = self.destination(state, host);
        let to = to.or_else(|| {
            let outgoing = &state.hosts[host].record.as_ref()?.outgoing;
            let outgoing = outgoing.iter().find(|outgoing| outgoing.session == uuid(session))?;
            Some(host_of(outgoing.to.as_deref()?))
        })?;
        let keeper = Some(uuid(state.past.keepers[usize::from(session)]));
        let event = Event::HandedOver {
            session: uuid(session),
            to: name(to),
            address: name(to),
            keeper,
            supplies: self.post_copy,
        };
        let written = self.happen(state, host, event);
        if state.hosts[host].disk.as_ref().is_some_and(|disk| {
            matches!(&disk.ownership, ownership::Ownership::HandedOver { session: s, .. } if *s == uuid(session))
        }) {
            state.past.handed_over |= 1 << session;
        }
        written.map(drop)
    }

    fn commit_now(&self, state: &mut State, host: usize, session: SessionId) {
        let Some(record) = state.hosts[host].record.clone() else { return };
        let handed_over = state.hosts[host].handed_over().is_some();
        let generation = record.generation + u64::from(!handed_over);
        if let Some(link) = migrates(state, host) {
            link.ask(Request::Commit(session, generation));
        }
    }

    /// The destination runs it: QEMU goes first, the record last, and then the destination need not remember.
    fn release(&self, state: &mut State, host: usize, session: SessionId) -> Option<()> {
        let (_, to) = state.hosts[host].handed_over()?;
        let lacks = state.hosts[host].record.as_ref().is_some_and(|record| record.supplies);
        if state.past.copies_run & 1 << session == 0 || lacks {
            state.breaks(Rule::ThrownAwayBeforeTheCopyRan);
        }
        let mark = state.hosts[host].record.as_ref()?.mark();
        HandOver::carry_out(state, host, &[Effect::Discard(mark)], None);
        state.hosts[host].work.push(Do::Released(session, to));
        state.hosts[host].step = Step::Idle;
        Some(())
    }

    fn source_hears(&self, state: &mut State, host: usize, number: u8) -> Option<()> {
        let link = state.link(number)?;
        let (purpose, reply) = (link.purpose, link.replies.remove(0));
        match (purpose, reply) {
            (Purpose::Abandon(session), Reply::Said(word, _)) => {
                state.link(number)?.open = false;
                if matches!(withdrawal(word), Withdrawal::Done | Withdrawal::Unknown) {
                    state.hosts[host].abandon.retain(|(of, _)| *of != session);
                    self.happen(state, host, Event::Withdrawn { session: uuid(session) });
                }
                return Some(());
            }
            (Purpose::Withdraw, Reply::Said(word, _)) => {
                state.link(number)?.open = false;
                if !matches!(state.hosts[host].step, Step::Withdrawing(_)) {
                    return Some(());
                }
                self.run_here(state, host, Asked::Destination(withdrawal(word)), false);
                return Some(());
            }
            (Purpose::Whose, Reply::Belongs(says)) => {
                state.link(number)?.open = false;
                if let Step::AskingSource(session) = state.hosts[host].step {
                    state.hosts[host].step = Step::Idle;
                    // What was asked about may have made way for another since.
                    if state.hosts[host].incoming() == Some((session, true)) {
                        self.run_here(state, host, Asked::Source(says), false);
                    }
                }
                return Some(());
            }
            _ => {}
        }
        match (state.hosts[host].step, reply) {
            (Step::AwaitingReserved(session), Reply::Reserved(keeper)) => {
                state.past.keepers[usize::from(session)] = keeper;
                state.hosts[host].step = Step::Mirroring(session);
                self.replaced(state, host);
            }
            (Step::AwaitingReady(session), Reply::Said(Response::Ready, _)) => {
                state.hosts[host].step = Step::Ready(session);
            }
            (
                Step::AwaitingReserved(session)
                | Step::Mirroring(session)
                | Step::Offered(session)
                | Step::AwaitingReady(session)
                | Step::Ready(session),
                _,
            ) => self.undo(state, host, session)?,
            (Step::AwaitingRunning(session), Reply::Said(Response::Running, _)) => {
                state.hang_up(host, &[Purpose::Migrate]);
                self.answered(state, host, session, Response::Running, 0);
            }
            // Only an answer to a question asked anew counts as "no copy".
            (Step::AwaitingRunning(session), _) => {
                state.hang_up(host, &[Purpose::Migrate]);
                state.hosts[host].step = Step::InDoubt(session);
            }
            (Step::Asked(session), Reply::Said(word, keeper)) => {
                state.hang_up(host, &[Purpose::Settle]);
                self.answered(state, host, session, word, keeper);
            }
            (Step::Undoing(session), Reply::Said(word, _)) => {
                let told = matches!(withdrawal(word), Withdrawal::Done | Withdrawal::Unknown);
                self.end_undo(state, host, session, told);
            }
            _ => {}
        }
        Some(())
    }

    fn gives_up_waiting(&self, state: &mut State, host: usize) -> Option<()> {
        match state.hosts[host].step {
            Step::Undoing(session) => self.end_undo(state, host, session, false),
            Step::AwaitingRunning(session) if self.defect == Some(Defect::ResumesAfterDeadline) => {
                state.hang_up(host, &[Purpose::Migrate]);
                let keeper = state.past.keepers[usize::from(session)];
                self.answered(state, host, session, Response::NoCopy, keeper);
            }
            Step::AwaitingRunning(session) | Step::Asked(session) => {
                state.hang_up(host, &[Purpose::Migrate, Purpose::Settle]);
                state.hosts[host].step = Step::InDoubt(session);
            }
            Step::Withdrawing(_) => {
                state.hang_up(host, &[Purpose::Withdraw]);
                let force = self.defect == Some(Defect::PersonAsksNobody);
                self.run_here(state, host, Asked::Destination(Withdrawal::Unheard), force);
            }
            Step::AskingSource(session) => {
                state.hang_up(host, &[Purpose::Whose]);
                state.hosts[host].step = Step::Idle;
                if state.hosts[host].incoming().is_none_or(|(now, _)| now != session) {
                    return Some(());
                }
                let force = self.defect == Some(Defect::PersonAsksNobody);
                self.run_here(state, host, Asked::Source(SourceSays::Unheard), force);
            }
            Step::AwaitingReserved(session)
            | Step::Mirroring(session)
            | Step::Offered(session)
            | Step::AwaitingReady(session)
            | Step::Ready(session) => self.undo(state, host, session)?,
            _ => return None,
        }
        Some(())
    }

    /// Controller::undo: the machine first, then the destination.
    fn undo(&self, state: &mut State, host: usize, session: SessionId) -> Option<()> {
        if let Some((_, Guest::Switched)) = state.hosts[host].qemu {
            state.run(host);
        }
        if let Some(link) = migrates(state, host) {
            link.ask(Request::Cancel(session));
        }
        state.hosts[host].step = Step::Undoing(session);
        Some(())
    }

    fn end_undo(&self, state: &mut State, host: usize, session: SessionId, told: bool) {
        state.hang_up(host, &[Purpose::Migrate]);
        state.hosts[host].step = Step::Idle;
        // It has run again for a while by now; where that cannot be put on record a later start looks once more.
        let _ = self.happen(state, host, Event::Resumed);
        let record = state.hosts[host].record.as_ref();
        let outgoing =
            record.and_then(|now| now.outgoing.iter().find(|to| to.session == uuid(session)).cloned());
        let Some(outgoing) = outgoing else { return };
        if !told || self.happen(state, host, Event::Withdrawn { session: uuid(session) }).is_none() {
            state.hosts[host].abandon.push((session, host_of(&outgoing.to.unwrap_or_default())));
        }
    }

    /// source::earlier::replaced.
    fn replaced(&self, state: &mut State, host: usize) {
        let Some(to) = self.destination(state, host) else { return };
        let record = state.hosts[host].record.clone();
        for outgoing in record.iter().flat_map(|record| &record.outgoing) {
            if outgoing.to.as_deref() == Some(&name(to)) {
                self.happen(state, host, Event::Withdrawn { session: outgoing.session });
            }
        }
    }
}

/// The source's end of the connection of its session.
fn migrates(state: &mut State, host: usize) -> Option<&mut Link> {
    state.links.iter_mut().find(|link| link.from == host && link.open && link.purpose == Purpose::Migrate)
}
