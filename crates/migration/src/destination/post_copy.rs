//! Post-copy at the destination: the machine runs, and what it lacks is asked for.
//!
//! What is missing is kept apart from the session that brings it: when the link is lost the guest waits at the next page
//! that it lacks, and goes on when its source has connected again. When this agent ends, QEMU keeps the guest waiting by
//! its own descriptor until the next agent has taken over ([`recover`]).

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use dirty_tracker::{DescriptorSource, MissingPages};
use link::{AbortHandle, DataReceiver};
use mirror::hash::Secret;
use mirror::layout::{Layout, PAGE_SIZE};
use mirror::memory::destination::Finished;
use mirror::memory::pages::PageSet;
use mirror::memory::post_copy::{Event, Faults, Places, PostCopyDestination};
use mirror::memory::source::TrackedRange;
use mirror::memory::{Ram, RamFile};
use qemu::qmp::GivenDescriptor;
use qemu::{Qmp, RamBlock, Spec};
use tokio::sync::{mpsc, watch};
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

use super::arrivals::{Arrivals, DataConnections};
use super::{End, Sender, Source, failed, interrupted, no_copy, violation};
use crate::failure::{Finding, chain};
use crate::host::Host;
use crate::options::MAX_STREAMS;
use crate::vm::{Ownership, PostCopy, Record};
use crate::wire::{self, Missing, Reply};

/// Where full userfaultfds come from.
pub(crate) const DEVICE: &str = "/dev/userfaultfd";

/// Whether processes without privileges may have them.
const UNPRIVILEGED: &str = "/proc/sys/vm/unprivileged_userfaultfd";

/// The machines of this host whose memory is not complete, by the migration that brought them. Clones are handles to
/// the same.
#[derive(Debug, Clone, Default)]
pub struct PostCopies(Arc<Mutex<HashMap<Uuid, Arc<Tail>>>>);

impl PostCopies {
    pub(crate) fn get(&self, session: Uuid) -> Option<Arc<Tail>> {
        self.lock().get(&session).cloned()
    }

    pub(crate) fn remove(&self, session: Uuid) {
        let tail = self.lock().remove(&session);
        // Its threads are waited for; not with the others locked out.
        drop(tail);
    }

    fn insert(&self, session: Uuid, tail: Arc<Tail>) {
        self.lock().insert(session, tail);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Uuid, Arc<Tail>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How far it is.
#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Missing,
    Complete,
    Failed(String),
}

/// The rest of a machine's memory, on its way.
#[derive(Debug)]
pub(crate) struct Tail {
    memory: PostCopyDestination,
    events: tokio::sync::Mutex<mpsc::UnboundedReceiver<Event>>,
    state: watch::Receiver<State>,
    aborts: Mutex<Vec<AbortHandle>>,
    /// Another agent began it: the ledger is not whole.
    taken_over: bool,
    /// What QEMU was given to make its descriptor from.
    given: Option<GivenDescriptor>,
}

/// QEMU, attached so that it waits for what is missing.
pub(super) struct Waiting {
    supplier: MissingPages,
    places: Places,
    given: Option<GivenDescriptor>,
}

/// Where QEMU has mapped guest RAM: the addresses, and which part of RAM each is.
pub(super) fn places(ram: &[RamBlock]) -> (Vec<Range<u64>>, Places) {
    let (mut addresses, mut ranges) = (Vec::new(), Vec::new());
    for (block, ram) in ram.iter().enumerate() {
        let base = ram.mappings.first().map_or(0, |mapping| mapping.file_offset);
        for mapping in &ram.mappings {
            addresses.push(mapping.address..mapping.address + mapping.len);
            ranges.push((TrackedRange { block, offset: mapping.file_offset - base }, mapping.len));
        }
    }
    (addresses, Places { ranges })
}

/// Has QEMU wait, from now on, for pages of its RAM that are not there.
pub(super) async fn attach(
    qmp: &Qmp,
    pid: u32,
    addresses: &[Range<u64>],
    places: Places,
) -> Result<Waiting, Finding> {
    let refused = |why: String| {
        Finding::new("post-copy", why, format!("let the destination's agent open {DEVICE}, or run as root"))
    };
    // A descriptor of the device makes it independent of QEMU's own privileges.
    let given = match std::fs::File::open(DEVICE) {
        Ok(device) => Some(qmp.give_descriptor(device.into()).await.map_err(|e| refused(chain(&e)))?),
        Err(_) => None,
    };
    let source = given
        .map_or(DescriptorSource::Injected, |given| DescriptorSource::Device { fd_in_process: given.number });
    let supplier = tokio::task::block_in_place(|| MissingPages::attach(pid, addresses, source))
        .map_err(|e| refused(chain(&e)))?;
    Ok(Waiting { supplier, places, given })
}

impl Tail {
    /// Begins with a copy of which something is missing. On record before anything can depend on it.
    pub(super) fn begin(
        host: &Host,
        record: &mut Record,
        copy: Finished,
        waiting: Waiting,
        streams: Vec<DataReceiver>,
    ) -> Result<Arc<Tail>, End> {
        let Waiting { supplier, places, given } = waiting;
        let descriptor = supplier.number();
        let file = host.run_dir.join(format!("{}.missing", record.name));
        let (tell, receivers) = events();
        let memory =
            PostCopyDestination::start(copy, supplier, places, tell).map_err(|e| failed("post-copy", &e))?;
        write(&file, &memory.missing()).map_err(|e| failed("post-copy", &e))?;
        record.made.files.push(file.clone());
        record.post_copy = Some(PostCopy { descriptor, missing: file });
        let tail = Tail::of(memory, receivers, given, false);
        for stream in streams {
            tail.attach(stream)?;
        }
        let tail = Arc::new(tail);
        if let Some(session) = record.arrived_by {
            host.post_copies.insert(session, Arc::clone(&tail));
        }
        Ok(tail)
    }

    fn of(
        memory: PostCopyDestination,
        (events, state): (mpsc::UnboundedReceiver<Event>, watch::Receiver<State>),
        given: Option<GivenDescriptor>,
        taken_over: bool,
    ) -> Tail {
        let events = tokio::sync::Mutex::new(events);
        Tail { memory, events, state, aborts: Mutex::default(), taken_over, given }
    }

    fn attach(&self, stream: DataReceiver) -> Result<(), End> {
        let abort = stream.abort_handle().map_err(|e| failed("data-stream", &e))?;
        let mut aborts = self.aborts.lock().unwrap_or_else(PoisonError::into_inner);
        if aborts.len() > usize::from(MAX_STREAMS) {
            return Err(violation("opened a data stream too many"));
        }
        aborts.push(abort);
        drop(aborts);
        self.memory.attach(stream).map_err(|e| failed("data-stream", &e))
    }

    /// Ends the streams; what they have not brought is missing still.
    fn abort(&self) {
        let aborts = std::mem::take(&mut *self.aborts.lock().unwrap_or_else(PoisonError::into_inner));
        aborts.iter().for_each(AbortHandle::abort);
    }

    /// Whether nothing is missing.
    fn is_complete(&self) -> bool {
        self.memory.left() == 0 || *self.state.borrow() == State::Complete
    }

    /// Passes on what the guest asks for, and takes in the streams that bring it, as long as the handle is kept.
    pub(super) fn attend(self: &Arc<Tail>, sender: Sender, mut arrivals: Arrivals) -> AbortOnDropHandle<()> {
        let tail = Arc::clone(self);
        AbortOnDropHandle::new(tokio::spawn(async move {
            let mut events = tail.events.lock().await;
            // What was asked for over a link that was lost is asked for again.
            let mut wanted = tail.memory.waited_for();
            loop {
                if !wanted.is_empty() {
                    let pages = wanted.drain(..).map(|page| page.0).collect();
                    if sender.send(Reply::Wanted(wire::Pages { pages })).await.is_err() {
                        return;
                    }
                }
                tokio::select! {
                    Some(event) = events.recv() => match event {
                        Event::Wanted(pages) => wanted = pages,
                        Event::Mismatch(page) => {
                            tracing::warn!(page = page.0, "a page did not come as it was sent");
                            wanted.push(page);
                        }
                        Event::StreamEnded { error } => tracing::debug!(?error, "a stream of pages has ended"),
                        Event::Complete | Event::Failed(_) => {}
                    },
                    Some((_, receiver)) = arrivals.queue.recv() => {
                        if let Err(error) = tail.attach(receiver) {
                            tracing::warn!(?error, "a stream of pages was not taken");
                        }
                    }
                    else => return,
                }
            }
        }))
    }
}

/// Sorts what the memory says: the state for those who wait for it, the rest for who attends.
fn events()
-> (impl Fn(Event) + Send + Sync + 'static, (mpsc::UnboundedReceiver<Event>, watch::Receiver<State>)) {
    let (tell, events) = mpsc::unbounded_channel();
    let (set, state) = watch::channel(State::Missing);
    let sort = move |event| match event {
        Event::Complete => drop(set.send_replace(State::Complete)),
        Event::Failed(error) => drop(set.send_replace(State::Failed(chain(&error)))),
        event => drop(tell.send(event)),
    };
    (sort, (events, state))
}

fn write(file: &Path, missing: &PageSet) -> std::io::Result<()> {
    let bytes: Vec<u8> = missing.words().iter().flat_map(|word| word.to_le_bytes()).collect();
    std::fs::write(file, bytes)
}

fn read(file: &Path, layout: &Layout) -> std::io::Result<PageSet> {
    let mut missing = PageSet::new(layout.end());
    let bytes = std::fs::read(file)?;
    let part = Missing { first: 0, bits: bytes, more: false };
    match part.add_to(&mut missing) {
        true => Ok(missing),
        false => Err(std::io::ErrorKind::InvalidData.into()),
    }
}

/// Takes over from an agent that has ended: QEMU waits by its own descriptor.
pub(crate) fn recover(host: &Host, record: &Record) -> Result<(), String> {
    let (Some(PostCopy { descriptor, missing }), Some(session)) = (&record.post_copy, record.arrived_by)
    else {
        return Ok(());
    };
    if host.post_copies.get(session).is_some() {
        return Ok(());
    }
    let Some(process) = &record.process else { return Ok(()) };
    let spec = Spec::parse(&record.argv).map_err(|e| chain(&e))?;
    let blocks = qemu::ram_blocks(process, &spec).map_err(|e| chain(&e))?;
    let (addresses, places) = places(&blocks);
    let layout =
        Layout::new(blocks.iter().map(|block| (block.id.as_str(), block.size)), 1).map_err(|e| chain(&e))?;
    let missing = read(missing, &layout).map_err(|e| chain(&e))?;
    let files = blocks
        .into_iter()
        .map(|block| RamFile {
            offset: block.mappings.first().map_or(0, |mapping| mapping.file_offset),
            file: block.file,
        })
        .collect();
    let ram = Ram::new(layout, files).map_err(|e| chain(&e))?;
    let secret = Secret::random().map_err(|e| chain(&e))?;
    let supplier = MissingPages::resume(process.pid, &addresses, *descriptor).map_err(|e| chain(&e))?;
    let (tell, receivers) = events();
    let memory =
        PostCopyDestination::resume(&ram, secret, &missing, supplier, places, tell).map_err(|e| chain(&e))?;
    tracing::warn!(vm = %record.name, pages = memory.left(), "memory is missing; its source is awaited");
    host.post_copies.insert(session, Arc::new(Tail::of(memory, receivers, None, true)));
    Ok(())
}

impl Source {
    /// Waits until nothing is missing any more, and says so.
    pub(super) async fn supplied(&mut self, session: Uuid, qmp: Option<&Qmp>) -> Result<(), End> {
        let Some(tail) = self.host.post_copies.get(session) else { return Ok(()) };
        let mut state = tail.state.clone();
        while !tail.is_complete() {
            tokio::select! {
                changed = state.wait_for(|state| *state != State::Missing) => {
                    if let Ok(State::Failed(why)) = changed.map(|state| state.clone()) {
                        let hint = "the guest waits for memory that cannot be given to it; see the agents' logs";
                        return Err(End::Failed(vec![Finding::new("post-copy", why, hint)]));
                    }
                }
                word = self.receiver.receive::<wire::ToDestination>() => return Err(interrupted(word)),
            }
        }
        self.attending = None;
        tail.abort();
        let Faults { count, longest, total } = tokio::task::block_in_place(|| tail.memory.finish());
        tracing::info!(%session, faults = count, ?longest, "nothing is missing any more");
        self.host.post_copies.remove(session);
        self.no_longer_missing(session);
        if let (Some(qmp), Some(given)) = (qmp, &tail.given)
            && let Err(e) = qmp.take_descriptor_back(given).await
        {
            tracing::debug!(error = chain(&e), "QEMU keeps a descriptor that it does not need");
        }
        let us = |time: std::time::Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let sums = if tail.taken_over { Vec::new() } else { tail.memory.sums() };
        self.reply(Reply::Supplied(wire::Supplied {
            sums: wire::Sums::new(0, &sums, 0).sums,
            faults: count,
            longest_us: us(longest),
            total_us: us(total),
        }))
        .await
    }

    /// The record need not speak of it any more.
    fn no_longer_missing(&self, session: Uuid) {
        let journal = &self.host.journal;
        for mut record in journal.all() {
            if record.arrived_by != Some(session) {
                continue;
            }
            if let Some(PostCopy { missing, .. }) = record.post_copy.take() {
                if let Err(e) = journal.update(&record) {
                    tracing::error!(vm = %record.name, error = chain(&e), "the journal cannot be written");
                }
                let _ = std::fs::remove_file(missing);
            }
        }
    }

    /// A source whose link was lost goes on.
    pub(super) async fn resume(&mut self, resume: wire::Resume, data: &DataConnections) -> Result<(), End> {
        let commit = resume.commit.ok_or_else(|| violation("resumes nothing"))?;
        if Uuid::from_slice(&commit.session).is_ok_and(|session| self.host.journal.has_departed(session)) {
            // It has ended, or moved on: it lacks nothing any more.
            return self.reply(Reply::Running(wire::Nothing {})).await;
        }
        let Some((record, session)) = self.meant(&commit) else { return Err(no_copy(&commit.name)) };
        if record.ownership != Ownership::Owner {
            return Err(violation("resumes a post-copy of a machine that was not handed over"));
        }
        let secret = Secret::try_from(&resume.secret[..]).map_err(|e| failed("protocol", &e))?;
        let Some(tail) = self.host.post_copies.get(session) else {
            return self.reply(Reply::Running(wire::Nothing {})).await;
        };
        tracing::info!(vm = %record.name, pages = tail.memory.left(), "the source of missing memory is back");
        tail.abort();
        tail.memory.trust(secret);
        let arrivals = data.expect(session, &self.peer.name);
        for part in Missing::of(&tail.memory.missing()) {
            self.reply(Reply::Missing(part)).await?;
        }
        self.attending = Some(tail.attend(self.sender.clone(), arrivals));
        drop(tail);
        self.supplied(session, None).await?;
        // The source closes when it has given everything back.
        let _ = tokio::time::timeout(super::FIRST_WORD, self.receiver.receive::<wire::ToDestination>()).await;
        Ok(())
    }
}

/// Why QEMU here could not be made to wait for missing pages.
pub(crate) fn impossible(host: &Host, ram: &[RamBlock]) -> Option<Finding> {
    if let Some(huge) = ram.iter().find(|block| block.page_size != PAGE_SIZE as u64) {
        return Some(Finding::new(
            "post-copy",
            format!("RAM block {} on {} has huge pages, which cannot come one by one", huge.id, host.name),
            "use --on-diverge throttle, or put the VM's RAM on a tmpfs",
        ));
    }
    let allowed = std::fs::File::open(DEVICE).is_ok()
        || std::fs::read_to_string(UNPRIVILEGED).is_ok_and(|allowed| allowed.trim() == "1");
    (!allowed).then(|| {
        Finding::new(
            "post-copy",
            format!("the agent on {} may not open {DEVICE}", host.name),
            format!("let it (root, or a udev rule), or set {UNPRIVILEGED} to 1"),
        )
    })
}
