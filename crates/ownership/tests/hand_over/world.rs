//! What the production code does with the effects that `ownership::on` names, and with what it hears: the thin part, mirrored.

use ownership::Ownership;
use ownership::concerned::whose;
use ownership::{self, Answer, Asked, Effect, Event, Mark, Response, Standing};

use super::state::*;
use super::{Defect, HandOver, LINKS};

impl HandOver {
    /// Something happens on a host: the record is written first. `None` where the journal failed.
    pub(crate) fn happen(&self, state: &mut State, host: usize, event: Event) -> Option<Vec<Effect>> {
        let at = &mut state.hosts[host];
        let given_up = event == Event::GiveUp && at.owns();
        let step = ownership::on(at.record.as_ref(), event);
        if step.standing != at.record || at.unsettled {
            write(at, step.standing)?;
        }
        Some(self.distorted(step.effects, given_up))
    }

    /// As the rule that is left out would have it.
    fn distorted(&self, effects: Vec<Effect>, given_up: bool) -> Vec<Effect> {
        let without = |effect| match (self.defect, effect) {
            (Some(Defect::GivesUpWhatHasRun), Effect::Discard(Some(Mark::Ran))) if given_up => {
                Effect::Discard(Some(Mark::NeverRan))
            }
            (
                Some(Defect::NoCopyWithoutEvidence | Defect::ForgetsHandOvers),
                Effect::Respond(Response::Unknown),
            ) => Effect::Respond(Response::NoCopy),
            (Some(Defect::ForgetsHandOvers), Effect::Discard(Some(Mark::Ran))) => Effect::Discard(None),
            (Some(Defect::DepartsUnrun), Effect::Doubt) => Effect::Discard(Some(Mark::Ran)),
            (Some(Defect::RunningFromRecord), Effect::Resume) => Effect::Respond(Response::Running),
            (Some(Defect::ResumesForeign), Effect::Doubt) => Effect::Resume,
            (_, effect) => effect,
        };
        effects.into_iter().map(without).collect()
    }

    /// Begins what was decided. Nobody else decides until it is done.
    pub(crate) fn carry_out(state: &mut State, host: usize, effects: &[Effect], tells: Option<u8>) {
        let mut work = Vec::new();
        let leaves = state.hosts[host].handed_over().is_some();
        for effect in effects {
            match effect {
                Effect::Resume => work.extend([Do::Resume, Do::SayRunning, Do::NoteResumed]),
                Effect::Respond(word) => work.push(Do::Respond(*word)),
                Effect::Discard(mark) => {
                    work.extend(leaves.then_some(Do::Keep));
                    work.extend([Do::End, Do::Mark(*mark), Do::Remove]);
                }
                Effect::Abandon => work.push(Do::Abandon),
                Effect::Commit | Effect::Release | Effect::Ask | Effect::Wait | Effect::Doubt => {}
                Effect::Refuse(_) => work.push(Do::Respond(Response::NotNow)),
            }
        }
        if tells.is_none() {
            work.retain(|step| !matches!(step, Do::Respond(_) | Do::SayRunning));
        }
        if let Some(link) = tells.and_then(|number| state.link(number)) {
            link.task = if work.is_empty() { Task::Done } else { Task::Deciding };
        }
        state.hosts[host].tells = tells.filter(|_| !work.is_empty());
        state.hosts[host].work = work;
    }

    /// The next step of what is being done. `goes_well` is about a QEMU that is told to run.
    pub(crate) fn do_next(&self, state: &mut State, host: usize, goes_well: bool) -> Option<()> {
        let step = *state.hosts[host].work.first()?;
        state.hosts[host].work.remove(0);
        match step {
            Do::Resume => match (state.hosts[host].qemu, goes_well) {
                (Some((_, Guest::Loaded | Guest::Switched | Guest::Running)), true) => state.run(host),
                (Some((_, Guest::Away)), true) => {
                    // Somebody else's migration has taken it elsewhere, where it runs on.
                    state.breaks(Rule::ResumedWhatIsNotItsOwn);
                }
                // QEMU refuses: it is asked, ended, and has certainly not run.
                (Some((_, Guest::Loaded)), false) => self.not_resumed(state, host, true)?,
                // It has died, before or after: nobody knows.
                _ => self.not_resumed(state, host, self.defect == Some(Defect::NoCopyAfterALostResume))?,
            },
            Do::SayRunning => self.tell(state, host, Response::Running),
            Do::NoteResumed => {
                self.happen(state, host, Event::Resumed);
            }
            Do::Respond(word) => self.tell(state, host, word),
            Do::Keep => state.hosts[host].kept = self.defect != Some(Defect::LeavesImagesUnlocked),
            Do::End => {
                let at = &state.hosts[host];
                let leaves = at.handed_over().is_some();
                let has_run = matches!(at.qemu, Some((_, Guest::Running | Guest::Switched | Guest::Away)));
                // lifecycle::forget: whatever its record says.
                if at.incoming().is_some() && has_run && self.defect != Some(Defect::EndsWhatHasRun) {
                    return self.stop_work(state, host);
                }
                if !leaves && has_run {
                    state.breaks(Rule::EndedWhatHasRun);
                }
                (state.hosts[host].qemu, state.hosts[host].restarts) = (None, leaves);
            }
            Do::Mark(None) => {}
            Do::Mark(Some(mark)) => {
                let arrived = state.hosts[host].record.as_ref().filter(|record| !record.released);
                if let Some(session) = arrived.and_then(|record| record.arrived_by) {
                    if state.hosts[host].journal != JournalState::Works {
                        return self.stop_work(state, host);
                    }
                    state.hosts[host].marks[usize::from(number(session))] = Some(mark);
                }
            }
            Do::Remove => {
                if state.hosts[host].journal != JournalState::Works {
                    return self.stop_work(state, host);
                }
                let at = &mut state.hosts[host];
                (at.record, at.disk, at.older, at.unsettled) = (None, None, None, false);
            }
            Do::Abandon => {
                let outgoing = state.hosts[host].record.as_ref().map(|record| record.outgoing.clone());
                state.hosts[host].abandon = outgoing
                    .iter()
                    .flatten()
                    .map(|to| (number(to.session), host_of(to.to.as_deref().unwrap_or_default())))
                    .collect();
            }
            Do::Released(session, to) => {
                if state.hosts[to].up == Power::On && state.links.len() < LINKS {
                    state.connect(host, to, Purpose::Release, Request::Released(session));
                    state.hang_up(host, &[Purpose::Release]);
                }
            }
        }
        self.is_through(state, host);
        Some(())
    }

    /// The journal has failed: the record stays, and nothing more is done or said.
    fn stop_work(&self, state: &mut State, host: usize) -> Option<()> {
        state.hosts[host].work.clear();
        self.tell(state, host, Response::NotNow);
        self.is_through(state, host);
        Some(())
    }

    fn is_through(&self, state: &mut State, host: usize) {
        if state.hosts[host].work.is_empty()
            && let Some(number) = state.hosts[host].tells.take()
            && let Some(link) = state.link(number)
        {
            link.task = Task::Done;
        }
    }

    fn tell(&self, state: &mut State, host: usize, word: Response) {
        let keeper = state.hosts[host].keeper;
        if let Some(link) = state.hosts[host].tells.and_then(|number| state.link(number)) {
            link.answer(Reply::Said(word, keeper));
        }
    }

    /// Source::not_resumed.
    fn not_resumed(&self, state: &mut State, host: usize, never_ran: bool) -> Option<()> {
        let tells = state.hosts[host].tells;
        if never_ran {
            // Ended before anything is said of it.
            state.hosts[host].qemu = state.hosts[host].qemu.map(|(session, _)| (session, Guest::Dead));
        }
        state.hosts[host].work.clear();
        match self.happen(state, host, Event::NotResumed { never_ran }) {
            Some(effects) => HandOver::carry_out(state, host, &effects, tells),
            None => self.stop_work(state, host)?,
        }
        Some(())
    }

    /// A destination reads the next request of a connection.
    pub(crate) fn read(&self, state: &mut State, at: usize) -> Option<()> {
        let link = &mut state.links[at];
        let (host, from, number, open) = (link.to, link.from, link.number, link.open);
        let request = link.requests.remove(0);
        let task = link.task;
        let peer = name(from);
        match (task, request) {
            // A request of a source that has left meanwhile would make way for nobody.
            (Task::Fresh, Request::Reserve(..)) if !open => state.links[at].task = Task::Done,
            (Task::Fresh, Request::Reserve(session, generation, abandoned)) => {
                self.reserve(state, at, session, generation, abandoned)?;
            }
            (Task::AwaitingCommit(session), Request::Commit(s, generation)) if s == session => {
                self.commit(state, host, &peer, (session, generation), number)?;
            }
            (Task::Fresh, Request::Commit(session, generation)) => {
                self.commit(state, host, &peer, (session, generation), number)?;
            }
            (Task::Fresh, Request::Cancel(_)) if !state.hosts[host].work.is_empty() => {
                let keeper = state.hosts[host].keeper;
                state.links[at].answer(Reply::Said(Response::Cancelled, keeper));
                state.links[at].task = Task::Done;
            }
            (Task::Fresh | Task::AwaitingCommit(_), Request::Cancel(session)) => {
                let mark = state.hosts[host].marks[usize::from(session)];
                let event = Event::Cancelled { session: uuid(session), from: peer, mark };
                let effects = self.happen(state, host, event)?;
                HandOver::carry_out(state, host, &effects, Some(number));
            }
            (Task::Mirroring(session), Request::Cancel(_)) => {
                self.session_over(state, host, session);
                state.links[at].answer(Reply::Said(Response::Cancelled, state.hosts[host].keeper));
                state.links[at].task = Task::Done;
            }
            (Task::Mirroring(session), Request::Load) => {
                if state.hosts[host].qemu == Some((session, Guest::Incomplete)) {
                    state.hosts[host].qemu = Some((session, Guest::Loaded));
                    state.links[at].task = Task::Loaded(session);
                } else {
                    self.session_over(state, host, session);
                    self.fails(state, at);
                }
            }
            (Task::Fresh, Request::Whose(session)) => {
                let says = whose(state.hosts[host].record.as_ref(), uuid(session), &name(from));
                state.links[at].answer(Reply::Belongs(says));
                state.links[at].task = Task::Done;
            }
            (Task::Fresh, Request::Released(session)) => {
                state.hosts[host].marks[usize::from(session)] = None;
                self.happen(state, host, Event::Released { session: uuid(session) });
                state.links[at].task = Task::Done;
            }
            _ => {}
        }
        Some(())
    }

    fn fails(&self, state: &mut State, at: usize) {
        let keeper = state.hosts[state.links[at].to].keeper;
        state.links[at].answer(Reply::Said(Response::NotNow, keeper));
        state.links[at].task = Task::Done;
    }

    fn reserve(
        &self,
        state: &mut State,
        at: usize,
        session: SessionId,
        generation: u64,
        abandoned: u8,
    ) -> Option<()> {
        let (host, from) = (state.links[at].to, state.links[at].from);
        let named = (1..SESSIONS).filter(|s| abandoned & 1 << s != 0).filter_map(|s| u8::try_from(s).ok());
        let named = Some(named.map(uuid).collect()).filter(|_| self.defect != Some(Defect::GivesWayToAny));
        let event =
            Event::Reserved { session: uuid(session), from: name(from), generation, abandoned: named };
        match &ownership::on(state.hosts[host].record.as_ref(), event.clone()).effects[..] {
            [] if state.hosts[host].record.is_none() && !state.hosts[host].unreadable => {
                if self.happen(state, host, event).is_none() {
                    self.fails(state, at);
                    return Some(());
                }
                state.hosts[host].qemu = Some((session, Guest::Incomplete));
                let keeper = state.hosts[host].keeper;
                state.links[at].answer(Reply::Reserved(keeper));
                state.links[at].task = Task::Mirroring(session);
            }
            // It makes way first, and the request is read again.
            [Effect::Discard(mark)] => {
                let discard = [Effect::Discard(*mark)];
                gives_way(state, host, from);
                HandOver::carry_out(state, host, &discard, None);
                state.links[at].requests.insert(0, Request::Reserve(session, generation, abandoned));
            }
            _ => self.fails(state, at),
        }
        Some(())
    }

    fn commit(
        &self,
        state: &mut State,
        host: usize,
        peer: &str,
        (session, generation): (SessionId, u64),
        number: u8,
    ) -> Option<()> {
        let mark = state.hosts[host].marks[usize::from(session)];
        let event = Event::Committed { session: uuid(session), from: peer.to_owned(), generation, mark };
        // A ready copy whose QEMU is gone has never run: Source::settle finds that first.
        let would = ownership::on(state.hosts[host].record.as_ref(), event.clone()).effects;
        let dead = !matches!(
            state.hosts[host].qemu,
            Some((_, Guest::Loaded | Guest::Running | Guest::Switched | Guest::Away))
        );
        if would == [Effect::Resume] && dead {
            let effects = self.happen(state, host, Event::Ended)?;
            let told = match effects[..] {
                [Effect::Discard(Some(Mark::NeverRan))] => Response::NoCopy,
                _ => Response::NotNow,
            };
            let effects = [effects, vec![Effect::Respond(told)]].concat();
            HandOver::carry_out(state, host, &effects, Some(number));
            return Some(());
        }
        if self.defect == Some(Defect::ResumesBeforeItIsOnRecord) && would == [Effect::Resume] {
            let (came, _) = state.hosts[host].qemu?;
            state.hosts[host].qemu = Some((came, Guest::Running));
            state.past.copies_run |= 1 << came;
        }
        match self.happen(state, host, event) {
            Some(effects) => HandOver::carry_out(state, host, &effects, Some(number)),
            None => {
                let keeper = state.hosts[host].keeper;
                let link = state.link(number)?;
                link.answer(Reply::Said(Response::NotNow, keeper));
                link.task = Task::Done;
            }
        }
        Some(())
    }

    /// lifecycle::session_over.
    pub(crate) fn session_over(&self, state: &mut State, host: usize, session: SessionId) {
        let by_name = self.defect == Some(Defect::ForgetsByName);
        let its = state.hosts[host].record.as_ref().is_some_and(|now| now.arrived_by == Some(uuid(session)));
        if by_name && state.hosts[host].record.is_some() {
            return HandOver::carry_out(state, host, &[Effect::Discard(None)], None);
        }
        if its && let Some(effects) = self.happen(state, host, Event::SessionOver { session: uuid(session) })
        {
            HandOver::carry_out(state, host, &effects, None);
        }
    }

    /// The source has heard an answer to a Commit.
    pub(crate) fn answered(
        &self,
        state: &mut State,
        host: usize,
        session: SessionId,
        word: Response,
        keeper: u8,
    ) {
        let answer = match word {
            Response::Running => Answer::Running,
            Response::NoCopy => Answer::NoCopy { keeper: Some(uuid(keeper)) },
            Response::Unknown => Answer::Unknown,
            _ => Answer::Other,
        };
        let Some(effects) = self.happen(state, host, Event::Answered { session: uuid(session), answer })
        else {
            return state.hosts[host].step = Step::InDoubt(session);
        };
        state.hosts[host].step = match effects[..] {
            [Effect::Release] => Step::Given(session),
            [Effect::Resume, ..] => Step::Keeping(session),
            _ => Step::InDoubt(session),
        };
    }

    /// An agent starts: `migration::recover` of the only record.
    pub(crate) fn recover(&self, state: &mut State, host: usize) {
        let at = &mut state.hosts[host];
        at.up = Power::On;
        (at.record, at.unsettled) = (at.disk.clone(), false);
        if at.unreadable {
            if self.defect == Some(Defect::OlderSlotYields) {
                at.disk.clone_from(&at.older);
                at.record.clone_from(&at.older);
                at.unreadable = false;
            } else {
                at.record = None;
                return;
            }
        }
        let found = match at.qemu {
            None | Some((_, Guest::Dead)) => ownership::Qemu::Gone,
            Some((_, Guest::Running | Guest::Switched | Guest::Away))
                if at.incoming().is_some_and(|(_, ready)| !ready) =>
            {
                ownership::Qemu::Ran
            }
            Some((_, Guest::Switched | Guest::Away)) => ownership::Qemu::Switched,
            Some(_) => ownership::Qemu::There,
        };
        if at.record.is_none() {
            return;
        }
        let Some(effects) = self.happen(state, host, Event::Found(found)) else { return };
        if let Some((session, _)) = state.hosts[host].handed_over() {
            state.hosts[host].step = Step::InDoubt(session);
        }
        HandOver::carry_out(state, host, &effects, None);
    }

    /// A person's decision, when everybody who can be asked has been.
    pub(crate) fn run_here(&self, state: &mut State, host: usize, asked: Asked, force: bool) {
        let of = state.hosts[host].handed_over().map(|(session, _)| session);
        let incoming = state.hosts[host].incoming().map(|(session, _)| session);
        if incoming.is_some() && matches!(state.hosts[host].qemu, None | Some((_, Guest::Dead))) {
            if let Some(effects) = self.happen(state, host, Event::Ended) {
                HandOver::carry_out(state, host, &effects, None);
            }
            return;
        }
        let decided = self.happen(state, host, Event::RunHere { asked, force });
        // A person's word counts from when the next agent may find it.
        let is_owner = |disk: &Standing| disk.ownership == Ownership::Owner;
        if let Some(session) = incoming
            && state.hosts[host].disk.as_ref().is_some_and(is_owner)
        {
            state.past.handed_over |= 1 << session;
        }
        let Some(effects) = decided else { return };
        if !effects.contains(&Effect::Resume) {
            state.hosts[host].step = of.map_or(Step::Idle, Step::InDoubt);
            return;
        }
        state.hosts[host].step = Step::Idle;
        HandOver::carry_out(state, host, &effects, None);
    }
}

/// What was handed over by a copy that waits is nowhere else, unless its source has taken it back since.
fn gives_way(state: &mut State, host: usize, source: usize) {
    let Some((session, true)) = state.hosts[host].incoming() else { return };
    let outgoing = state.hosts[source].disk.iter().flat_map(|disk| &disk.outgoing);
    let taken_back = outgoing.into_iter().any(|outgoing| outgoing.session == uuid(session));
    let waits = state.hosts[host].qemu == Some((session, Guest::Loaded));
    if waits && !taken_back && state.past.handed_over & 1 << session != 0 {
        state.breaks(Rule::GaveWayToAnOlderState);
    }
}

/// Journal::change.
pub(crate) fn write(host: &mut Host, standing: Option<Standing>) -> Option<()> {
    if let JournalState::Fails { lands } = host.journal {
        if lands {
            host.disk = standing;
        }
        host.unsettled = true;
        return None;
    }
    if !host.unsettled {
        host.older = host.disk.take();
    }
    host.disk.clone_from(&standing);
    host.record = standing;
    host.unsettled = false;
    Some(())
}
