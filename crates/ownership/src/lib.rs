//! Whose a machine is: every transition of it, as one pure function, and the [`journal`] that keeps it through any crash. This crate
//! knows no QEMU and no disk.
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

pub mod concerned;
mod departed;
#[cfg(fuzzing)]
pub mod fuzzing;
pub mod journal;
mod name;
mod standing;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod transitions;

use uuid::Uuid;

pub use departed::{Departed, Supplied};
pub use journal::{Claim, Journal, JournalError, OnRecord};
pub use name::{BadName, VmName};
pub use standing::{Mark, Outgoing, Ownership, Standing};
pub use transitions::on;

/// What a destination says of a machine that it is asked about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Response {
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
    /// Have QEMU run the guest. If it does, who asked for it is told [`Response::Running`], and then it is [`Event::Resumed`]; if it does
    /// not, [`Event::NotResumed`].
    Resume,
    /// Answer the other agent.
    Respond(Response),
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
