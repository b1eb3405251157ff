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
pub mod boot_files;
mod copy;
mod events;
pub mod forwarded;
#[cfg(fuzzing)]
pub mod fuzzing;
pub mod health;
mod images;
pub mod network;
mod owner;
pub mod post_copy;
mod receiving;
mod relay;
mod reservation;
mod storage;
mod tail;

pub use arrivals::DataConnections;
pub use receiving::ReceivingHost;
pub use reservation::CPU_FEATURE_MISSING;
pub use tail::PostCopies;

use std::sync::Arc;
use std::time::Duration;

use link::{Control, ControlReceiver, ControlSender, Peer};
use mirror::memory::Ram;
use mirror::memory::destination::MemoryDestination;
use qemu::{Qmp, Spec};
use tokio::sync::Mutex;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

use arrivals::Arrivals;
use copy::{Copy, Upkeep};
use events::Events;
use relay::Relay;

use crate::boot_files::Arriving;
use crate::reservation::{Request, Reservation};
use finding::{Finding, chain, kind};
use host::Host;
use host::lifecycle::{self, Forgotten};
use host::vm::{PostCopy, Record, Vm};
use movable::confinement;
use ownership::VmName;
use ownership::{Effect, Event, Word};
use protocol::deadlines::{BOOT_FILES, FIRST_WORD, FOUND, WORKING};
use protocol::wire::bounds::{self, Unheard};
use protocol::wire::{self, Reply, Request as Asked, ToSource};
use session::points::{self, Point};

/// Why a session did not become a machine here.
#[derive(Debug)]
pub(crate) enum End {
    /// The source gave it up.
    Cancelled,
    /// The link is gone.
    Link(link::LinkError),
    /// Something failed here.
    Failed(Vec<Finding>),
    /// The QEMU here has failed, and may have said why.
    Qemu(Finding),
}

impl From<link::LinkError> for End {
    fn from(error: link::LinkError) -> End {
        End::Link(error)
    }
}

pub(crate) fn failed(kind: &str, error: &dyn std::error::Error) -> End {
    End::Failed(vec![Finding::new(kind, chain(error), "see the log of the destination's agent")])
}

impl From<Unheard> for End {
    fn from(unheard: Unheard) -> End {
        match unheard {
            Unheard::Link(error) => End::Link(error),
            Unheard::Violation(what) => violation(&what),
        }
    }
}

pub(crate) fn violation(what: &str) -> End {
    let hint = "see whether both agents are of the same version";
    End::Failed(vec![Finding::new(kind::PROTOCOL, format!("the source {what}"), hint)])
}

/// Serves one control connection from its first word to its end. `arrived` is called when a machine has become this
/// host's and runs. Gives the machine of which it may have left a copy.
pub async fn serve(
    host: Arc<ReceivingHost>,
    control: Control,
    peer: Peer,
    data: DataConnections,
    arrived: impl Fn(Vm) + Send,
) -> Option<VmName> {
    let (sender, receiver) = control.split();
    let sender = Sender(Arc::new(Mutex::new(sender)));
    let mut source = Source {
        host,
        peer,
        sender,
        receiver,
        attending: None,
        working: None,
        frames: network::Frames::default(),
        interfaces: None,
    };
    let first = match timeout(FIRST_WORD, source.word()).await {
        Ok(Ok(first)) => first,
        Ok(Err(Unheard::Violation(what))) => {
            source.tell(violation(&what), None).await;
            return None;
        }
        Ok(Err(Unheard::Link(_))) | Err(_) => {
            tracing::warn!(peer = %source.peer, "a source connected and said nothing");
            return None;
        }
    };
    if source.may_know_of(&first)
        && let Err(why) = can_be_told(&source.host, first.vm()).await
    {
        let refused = vec![why].into();
        let word =
            if matches!(first, Asked::Reserve(_)) { Reply::Refused(refused) } else { Reply::Failed(refused) };
        // The source asks again.
        let _ = source.reply(word).await;
        let _ = timeout(FIRST_WORD, source.word()).await;
        return None;
    }
    let vm = first.vm().parse::<VmName>().ok();
    let session = match &first {
        Asked::Reserve(reserve) => Uuid::from_slice(&reserve.session).ok(),
        Asked::Cancel(commit) => Uuid::from_slice(&commit.session).ok(),
        _ => None,
    };
    let asks_only = matches!(first, Asked::Whose(_) | Asked::Released(_) | Asked::EndForwarding(_));
    let ended = match first {
        Asked::Reserve(reserve) => source.session(reserve, &data, &arrived).await,
        Asked::Commit(commit) => source.settle(&commit, &arrived).await,
        Asked::Cancel(commit) => source.abandon(&commit).await,
        Asked::Resume(resume) => source.resume(resume, &data).await,
        Asked::EndForwarding(commit) => source.end_forwarding(&commit).await,
        Asked::Whose(commit) => source.whose(&commit).await,
        Asked::Released(commit) => source.let_go(&commit),
        other => Err(violation(&format!("began with {other}"))),
    };
    if let Err(end) = ended {
        if let (End::Cancelled, Some(session)) = (&end, session) {
            source.host.left.source_has_it(session);
        }
        source.tell(end, vm.as_ref()).await;
    }
    vm.filter(|_| !asks_only)
}

/// Whether this agent knows what it has of a machine; of one of which it does not, it answers nothing else than that.
async fn can_be_told(host: &Host, vm: &str) -> Result<(), Finding> {
    host.recovering.found(vm, FOUND).await?;
    match host.journal.unreadable().iter().find(|(name, _)| name.as_ref() == vm) {
        None => Ok(()),
        Some((name, error)) => Err(Finding::new(
            kind::RECORD_UNREADABLE,
            format!("the record of {name} on {} cannot be read: {}", host.name, chain(error)),
            format!("see `vmirror show {name}` there"),
        )),
    }
}

/// The source at the other end of a control connection.
pub(crate) struct Source {
    pub(crate) host: Arc<ReceivingHost>,
    pub(crate) peer: Peer,
    pub(crate) sender: Sender,
    pub(crate) receiver: ControlReceiver,
    /// Passes on what a guest asks for whose memory is not complete.
    pub(crate) attending: Option<AbortOnDropHandle<End>>,
    /// Says that a reservation is still worked on, until anything else is said.
    working: Option<AbortOnDropHandle<()>>,
    /// What is on its way to the guest.
    frames: network::Frames,
    /// The interfaces that it is to have here, being looked for.
    interfaces: Option<tokio::task::JoinHandle<network::Interfaces>>,
}

/// The way to the source, for several tasks. A message is sent whole, one after the other.
#[derive(Debug, Clone)]
pub(crate) struct Sender(Arc<Mutex<ControlSender>>);

impl Source {
    /// Whether a peer is told that there is such a machine, though nothing can be said of it now. Who is not allowed here, and has not
    /// sent it, hears what it would hear if there were none.
    fn may_know_of(&self, first: &Asked) -> bool {
        let is_its = match first {
            Asked::Commit(commit) | Asked::Cancel(commit) => self.meant(commit).is_some(),
            Asked::Resume(resume) => {
                resume.commit.as_ref().is_some_and(|commit| self.meant(commit).is_some())
            }
            _ => false,
        };
        is_its || self.host.allow.peers.contains(&self.peer.name)
    }
}

impl Sender {
    pub(crate) async fn send(&self, reply: Reply) -> Result<(), link::LinkError> {
        self.0.lock().await.send(&ToSource::from(reply)).await
    }

    fn say_that_it_is_worked_on(&self) -> AbortOnDropHandle<()> {
        let sender = self.clone();
        AbortOnDropHandle::new(tokio::spawn(async move {
            loop {
                tokio::time::sleep(WORKING).await;
                if sender.send(Reply::Working(wire::Nothing {})).await.is_err() {
                    return;
                }
            }
        }))
    }
}

impl Source {
    /// What the source says next. Nothing is lost when this is cancelled.
    pub(crate) async fn word(&mut self) -> Result<Asked, Unheard> {
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

    async fn tell(&mut self, end: End, vm: Option<&VmName>) {
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
            let _ = timeout(FIRST_WORD, self.word()).await;
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
        if let Ok(Err(gone)) = timeout(Duration::ZERO, self.word()).await {
            // A source that has left means nothing by what it said before.
            return Err(gone.into());
        }
        let mut request =
            Request::decode(reserve, &self.peer).map_err(|finding| End::Failed(vec![finding]))?;
        if !request.rehearsal {
            let shipped = timeout(BOOT_FILES, self.take_in_boot_files(&mut request)).await;
            shipped.unwrap_or_else(|_| Err(too_slow(&self.host.name)))?;
        }
        let arrivals = data.expect(request.session, &self.peer.name);
        self.working = request.patient.then(|| self.sender.say_that_it_is_worked_on());
        let reserved = tokio::select! {
            reserved = request.reserve(&self.host, &self.peer.name) => reserved,
            word = bounds::request(&mut self.receiver) => {
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
            let forgotten = lifecycle::forget(&self.host, &reservation.record, Some(&reservation.qmp)).await;
            if let Forgotten::Lingers(why) = forgotten {
                return Err(End::Failed(vec![why]));
            }
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
            Ok((record, spec, qmp)) => {
                points::reach(Point::Ready).await;
                self.await_commit(record, spec, qmp, arrived).await
            }
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
                let part = match self.word().await {
                    Ok(Asked::FilePart(part)) => part,
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

    /// Throws away what this session has made, if it is not complete; by now the name may be another's.
    async fn forget_session(&self, request: &Request) {
        lifecycle::session_over(&self.host, &request.name, request.session).await;
    }

    /// Holds the copy until it is complete and loaded.
    async fn mirror(
        &mut self,
        request: &Request,
        mut reservation: Reservation,
        mut arrivals: Arrivals,
    ) -> Result<(Record, Spec, Qmp), End> {
        let places = post_copy::places(&reservation.ram);
        let pid = reservation.record.process.as_ref().map_or(0, |process| process.pid);
        let files = reservation.ram.drain(..).map(|block| movable::ram::file_of(block, pid)).collect();
        let ram = Ram::new(request.layout.clone(), files).map_err(|e| failed("ram", &e))?;
        let (tell, events) = Events::of(&request.layout, storage::blocks(request, &reservation.images));
        let told = tell.clone();
        let memory = MemoryDestination::start(ram, request.secret.clone(), move |event| tell.tell(event))
            .map_err(|e| failed("ram", &e))?;
        let storage = storage::begin(&self.host, request, &mut reservation, told).await?;
        let known_filters = confinement::known(&self.host, &reservation.record, &reservation.spec);
        let mut copy = Copy {
            streams: usize::from(request.layout.streams()),
            known_filters,
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
        let mut lacks = None;
        if let Some((tail, attendance, what)) = copy.memory_is_complete(&self.host)? {
            self.attending = Some(tail.attend(self.sender.clone(), arrivals, attendance));
            lacks = Some(what);
        }
        points::reach(Point::LoadHeard).await;
        tokio::select! {
            loaded = copy.load_all(&self.host) => loaded?,
            // QEMU may wait for a page that cannot come any more.
            end = post_copy::attended(&mut self.attending) => return Err(end),
            word = bounds::request(&mut self.receiver) => return Err(interrupted(word)),
        }
        points::reach(Point::Loaded).await;
        self.ready(copy.reservation, lacks)
    }

    /// Holds the copy while QEMU loads its own stream, until that is complete.
    async fn relay(
        &mut self,
        reservation: Reservation,
        mut arrivals: Arrivals,
    ) -> Result<(Record, Spec, Qmp), End> {
        self.reply(Reply::Reserved(wire::Reserved::default())).await?;
        let reservation = Relay::new(reservation).run(self, &mut arrivals).await?;
        self.ready(reservation, None)
    }

    /// The copy is loaded, and complete but for what it `lacks` and will be given: on record before the source hears of it.
    fn ready(&self, reservation: Reservation, lacks: Option<PostCopy>) -> Result<(Record, Spec, Qmp), End> {
        let Reservation { mut record, spec, qmp, .. } = reservation;
        let session = record.arrived_by.unwrap_or_default();
        let loaded = |now: &mut Record| {
            now.made.storage_daemon = None;
            now.post_copy = lacks;
        };
        let effects = self.host.journal.on(&mut record, Event::Copied { session }, loaded);
        match effects.map_err(|e| failed("journal", &e))?[..] {
            [Effect::Say(Word::Ready)] => Ok((record, spec, qmp)),
            _ => Err(no_copy(record.name.as_ref())),
        }
    }
}

/// What a source has to say while it should wait: that it does not want the copy, or that it is not there any more.
fn interrupted(word: Result<Asked, Unheard>) -> End {
    match word {
        Ok(Asked::Cancel(_)) => End::Cancelled,
        Ok(other) => violation(&format!("sent {other} out of order")),
        Err(error) => error.into(),
    }
}

fn too_slow(host: &str) -> End {
    let message = format!("the files that the VM boots from were not here within {BOOT_FILES:?}");
    let hint = format!("copy them to {host}, under the same paths, or allow the migration more bandwidth");
    End::Failed(vec![Finding::new("file-not-shipped", message, hint)])
}

pub(crate) fn no_copy(name: &str) -> End {
    let message = format!("the destination has no complete copy of VM {name}");
    End::Failed(vec![Finding::new(kind::NO_COPY, message, "see the destination's log")])
}

pub(crate) fn unknown_copy(host: &str, name: &str) -> End {
    let message = format!(
        "{host} knows nothing of that copy of VM {name}: its state directory is another one, or has been lost or set back; the VM may have run there"
    );
    let hint = "see whether its QEMU runs there; then use `vmirror resolve`";
    End::Failed(vec![Finding::new(kind::UNKNOWN_COPY, message, hint)])
}

pub(crate) fn qemu_gone() -> End {
    End::Qemu(Finding::new("qemu-gone", "QEMU at the destination has ended", ""))
}

/// What is wrong with the QEMU of a machine, with the last that it has said and where the rest is.
fn with_its_words(host: &Host, vm: &VmName, finding: Finding) -> Finding {
    let said = host.logs.last_words(vm).map(|said| format!("; it said: {said}")).unwrap_or_default();
    let log = format!("see its log there, {}", host.logs.of_ended(vm).display());
    let hint = if finding.hint.is_empty() { log } else { format!("{log}; {}", finding.hint) };
    Finding::new(&finding.kind, format!("{}{said}", finding.message), hint)
}
