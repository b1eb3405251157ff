//! The model of the hand-over: what hosts, people and the world may do.

pub(crate) mod source;
pub(crate) mod state;
pub(crate) mod world;

use ownership::{Asked, Effect, Event, Ownership, SourceSays, Standing, Withdrawal};
use stateright::{Model, Property};

use source::SourceAction;
use state::*;

/// The system to be checked.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HandOver {
    /// How many hosts there are: two, or a third that it may move on to.
    pub(crate) hosts: usize,
    /// How many migrations may be begun.
    pub(crate) sessions: SessionId,
    /// How many faults may strike.
    pub(crate) faults: u8,
    /// It is handed over before its memory is complete.
    pub(crate) post_copy: bool,
    /// It has come from another host, which has not heard yet that it runs.
    pub(crate) arrived: bool,
    /// Which rule is left out, to see that the checker misses it.
    pub(crate) defect: Option<Defect>,
}

/// A rule left out. Most are mistakes that the code has had.
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
    /// The destination forgets that it has owned a machine when that has left, and takes that for never having had it.
    ForgetsHandOvers,
    /// The destination counts a machine as gone that it owned and may never have run.
    DepartsUnrun,
    /// A person who could not have the destination asked takes that for leave.
    PersonAsksNobody,
    /// A destination that knows nothing of a copy says that there is none: its state directory may be lost.
    NoCopyWithoutEvidence,
    /// A QEMU that died while it was told to run counts as one that never ran.
    NoCopyAfterALostResume,
    /// The copy is confirmed to be gone though it has become the owner since it was looked at.
    ConfirmsWhatItSawBefore,
    /// The source runs on after HANDED OVER could not be written, though that may be on the disk.
    ActsOnAFailedWrite,
    /// A record that cannot be read yields to the one before it.
    OlderSlotYields,
    /// A machine that somebody else has migrated away is resumed.
    ResumesForeign,
    /// The source gives its memory back before the destination has all of it.
    DoesNotSupply,
    /// The images that a machine leaves are not kept locked.
    LeavesImagesUnlocked,
    /// A complete copy gives way to whatever its source sends next.
    GivesWayToAny,
    /// A machine that had run here before it was handed over and taken back is given up as one that never did.
    GivesUpWhatHasRun,
    /// That a pause is ours is on record before QEMU is set up for ours.
    OffersBeforeItIsSetUp,
    /// A copy that has run, as its QEMU says, is ended because its record says that it never came.
    EndsWhatHasRun,
}

/// One step of anybody.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    /// A source's controller.
    Source(usize, SourceAction),
    /// The next step of what a host has decided; for a QEMU that is told to run, whether it does.
    Do(usize, bool),
    /// The destination of a connection reads what comes next.
    Read(u8),
    /// Puts on record that the copy is complete, and says so.
    NoteReady(u8),
    /// QEMU does not load its devices.
    LoadFails(u8),
    /// Finds that the source has left, or the connection is broken.
    NoticeEnd(u8),
    /// The agent starts.
    Recover(usize),
    /// The agent finds that QEMU has died.
    FindEnded(usize),
    /// Whoever supervises QEMU starts it once more, from the disks that are here.
    Supervisor(usize),
    Person(usize, Person),
    Fault(Fault),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Person {
    /// Says `resolve --run-here`.
    RunHere,
    /// Says `resolve --run-here --force`, having made sure.
    RunHereForce,
    GiveUp,
    /// Starts the machine from its disks, where it was lost.
    StartAnew,
}

/// What may happen at any time and helps nobody.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Fault {
    /// Whatever is under way on this connection is lost.
    Break(u8),
    AgentDies(usize),
    PowerFails(usize),
    LostForGood(usize),
    QemuDies(usize),
    /// Writes of the journal fail, and are on the disk all the same, or are not. It works again after a while.
    JournalFails(usize, bool),
    /// While the agent is down its state directory is lost.
    StateIsLost(usize),
    /// While the agent is down its state directory is set back: to when the copy was not complete, or to before the machine first left.
    StateIsSetBack(usize),
    /// While the agent is down the newest record becomes unreadable.
    RecordIsUnreadable(usize),
    /// The host is restored from a backup of before all this, its state directory with it.
    Restored(usize),
    /// Somebody migrates the machine by other means.
    ForeignMigration(usize),
}

impl Action {
    /// Whether it belongs to the way out of trouble and not to the trouble.
    pub(crate) fn helps(self) -> bool {
        !matches!(
            self,
            Action::Fault(_) | Action::LoadFails(_) | Action::Do(_, false) | Action::Supervisor(_)
        )
    }

    /// Whether a person does it.
    pub(crate) fn by_a_person(self) -> bool {
        matches!(self, Action::Person(..))
    }
}

impl HandOver {
    pub(crate) fn first(&self) -> State {
        if self.arrived { State::arrived(self.hosts) } else { State::first(self.hosts) }
    }

    fn host_actions(&self, state: &State, host: usize, actions: &mut Vec<Action>) {
        let at = &state.hosts[host];
        if at.restarts && at.qemu.is_none() && at.up != Power::Lost {
            actions.push(Action::Supervisor(host));
        }
        match at.up {
            Power::Lost => return,
            Power::AgentDown => return actions.push(Action::Recover(host)),
            Power::On => {}
        }
        if let Some(next) = at.work.first() {
            actions.push(Action::Do(host, true));
            if *next == Do::Resume && matches!(at.qemu, Some((_, Guest::Loaded))) {
                actions.push(Action::Do(host, false));
            }
        }
        let mut source = Vec::new();
        self.source_actions(state, host, &mut source);
        actions.extend(source.into_iter().map(|action| Action::Source(host, action)));
        if !at.work.is_empty() {
            return;
        }
        let attended = state.links.iter().any(|link| link.to == host && link.task.session().is_some());
        let busy = attended || !matches!(at.step, Step::Idle | Step::InDoubt(_));
        let dead = matches!(at.qemu, None | Some((_, Guest::Dead)));
        if dead && !busy && at.handed_over().is_none() && at.record.is_some() {
            let step = ownership::on(at.record.as_ref(), Event::Ended);
            if !matches!(step.effects[..], [Effect::Doubt]) || self.defect == Some(Defect::DepartsUnrun) {
                actions.push(Action::FindEnded(host));
            }
        }
        if !busy {
            self.people(state, host, actions);
        }
    }

    /// What people do as docs/operations.md has it. Without `--force` they may say what they like: only what has been asked decides.
    fn people(&self, state: &State, host: usize, actions: &mut Vec<Action>) {
        let at = &state.hosts[host];
        let say = |person| Action::Person(host, person);
        if let Some((session, to)) = at.handed_over() {
            actions.push(say(Person::RunHere));
            let there = &state.hosts[to];
            // The copy has not run, and never will: its host is lost for good.
            if there.up == Power::Lost && state.past.copies_run & 1 << session == 0 && state.running() == 0 {
                actions.push(say(Person::RunHereForce));
            }
            // It was seen to run there.
            if there.qemu == Some((session, Guest::Running)) {
                actions.push(say(Person::GiveUp));
            }
        }
        if let Some((session, true)) = at.incoming() {
            let source = state.past.sources[usize::from(session)].map(|source| &state.hosts[source]);
            actions.push(say(Person::RunHere));
            let gone = source.is_none_or(|source| source.up == Power::Lost);
            if gone && state.running() == 0 && matches!(at.qemu, Some((_, Guest::Loaded))) {
                actions.push(say(Person::RunHereForce));
            }
            if source.is_some_and(|source| matches!(source.qemu, Some((_, Guest::Switched | Guest::Running))))
            {
                actions.push(say(Person::GiveUp));
            }
        }
        let nothing = at.record.is_none() && at.qemu.is_none() && !at.unreadable;
        // Who has looked at the others, where it waits at most, while nobody asks or answers about it, and nobody says that its journal may
        // have another word than its own.
        let is_unsaid = |other: &Host| {
            let whose = |record: &Option<Standing>| record.as_ref().map(|now| now.ownership.clone());
            whose(&other.record) != whose(&other.disk)
        };
        // Listed as uncertain, or as soon as its agent is there.
        let is_in_doubt = |other: &Host| {
            let handed_over = |disk: &Standing| matches!(disk.ownership, Ownership::HandedOver { .. });
            other.up != Power::Lost && other.disk.as_ref().is_some_and(handed_over)
        };
        let may_have_it =
            |other: &Host| other.owns() || other.runs() || other.step != Step::Idle || is_in_doubt(other);
        let elsewhere = state.hosts.iter().any(|other| may_have_it(other) || is_unsaid(other));
        let said = !state.links.is_empty();
        if state.past.restored == Some(host) && nothing && state.running() == 0 && !elsewhere && !said {
            actions.push(say(Person::StartAnew));
        }
        let unseen = at.owns() && at.record.as_ref().is_some_and(|record| record.resuming);
        if unseen && matches!(at.qemu, None | Some((_, Guest::Dead))) {
            actions.push(say(Person::GiveUp));
        }
    }

    fn person(&self, state: &mut State, host: usize, person: Person) -> Option<()> {
        let handed_over = state.hosts[host].handed_over();
        match (person, handed_over) {
            (Person::RunHere, Some((session, to))) => {
                state.hosts[host].step = Step::Withdrawing(session);
                if state.hosts[to].up == Power::On && state.links.len() < LINKS {
                    state.connect(host, to, Purpose::Withdraw, Request::Cancel(session));
                }
            }
            (Person::RunHere, None) => {
                let (session, _) = state.hosts[host].incoming()?;
                state.hosts[host].step = Step::AskingSource(session);
                let source = state.past.sources[usize::from(session)]?;
                if state.hosts[source].up == Power::On && state.links.len() < LINKS {
                    state.connect(host, source, Purpose::Whose, Request::Whose(session));
                }
            }
            (Person::RunHereForce, handed_over) => {
                let asked = match handed_over {
                    Some(_) => Asked::Destination(Withdrawal::Unheard),
                    None => Asked::Source(SourceSays::Unheard),
                };
                self.run_here(state, host, asked, true);
            }
            (Person::GiveUp, handed_over) => {
                let session =
                    state.hosts[host].record.as_ref().and_then(|record| record.arrived_by).map(number);
                let owned = state.hosts[host].owns();
                let effects = self.happen(state, host, Event::GiveUp)?;
                if owned && let Some(session) = session {
                    // Its memory is lost, and nobody saw it run: whoever gives it up accepts the older state that the source still
                    // has. Of one that was handed over from here it was seen.
                    let on = |s: usize| s > usize::from(session) && state.past.handed_over & 1 << s != 0;
                    if !(1..SESSIONS).any(|s| on(s) && state.past.sources[s] == Some(host)) {
                        state.past.forgiven |= 1 << session;
                    }
                }
                if handed_over.is_some() && effects.iter().any(|effect| matches!(effect, Effect::Discard(_)))
                {
                    state.hosts[host].step = Step::Idle;
                }
                HandOver::carry_out(state, host, &effects, None);
            }
            (Person::StartAnew, _) => {
                let at = &mut state.hosts[host];
                (at.record, at.disk) = (Some(Standing::own()), Some(Standing::own()));
                at.qemu = Some((0, Guest::Running));
                (at.kept, at.restarts) = (false, false);
                state.past.restored = None;
            }
        }
        Some(())
    }

    fn link_actions(&self, state: &State, link: &Link, actions: &mut Vec<Action>) {
        let host = &state.hosts[link.to];
        if host.up != Power::On {
            return;
        }
        let next = link.requests.first();
        // Nobody decides while somebody else's decision is being carried out.
        let looks_only = self.defect == Some(Defect::ConfirmsWhatItSawBefore)
            && matches!((link.task, next), (Task::Fresh, Some(Request::Cancel(_))));
        // Who has a copy withdrawn keeps the decision until there is an answer.
        let asks = matches!(host.step, Step::Withdrawing(_));
        let decides = (host.work.is_empty() && !asks) || looks_only;
        match link.task {
            Task::Fresh | Task::AwaitingCommit(_) if next.is_some() && decides => {
                actions.push(Action::Read(link.number));
            }
            Task::Mirroring(_) if next.is_some() && decides => {
                actions.push(Action::Read(link.number));
                if next == Some(&Request::Load) && state.faults < self.faults {
                    actions.push(Action::LoadFails(link.number));
                }
            }
            // Loading does not look at the connection: it goes on to its end.
            Task::Loaded(_) => actions.push(Action::NoteReady(link.number)),
            _ => {}
        }
        let looks = matches!(link.task, Task::Fresh | Task::Mirroring(_) | Task::AwaitingCommit(_));
        if looks && decides && next.is_none() && (link.broken || !link.open) {
            actions.push(Action::NoticeEnd(link.number));
        }
    }

    fn faults(&self, state: &State, actions: &mut Vec<Fault>) {
        if state.faults >= self.faults {
            return;
        }
        let breakable = |link: &&Link| !link.broken && link.open && link.task != Task::Done;
        actions.extend(state.links.iter().filter(breakable).map(|link| Fault::Break(link.number)));
        for (number, host) in state.hosts.iter().enumerate() {
            match host.up {
                Power::Lost => continue,
                Power::On => {
                    actions.push(Fault::AgentDies(number));
                    if host.journal == JournalState::Works {
                        actions.extend([true, false].map(|lands| Fault::JournalFails(number, lands)));
                    }
                }
                Power::AgentDown => {
                    // A source that loses its state directory loses its machines with it: they wait for a person.
                    if host.incoming().is_some()
                        || host.disk.as_ref().is_some_and(|disk| disk.arrived_by.is_some())
                    {
                        actions.push(Fault::StateIsLost(number));
                    }
                    if state.earlier(number).is_some() {
                        actions.push(Fault::StateIsSetBack(number));
                    }
                    if host.disk.is_some() && host.older.is_some() && !host.unreadable {
                        actions.push(Fault::RecordIsUnreadable(number));
                    }
                }
            }
            actions.extend([Fault::PowerFails(number), Fault::LostForGood(number)]);
            // Before all this it was on the first host, and nothing was known of it elsewhere.
            let since = |disk: &Standing| disk.arrived_by.is_none() && *disk != Standing::own();
            if host.disk.as_ref().is_some_and(|disk| number != 0 || disk.generation < 2 && since(disk)) {
                actions.push(Fault::Restored(number));
            }
            if matches!(host.qemu, Some((_, Guest::Loaded | Guest::Running | Guest::Switched))) {
                actions.push(Fault::QemuDies(number));
            }
            // Not where it could not be put on record that it runs again: two things at once that have nothing to do with one another.
            let noted = host.record.as_ref().is_some_and(|now| !now.resuming && !now.switching);
            // Once QEMU is set up for ours, no other can be begun that others could receive.
            let possible = match host.step {
                Step::Idle | Step::AwaitingReserved(_) | Step::Mirroring(_) => noted,
                Step::Offered(_) => self.defect == Some(Defect::OffersBeforeItIsSetUp),
                _ => false,
            };
            if host.runs() && host.owns() && possible && host.work.is_empty() {
                actions.push(Fault::ForeignMigration(number));
            }
        }
    }

    fn strike(&self, state: &mut State, fault: Fault) -> Option<()> {
        state.faults += 1;
        match fault {
            Fault::Break(number) => {
                let link = state.link(number)?;
                link.broken = true;
                link.requests.clear();
                link.replies.clear();
            }
            Fault::AgentDies(host) => agent_ends(state, host, Power::AgentDown),
            Fault::PowerFails(host) | Fault::LostForGood(host) => {
                let lost = matches!(fault, Fault::LostForGood(_));
                agent_ends(state, host, if lost { Power::Lost } else { Power::AgentDown });
                if state.hosts[host].qemu.is_some() {
                    self.qemu_dies(state, host);
                    state.hosts[host].qemu = None;
                }
                state.hosts[host].restarts = false;
            }
            Fault::QemuDies(host) => self.qemu_dies(state, host),
            Fault::JournalFails(host, lands) => state.hosts[host].journal = JournalState::Fails { lands },
            Fault::StateIsLost(host) => {
                let host = &mut state.hosts[host];
                (host.disk, host.older, host.record) = (None, None, None);
                (host.marks, host.keeper, host.unreadable) = ([None; SESSIONS], host.keeper + 1, false);
                // What runs there runs on without an agent; what waits there waits for a person.
                state.past.hit = true;
            }
            Fault::StateIsSetBack(host) => {
                let earlier = state.earlier(host)?;
                let since = earlier.arrived_by.map_or(0, number);
                let at = &mut state.hosts[host];
                (at.disk, at.record, at.older) = (Some(earlier.clone()), Some(earlier), None);
                at.marks[usize::from(since)..].fill(None);
                at.unreadable = false;
                // Whether what is there is to run on is for a person to find out.
                state.past.hit = true;
            }
            Fault::RecordIsUnreadable(host) => {
                state.hosts[host].unreadable = true;
                state.past.hit = true;
            }
            Fault::Restored(host) => {
                agent_ends(state, host, Power::AgentDown);
                self.qemu_dies(state, host);
                let at = &mut state.hosts[host];
                let before = (host == 0).then(Standing::own);
                (at.qemu, at.disk, at.record, at.older) = (None, before.clone(), before, None);
                (at.marks, at.unreadable) = ([None; SESSIONS], false);
                (at.kept, at.restarts) = (false, false);
                state.past.hit = true;
                state.past.restored = Some(host).filter(|host| *host == 0);
            }
            Fault::ForeignMigration(host) => {
                let (session, _) = state.hosts[host].qemu?;
                state.hosts[host].qemu = Some((session, Guest::Away));
                state.past.ended = true;
            }
        }
        Some(())
    }

    fn qemu_dies(&self, state: &mut State, host: usize) {
        let Some((session, guest)) = state.hosts[host].qemu else { return };
        match guest {
            Guest::Running => state.past.ended = true,
            // The only other state may be the one from before, which may be wanted or not.
            Guest::Switched | Guest::Loaded => state.past.hit = true,
            _ => {}
        }
        if guest != Guest::Away {
            state.hosts[host].qemu = Some((session, Guest::Dead));
        }
    }
}

/// Most connections at a time: a session's, and one about it.
pub(crate) const LINKS: usize = 2;

/// Nothing survives but the journal and QEMU. What the kernel has taken for sending may still arrive.
fn agent_ends(state: &mut State, host: usize, up: Power) {
    let at = &mut state.hosts[host];
    (at.up, at.step, at.tells) = (up, Step::Idle, None);
    at.abandon.clear();
    at.work.clear();
    at.record.clone_from(&at.disk);
    at.unsettled = false;
    at.journal = JournalState::Works;
    for link in &mut state.links {
        if link.from == host {
            link.open = false;
        }
        if link.to == host {
            link.task = Task::Done;
            link.broken = true;
        }
    }
}

impl Task {
    /// The session whose QEMU this task talks to.
    pub(crate) fn session(self) -> Option<SessionId> {
        match self {
            Task::Mirroring(session) | Task::Loaded(session) | Task::AwaitingCommit(session) => Some(session),
            Task::Fresh | Task::Deciding | Task::Done => None,
        }
    }
}

impl Model for HandOver {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![self.first()]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        for host in 0..state.hosts.len() {
            self.host_actions(state, host, actions);
        }
        for link in &state.links {
            self.link_actions(state, link, actions);
        }
        let mut faults = Vec::new();
        self.faults(state, &mut faults);
        actions.extend(faults.into_iter().map(Action::Fault));
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        let at = |state: &State, number| state.links.iter().position(|link| link.number == number);
        match action {
            Action::Source(host, action) => self.source_acts(&mut state, host, action)?,
            Action::Do(host, goes_well) => {
                if !goes_well {
                    state.faults += 1;
                }
                self.do_next(&mut state, host, goes_well)?;
            }
            Action::Read(number) => {
                let at = at(&state, number)?;
                self.read(&mut state, at)?;
            }
            Action::NoteReady(number) => {
                let at = at(&state, number)?;
                let (host, Task::Loaded(session)) = (state.links[at].to, state.links[at].task) else {
                    return None;
                };
                let keeper = state.hosts[host].keeper;
                match self.happen(&mut state, host, Event::Copied { session: uuid(session) }).as_deref() {
                    Some([Effect::Respond(ownership::Response::Ready)]) => {
                        state.links[at].answer(Reply::Said(ownership::Response::Ready, keeper));
                        state.links[at].task = Task::AwaitingCommit(session);
                    }
                    _ => {
                        state.links[at].answer(Reply::Said(ownership::Response::NotNow, keeper));
                        state.links[at].task = Task::Done;
                        if state.hosts[host].work.is_empty() {
                            self.session_over(&mut state, host, session);
                        }
                    }
                }
            }
            Action::LoadFails(number) | Action::NoticeEnd(number) => {
                let at = at(&state, number)?;
                let host = state.links[at].to;
                if matches!(action, Action::LoadFails(_)) {
                    let keeper = state.hosts[host].keeper;
                    state.faults += 1;
                    state.links[at].answer(Reply::Said(ownership::Response::NotNow, keeper));
                }
                let task = state.links[at].task;
                state.links[at].task = Task::Done;
                if let Task::Mirroring(session) = task {
                    self.session_over(&mut state, host, session);
                }
            }
            Action::Recover(host) => self.recover(&mut state, host),
            Action::FindEnded(host) => {
                let effects = self.happen(&mut state, host, Event::Ended)?;
                HandOver::carry_out(&mut state, host, &effects, None);
            }
            Action::Supervisor(host) => {
                let at = &mut state.hosts[host];
                // Else it fails at the lock, and tries again.
                if !at.kept {
                    (at.qemu, at.restarts) = (Some((0, Guest::Running)), false);
                }
            }
            Action::Person(host, person) => self.person(&mut state, host, person)?,
            Action::Fault(fault) => self.strike(&mut state, fault)?,
        }
        state.tidy();
        (state != *last).then_some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        fn kept(state: &State, rule: Rule) -> bool {
            state.past.broken != Some(rule)
        }
        let mut properties = vec![
            Property::always(NEVER_TWO, |_, state: &State| state.running() <= 1),
            Property::always(COMMIT_FIRST, |_, state: &State| kept(state, Rule::ResumedWithoutCommit)),
            Property::always(ITS_OWN, |_, state: &State| kept(state, Rule::ResumedWhatIsNotItsOwn)),
            Property::always(GENERATIONS_GROW, |_, state: &State| {
                kept(state, Rule::RanUnderAStaleGeneration)
            }),
            Property::always(NO_OLD_STATE, |_, state: &State| kept(state, Rule::RanOnFromAnOldState)),
            Property::always(NOTHING_THROWN_AWAY, |_, state: &State| {
                kept(state, Rule::ThrownAwayBeforeTheCopyRan)
            }),
            Property::always(WAITS, |_, state: &State| kept(state, Rule::GaveWayToAnOlderState)),
            Property::always(NOTHING_ENDED, |_, state: &State| kept(state, Rule::EndedWhatHasRun)),
            Property::sometimes("it moves and nothing is left at the source", |_, state: &State| {
                state.hosts[0].disk.is_none() && state.hosts[0].qemu.is_none() && state.hosts[1].runs()
            }),
        ];
        if self.sessions > 1 {
            properties.push(Property::sometimes("it moves on, or comes back", |_, state: &State| {
                state.past.copies_run & 0b110 == 0b110 && state.running() == 1
            }));
        }
        if self.faults > 0 && !self.arrived {
            properties.push(Property::sometimes(
                "it comes back after a hand-over that failed",
                |_, state: &State| {
                    let kept = |record: &ownership::Standing| record.generation == 2;
                    state.hosts[0].record.as_ref().is_some_and(kept) && state.hosts[0].runs()
                },
            ));
        }
        properties
    }
}

pub(crate) const NEVER_TWO: &str = "never two";
pub(crate) const COMMIT_FIRST: &str = "a destination never resumes without Commit or a person";
pub(crate) const ITS_OWN: &str = "nobody resumes but what its journal says is its own";
pub(crate) const GENERATIONS_GROW: &str = "no stale generation runs";
pub(crate) const NO_OLD_STATE: &str =
    "what has run at a destination never runs on from the source's older state";
pub(crate) const WAITS: &str = "a copy that was handed over gives way to no older state";
pub(crate) const NOTHING_ENDED: &str =
    "what has run on a host is ended only where it was handed over from there";
pub(crate) const NOTHING_THROWN_AWAY: &str = "the source throws nothing away before the copy has run";
