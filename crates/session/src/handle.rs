//! The handle by which an agent follows and steers a migration that it is the source of.

use std::sync::Arc;

use tokio::sync::{mpsc, watch};
use uuid::Uuid;

use crate::progress::Progress;
use crate::report::{Report, Verification};
use finding::Finding;

/// What can be asked of a running session.
#[derive(Debug)]
pub enum Command {
    /// Switch over now.
    Switch,
    /// End it; the machine stays where it is.
    Cancel,
    /// Compare every page on both sides with the ledgers, and answer with what was found.
    Verify(tokio::sync::oneshot::Sender<Result<Verification, Finding>>),
    /// Change the limit of all data streams together, in bytes per second; `None` is unlimited.
    Bandwidth(Option<std::num::NonZeroU64>),
}

/// The session has ended, or is past the point where the command could have an effect.
#[derive(Debug, thiserror::Error)]
#[error("the migration has already ended")]
pub struct Ended;

/// A migration under way, as its source sees it. Clones are handles to the same session.
#[derive(Debug, Clone)]
pub struct Session {
    /// Identity, the same in the report and at the destination.
    pub id: Uuid,
    commands: mpsc::Sender<Command>,
    progress: watch::Receiver<Progress>,
    report: watch::Receiver<Option<Arc<Report>>>,
}

/// The controller's end of a [`Session`].
#[derive(Debug)]
pub struct Conductor {
    /// What is asked of it.
    pub commands: mpsc::Receiver<Command>,
    /// How it goes.
    pub progress: watch::Sender<Progress>,
    /// What came of it, at its end.
    pub report: watch::Sender<Option<Arc<Report>>>,
}

impl Session {
    /// A session and the controller's end of it.
    #[must_use]
    pub fn new(id: Uuid, first: Progress) -> (Session, Conductor) {
        let (commands, receiver) = mpsc::channel(16);
        let (progress, seen) = watch::channel(first);
        let (report, ended) = watch::channel(None);
        (
            Session { id, commands, progress: seen, report: ended },
            Conductor { commands: receiver, progress, report },
        )
    }

    /// Sends a command. One that comes when the machine is already handed over has no effect; the report tells.
    ///
    /// # Errors
    /// [`Ended`] when nobody is there to follow it.
    pub async fn command(&self, command: Command) -> Result<(), Ended> {
        self.commands.send(command).await.map_err(|_| Ended)
    }

    /// The latest progress, and a way to wait for the next.
    #[must_use]
    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.clone()
    }

    /// The report, once the session has ended.
    #[must_use]
    pub fn report(&self) -> Option<Arc<Report>> {
        self.report.borrow().clone()
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// [`Ended`] when the controller vanished without a report, which only an agent shutting down does.
    pub async fn finished(&self) -> Result<Arc<Report>, Ended> {
        let mut report = self.report.clone();
        let report = report.wait_for(Option::is_some).await.map_err(|_| Ended)?;
        report.clone().ok_or(Ended)
    }
}
