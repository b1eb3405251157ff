//! What the journal says of whose a machine is.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Which side of a hand-over this host is on. The number beside it in the record makes a stale side powerless.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ownership {
    /// The machine is this host's.
    Owner,
    /// This host holds a copy that may not run until the source commits.
    Incoming {
        /// The migration.
        session: Uuid,
        /// Name of the source agent.
        from: String,
        /// The copy is complete and paused; from here on only the source or a person decides.
        ready: bool,
    },
    /// This host has given the machine away and never resumes it by itself.
    HandedOver {
        /// The migration.
        session: Uuid,
        /// Name of the destination agent.
        to: String,
        /// Its address.
        address: String,
        /// Identity of the state directory of the agent there, whose word on the copy counts; not on record of earlier versions, and
        /// not told by them.
        #[serde(default)]
        keeper: Option<Uuid>,
    },
}

/// A switch-over under way.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Outgoing {
    /// The migration.
    pub session: Uuid,
    /// Name of the destination's agent; not on record of earlier versions.
    #[serde(default)]
    pub to: Option<String>,
    /// Address of the destination's agent.
    pub address: String,
}

impl Outgoing {
    /// The agent there: by its name, or where it is.
    pub fn whose(&self) -> &str {
        self.to.as_ref().unwrap_or(&self.address)
    }
}

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
