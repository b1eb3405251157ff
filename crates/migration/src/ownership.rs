//! Whose a machine is: every transition of it, as one pure function.
//!
//! [`on`] takes what the journal says of a machine and something that has happened, and says what the journal is to say from then
//! on and what is to be done, in that order: the record is durable before any of the effects begins. Nothing else changes a
//! machine's [`Standing`]. The code that carries the effects out may be interrupted between any two of them; what makes up
//! for that is [`Event::Found`], which an agent that starts asks about each record.
//!
//! ```text
//!  source                                          destination
//!  Owner ──Offered──► Owner, outgoing              (none) ──Reserved──► Incoming ──Copied──► Incoming, ready
//!        ──HandedOver──► HandedOver ── Commit ─────────────────────────────────Committed──► Owner, resuming
//!                        │        ◄────────────────── Running ──────────────────Resumed───► Owner
//!                        ├─Answered(Running)──► discarded
//!                        └─Answered(NoCopy)───► Owner, resuming, outgoing ──Resumed──► Owner, outgoing
//! ```
//!
//! `tests/hand_over_model.rs` checks this very function with every order of events, crashes and decisions of people.

#[cfg(test)]
mod tests;
mod transitions;

use uuid::Uuid;

pub use transitions::on;

use crate::vm::{Outgoing, Ownership, Record};

/// The part of a record that says whose the machine is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Standing {
    /// Grows by one with every change of owner.
    pub generation: u64,
    /// Which side of a hand-over this host is on.
    pub ownership: Ownership,
    /// The migration by which it came here.
    pub arrived_by: Option<Uuid>,
    /// The agent that it came from.
    pub arrived_from: Option<String>,
    /// Where copies may wait that are worthless unless the machine is handed over by that very migration: of the one under way, and
    /// of earlier ones whose destinations have not been told yet.
    pub outgoing: Vec<Outgoing>,
    /// Its guest may be paused by a switch-over of ours: nobody has seen it run since that began.
    pub switching: bool,
    /// It is this host's, and may not have been let run yet.
    pub resuming: bool,
    /// Its guest has run here since it came: whatever becomes of it, no host that it came from has anything newer.
    pub has_run: bool,
    /// It was handed over before its memory was complete: the rest is only here.
    pub supplies: bool,
    /// The host that it came from has said that it keeps nothing of it, and will not ask what became of it.
    pub released: bool,
}

/// What stays of a hand-over to this host when its machine is not here any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mark {
    /// It became this host's, and ran here.
    Ran,
    /// Its copy was complete, never ran, and never will: the source may run the machine.
    NeverRan,
}

/// What a destination says of a machine that it is asked about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Word {
    /// The copy is complete and paused.
    Ready,
    /// It is this host's, runs here or has run here.
    Running,
    /// Its copy never ran and never will.
    NoCopy,
    /// Its copy is gone.
    Cancelled,
    /// Nothing is known of it here: it may have run, or may not.
    Unknown,
    /// It cannot be said now.
    NotNow,
}

/// What a source has heard from a destination that it asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Answer {
    /// It is the destination's.
    Running,
    /// It never ran there and never will, says the agent with this state directory; older agents do not tell theirs.
    NoCopy {
        /// Identity of the directory.
        keeper: Option<Uuid>,
    },
    /// It answers, and knows nothing of it.
    Unknown,
    /// Anything else, or nothing.
    Other,
}

/// What a person at the source finds out before the machine is let run there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Withdrawal {
    /// The destination has thrown its copy away, or had thrown it away before.
    Done,
    /// The machine is the destination's.
    RunsThere,
    /// The destination answers, and knows nothing of it.
    Unknown,
    /// It could not be told.
    Unheard,
}

/// What a person at the destination finds out before the machine is let run there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SourceSays {
    /// The machine is the source's own.
    Mine,
    /// It has handed it over by this very migration.
    Yours,
    /// Nothing is known of it there.
    Unknown,
    /// It could not be asked.
    Unheard,
}

/// What was found out before a person's decision is carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Asked {
    /// The destination of a machine that was handed over.
    Destination(Withdrawal),
    /// The source of a copy.
    Source(SourceSays),
    /// Nobody: there is nobody to be asked.
    Nobody,
}

/// What an agent that starts finds of a machine's QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Qemu {
    /// It has certainly ended.
    Gone,
    /// It runs the guest, or the guest is stopped for a reason that is not ours.
    There,
    /// It runs the guest, or has run it, and the record is that of a copy that was never complete: an older one than that.
    Ran,
    /// The guest is stopped as by a switch-over.
    Switched,
    /// The guest is stopped as by a scan of its memory, and it is on record that there are such.
    Held,
    /// It cannot be told.
    Unclear,
}

/// Something that has happened.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Event {
    /// At the source: a complete copy may come to be there.
    Offered {
        /// The migration.
        session: Uuid,
        /// Name of the destination's agent.
        to: String,
        /// Its address.
        address: String,
    },
    /// At the source: of this migration nothing is left at the destination.
    Withdrawn {
        /// The migration.
        session: Uuid,
    },
    /// At the source: the destination has said that its copy is complete.
    HandedOver {
        /// The migration.
        session: Uuid,
        /// Name of the destination's agent.
        to: String,
        /// Its address.
        address: String,
        /// Identity of its state directory.
        keeper: Option<Uuid>,
        /// The rest of the memory is still here.
        supplies: bool,
    },
    /// At the source: the destination has answered a Commit.
    Answered {
        /// The migration.
        session: Uuid,
        /// What it said.
        answer: Answer,
    },
    /// At the source: everything that the destination lacked has been supplied, or never will be.
    Supplied,
    /// At the destination: a source wants a copy kept here.
    Reserved {
        /// The migration.
        session: Uuid,
        /// Name of the source's agent.
        from: String,
        /// The machine's generation there.
        generation: u64,
        /// Earlier migrations whose copies it says are worthless; older agents say nothing of them.
        abandoned: Option<Vec<Uuid>>,
    },
    /// At the destination: the copy is complete and loaded.
    Copied {
        /// The migration.
        session: Uuid,
    },
    /// At the destination: the source has given the machine away.
    Committed {
        /// The migration.
        session: Uuid,
        /// Name of the agent that says so.
        from: String,
        /// The machine's generation at its new owner.
        generation: u64,
        /// What is remembered of that migration here.
        mark: Option<Mark>,
    },
    /// At the destination: the source wants no copy here.
    Cancelled {
        /// The migration.
        session: Uuid,
        /// Name of the agent that says so.
        from: String,
        /// What is remembered of that migration here.
        mark: Option<Mark>,
    },
    /// At the destination: the source keeps nothing of the machine any more.
    Released {
        /// The migration.
        session: Uuid,
    },
    /// The machine has been let run.
    Resumed,
    /// QEMU did not let it run.
    NotResumed {
        /// It is certain that it never ran, and its QEMU has ended.
        never_ran: bool,
    },
    /// At the destination: the migration is over for the task that served it.
    SessionOver {
        /// The migration.
        session: Uuid,
    },
    /// The machine's QEMU has certainly ended.
    Ended,
    /// An agent starts, and finds this record.
    Found(Qemu),
    /// A person says that it is to run here.
    RunHere {
        /// What was found out before.
        asked: Asked,
        /// Whatever was found out, except that it runs elsewhere.
        force: bool,
    },
    /// A person says that it is not to run here.
    GiveUp,
}

/// Why something is not done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Why {
    /// The machine is not, or not any more, what the event is about.
    Changed,
    /// The name is another machine's.
    NameTaken,
    /// The name is that of a complete copy, by which its source may have handed the machine over.
    CopyWaits,
    /// Too many copies may wait elsewhere that nobody could be told are worthless.
    CopiesLeft,
    /// It is the destination's.
    RunsThere,
    /// The destination knows nothing of it, and may have run it.
    UnknownThere,
    /// The source says that it is its own.
    OwnedThere,
    /// The other agent could not be asked: only a person who has made sure can tell.
    Unheard,
    /// The destination lacks memory that is only here.
    Supplies,
    /// There is nothing to decide.
    NotInDoubt,
}

/// What is to be done once the record is durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Effect {
    /// Say Commit to the destination.
    Commit,
    /// Have QEMU run the guest. If it does, who asked for it is told [`Word::Running`], and then it is [`Event::Resumed`]; if it does
    /// not, [`Event::NotResumed`].
    Resume,
    /// Answer the other agent.
    Say(Word),
    /// End QEMU, remove what was made for the machine, make the mark, and then remove the record, in this order.
    Discard(Option<Mark>),
    /// Supply what the destination lacks, if anything, then discard what is here and tell it so.
    Release,
    /// Ask the destination, again and again.
    Ask,
    /// Have the destination throw its copy away as soon as it can be reached.
    Abandon,
    /// Wait for the source's word, or a person's.
    Wait,
    /// Only a person can tell; nothing is touched.
    Doubt,
    /// Do nothing.
    Refuse(Why),
}

/// What the journal says after an event, and what is to be done then.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Step {
    /// The new standing; none where there is no record.
    pub standing: Option<Standing>,
    /// What is to be done, in this order.
    pub effects: Vec<Effect>,
}

/// Most copies that may wait elsewhere while a machine is migrated once more. A destination that takes the machine anew has none any more,
/// so these are at as many hosts, each lost within a switch-over.
pub const MOST_OUTGOING: usize = 16;

impl Standing {
    /// Of a machine that was started or taken in here.
    #[must_use]
    pub fn own() -> Standing {
        Standing {
            generation: 0,
            ownership: Ownership::Owner,
            arrived_by: None,
            arrived_from: None,
            outgoing: Vec::new(),
            switching: false,
            resuming: false,
            has_run: true,
            supplies: false,
            released: false,
        }
    }

    /// What is to be remembered when such a machine goes that nobody has decided about.
    #[must_use]
    pub fn mark(&self) -> Option<Mark> {
        match self.ownership {
            Ownership::Incoming { ready, .. } => ready.then_some(Mark::NeverRan),
            // It may have run or not: neither is said of it.
            Ownership::Owner if self.is_unseen() => None,
            Ownership::Owner | Ownership::HandedOver { .. } => {
                (self.arrived_by.is_some() && !self.released).then_some(Mark::Ran)
            }
        }
    }

    /// Whether it came here to stay, and nobody knows yet whether its guest has run here.
    #[must_use]
    pub fn is_unseen(&self) -> bool {
        self.ownership == Ownership::Owner && self.resuming && !self.has_run
    }

    /// Whether it came here by this migration, from this agent.
    #[must_use]
    pub fn came_by(&self, session: Uuid, from: &str) -> bool {
        self.arrived_by == Some(session) && self.arrived_from.as_deref() == Some(from)
    }
}

impl From<&Record> for Standing {
    fn from(record: &Record) -> Standing {
        Standing {
            generation: record.generation,
            ownership: record.ownership.clone(),
            arrived_by: record.arrived_by,
            arrived_from: record.arrived_from.clone(),
            outgoing: record.outgoing.clone(),
            switching: record.switching,
            resuming: record.resuming,
            // Not on record of earlier versions; what has never come from elsewhere was started here.
            has_run: record.has_run || record.arrived_by.is_none(),
            supplies: record.supplies,
            released: record.released,
        }
    }
}

impl Record {
    /// Takes on a standing.
    pub(crate) fn stand(&mut self, standing: Standing) {
        let Standing {
            generation,
            ownership,
            arrived_by,
            arrived_from,
            outgoing,
            switching,
            resuming,
            has_run,
            supplies,
            released,
        } = standing;
        self.generation = generation;
        self.ownership = ownership;
        self.arrived_by = arrived_by;
        self.arrived_from = arrived_from;
        self.outgoing = outgoing;
        self.switching = switching;
        self.resuming = resuming;
        self.has_run = has_run;
        self.supplies = supplies;
        self.released = released;
    }
}
