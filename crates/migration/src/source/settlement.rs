//! The settlement of a hand-over whose end was not heard of.

use tokio::time::timeout;
use uuid::Uuid;

use super::peer::{Destination, about};
use crate::linked::LinkedHost;
use finding::{Failure, Finding, Stage, chain};
use host::Host;
use host::Record;
use ownership::JournalError;
use ownership::{Answer, Effect, Event, SourceSays, Withdrawal};
use ownership::{Outgoing, Ownership, VmName};
use protocol::deadlines::{ABANDON_PAUSE, ANSWER, CANCEL};
use protocol::wire::{self, Reply, Request};

/// What became of a machine that was handed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Settled {
    /// The destination owns it and runs it.
    RunsThere,
    /// The destination has no complete copy and will never run it. It is on record that it is this host's again, and to be resumed.
    RunsHere,
    /// The agent there answers, and knows nothing of the machine.
    UnknownThere,
    /// The destination could not be asked.
    Unknown,
    /// The agent that answers there is not the one that took the copy, or has lost its state directory: a person must look.
    OtherKeeper,
}

/// Tells the destination again that the machine is its own, learns whether it is, and puts on record what follows. Asking any number of
/// times does no harm.
///
/// # Errors
/// [`Failure`] when the record is not that of a machine handed over, or the journal fails.
pub async fn settle(host: &LinkedHost, record: &mut Record) -> Result<Settled, Failure> {
    let Ownership::HandedOver { session, to, address, .. } = record.ownership.clone() else {
        let message = format!("VM {} was not handed over", record.name);
        return Err(refused(Finding::new("not-in-doubt", message, "there is nothing to settle")));
    };
    if host.journal.is_unsettled(&record.name) {
        // A later start may find that it is this host's: nobody is told to run it before that is overwritten.
        host.journal.settle(&record.name).map_err(unwritten)?;
    }
    let commit = about(&session, record);
    let asked = async {
        let mut destination = connect(host, Some(&to), &address).await?;
        destination.commit(commit).await.map_err(|stop| stop.into_failure(Stage::Uncertain).finding)
    };
    let answer = match timeout(ANSWER, asked).await {
        Ok(Ok(answer)) => answer,
        other => {
            tracing::warn!(vm = %record.name, ?other, "the hand-over is not settled");
            Answer::Other
        }
    };
    let effects = host.journal.on(record, Event::Answered { session, answer }, |_| {});
    let effects = effects.map_err(unwritten)?;
    Ok(match effects.first() {
        Some(Effect::Release) => Settled::RunsThere,
        Some(Effect::Resume) => Settled::RunsHere,
        Some(Effect::Doubt) => Settled::OtherKeeper,
        _ if answer == Answer::Unknown => Settled::UnknownThere,
        _ => Settled::Unknown,
    })
}

fn unwritten(error: JournalError) -> Failure {
    refused(Finding::new("journal", chain(&error), "see to the disk of state_dir; it is tried again"))
}

fn refused(finding: Finding) -> Failure {
    Failure { stage: Stage::Refused, finding, more: Vec::new() }
}

/// Connects to an agent, and to no other that has its address by now.
async fn connect(host: &LinkedHost, name: Option<&str>, address: &str) -> Result<Destination, Finding> {
    let destination = Destination::connect(host, address).await?;
    match name {
        Some(name) if destination.name() != name => {
            let message = format!("{} answers at {address}, not {name}", destination.name());
            Err(Finding::new("other-agent", message, "see to the address"))
        }
        _ => Ok(destination),
    }
}

/// Has a destination throw away the copy of a machine that stays here.
pub(crate) async fn withdraw(host: &LinkedHost, record: &Record, outgoing: &Outgoing) -> Withdrawal {
    match connect(host, outgoing.to.as_deref(), &outgoing.address).await {
        Ok(mut destination) => destination.cancel(about(&outgoing.session, record), CANCEL).await,
        Err(finding) => {
            tracing::debug!(vm = %record.name, why = finding.message, "the destination cannot be told");
            Withdrawal::Unheard
        }
    }
}

/// Has every copy thrown away that may wait somewhere.
pub(crate) fn abandon_all(host: &LinkedHost, record: &Record) {
    for outgoing in &record.outgoing {
        abandon(host, record, outgoing.clone());
    }
}

/// Has it thrown away as soon as the destination can be reached, however long that takes: it is told for as long as it is on record that
/// it has to be. Nothing depends on it but the memory that the copy takes.
pub(crate) fn abandon(host: &LinkedHost, record: &Record, outgoing: Outgoing) {
    let (host, record) = (host.clone(), record.clone());
    tokio::spawn(async move {
        let (mut pause, longest) = ABANDON_PAUSE;
        loop {
            // One that knows nothing of it has no copy that it would ever let run.
            if matches!(withdraw(&host, &record, &outgoing).await, Withdrawal::Done | Withdrawal::Unknown)
                && withdrawn(&host, &record.name, outgoing.session)
            {
                return tracing::info!(vm = %record.name, "the destination has thrown its copy away");
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(longest);
            let is_left = |now: Record| now.outgoing.iter().any(|left| left.session == outgoing.session);
            if !host.journal.get(&record.name).is_some_and(is_left) {
                return;
            }
        }
    });
}

/// The destination of this migration need not be told again. False when that could not be put on record.
pub(super) fn withdrawn(host: &Host, name: &VmName, session: Uuid) -> bool {
    let event = || Event::Withdrawn { session };
    // The machine may be changing just now, and what it is then is looked at again.
    while let Some(mut record) = host.journal.get(name) {
        match host.journal.on(&mut record, event(), |_| {}) {
            Ok(_) => return true,
            Err(JournalError::Changed(_)) => {}
            Err(e) => {
                tracing::error!(vm = %name, error = chain(&e), "the journal cannot be written");
                return false;
            }
        }
    }
    true
}

/// The destination lacks nothing any more that is here.
pub fn supplied(host: &Host, record: &mut Record) {
    if let Err(e) = host.journal.on(record, Event::Supplied, |_| {}) {
        tracing::error!(vm = %record.name, error = chain(&e), "the journal cannot be written");
    }
}

/// Tells the destination that nothing is kept here of a machine that was handed over, so that it need not remember. Once: it may
/// remember for ever.
pub async fn release(host: &LinkedHost, record: &Record) {
    let Ownership::HandedOver { session, to, address, .. } = &record.ownership else { return };
    let told = async {
        let destination = connect(host, Some(to), address).await?;
        let said = destination.send(Request::Released(about(session, record))).await;
        said.map_err(|stop| stop.into_failure(Stage::Failed).finding)
    };
    match timeout(ANSWER, told).await {
        Ok(Ok(())) => {}
        other => {
            tracing::debug!(vm = %record.name, ?other, "the destination remembers the hand-over for longer")
        }
    }
}

/// Asks the source of a copy that waits here whose the machine is.
pub(crate) async fn whose(host: &LinkedHost, record: &Record) -> SourceSays {
    let (Some(session), Some(address)) = (record.arrived_by, &record.arrived_from_address) else {
        return SourceSays::Unheard;
    };
    let asked = async {
        let mut source = connect(host, record.arrived_from.as_deref(), address).await?;
        source
            .send(Request::Whose(about(&session, record)))
            .await
            .map_err(|s| s.into_failure(Stage::Failed).finding)?;
        source.receive().await.map_err(|stop| stop.into_failure(Stage::Failed).finding)
    };
    match timeout(ANSWER, asked).await {
        Ok(Ok(Reply::Belongs(belongs))) => match belongs.owner() {
            wire::Owner::Mine => SourceSays::Mine,
            wire::Owner::Yours => SourceSays::Yours,
            wire::Owner::Unknown => SourceSays::Unknown,
        },
        other => {
            let other = other.map(|heard| heard.map(|reply| reply.to_string()));
            tracing::warn!(vm = %record.name, ?other, "the source could not be asked");
            SourceSays::Unheard
        }
    }
}
