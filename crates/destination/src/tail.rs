//! The rest of a machine's memory on its way: what is kept of a post-copy beyond the sessions that bring it.

use std::collections::HashMap;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dirty_tracker::MissingPages;
use link::{AbortHandle, DataReceiver, LinkError};
use mirror::hash::Secret;
use mirror::layout::Layout;
use mirror::memory::destination::Finished;
use mirror::memory::pages::PageSet;
use mirror::memory::post_copy::{Event, Faults, Places, PostCopyDestination, PostCopyError};
use qemu::{Process, Qmp};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

use crate::arrivals::Arrivals;
use crate::end::{End, failed, violation};
use crate::receiving::ReceivingHost;
use crate::sender::Sender;
use crate::waiting::{DEVICE, Waiting};
use finding::{Finding, chain, kind};
use host::Host;
use host::PostCopyMemory;
use host::vm::{GivenDescriptor, PostCopy, Record};
use ownership::{Supplied, VmName};
use protocol::wire::{self, Missing, Reply};
use session::options::MAX_STREAMS;

/// The machines of this host whose memory is not complete, by the migration that brought them. Clones are handles to
/// the same.
#[derive(Debug, Clone, Default)]
pub struct PostCopies {
    tails: Arc<Mutex<HashMap<Uuid, Arc<Tail>>>>,
    recovering: Arc<tokio::sync::Mutex<()>>,
}

impl PostCopies {
    /// There is a connection to the QEMU of the machine that came by this migration, where one waits for the rest of its memory.
    pub fn monitor(&self, session: Uuid, qmp: Qmp) {
        if let Some(tail) = self.get(session) {
            tail.monitor(qmp);
        }
    }

    pub(crate) fn get(&self, session: Uuid) -> Option<Arc<Tail>> {
        self.lock().get(&session).cloned()
    }

    /// To be held while one is taken over from an agent that has ended: both this agent and the source that is back may try.
    pub(super) async fn recovering(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.recovering.lock().await
    }

    fn insert(&self, session: Uuid, tail: Arc<Tail>) {
        self.lock().insert(session, tail);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Uuid, Arc<Tail>>> {
        lock(&self.tails)
    }
}

impl PostCopyMemory for PostCopies {
    fn supplied(&self, session: Uuid) -> Option<Supplied> {
        self.get(session)?.supplied()
    }

    fn end(&self, session: Uuid) {
        let tail = self.lock().remove(&session);
        // Its threads are waited for; not with the others locked out.
        drop(tail);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Words of a memory that is not complete which may wait for who attends: many times what a guest's vCPUs can wait for. A source that sends
/// pages which are not what it says makes more of them.
const MOST_EVENTS: usize = 1 << 16;

/// How far it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum State {
    Missing,
    Complete,
    /// Nobody needs it any more, and why.
    Failed(String),
}

/// The rest of a machine's memory, on its way.
#[derive(Debug)]
pub(crate) struct Tail {
    pub(super) memory: PostCopyDestination,
    events: tokio::sync::Mutex<mpsc::Receiver<Event>>,
    pub(super) state: watch::Receiver<State>,
    link: Mutex<Link>,
    /// Another agent began it: the ledger is not whole, nor are the figures.
    taken_over: bool,
    /// What QEMU was given to make its descriptor from.
    given: Option<GivenDescriptor>,
    process: Option<Process>,
    /// The connection to QEMU, once there is one.
    qmp: Mutex<Option<Qmp>>,
    /// Set by the end, which is made once.
    finished: tokio::sync::Mutex<Option<Supplied>>,
}

/// What belongs to one connection of the source. Another one takes its place.
#[derive(Debug)]
struct Link {
    superseded: CancellationToken,
    ended: mpsc::UnboundedSender<Option<PostCopyError>>,
    aborts: Vec<Arc<AbortHandle>>,
}

/// The ear for one connection of the source.
pub(super) struct Attendance {
    superseded: CancellationToken,
    ended: mpsc::UnboundedReceiver<Option<PostCopyError>>,
}

impl Link {
    fn new() -> (Link, Attendance) {
        let (superseded, (tell, ended)) = (CancellationToken::new(), mpsc::unbounded_channel());
        let link = Link { superseded: superseded.clone(), ended: tell, aborts: Vec::new() };
        (link, Attendance { superseded, ended })
    }

    /// Ends the streams, and whoever attends to them. What they have not brought is missing still.
    fn end(&self) {
        self.superseded.cancel();
        self.aborts.iter().for_each(|abort| abort.abort());
    }
}

impl Tail {
    /// Begins with a copy of which something is missing. What is returned last goes on record before anything can depend on it.
    pub(super) fn begin(
        host: &ReceivingHost,
        record: &Record,
        qmp: Qmp,
        copy: Finished,
        waiting: Waiting,
        streams: Vec<DataReceiver>,
    ) -> Result<(Arc<Tail>, Attendance, PostCopy), End> {
        let Waiting { supplier, places, given } = waiting;
        let descriptor = supplier.number();
        let file = missing_file(host, &record.name);
        let (tell, receivers) = events();
        let memory = PostCopyDestination::start(copy, supplier, places, tell)
            .map_err(|e| failed(kind::POST_COPY, &e))?;
        write(&file, &memory.missing()).map_err(|e| failed(kind::POST_COPY, &e))?;
        let lacks = PostCopy { descriptor, missing: file, given: given.clone() };
        let (tail, attendance) = Tail::of(memory, receivers, given, record, false);
        tail.monitor(qmp);
        for stream in streams {
            tail.attach(stream)?;
        }
        let tail = Arc::new(tail);
        if let Some(session) = record.arrived_by {
            host.post_copies.insert(session, Arc::clone(&tail));
        }
        Ok((tail, attendance, lacks))
    }

    /// Goes on where another agent has ended.
    pub(super) fn resume(
        host: &ReceivingHost,
        record: &Record,
        layout: &Layout,
        missing: PageSet,
        supplier: MissingPages,
        places: Places,
    ) -> Result<(), String> {
        let (Some(session), Some(post_copy)) = (record.arrived_by, &record.post_copy) else { return Ok(()) };
        let secret = Secret::random().map_err(|e| chain(&e))?;
        let (tell, receivers) = events();
        let memory = PostCopyDestination::resume(layout, secret, missing, supplier, places, tell)
            .map_err(|e| chain(&e))?;
        tracing::warn!(vm = %record.name, pages = memory.left(), "memory is missing; its source is awaited");
        let (tail, _) = Tail::of(memory, receivers, post_copy.given.clone(), record, true);
        host.post_copies.insert(session, Arc::new(tail));
        Ok(())
    }

    fn of(
        memory: PostCopyDestination,
        (events, state): (mpsc::Receiver<Event>, watch::Receiver<State>),
        given: Option<GivenDescriptor>,
        record: &Record,
        taken_over: bool,
    ) -> (Tail, Attendance) {
        let (link, attendance) = Link::new();
        let tail = Tail {
            memory,
            events: tokio::sync::Mutex::new(events),
            state,
            link: Mutex::new(link),
            taken_over,
            given,
            process: record.process.clone(),
            qmp: Mutex::default(),
            finished: tokio::sync::Mutex::default(),
        };
        (tail, attendance)
    }

    /// The connection to its QEMU, to give back by it what was given to QEMU.
    pub(super) fn monitor(&self, qmp: Qmp) {
        *lock(&self.qmp) = Some(qmp);
    }

    /// That connection, if there is one.
    pub(super) fn qmp(&self) -> Option<Qmp> {
        lock(&self.qmp).clone()
    }

    pub(super) fn process(&self) -> Option<&Process> {
        self.process.as_ref()
    }

    /// Another connection of the source takes the place of the one there was, which ends at once.
    pub(super) fn relink(&self) -> Attendance {
        let (link, attendance) = Link::new();
        std::mem::replace(&mut *lock(&self.link), link).end();
        attendance
    }

    fn attach(&self, stream: DataReceiver) -> Result<(), End> {
        let abort = Arc::new(stream.abort_handle().map_err(|e| failed("data-stream", &e))?);
        let mut link = lock(&self.link);
        if link.aborts.len() > usize::from(MAX_STREAMS) {
            return Err(violation("opened a data stream too many"));
        }
        link.aborts.push(Arc::clone(&abort));
        let tell = link.ended.clone();
        drop(link);
        let ended = move |error| {
            // The handle keeps the connection open; the source is to see that nobody reads it any more.
            abort.abort();
            let _ = tell.send(error);
        };
        self.memory.attach(stream, ended).map_err(|e| failed("data-stream", &e))
    }

    /// Whether nothing is missing.
    pub(super) fn is_complete(&self) -> bool {
        self.memory.left() == 0 || *self.state.borrow() == State::Complete
    }

    /// Passes on what the guest asks for, and takes in the streams that bring it, as long as the handle is kept. Ends
    /// when that cannot go on, with the reason.
    pub(super) fn attend(
        self: &Arc<Tail>,
        sender: Sender,
        arrivals: Arrivals,
        attendance: Attendance,
    ) -> AbortOnDropHandle<End> {
        let tail = Arc::clone(self);
        AbortOnDropHandle::new(tokio::spawn(async move {
            let Attendance { superseded, ended } = attendance;
            tokio::select! {
                biased;
                () = superseded.cancelled() => End::Link(LinkError::Closed),
                end = tail.pass_on(sender, arrivals, ended) => end,
            }
        }))
    }

    async fn pass_on(
        &self,
        sender: Sender,
        mut arrivals: Arrivals,
        mut ended: mpsc::UnboundedReceiver<Option<PostCopyError>>,
    ) -> End {
        let mut events = self.events.lock().await;
        // What was asked for over a link that was lost is asked for again.
        let mut wanted = self.memory.waited_for();
        loop {
            if !wanted.is_empty() {
                let pages = wanted.drain(..).map(|page| page.0).collect();
                if let Err(lost) = sender.send(Reply::Wanted(wire::Pages { pages })).await {
                    return lost.into();
                }
            }
            tokio::select! {
                Some(event) = events.recv() => match event {
                    Event::Wanted(pages) => wanted = pages,
                    Event::Mismatch(page) => {
                        tracing::warn!(page = page.0, "a page did not come as it was sent");
                        wanted.push(page);
                    }
                    Event::Stuck(_) | Event::Complete | Event::Failed(_) => {}
                },
                Some(error) = ended.recv() => match self.memory.left() {
                    0 => tracing::debug!(?error, "a stream of pages has ended"),
                    left => return ended_too_early(left, error),
                },
                Some((_, receiver)) = arrivals.queue.recv() => {
                    if let Err(end) = self.attach(receiver) {
                        return end;
                    }
                }
                else => return End::Link(LinkError::Closed),
            }
        }
    }

    /// Ends it, everything being there: QEMU waits for nothing any more, and the record says so. Done once, whoever asks.
    pub(super) async fn finish(&self, host: &Host, session: Uuid) -> Supplied {
        let mut finished = self.finished.lock().await;
        if let Some(supplied) = *finished {
            return supplied;
        }
        lock(&self.link).end();
        let faults = tokio::task::block_in_place(|| self.memory.finish());
        tracing::info!(%session, faults = faults.count, longest = ?faults.longest, "nothing is missing any more");
        let supplied = supplied(faults, self.taken_over);
        self.take_descriptor_back().await;
        no_longer_missing(host, session, Some(supplied)).await;
        host.post_copy_memory.end(session);
        *finished = Some(supplied);
        supplied
    }

    /// How the guest has fared, if it lacks nothing any more.
    fn supplied(&self) -> Option<Supplied> {
        self.is_complete().then(|| supplied(self.memory.faults(), self.taken_over))
    }

    /// The ledger sums; none where this agent has not seen all of it.
    pub(super) fn sums(&self) -> Vec<mirror::ledger::Sum> {
        if self.taken_over { Vec::new() } else { self.memory.sums() }
    }

    /// What QEMU was given it need not keep. It may have closed it by itself, with the connection by which it came; its
    /// number may be another's by now.
    async fn take_descriptor_back(&self) {
        let (Some(given), Some(process), Some(qmp)) = (&self.given, &self.process, self.qmp()) else {
            return;
        };
        let link = std::fs::read_link(format!("/proc/{}/fd/{}", process.pid, given.number));
        if !link.is_ok_and(|link| link == Path::new(DEVICE)) {
            return;
        }
        let given = qemu::qmp::GivenDescriptor { set: given.set, number: given.number };
        if let Err(e) = qmp.take_descriptor_back(&given).await {
            tracing::debug!(error = chain(&e), "QEMU keeps a descriptor that it does not need");
        }
    }
}

/// The file that says what a machine lacks.
pub(super) fn missing_file(host: &Host, name: &VmName) -> PathBuf {
    host.run_dir.join(format!("{name}.missing"))
}

fn ended_too_early(left: u64, error: Option<PostCopyError>) -> End {
    let why = error.map(|error| format!(": {}", chain(&error))).unwrap_or_default();
    End::Failed(vec![Finding::new(
        kind::POST_COPY,
        format!("a stream of pages has ended and {left} are still missing{why}"),
        "the guest waits for memory; it is supplied again as soon as that can be",
    )])
}

fn supplied(Faults { count, longest, total }: Faults, taken_over: bool) -> Supplied {
    let us = |time: std::time::Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    Supplied { faults: count, longest_us: us(longest), total_us: us(total), taken_over }
}

/// The record need not speak of what is missing any more. The file that says what was is removed only when the record
/// does not: an agent that finds it spoken of cannot go on without.
pub(super) async fn no_longer_missing(host: &Host, session: Uuid, supplied: Option<Supplied>) {
    let name = host.journal.all().into_iter().find(|record| record.arrived_by == Some(session));
    let Some(Record { name, .. }) = name else { return };
    let _deciding = host.journal.decide(&name).await;
    let Some(mut record) = host.journal.get(&name).filter(|record| record.arrived_by == Some(session)) else {
        return;
    };
    let Some(PostCopy { missing, .. }) = record.post_copy.clone() else { return };
    let whole = |now: &mut Record| {
        now.post_copy = None;
        now.supplied = supplied.or(now.supplied);
    };
    match host.journal.amend(&mut record, whole) {
        Ok(()) => drop(std::fs::remove_file(missing)),
        Err(e) => tracing::error!(vm = %name, error = chain(&e), "the journal cannot be written"),
    }
}

/// Sorts what the memory says: the state for those who wait for it, the rest for who attends.
fn events() -> (impl Fn(Event) + Send + Sync + 'static, (mpsc::Receiver<Event>, watch::Receiver<State>)) {
    let (tell, events) = mpsc::channel(MOST_EVENTS);
    let (set, state) = watch::channel(State::Missing);
    let sort = move |event| match event {
        Event::Complete => drop(set.send_replace(State::Complete)),
        Event::Failed(error) => drop(set.send_replace(State::Failed(chain(&error)))),
        Event::Stuck(error) => {
            tracing::error!(
                error = chain(&error),
                "the guest waits for memory that cannot be given to it now"
            );
        }
        // Of a page that came wrong it is asked again when the guest, or the next link, lacks it.
        event => drop(tell.try_send(event)),
    };
    (sort, (events, state))
}

fn write(file: &Path, missing: &PageSet) -> std::io::Result<()> {
    let bytes: Vec<u8> = missing.words().iter().flat_map(|word| word.to_le_bytes()).collect();
    // Anew, so that it is nobody else's, whoever had it.
    match std::fs::remove_file(file) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut open = std::fs::OpenOptions::new();
    open.write(true).create_new(true).mode(0o600).open(file)?.write_all(&bytes)
}

pub(super) fn read(file: &Path, layout: &Layout) -> std::io::Result<PageSet> {
    let mut missing = PageSet::new(layout.end());
    let bytes = std::fs::read(file)?;
    let part = Missing { first: 0, bits: bytes, more: false };
    match part.add_to(&mut missing) {
        true => Ok(missing),
        false => Err(std::io::ErrorKind::InvalidData.into()),
    }
}
