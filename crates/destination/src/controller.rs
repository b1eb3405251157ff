//! One session of a source, phase after phase: reserved, mirrored, loaded, ready; then it waits for the source's word.

use std::sync::Arc;
use std::time::Duration;

use link::{Control, Peer};
use mirror::memory::Ram;
use mirror::memory::destination::MemoryDestination;
use qemu::{Qmp, Spec};
use tokio::sync::Mutex;
use tokio::time::timeout;
use uuid::Uuid;

use crate::arrivals::{Arrivals, DataConnections};
use crate::boot_files::Arriving;
use crate::copy::{Copy, Upkeep};
use crate::end::{End, failed, interrupted, no_copy, too_slow, violation};
use crate::events::Events;
use crate::receiving::ReceivingHost;
use crate::relay::Relay;
use crate::reservation::{Request, Reservation};
use crate::sender::Sender;
use crate::source::Source;
use crate::{network, post_copy, storage, waiting};
use finding::{Finding, chain, kind};
use host::Host;
use host::lifecycle::{self, Forgotten};
use host::vm::{PostCopy, Record, Vm};
use movable::confinement;
use ownership::VmName;
use ownership::{Effect, Event, Response};
use protocol::deadlines::{BOOT_FILES, FIRST_REQUEST, FOUND};
use protocol::wire::bounds::{self, Unheard};
use protocol::wire::{self, Reply, Request as Asked};
use session::points::{self, Point};

/// Serves one control connection from its first request to its end. `arrived` is called when a machine has become this
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
    let first = match timeout(FIRST_REQUEST, source.next_request()).await {
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
        let _ = timeout(FIRST_REQUEST, source.next_request()).await;
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

impl Source {
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
        if let Ok(word) = timeout(Duration::ZERO, self.next_request()).await {
            // A source that has left, or does not want the copy any more, means nothing by what it said before.
            return Err(interrupted(word));
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
                let part = match self.next_request().await {
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
        let places = waiting::places(&reservation.ram);
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
            may_lack: request.post_copy,
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
            [Effect::Respond(Response::Ready)] => Ok((record, spec, qmp)),
            _ => Err(no_copy(record.name.as_ref())),
        }
    }
}
