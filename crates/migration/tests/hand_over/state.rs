//! What the model is about: two hosts, their journals, their QEMUs, what is between them, and what has happened so far.

/// Number of a migration, from 1.
pub(crate) type SessionId = u8;
/// Generation of a machine, as in its record.
pub(crate) type Generation = u8;

/// Everything at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct State {
    pub(crate) source: Source,
    pub(crate) destination: Destination,
    /// Control connections; those that both sides have left are taken out.
    pub(crate) links: Vec<Link>,
    /// Migrations begun.
    pub(crate) sessions: SessionId,
    pub(crate) past: Past,
}

/// The host that the machine leaves.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Source {
    pub(crate) host: HostState,
    pub(crate) record: Option<SourceRecord>,
    pub(crate) qemu: SourceQemu,
    /// What the agent is about; forgotten when it crashes.
    pub(crate) step: SourceStep,
    /// A destination that is still to be told that its copy is worthless; forgotten when the agent crashes.
    pub(crate) abandon: Option<SessionId>,
}

/// The host that it goes to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Destination {
    pub(crate) host: HostState,
    pub(crate) record: Option<DestinationRecord>,
    pub(crate) qemu: Option<(SessionId, CopyState)>,
    /// Marks of hand-overs to here whose machine is gone, a bit for each session.
    pub(crate) departed: u8,
}

/// A host and its agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum HostState {
    /// The agent runs.
    Up,
    /// The agent does not; a QEMU may.
    Down,
    /// The host is lost for good.
    Lost,
}

/// The part of `vm::Record` that decides, at the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum SourceRecord {
    Owner { generation: Generation, outgoing: Option<SessionId> },
    HandedOver { generation: Generation, session: SessionId },
}

/// The same at the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum DestinationRecord {
    /// `generation` is the source's.
    Incoming { session: SessionId, generation: Generation, ready: bool },
    /// `generation` is the destination's own.
    Owner { session: SessionId, generation: Generation, resuming: bool },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum SourceQemu {
    Running,
    /// By the switch-over.
    Paused,
    Gone,
}

/// A QEMU at the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum CopyState {
    Incomplete,
    /// Complete, paused, never run.
    Loaded,
    Running,
    /// It has died by itself.
    Dead,
}

/// How far the source's controller is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum SourceStep {
    Idle,
    AwaitingReserved(SessionId),
    Mirroring(SessionId),
    /// The journal says where a complete copy may come to be.
    Offered(SessionId),
    /// The guest is paused, `Load` is sent.
    AwaitingReady(SessionId),
    Ready(SessionId),
    /// The journal says HANDED OVER.
    HandedOver(SessionId),
    /// `Commit` is sent.
    AwaitingRunning(SessionId),
    /// Nothing was heard; the destination is to be asked.
    InDoubt(SessionId),
    Asked(SessionId),
    /// The destination has no copy, or a person has decided.
    Kept,
    /// And the journal says so.
    KeptOnRecord,
    /// The machine runs at the destination.
    Given(SessionId),
    /// And QEMU is gone.
    Released,
    /// The machine runs on here, the destination is told.
    Undoing(SessionId),
}

/// A control connection.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Link {
    pub(crate) purpose: Purpose,
    /// Whether the source still listens.
    pub(crate) source: bool,
    /// The destination's task that serves it.
    pub(crate) task: Task,
    /// Nothing gets through any more, and either side notices in its own time.
    pub(crate) broken: bool,
    pub(crate) requests: Vec<Request>,
    pub(crate) replies: Vec<Reply>,
}

/// What the source has opened it for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Purpose {
    Migrate,
    Settle,
    Abandon,
}

/// How far the destination's controller is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Task {
    Fresh,
    Mirroring(SessionId),
    Loaded(SessionId),
    /// The journal says ready.
    ReadyOnRecord(SessionId),
    AwaitingCommit(SessionId),
    /// The journal says OWNER.
    Owner(SessionId),
    Resumed(SessionId),
    Done,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Request {
    Reserve(SessionId, Generation),
    Load,
    Commit(SessionId, Generation),
    Cancel(SessionId),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Reply {
    Reserved,
    Ready,
    Running,
    Cancelled,
    /// `Failed` with the finding `no-copy`.
    NoCopy,
    /// `Failed` with any other.
    Failed,
}

/// What no part of the system knows, but the properties are about.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(crate) struct Past {
    /// A bit for each generation under which the machine has run at the source, and at the destination.
    pub(crate) ran_at_source: u8,
    pub(crate) ran_at_destination: u8,
    /// A bit for each session whose copy has run.
    pub(crate) copies_run: u8,
    /// A bit for each session that the source has durably handed over, or a person has decided for the destination.
    pub(crate) handed_over: u8,
    /// The destination has sent the machine on, and it runs there.
    pub(crate) elsewhere: bool,
    /// The machine has ended while it ran, or its host was lost while it was certainly its own.
    pub(crate) ended: bool,
    /// The source's QEMU was lost with its host.
    pub(crate) source_lost: bool,
    /// The first rule that was seen broken.
    pub(crate) broken: Option<Rule>,
}

/// Rules that are about a step and not about a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Rule {
    ResumedWithoutCommit,
    ResumedWithoutTheDestinationsWord,
    RanUnderAStaleGeneration,
    RanOnFromAnOldState,
    ThrownAwayBeforeTheCopyRan,
}

impl State {
    /// A machine that runs at the source.
    pub(crate) fn first() -> State {
        State {
            source: Source {
                host: HostState::Up,
                record: Some(SourceRecord::Owner { generation: 0, outgoing: None }),
                qemu: SourceQemu::Running,
                step: SourceStep::Idle,
                abandon: None,
            },
            destination: Destination { host: HostState::Up, record: None, qemu: None, departed: 0 },
            links: Vec::new(),
            sessions: 0,
            past: Past { ran_at_source: 1, ..Past::default() },
        }
    }

    /// Places at which the machine runs.
    pub(crate) fn running(&self) -> usize {
        usize::from(self.source.qemu == SourceQemu::Running)
            + usize::from(matches!(self.destination.qemu, Some((_, CopyState::Running))))
            + usize::from(self.past.elsewhere)
    }

    /// Whether no rule of the hand-over could bring the machine back: it ended by itself, or both hosts have lost it.
    pub(crate) fn beyond_help(&self) -> bool {
        let copy_lives = matches!(self.destination.qemu, Some((_, CopyState::Loaded | CopyState::Running)));
        self.past.ended || (self.past.source_lost && !copy_lives)
    }

    pub(crate) fn breaks(&mut self, rule: Rule) {
        self.past.broken.get_or_insert(rule);
    }

    /// The source's QEMU runs from here on.
    pub(crate) fn run_at_source(&mut self) {
        let Some(SourceRecord::Owner { generation, .. }) = self.source.record else {
            return self.breaks(Rule::ResumedWithoutTheDestinationsWord);
        };
        self.source.qemu = SourceQemu::Running;
        let bit = 1 << generation;
        if self.past.ran_at_destination >= bit || self.past.ran_at_source >= bit << 1 {
            self.breaks(Rule::RanUnderAStaleGeneration);
        }
        if self.past.copies_run != 0 {
            self.breaks(Rule::RanOnFromAnOldState);
        }
        self.past.ran_at_source |= bit;
    }

    /// The destination's QEMU runs from here on.
    pub(crate) fn run_at_destination(&mut self, session: SessionId) {
        let Some(DestinationRecord::Owner { generation, .. }) = self.destination.record else {
            return self.breaks(Rule::ResumedWithoutCommit);
        };
        self.destination.qemu = Some((session, CopyState::Running));
        if self.past.handed_over & 1 << session == 0 {
            self.breaks(Rule::ResumedWithoutCommit);
        }
        let bit = 1 << generation;
        if self.past.ran_at_source >= bit || self.past.ran_at_destination >= bit << 1 {
            self.breaks(Rule::RanUnderAStaleGeneration);
        }
        self.past.ran_at_destination |= bit;
        self.past.copies_run |= 1 << session;
    }

    /// Takes out connections that nobody holds, so that states that differ in them alone are one.
    pub(crate) fn tidy(&mut self) {
        for link in &mut self.links {
            if link.task == Task::Done {
                link.requests.clear();
            }
            if !link.source {
                link.replies.clear();
            }
        }
        self.links.retain(|link| link.source || link.task != Task::Done);
    }
}

impl Link {
    pub(crate) fn new(purpose: Purpose, first: Request) -> Link {
        Link {
            purpose,
            source: true,
            task: Task::Fresh,
            broken: false,
            requests: vec![first],
            replies: Vec::new(),
        }
    }

    pub(crate) fn ask(&mut self, request: Request) {
        if !self.broken {
            self.requests.push(request);
        }
    }

    pub(crate) fn answer(&mut self, reply: Reply) {
        if !self.broken && self.source {
            self.replies.push(reply);
        }
    }
}
