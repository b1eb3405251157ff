//! Why the agent does not do what it was asked.

pub use finding::chain;
use finding::{Failure, Finding};
use host::lifecycle::for_where;
use ownership::{BadName, JournalError};
use session::OptionError;
use uuid::Uuid;

use crate::api::types::Doubt;
use crate::history::HistoryError;

/// Why the agent does not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AgentError {
    /// No machine has this name.
    #[error("no VM is called {name:?}; {}", listed(known))]
    UnknownVm {
        /// What was asked for.
        name: String,
        /// The names there are.
        known: Vec<String>,
    },
    /// It has left, and only what comes for it here is this host's business.
    #[error("{vm} runs on {to}, and what comes for it here is forwarded there")]
    Forwarded {
        /// The machine.
        vm: String,
        /// Name of the agent that has it.
        to: String,
    },
    /// It has left, and only its images are here.
    #[error("{vm} has left{}: only its images are here, and kept locked", for_where(to.as_deref()))]
    HasLeft {
        /// The machine.
        vm: String,
        /// Name of the agent that it was handed over to, if that is known.
        to: Option<String>,
    },
    /// The name cannot be a machine's.
    #[error(transparent)]
    BadName(#[from] BadName),
    /// A machine has the name already.
    #[error("a VM called {0:?} is here already")]
    NameTaken(String),
    /// It is in a migration.
    #[error("{vm} is being migrated to {to}")]
    InSession {
        /// The machine.
        vm: String,
        /// Where to.
        to: String,
    },
    /// Something else is being done to it.
    #[error("{vm} is being {doing}")]
    Held {
        /// The machine.
        vm: String,
        /// What is done to it.
        doing: &'static str,
    },
    /// It is not in a migration.
    #[error("{vm} has no mirror and is not being migrated{last}")]
    NoSession {
        /// The machine.
        vm: String,
        /// What came of the last one, in words that follow; empty where there was none.
        last: String,
    },
    /// It is being migrated, and no mirror of it is kept standing.
    #[error("{0} is being migrated, and switches over as soon as it can")]
    NotStanding(String),
    /// The migration ended before the command reached it.
    #[error("the migration of {0} has already ended")]
    SessionEnded(String),
    /// Nobody knows where it should run.
    #[error("{vm} was {doubt}")]
    Uncertain {
        /// The machine.
        vm: String,
        /// Why.
        doubt: Doubt,
    },
    /// Its hand-over is under way, and nobody is to decide anything about it yet.
    #[error(
        "the hand-over of {0} is under way: it is decided, or listed as uncertain, within {limit} s",
        limit = protocol::deadlines::DECIDED.as_secs()
    )]
    HandingOver(String),
    /// There is nothing to decide.
    #[error("it is certain that {0} runs here: there is nothing to resolve")]
    NotUncertain(String),
    /// The request is not what this version understands.
    #[error("{0}")]
    BadRequest(String),
    /// An option makes no sense.
    #[error(transparent)]
    Option(#[from] OptionError),
    /// The destination is not an address.
    #[error("{0:?} is not the address of an agent's link")]
    Address(String),
    /// No such migration is under way or in the history.
    #[error("no migration has the id {0}")]
    UnknownSession(Uuid),
    /// The agent is going down.
    #[error("the agent is shutting down")]
    ShuttingDown,
    /// The machine could not be started, taken in or stopped; the finding says why.
    #[error("{}", .0.message)]
    Refused(Finding),
    /// A migration's own refusal.
    #[error("{}", .0.finding.message)]
    Migration(Box<Failure>),
    /// The history has no answer.
    #[error(transparent)]
    History(#[from] HistoryError),
    /// The journal cannot be read or written.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

fn listed(names: &[String]) -> String {
    if names.is_empty() { "there are none".to_owned() } else { format!("there are: {}", names.join(", ")) }
}
