//! The settlement of a hand-over whose end was not heard of.

use std::time::Duration;

use tokio::time::timeout;

use super::peer::{Destination, Withdrawal};
use super::stop::Stop;
use crate::failure::{Failure, Finding, Stage, kind};
use crate::host::Host;
use crate::vm::{Outgoing, Ownership, Record};
use crate::wire::{self, Reply, Request};

/// Between attempts to tell a destination that its copy is worthless, and how many there are: an hour in all. After
/// that the next migration of the machine to there replaces the copy, or a person gives it up.
const ABANDON_PAUSE: Duration = Duration::from_secs(15);
const ABANDON_TRIES: usize = 240;
/// How long a destination may take to resume a machine.
const ANSWER: Duration = Duration::from_secs(15);

/// What became of a machine that was handed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Settled {
    /// The destination owns it and runs it.
    RunsThere,
    /// The destination has no complete copy and will never run it: it can run here.
    RunsHere,
    /// The destination could not be asked.
    Unknown,
}

/// Tells the destination again that the machine is its own, and learns whether it is. Asking any number of times does
/// no harm.
///
/// # Errors
/// [`Failure`] when the record is not that of a machine handed over.
pub async fn settle(host: &Host, record: &Record) -> Result<Settled, Failure> {
    let Ownership::HandedOver { session, to, address } = &record.ownership else {
        let message = format!("VM {} was not handed over", record.name);
        let finding = Finding::new("not-in-doubt", message, "there is nothing to settle");
        return Err(Failure { stage: Stage::Refused, finding, more: Vec::new() });
    };
    let commit = wire::Commit {
        session: session.as_bytes().to_vec(),
        name: record.name.to_string(),
        generation: record.generation,
    };
    let asked = async {
        let mut destination = Destination::connect(host, address).await.map_err(Stop::Failed)?;
        if destination.name() != to {
            let message = format!("{} answers at {address}, not {to}", destination.name());
            return Err(Stop::Failed(Finding::new("other-agent", message, "see to the address")));
        }
        destination.send(Request::Commit(commit)).await?;
        destination.receive().await
    };
    Ok(match timeout(ANSWER, asked).await {
        Ok(Ok(Reply::Running(_))) => Settled::RunsThere,
        Ok(Err(Stop::Failed(finding))) if finding.kind == kind::NO_COPY => Settled::RunsHere,
        other => {
            tracing::warn!(vm = %record.name, ?other, "the hand-over is not settled");
            Settled::Unknown
        }
    })
}

/// Has a destination throw away the copy of a machine that stays here.
pub(crate) async fn withdraw(host: &Host, record: &Record, outgoing: &Outgoing) -> Withdrawal {
    let commit = wire::Commit {
        session: outgoing.session.as_bytes().to_vec(),
        name: record.name.to_string(),
        generation: record.generation,
    };
    match Destination::connect(host, &outgoing.address).await {
        Ok(mut destination) => destination.cancel(commit, ANSWER).await,
        Err(finding) => {
            tracing::debug!(vm = %record.name, why = finding.message, "the destination cannot be told");
            Withdrawal::Unheard
        }
    }
}

/// Has it thrown away as soon as the destination can be reached. Nothing depends on it but the memory that the copy
/// takes.
pub(crate) fn abandon(host: &Host, record: &Record, outgoing: Outgoing) {
    let (host, record) = (host.clone(), record.clone());
    tokio::spawn(async move {
        for _ in 0..ABANDON_TRIES {
            if withdraw(&host, &record, &outgoing).await == Withdrawal::Done {
                tracing::info!(vm = %record.name, "the destination has thrown its copy away");
                return told(&host, record.name.as_ref(), &outgoing);
            }
            tokio::time::sleep(ABANDON_PAUSE).await;
        }
        tracing::warn!(vm = %record.name, address = outgoing.address, "a copy may be left at the destination");
    });
}

/// The destination need not be told again, unless a later switch-over has been there since.
fn told(host: &Host, name: &str, outgoing: &Outgoing) {
    let record = name.parse().ok().and_then(|name| host.journal.get(&name));
    if let Some(mut record) = record.filter(|record| record.outgoing.as_ref() == Some(outgoing)) {
        record.outgoing = None;
        if let Err(e) = host.journal.update(&record) {
            tracing::error!(vm = name, error = crate::failure::chain(&e), "the journal cannot be written");
        }
    }
}
