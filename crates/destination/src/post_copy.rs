//! Post-copy at the destination: the machine runs, and what it lacks is asked for.
//!
//! What is missing is kept apart from the session that brings it (a `tail`): when the link is lost the guest waits at the
//! next page that it lacks, and goes on when its source has connected again. When this agent ends, QEMU keeps the guest
//! waiting by its own descriptor until the next agent has taken over ([`recover`]).

use std::sync::Arc;

use dirty_tracker::{AttachError, MissingPages};
use link::LinkError;
use mirror::hash::Secret;
use mirror::layout::Layout;
use mirror::memory::Ram;
use mirror::memory::post_copy::still_missing;
use qemu::Spec;
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

use crate::arrivals::DataConnections;
use crate::end::{End, failed, interrupted, no_copy, violation};
use crate::health;
use crate::receiving::ReceivingHost;
use crate::source::Source;
use crate::tail::{self, State, Tail};
use crate::waiting::places;
use finding::{Finding, chain, kind};
use host::vm::{PostCopy, Record};
use ownership::{Departed, Ownership};
use protocol::wire::bounds;
use protocol::wire::{self, Missing, Reply};

/// How often what a machine lacks is looked for before its source is told to try again later.
const RECOVERIES: u32 = 3;

/// Takes over from an agent that has ended: QEMU waits by its own descriptor.
///
/// # Errors
/// Why it could not, in words: to be tried again.
pub async fn recover(host: &ReceivingHost, record: &Record) -> Result<(), String> {
    let (Some(PostCopy { descriptor, missing, .. }), Some(session)) = (&record.post_copy, record.arrived_by)
    else {
        return Ok(());
    };
    let _one_at_a_time = host.post_copies.recovering().await;
    if host.post_copies.get(session).is_some() {
        return Ok(());
    }
    // After that: the end of one is put on record before it is forgotten.
    if host.journal.get(&record.name).is_none_or(|now| now.post_copy != record.post_copy) {
        return Ok(());
    }
    let Some(process) = &record.process else { return Err("the VM has no process".to_owned()) };
    let spec = Spec::parse(&record.argv).map_err(|e| chain(&e))?;
    let blocks = qemu::ram_blocks(process, &spec, &record.ram).map_err(|e| chain(&e))?;
    let (addresses, places) = places(&blocks);
    let layout =
        Layout::new(blocks.iter().map(|block| (block.id.as_str(), block.size)), 1).map_err(|e| chain(&e))?;
    let missing = tail::read(missing, &layout)
        .map_err(|e| format!("{} cannot be read: {}", missing.display(), chain(&e)))?;
    let files = blocks.into_iter().map(|block| movable::ram::file_of(block, process.pid)).collect();
    let ram = Ram::new(layout.clone(), files).map_err(|e| chain(&e))?;
    let missing = still_missing(&ram, &missing).map_err(|e| chain(&e))?;
    match MissingPages::resume(process.pid, &addresses, *descriptor) {
        Ok(supplier) => Tail::resume(host, record, &layout, missing, supplier, places),
        // The agent before had finished, and ended before its journal said so.
        Err(AttachError::NotWaiting { .. }) if missing.is_empty() => {
            let supplied = ownership::Supplied { taken_over: true, ..ownership::Supplied::default() };
            tail::no_longer_missing(host, session, Some(supplied)).await;
            Ok(())
        }
        Err(e) => Err(chain(&e)),
    }
}

/// How the attendance of the source ends; never where there is none.
pub(super) async fn attended(attending: &mut Option<AbortOnDropHandle<End>>) -> End {
    match attending {
        Some(attending) => attending.await.unwrap_or(End::Link(LinkError::Closed)),
        None => std::future::pending().await,
    }
}

/// Its QEMU has ended.
fn nobody_needs_it(why: String) -> End {
    End::Failed(vec![Finding::new(kind::POST_COPY, why, "see the VM's log there, and the agents'")])
}

impl Source {
    /// Waits until nothing is missing any more, and says so.
    pub(super) async fn supplied(&mut self, session: Uuid) -> Result<(), End> {
        let Some(tail) = self.host.post_copies.get(session) else { return Ok(()) };
        let (mut state, mut attending) = (tail.state.clone(), self.attending.take());
        while !tail.is_complete() {
            tokio::select! {
                changed = state.wait_for(|state| *state != State::Missing) => {
                    if let Ok(State::Failed(why)) = changed.map(|state| state.clone()) {
                        return Err(nobody_needs_it(why));
                    }
                }
                end = attended(&mut attending) => return Err(end),
                word = bounds::request(&mut self.receiver) => return Err(interrupted(word)),
            }
        }
        drop(attending);
        let supplied = tail.finish(&self.host, session).await;
        let sums = wire::Sums::new(0, &tail.sums(), 0).sums;
        self.reply(Reply::Supplied(wire::Supplied { sums, ..supplied.into() })).await
    }

    /// A source whose link was lost goes on.
    pub(super) async fn resume(&mut self, resume: wire::Resume, data: &DataConnections) -> Result<(), End> {
        let commit = resume.commit.ok_or_else(|| violation("resumes nothing"))?;
        if let Some(departed) = self.departed(&commit)? {
            // It has ended, or moved on: nothing can be supplied to it any more.
            let supplied = departed.supplied.map(Into::into);
            return self.reply(Reply::Running(wire::Running { supplied, lacked: departed.lacked })).await;
        }
        let secret = Secret::try_from(&resume.secret[..]).map_err(|e| failed("protocol", &e))?;
        let Some(tail) = self.missing_of(&commit).await? else {
            let Some((record, _)) = self.meant(&commit) else { return Err(no_copy(&commit.name)) };
            let supplied = record.supplied.map(Into::into);
            return self.reply(Reply::Running(wire::Running { supplied, lacked: false })).await;
        };
        let Some((record, session)) = self.meant(&commit) else { return Err(no_copy(&commit.name)) };
        if let State::Failed(why) = &*tail.state.borrow() {
            // It is about to be found so by who looks after the machine here, and is told then what became of it.
            return Err(nobody_needs_it(why.clone()));
        }
        tracing::info!(vm = %record.name, pages = tail.memory.left(), "the source of missing memory is back");
        let attendance = tail.relink();
        tail.memory.trust(secret);
        let arrivals = data.expect(session, &self.peer.name);
        for part in Missing::of(&tail.memory.missing()) {
            self.reply(Reply::Missing(part)).await?;
        }
        self.attending = Some(tail.attend(self.sender.clone(), arrivals, attendance));
        self.supplied(session).await?;
        let (qmp, process) = (tail.qmp(), tail.process().cloned());
        drop(tail);
        if let Some(qmp) = qmp {
            let health = health::watch(&qmp, process.as_ref()).await;
            self.reply(Reply::Health(health)).await?;
            // The source closes when it has given everything back.
            let _ = tokio::time::timeout(protocol::deadlines::FIRST_REQUEST, self.next_request()).await;
        }
        Ok(())
    }

    /// What is remembered of a machine that became this host's by this hand-over, and is not here any more.
    fn departed(&self, commit: &wire::Commit) -> Result<Option<Departed>, End> {
        let session = Uuid::from_slice(&commit.session).map_err(|_| violation("names no migration"))?;
        self.host.journal.departed(session).map_err(|e| failed("journal", &e))
    }

    /// What a machine lacks that runs here. None only where it is certain that it lacks nothing: what the source has it
    /// throws away then.
    async fn missing_of(&self, commit: &wire::Commit) -> Result<Option<Arc<Tail>>, End> {
        // The end of a post-copy that is being put on record is waited for.
        for _ in 0..RECOVERIES {
            let Some((record, session)) = self.meant(commit) else { return Err(no_copy(&commit.name)) };
            if record.ownership != Ownership::Owner {
                return Err(violation("resumes a post-copy of a machine that was not handed over"));
            }
            if let Some(tail) = self.host.post_copies.get(session) {
                return Ok(Some(tail));
            }
            if record.post_copy.is_none() {
                return Ok(None);
            }
            // This agent has not been able to take over from one that has ended. Now it may be.
            let deciding = self.host.journal.decide(&record.name).await;
            let still = self.meant(commit).is_some_and(|(now, _)| now.post_copy == record.post_copy);
            drop(deciding);
            if still && let Err(why) = recover(&self.host, &record).await {
                let message = format!("VM {} lacks memory and cannot be given it: {why}", record.name);
                let hint =
                    "the guest waits, its source keeps what it lacks and tries again; see the log there";
                return Err(End::Failed(vec![Finding::new(kind::POST_COPY, message, hint)]));
            }
        }
        let message = format!("VM {} lacks memory and cannot be given it", commit.name);
        Err(End::Failed(vec![Finding::new(
            kind::POST_COPY,
            message,
            "see the log of the destination's agent",
        )]))
    }
}
