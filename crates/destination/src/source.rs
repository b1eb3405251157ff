//! The source at the other end of a control connection: what it says, and what it is told.

use std::sync::Arc;

use link::{ControlReceiver, Peer};
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

use crate::end::{End, with_its_words};
use crate::network;
use crate::receiving::ReceivingHost;
use crate::sender::Sender;
use finding::chain;
use ownership::VmName;
use protocol::deadlines::FIRST_REQUEST;
use protocol::wire::bounds::{self, Unheard};
use protocol::wire::{self, Reply, Request as Asked};

/// The source at the other end of a control connection.
pub(crate) struct Source {
    pub(crate) host: Arc<ReceivingHost>,
    pub(crate) peer: Peer,
    pub(crate) sender: Sender,
    pub(crate) receiver: ControlReceiver,
    /// Passes on what a guest asks for whose memory is not complete.
    pub(crate) attending: Option<AbortOnDropHandle<End>>,
    /// Says that a reservation is still worked on, until anything else is said.
    pub(crate) working: Option<AbortOnDropHandle<()>>,
    /// What is on its way to the guest.
    pub(crate) frames: network::Frames,
    /// The interfaces that it is to have here, being looked for.
    pub(crate) interfaces: Option<tokio::task::JoinHandle<network::Interfaces>>,
}

impl Source {
    /// Whether a peer is told that there is such a machine, though nothing can be said of it now. Who is not allowed here, and has not
    /// sent it, hears what it would hear if there were none.
    pub(crate) fn may_know_of(&self, first: &Asked) -> bool {
        let is_its = match first {
            Asked::Commit(commit) | Asked::Cancel(commit) => self.meant(commit).is_some(),
            Asked::Resume(resume) => {
                resume.commit.as_ref().is_some_and(|commit| self.meant(commit).is_some())
            }
            _ => false,
        };
        is_its || self.host.allow.peers.contains(&self.peer.name)
    }

    /// What the source says next. Nothing is lost when this is cancelled.
    pub(crate) async fn next_request(&mut self) -> Result<Asked, Unheard> {
        bounds::request(&mut self.receiver).await
    }

    pub(crate) async fn reply(&mut self, mut reply: Reply) -> Result<(), End> {
        // What is said of a copy is worth something from the agent only that has the record of it.
        match &mut reply {
            Reply::Failed(findings) => findings.keeper = self.host.journal.identity().into(),
            Reply::Reserved(reserved) => reserved.keeper = self.host.journal.identity().into(),
            _ => {}
        }
        self.working = None;
        Ok(self.sender.send(reply).await?)
    }

    pub(crate) async fn tell(&mut self, end: End, vm: Option<&VmName>) {
        let reply = match (end, vm) {
            (End::Cancelled, _) => Ok(Reply::Cancelled(wire::Nothing {})),
            (End::Failed(findings), _) => Err(findings),
            (End::Qemu(finding), Some(vm)) => Err(vec![with_its_words(&self.host, vm, finding)]),
            (End::Qemu(finding), None) => Err(vec![finding]),
            (End::Link(error), _) => {
                tracing::warn!(peer = %self.peer, error = chain(&error), "the link to a source is gone");
                return;
            }
        };
        let reply = reply.unwrap_or_else(|findings| {
            tracing::warn!(peer = %self.peer, ?findings, "a migration to here failed");
            Reply::Failed(findings.into())
        });
        let told = self.reply(reply).await;
        if told.is_ok() {
            // The source closes when it has read it.
            let _ = timeout(FIRST_REQUEST, self.next_request()).await;
        }
    }
}
