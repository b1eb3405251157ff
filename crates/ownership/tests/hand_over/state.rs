//! What the model is about: hosts, their journals, their QEMUs, what is between them, and what has happened so far.

use ownership::{Event, Mark, Ownership, Response, Standing, Withdrawal};
use uuid::Uuid;

/// Number of a migration, from 1.
pub(crate) type SessionId = u8;
/// Most migrations of one run.
pub(crate) const SESSIONS: usize = 4;

/// Everything at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct State {
    pub(crate) hosts: Vec<Host>,
    /// Control connections; those that both sides have left are taken out.
    pub(crate) links: Vec<Link>,
    /// Migrations begun.
    pub(crate) sessions: SessionId,
    /// Faults that have struck.
    pub(crate) faults: u8,
    pub(crate) past: Past,
}

/// A host, its agent, and what it has of the machine.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Host {
    pub(crate) up: Power,
    /// What a start of the agent finds.
    pub(crate) disk: Option<Standing>,
    /// The record before that, in the other slot.
    pub(crate) older: Option<Standing>,
    /// What the agent goes by.
    pub(crate) record: Option<Standing>,
    /// The last write has failed.
    pub(crate) unsettled: bool,
    pub(crate) journal: JournalState,
    /// Of each migration, by its number.
    pub(crate) marks: [Option<Mark>; SESSIONS],
    /// How often the state directory was lost.
    pub(crate) keeper: u8,
    /// The newest record cannot be read; the name is taken, and nothing known of it.
    pub(crate) unreadable: bool,
    pub(crate) qemu: Option<(SessionId, Guest)>,
    /// What the source's controller is about; forgotten when the agent ends.
    pub(crate) step: Step,
    /// What was decided and is being done: as long as there is something, nobody else decides.
    pub(crate) work: Vec<Do>,
    /// The connection whose peer is told of it.
    pub(crate) tells: Option<u8>,
    /// Destinations that are still to be told that their copies are worthless.
    pub(crate) abandon: Vec<(SessionId, usize)>,
    /// The machine has left, and its disks here are kept locked.
    pub(crate) kept: bool,
    /// Its QEMU has ended as planned, and whoever supervises it takes that for a failure.
    pub(crate) restarts: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Power {
    /// The agent runs.
    On,
    /// The agent does not; a QEMU may.
    AgentDown,
    /// The host is lost for good.
    Lost,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum JournalState {
    Works,
    /// Writes fail. Whether they are on the disk all the same.
    Fails {
        lands: bool,
    },
}

/// What a QEMU has of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Guest {
    /// A copy that is not complete.
    Incomplete,
    /// Complete, paused, never run.
    Loaded,
    Running,
    /// Stopped by a switch-over of ours.
    Switched,
    /// Stopped by somebody else's migration, and running where that went.
    Away,
    /// It has died by itself.
    Dead,
}

/// How far the source's controller is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Step {
    Idle,
    AwaitingReserved(SessionId),
    Mirroring(SessionId),
    /// The journal says where a complete copy may come to be.
    Offered(SessionId),
    /// The guest is paused, `Load` is sent.
    AwaitingReady(SessionId),
    Ready(SessionId),
    /// The journal failed when it was to say HANDED OVER.
    Unsettled(SessionId),
    /// The journal says HANDED OVER.
    HandedOver(SessionId),
    /// `Commit` is sent.
    AwaitingRunning(SessionId),
    /// Nothing was heard; the destination is to be asked.
    InDoubt(SessionId),
    Asked(SessionId),
    /// A person wants it here: the destination is asked to give its copy up.
    Withdrawing(SessionId),
    /// The machine runs at the destination: it is supplied, and then given back.
    Given(SessionId),
    /// The machine is to run on here, and then the destination is told.
    Keeping(SessionId),
    /// The destination is told.
    Undoing(SessionId),
    /// A person wants a copy to run here: its source is asked.
    AskingSource(SessionId),
}

/// One step of carrying out what was decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Do {
    Resume,
    SayRunning,
    NoteResumed,
    Respond(Response),
    End,
    Mark(Option<Mark>),
    Remove,
    /// Locks the disks of a machine that has left.
    Keep,
    Abandon,
    /// Tells the destination that nothing is kept here of what was handed over to it.
    Released(SessionId, usize),
}

/// A control connection. The number is its own for as long as it is there.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Link {
    pub(crate) number: u8,
    pub(crate) from: usize,
    pub(crate) to: usize,
    pub(crate) purpose: Purpose,
    /// Whether who has opened it still listens.
    pub(crate) open: bool,
    /// The task that serves it.
    pub(crate) task: Task,
    /// Nothing gets through any more, and either side notices in its own time.
    pub(crate) broken: bool,
    pub(crate) requests: Vec<Request>,
    pub(crate) replies: Vec<Reply>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Purpose {
    Migrate,
    Settle,
    /// A person has it withdrawn.
    Withdraw,
    Abandon(SessionId),
    /// A person at a copy asks its source.
    Whose,
    Release,
}

/// How far the destination's controller is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Task {
    Fresh,
    Mirroring(SessionId),
    Loaded(SessionId),
    AwaitingCommit(SessionId),
    /// Something was decided, and is being done.
    Deciding,
    Done,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Request {
    /// With the generation, and a bit for each migration that is said to be abandoned.
    Reserve(SessionId, u64, u8),
    Load,
    Commit(SessionId, u64),
    Cancel(SessionId),
    Whose(SessionId),
    Released(SessionId),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Reply {
    /// With the identity of the state directory.
    Reserved(u8),
    Said(Response, u8),
    Belongs(ownership::SourceSays),
}

/// What no part of the system knows, but the properties are about.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(crate) struct Past {
    /// The highest generation under which it has run.
    pub(crate) newest: u64,
    /// A bit for each session whose copy has run.
    pub(crate) copies_run: u8,
    /// The same of those that somebody has given up knowingly, or that lost nothing by it: the older state may run.
    pub(crate) forgiven: u8,
    /// A bit for each session that was durably handed over, or that a person has decided for.
    pub(crate) handed_over: u8,
    /// By whom: the host that each session left.
    pub(crate) sources: [Option<usize>; SESSIONS],
    pub(crate) keepers: [u8; SESSIONS],
    /// Under which generation each was asked for.
    pub(crate) generations: [u64; SESSIONS],
    /// The machine has ended while it ran, or its host was lost while it was certainly its own, or a person has thrown it away.
    pub(crate) ended: bool,
    /// It was lost in the middle of a hand-over, as no rule could prevent.
    pub(crate) hit: bool,
    /// A host has come back as it was before all this, and nobody has started the machine there since.
    pub(crate) restored: Option<usize>,
    /// The first rule that was seen broken.
    pub(crate) broken: Option<Rule>,
}

/// Rules that are about a step and not about a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Rule {
    ResumedWithoutCommit,
    ResumedWhatIsNotItsOwn,
    RanUnderAStaleGeneration,
    RanOnFromAnOldState,
    ThrownAwayBeforeTheCopyRan,
    GaveWayToAnOlderState,
    EndedWhatHasRun,
}

pub(crate) fn uuid(session: SessionId) -> Uuid {
    Uuid::from_u128(u128::from(session))
}

pub(crate) fn number(session: Uuid) -> SessionId {
    u8::try_from(session.as_u128()).expect("the model's own numbers")
}

pub(crate) fn name(host: usize) -> String {
    host.to_string()
}

pub(crate) fn host_of(name: &str) -> usize {
    name.parse().expect("the model's own names")
}

pub(crate) fn withdrawal(word: Response) -> Withdrawal {
    match word {
        Response::Cancelled | Response::NoCopy => Withdrawal::Done,
        Response::Running => Withdrawal::RunsThere,
        Response::Unknown => Withdrawal::Unknown,
        Response::Ready | Response::NotNow => Withdrawal::Unheard,
    }
}

impl Host {
    pub(crate) fn new() -> Host {
        Host {
            up: Power::On,
            disk: None,
            older: None,
            record: None,
            unsettled: false,
            journal: JournalState::Works,
            marks: [None; SESSIONS],
            keeper: 0,
            unreadable: false,
            qemu: None,
            step: Step::Idle,
            work: Vec::new(),
            tells: None,
            abandon: Vec::new(),
            kept: false,
            restarts: false,
        }
    }

    pub(crate) fn runs(&self) -> bool {
        matches!(self.qemu, Some((_, Guest::Running)))
    }

    /// The migration that it was handed over by, and to whom.
    pub(crate) fn handed_over(&self) -> Option<(SessionId, usize)> {
        match &self.record.as_ref()?.ownership {
            Ownership::HandedOver { session, to, .. } => Some((number(*session), host_of(to))),
            _ => None,
        }
    }

    pub(crate) fn owns(&self) -> bool {
        self.record.as_ref().is_some_and(|record| record.ownership == Ownership::Owner)
    }

    /// The migration of the copy that is here, and whether it is complete.
    pub(crate) fn incoming(&self) -> Option<(SessionId, bool)> {
        match &self.record.as_ref()?.ownership {
            Ownership::Incoming { session, ready, .. } => Some((number(*session), *ready)),
            _ => None,
        }
    }
}

impl State {
    /// A machine that runs on the first host.
    pub(crate) fn first(hosts: usize) -> State {
        let mut all = vec![Host::new(); hosts];
        all[0].record = Some(Standing::own());
        all[0].disk = Some(Standing::own());
        all[0].qemu = Some((0, Guest::Running));
        State { hosts: all, links: Vec::new(), sessions: 0, faults: 0, past: Past::default() }
    }

    /// One that has come to the second host and runs there, while the first has not heard so yet.
    pub(crate) fn arrived(hosts: usize) -> State {
        let mut state = State::first(hosts);
        let (from, to) = (name(0), name(1));
        let follow = |standing: Option<Standing>, event| {
            ownership::on(standing.as_ref(), event).standing.expect("a record")
        };
        let (session, address) = (uuid(1), to.clone());
        let offered = follow(Some(Standing::own()), Event::Offered { session, to: to.clone(), address });
        let (address, keeper) = (to.clone(), Some(uuid(0)));
        let given = Event::HandedOver { session, to, address, keeper, supplies: false };
        let given = follow(Some(offered), given);
        let reserved = Event::Reserved { session, from: from.clone(), generation: 0, abandoned: None };
        let ready = follow(Some(follow(None, reserved)), Event::Copied { session });
        let owned = follow(Some(ready), Event::Committed { session, from, generation: 1, mark: None });
        let runs = follow(Some(owned), Event::Resumed);
        for (host, standing, qemu) in [(0, given, (0, Guest::Switched)), (1, runs, (1, Guest::Running))] {
            let host = &mut state.hosts[host];
            (host.disk, host.record, host.qemu) = (Some(standing.clone()), Some(standing), Some(qemu));
        }
        state.hosts[0].step = Step::InDoubt(1);
        state.sessions = 1;
        state.past.newest = 1;
        (state.past.copies_run, state.past.handed_over) = (0b10, 0b10);
        state.past.sources[1] = Some(0);
        state
    }

    /// Places at which the machine runs.
    pub(crate) fn running(&self) -> usize {
        let there = |host: &&Host| matches!(host.qemu, Some((_, Guest::Running | Guest::Away)));
        self.hosts.iter().filter(there).count()
    }

    /// Whether no rule of the hand-over could bring the machine back.
    pub(crate) fn beyond_help(&self) -> bool {
        self.past.ended || self.past.hit
    }

    /// What a host had on record earlier, while it has a QEMU: of a copy, when it was not complete; of the machine's first host, before
    /// all this. Where another QEMU than the record's is there the record's is gone, and that is not in the model.
    pub(crate) fn earlier(&self, host: usize) -> Option<Standing> {
        let at = &self.hosts[host];
        let earlier = match at.qemu? {
            (0, Guest::Running | Guest::Switched) => Some(Standing::own()),
            (came @ 1.., Guest::Loaded | Guest::Running | Guest::Switched | Guest::Away) => {
                let (session, at) = (uuid(came), usize::from(came));
                let (from, generation) = (name(self.past.sources[at]?), self.past.generations[at]);
                let reserved = Event::Reserved { session, from, generation, abandoned: None };
                ownership::on(None, reserved).standing
            }
            _ => None,
        };
        // A generation that was given away since would be given away again.
        let of_now = |disk: &Standing| disk.generation < 2 || disk.arrived_by.is_some();
        earlier.filter(|earlier| at.disk.as_ref().is_none_or(|disk| disk != earlier && of_now(disk)))
    }

    pub(crate) fn breaks(&mut self, rule: Rule) {
        self.past.broken.get_or_insert(rule);
    }

    /// The QEMU of this host runs the guest from here on.
    pub(crate) fn run(&mut self, host: usize) {
        let Some((session, guest)) = self.hosts[host].qemu else { return };
        if guest == Guest::Running {
            return;
        }
        self.hosts[host].qemu = Some((session, Guest::Running));
        (self.hosts[host].kept, self.hosts[host].restarts) = (false, false);
        let Some(record) =
            self.hosts[host].record.clone().filter(|record| record.ownership == Ownership::Owner)
        else {
            return self.breaks(Rule::ResumedWhatIsNotItsOwn);
        };
        if record.generation < self.past.newest {
            self.breaks(Rule::RanUnderAStaleGeneration);
        }
        self.past.newest = self.past.newest.max(record.generation);
        if guest == Guest::Loaded {
            if self.past.handed_over & 1 << session == 0 {
                self.breaks(Rule::ResumedWithoutCommit);
            }
            self.past.copies_run |= 1 << session;
        } else {
            // What it was handed over by has run elsewhere, and this is the state from before.
            let left = (1..SESSIONS).filter(|&s| self.past.sources[s] == Some(host));
            let bits = left.filter(|&s| s > usize::from(session)).fold(0, |bits, s| bits | 1 << s);
            if self.past.copies_run & !self.past.forgiven & bits != 0 {
                self.breaks(Rule::RanOnFromAnOldState);
            }
        }
    }

    pub(crate) fn link(&mut self, number: u8) -> Option<&mut Link> {
        self.links.iter_mut().find(|link| link.number == number)
    }

    pub(crate) fn connect(&mut self, from: usize, to: usize, purpose: Purpose, first: Request) {
        let number = (0..).find(|number| self.links.iter().all(|link| link.number != *number));
        self.links.push(Link {
            number: number.expect("fewer than 256 connections"),
            from,
            to,
            purpose,
            open: true,
            task: Task::Fresh,
            broken: false,
            requests: vec![first],
            replies: Vec::new(),
        });
    }

    /// Leaves connections that this host has opened for this.
    pub(crate) fn hang_up(&mut self, host: usize, purposes: &[Purpose]) {
        for link in self.links.iter_mut().filter(|link| link.from == host && purposes.contains(&link.purpose))
        {
            link.open = false;
        }
    }

    /// Takes out connections that nobody holds, so that states that differ in them alone are one.
    pub(crate) fn tidy(&mut self) {
        for link in &mut self.links {
            if link.task == Task::Done {
                link.requests.clear();
            }
            if !link.open {
                link.replies.clear();
            }
        }
        self.links.retain(|link| link.open || link.task != Task::Done);
    }
}

impl Link {
    pub(crate) fn ask(&mut self, request: Request) {
        if !self.broken {
            self.requests.push(request);
        }
    }

    pub(crate) fn answer(&mut self, reply: Reply) {
        if !self.broken && self.open {
            self.replies.push(reply);
        }
    }
}
