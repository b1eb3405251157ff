//! The destination's controller: reserves, holds the copy, becomes the owner when told.
//!
//! ```text
//!            Reserve                    Load                     Commit
//!   (nothing) ─────► copy, mirrored ─────────► ready, paused ──────────► owner, runs
//!                         │ Cancel, any failure      │ Cancel
//!                         ▼                          ▼
//!                     (nothing)                  (nothing)
//! ```
//!
//! A copy that is not ready is thrown away whatever goes wrong. A copy that is ready is not: the source may have handed
//! the machine over, and the word of it may be on its way. It stays paused until the source, on a new connection if
//! need be, or a person says what it is to be.
mod arrivals;
mod copy;
pub(crate) mod forwarded;
pub(crate) mod images;
pub(crate) mod network;
mod owner;
pub(crate) mod post_copy;
mod relay;
mod storage;
mod tail;

pub use arrivals::DataConnections;
pub use post_copy::PostCopies;

use std::sync::Arc;
use std::time::Duration;

use link::{Control, ControlReceiver, ControlSender, Peer};
use mirror::memory::destination::MemoryDestination;
use mirror::memory::{Ram, RamFile};
use qemu::{Qmp, Spec};
use tokio::sync::{Mutex, mpsc};
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

use arrivals::Arrivals;
use copy::{Copy, Upkeep};
use relay::Relay;

use crate::boot_files::Arriving;
use crate::failure::{Finding, chain, kind};
use crate::host::Host;
use crate::lifecycle;
use crate::reservation::{Request, Reservation};
use crate::vm::{Ownership, Record, Vm};
use crate::wire::{self, Reply, Request as Asked, ToDestination, ToSource};
/// How long a source may take to say what it wants.
const FIRST_WORD: Duration = Duration::from_secs(10);

/// Why a session did not become a machine here.
#[derive(Debug)]
pub(super) enum End {
    /// The source gave it up.
    Cancelled,
    /// The link is gone.
    Link(link::LinkError),
    /// Something failed here.
    Failed(Vec<Finding>),
}

impl From<link::LinkError> for End {
    fn from(error: link::LinkError) -> End {
        End::Link(error)
    }
}

pub(super) fn failed(kind: &str, error: &dyn std::error::Error) -> End {
    End::Failed(vec![Finding::new(kind, chain(error), "see the log of the destination's agent")])
}

pub(super) fn violation(what: &str) -> End {
    let hint = "see whether both agents are of the same version";
    End::Failed(vec![Finding::new("protocol", format!("the source {what}"), hint)])
}

/// Serves one control connection from its first word to its end. `arrived` is called when a machine has become this
/// host's and runs.
pub async fn serve(
    host: Arc<Host>,
    control: Control,
    peer: Peer,
    data: DataConnections,
    arrived: impl Fn(Vm) + Send,
) {
    let (sender, mut receiver) = control.split();
    let first = timeout(FIRST_WORD, receiver.receive::<ToDestination>()).await;
    let Ok(Ok(ToDestination { request: Some(first) })) = first else {
        tracing::warn!(%peer, "a source connected and said nothing");
        return;
    };
    let sender = Sender(Arc::new(Mutex::new(sender)));
    let mut source = Source {
        host,
        peer,
        sender,
        receiver,
        attending: None,
        frames: network::Frames::default(),
        interfaces: None,
    };
    let ended = match first {
        Asked::Reserve(reserve) => source.session(reserve, &data, &arrived).await,
        Asked::Commit(commit) => source.settle(&commit, &arrived).await,
        Asked::Cancel(commit) => source.abandon(&commit).await,
        Asked::Resume(resume) => source.resume(resume, &data).await,
        Asked::EndForwarding(commit) => source.end_forwarding(&commit).await,
        _ => Err(violation("began with a message out of order")),
    };
    if let Err(end) = ended {
        source.tell(end).await;
    }
}

/// The source at the other end of a control connection.
pub(super) struct Source {
    pub(super) host: Arc<Host>,
    pub(super) peer: Peer,
    pub(super) sender: Sender,
    pub(super) receiver: ControlReceiver,
    /// Passes on what a guest asks for whose memory is not complete.
    pub(super) attending: Option<AbortOnDropHandle<End>>,
    /// What is on its way to the guest.
    frames: network::Frames,
    /// The interfaces that it is to have here, being looked for.
    interfaces: Option<tokio::task::JoinHandle<network::Interfaces>>,
}

/// The way to the source, for several tasks. A message is sent whole, one after the other.
#[derive(Debug, Clone)]
pub(super) struct Sender(Arc<Mutex<ControlSender>>);

impl Sender {
    pub(super) async fn send(&self, reply: Reply) -> Result<(), link::LinkError> {
        self.0.lock().await.send(&ToSource::from(reply)).await
    }
}

impl Source {
    pub(super) async fn reply(&mut self, reply: Reply) -> Result<(), End> {
        Ok(self.sender.send(reply).await?)
    }

    async fn tell(&mut self, end: End) {
        let told = match end {
            End::Cancelled => self.reply(Reply::Cancelled(wire::Nothing {})).await,
            End::Failed(findings) => {
                tracing::warn!(peer = %self.peer, ?findings, "a migration to here failed");
                self.reply(Reply::Failed(findings.into())).await
            }
            End::Link(error) => {
                tracing::warn!(peer = %self.peer, error = chain(&error), "the link to a source is gone");
                return;
            }
        };
        if told.is_ok() {
            // The source closes when it has read it.
            let _ = timeout(FIRST_WORD, self.receiver.receive::<ToDestination>()).await;
        }
    }

    /// One migration: reserve, mirror, ready, owner.
    async fn session(
        &mut self,
        reserve: wire::Reserve,
        data: &DataConnections,
        arrived: &(impl Fn(Vm) + Send),
    ) -> Result<(), End> {
        if !self.host.allow.peers.contains(&self.peer.name) {
            let finding = Finding::new(
                "peer-not-allowed",
                format!("{} does not take VMs from {}", self.host.name, self.peer.name),
                format!(
                    "add {:?} to [allow] peers in the configuration of {}",
                    self.peer.name, self.host.name
                ),
            );
            return self.reply(Reply::Refused(vec![finding].into())).await;
        }
        if let Ok(Err(gone)) = timeout(Duration::ZERO, self.receiver.receive::<ToDestination>()).await {
            // A source that has left means nothing by what it said before.
            return Err(gone.into());
        }
        let mut request =
            Request::decode(reserve, &self.peer).map_err(|finding| End::Failed(vec![finding]))?;
        if !request.rehearsal {
            self.take_in_boot_files(&mut request).await?;
        }
        let arrivals = data.expect(request.session, &self.peer.name);
        let reserved = tokio::select! {
            reserved = request.reserve(&self.host, &self.peer.name) => reserved,
            word = self.receiver.receive::<ToDestination>() => {
                self.forget_session(&request).await;
                return Err(interrupted(word));
            }
        };
        let reservation = match reserved {
            Ok(reservation) => reservation,
            Err(refusal) => {
                self.reply(Reply::Refused(refusal.into())).await?;
                return Ok(());
            }
        };
        if request.rehearsal {
            let reserved = Some(storage::reserved(&reservation.images));
            lifecycle::forget(&self.host, &reservation.record, Some(&reservation.qmp)).await;
            let none = wire::Findings { reserved, ..wire::Findings::default() };
            return self.reply(Reply::Refused(none)).await;
        }
        request.shipped.are_recorded();
        tracing::info!(vm = %request.name, session = %request.session, peer = %self.peer, "reserved");
        let (record, spec) = (reservation.record.clone(), reservation.spec.clone());
        self.interfaces = Some(tokio::spawn(async move { network::Interfaces::of(&record, &spec).await }));
        let copied = match request.qemu_stream {
            true => self.relay(reservation, arrivals).await,
            false => self.mirror(&request, reservation, arrivals).await,
        };
        match copied {
            Ok((record, spec, qmp)) => self.await_commit(record, spec, qmp, arrived).await,
            Err(end) => {
                self.forget_session(&request).await;
                Err(end)
            }
        }
    }

    /// Has the source ship what the machine boots from and this host does not have.
    async fn take_in_boot_files(&mut self, request: &mut Request) -> Result<(), End> {
        let lacking = request.lacking_files(&self.host);
        // For a machine that is refused nothing is shipped.
        if lacking.is_empty() || !request.is_welcome(&self.host, &self.peer.name).await {
            return Ok(());
        }
        let paths = lacking.iter().map(|file| file.path.clone()).collect();
        self.reply(Reply::Lacking(wire::Lacking { paths })).await?;
        for described in &lacking {
            let failed = |e: std::io::Error| failed("file-not-shipped", &e);
            let mut arriving = Arriving::new(described).map_err(failed)?;
            while !arriving.is_whole() {
                let part = match self.receiver.receive::<ToDestination>().await {
                    Ok(ToDestination { request: Some(Asked::FilePart(part)) }) => part,
                    word => return Err(interrupted(word)),
                };
                if !arriving.take(&part).map_err(failed)? {
                    return Err(violation("sends more of a file than there is"));
                }
            }
            match arriving.finish(&self.host, &request.secret) {
                Ok(path) => request.shipped.add(path),
                Err(finding) => return Err(End::Failed(vec![finding])),
            }
        }
        Ok(())
    }

    /// Throws away what this session has made; by now the name may be another's.
    async fn forget_session(&self, request: &Request) {
        let ours = |record: &Record| record.arrived_by == Some(request.session);
        if let Some(record) = self.host.journal.get(&request.name).filter(ours) {
            lifecycle::forget(&self.host, &record, None).await;
        }
    }

    /// Holds the copy until it is complete and loaded.
    async fn mirror(
        &mut self,
        request: &Request,
        mut reservation: Reservation,
        mut arrivals: Arrivals,
    ) -> Result<(Record, Spec, Qmp), End> {
        let places = post_copy::places(&reservation.ram);
        let files = reservation
            .ram
            .drain(..)
            .map(|block| RamFile {
                offset: block.mappings.first().map_or(0, |m| m.file_offset),
                file: block.file,
            })
            .collect();
        let ram = Ram::new(request.layout.clone(), files).map_err(|e| failed("ram", &e))?;
        let (tell, events) = mpsc::unbounded_channel();
        let told = tell.clone();
        let memory =
            MemoryDestination::start(ram, request.secret.clone(), move |event| drop(tell.send(event)))
                .map_err(|e| failed("ram", &e))?;
        let storage = storage::begin(&self.host, request, &mut reservation, told).await?;
        let mut copy = Copy {
            streams: usize::from(request.layout.streams()),
            reservation,
            memory: Upkeep { memory: Some(memory), storage, aborts: Vec::new() },
            events,
            attached: vec![false; usize::from(request.layout.streams())],
            barrier: None,
            last: None,
            places,
            waiting: None,
            supply: Vec::new(),
        };
        self.reply(Reply::Reserved(storage::reserved(&copy.reservation.images))).await?;
        storage::tell_contents(&copy, self).await?;
        copy.run(self, &mut arrivals).await?;
        if let Some((tail, attendance)) = copy.memory_is_complete(&self.host)? {
            self.attending = Some(tail.attend(self.sender.clone(), arrivals, attendance));
        }
        tokio::select! {
            loaded = copy.load_all() => loaded?,
            // QEMU may wait for a page that cannot come any more.
            end = post_copy::attended(&mut self.attending) => return Err(end),
            word = self.receiver.receive::<ToDestination>() => return Err(interrupted(word)),
        }
        self.ready(copy.reservation)
    }

    /// Holds the copy while QEMU loads its own stream, until that is complete.
    async fn relay(
        &mut self,
        reservation: Reservation,
        mut arrivals: Arrivals,
    ) -> Result<(Record, Spec, Qmp), End> {
        self.reply(Reply::Reserved(wire::Reserved::default())).await?;
        let reservation = Relay::new(reservation).run(self, &mut arrivals).await?;
        self.ready(reservation)
    }

    /// The copy is complete and loaded: on record before the source hears of it.
    fn ready(&self, reservation: Reservation) -> Result<(Record, Spec, Qmp), End> {
        let Reservation { mut record, spec, qmp, .. } = reservation;
        if let Ownership::Incoming { ready, .. } = &mut record.ownership {
            *ready = true;
        }
        self.host.journal.update(&record).map_err(|e| failed("journal", &e))?;
        Ok((record, spec, qmp))
    }
}

/// What a source has to say while it should wait: that it does not want the copy, or that it is not there any more.
fn interrupted(word: Result<ToDestination, link::LinkError>) -> End {
    match word {
        Ok(ToDestination { request: Some(Asked::Cancel(_)) }) => End::Cancelled,
        Ok(_) => violation("sent a message out of order"),
        Err(error) => error.into(),
    }
}

pub(super) fn no_copy(name: &str) -> End {
    let message = format!("the destination has no complete copy of VM {name}");
    End::Failed(vec![Finding::new(kind::NO_COPY, message, "see the destination's log")])
}

pub(super) fn qemu_gone() -> End {
    let message = "QEMU at the destination has ended";
    End::Failed(vec![Finding::new("qemu-gone", message, "see QEMU's log there")])
}
