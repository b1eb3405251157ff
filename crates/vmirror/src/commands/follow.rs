//! Following one migration to its end.

use agent::api::types::SessionEvent;
use futures::{Stream, StreamExt as _};
use ownership::VmName;
use session::{Outcome, Progress, Report};
use uuid::Uuid;

use crate::client::Client;
use crate::failure::{Exit, Failure};
use crate::live::Live;
use crate::output::Output;
use crate::summary;

/// How following ended.
#[derive(Debug)]
pub(super) enum Followed {
    /// The migration is over.
    Ended(Box<Report>),
    /// The mirror is in sync, which is all that was waited for.
    InSync(Box<Progress>),
    /// Ctrl-C, for the second time.
    Left,
}

/// What is done while following.
#[derive(Debug, Clone, Copy)]
pub(super) struct Manner<'a> {
    /// Ctrl-C cancels the migration of this machine; without one it only stops following.
    pub(super) cancels: Option<&'a VmName>,
    /// The mirror being in sync is enough.
    pub(super) until_in_sync: bool,
}

/// Follows a migration, showing its progress. The flag says whether Ctrl-C was pressed.
pub(super) async fn follow(
    client: &Client,
    id: Uuid,
    manner: Manner<'_>,
    output: &Output,
) -> Result<(Followed, bool), Failure> {
    let mut live = Live::new(*output);
    let events = client.follow(id).await?;
    let followed = steer(client, events, manner, &mut live).await;
    live.end();
    followed
}

async fn steer(
    client: &Client,
    mut events: impl Stream<Item = Result<SessionEvent, Failure>> + Unpin,
    manner: Manner<'_>,
    live: &mut Live,
) -> Result<(Followed, bool), Failure> {
    let mut interrupted = false;
    loop {
        tokio::select! {
            event = events.next() => match event {
                Some(Ok(SessionEvent::Progress(progress))) => {
                    live.show(&progress);
                    if manner.until_in_sync && progress.in_sync && !interrupted {
                        return Ok((Followed::InSync(progress), interrupted));
                    }
                }
                Some(Ok(SessionEvent::Report(report))) => return Ok((Followed::Ended(report), interrupted)),
                Some(Err(failure)) => return Err(failure),
                None => return Err(Failure::new(
                    Exit::Uncertain,
                    "agent-lost",
                    "the agent went away before the migration had ended",
                    "once it runs again, `vmirror list` and `vmirror history` tell what became of it",
                )),
            },
            // Where signals cannot be listened for, Ctrl-C ends the program as it always does.
            Ok(()) = tokio::signal::ctrl_c() => {
                let Some(vm) = manner.cancels.filter(|_| !interrupted) else {
                    return Ok((Followed::Left, true));
                };
                interrupted = true;
                live.say(&format!("cancelling; {vm} stays here (Ctrl-C again leaves without waiting)"));
                // It may have ended meanwhile, and then its report says how.
                let _ = client.post::<_, serde_json::Value>(&format!("/v1/vms/{vm}/cancel"), &()).await;
            }
        }
    }
}

/// Shows how a migration ended, and says how to exit.
pub(super) fn conclude(followed: Followed, interrupted: bool, to: Option<&str>, output: &Output) -> Exit {
    let report = match followed {
        Followed::Ended(report) => report,
        Followed::InSync(progress) => {
            output.done(&*progress, |progress| {
                format!(
                    "the mirror of {vm} at {} is in sync; `vmirror switch {vm}` moves it there, \
                     `vmirror cancel {vm}` ends the mirror",
                    progress.destination,
                    vm = progress.vm
                )
            });
            return Exit::Done;
        }
        Followed::Left => return Exit::Interrupted,
    };
    output.done(&*report, |report| summary::of(report, to));
    let exit = Exit::of(&report);
    if report.outcome != Outcome::Completed {
        output.complain(&Failure::ended(&report));
    } else if interrupted {
        output.note("it was too late to cancel");
    }
    match exit {
        Exit::Failed | Exit::Refused if interrupted => Exit::Interrupted,
        exit => exit,
    }
}
