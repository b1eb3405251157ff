//! The source's side of frames in flight: what arrives for a guest that is about to be paused, or has gone.
//!
//! Frames are diverted *before* the guest is paused, to [taps of our own](super::tap::OwnTap). What is in the queues of QEMU's taps
//! then, the guest still takes, if it is given a moment; what it leaves is read from there. To do only that would lose one frame of each
//! queue: a QEMU that has just stopped its guest takes one more, cannot deliver it, and throws it away.

use std::collections::{BTreeSet, VecDeque};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use super::PacketSocket;
use super::frames::{Backlog, Frame, LONGEST};
use super::mac::Mac;
use super::mark::is_mark;
use super::tap::{OwnTap, QemuQueue};
use super::ways::Ways;

/// So many frames of an interface at most before the next has its turn, and what was read is sent.
const BATCH: usize = 64;

/// What became of diverted frames.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Diverted {
    /// Sent to the destination.
    pub forwarded: u64,
    /// There was no room for them, or nobody took them any more.
    pub dropped: u64,
    /// The guest has been seen to speak from its new place, at every interface whose address is known.
    pub turned: bool,
}

/// Who the frames go to.
enum To {
    /// Nobody: what comes is not the guest's.
    Nobody,
    /// The destination once the guest is paused, and kept as well: the guest may stay here.
    Either,
    /// The destination, which has the guest.
    There,
    /// The guest, which has stayed.
    Here(Ways),
}

struct State {
    to: To,
    /// The guest is paused: what was left of earlier frames goes before those that were diverted.
    paused: bool,
    kept: Backlog,
    outgoing: VecDeque<Frame>,
    forwarded: u64,
    dropped: u64,
    /// Kept frames that the link did not take: lost if the guest goes, and its own if it stays.
    stranded: u64,
    /// When the last frame came that was for this guest alone.
    last: Instant,
    ended: bool,
    /// Interfaces whose guest has spoken from its new place.
    turned: BTreeSet<u8>,
}

struct Shared {
    state: Mutex<State>,
    taps: Vec<(OwnTap, Option<Mac>)>,
    wake: OwnedFd,
}

/// Frames that are diverted from a guest.
pub struct NetworkSource {
    shared: Arc<Shared>,
    abort: Box<dyn Fn() + Send + Sync>,
    thread: Option<JoinHandle<()>>,
}

impl NetworkSource {
    /// Makes ready to read what is diverted to these, one for each of the machine's interfaces, in their order, with the address of its
    /// card. From the [pause](Self::is_paused) on all of it is written to the stream, which the destination's side reads, and kept until
    /// it is known where the guest goes on. `abort` ends a write to the stream that blocks.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn start(
        taps: Vec<(OwnTap, Option<Mac>)>,
        stream: impl Write + Send + 'static,
        abort: impl Fn() + Send + Sync + 'static,
    ) -> io::Result<NetworkSource> {
        let state = State {
            to: To::Nobody,
            paused: false,
            kept: Backlog::default(),
            outgoing: VecDeque::new(),
            forwarded: 0,
            dropped: 0,
            stranded: 0,
            last: Instant::now(),
            ended: false,
            turned: BTreeSet::new(),
        };
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let shared = Arc::new(Shared { state: Mutex::new(state), taps, wake });
        let reading = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("network".into()).spawn(move || reading.run(stream))?;
        Ok(NetworkSource { shared, abort: Box::new(abort), thread: Some(thread) })
    }

    /// What comes from here on is the guest's: it is about to be diverted.
    pub fn begin(&self) {
        self.shared.lock().to = To::Either;
    }

    /// What is left in QEMU's queues, of each interface, is taken from it: its guest does not take it, or will not any more.
    pub fn take_over(&self, queues: &[Vec<QemuQueue>]) {
        let left = (0..).zip(queues).flat_map(|(interface, queues)| {
            let left = queues.iter().flat_map(QemuQueue::drain).filter(|content| !is_mark(content));
            left.map(move |content| Frame { interface, content })
        });
        let left: Vec<Frame> = left.collect();
        self.shared.lock().kept.precede(left);
    }

    /// The guest is paused for good. What its QEMU has left in its queues, of each interface, goes first.
    pub fn is_paused(&self, queues: &[Vec<QemuQueue>]) {
        self.take_over(queues);
        let mut state = self.shared.lock();
        state.paused = true;
        state.outgoing = state.kept.iter().cloned().collect();
        drop(state);
        self.shared.wake();
    }

    /// The guest is the destination's: nothing is kept any more. What is for others, or for everybody, does not travel from here on: it
    /// reaches the guest where it is.
    pub fn has_gone(&self) {
        let mut state = self.shared.lock();
        state.to = To::There;
        state.kept.clear();
        state.dropped += std::mem::take(&mut state.stranded);
    }

    /// The guest has stayed: it gets by these sockets, one for each interface, what was kept from it, and what comes until it is
    /// diverted no more.
    pub fn has_stayed(&self, sockets: Vec<PacketSocket>) {
        (self.abort)();
        let ways = Ways::new(sockets);
        let mut state = self.shared.lock();
        state.outgoing.clear();
        while let Some(frame) = state.kept.pop() {
            state.dropped += u64::from(!ways.deliver(&frame));
        }
        state.to = To::Here(ways);
    }

    /// For how long nothing has come for this guest alone.
    #[must_use]
    pub fn quiet_for(&self) -> Duration {
        self.shared.lock().last.elapsed()
    }

    /// Reads no more. The taps are gone when this is dropped.
    pub fn finish(mut self) -> Diverted {
        self.end();
        let state = self.shared.lock();
        let known = (0..).zip(&self.shared.taps).filter(|(_, (_, mac))| mac.is_some());
        let turned = known.map(|(interface, _)| interface).all(|interface| state.turned.contains(&interface));
        let dropped = state.dropped + state.kept.dropped();
        Diverted { forwarded: state.forwarded, dropped, turned }
    }

    fn end(&mut self) {
        self.shared.lock().ended = true;
        self.shared.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for NetworkSource {
    fn drop(&mut self) {
        if self.thread.is_some() {
            (self.abort)();
        }
        self.end();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // Full is as good as written.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    fn run(&self, stream: impl Write) {
        let mut stream = Some(stream);
        let mut buffer = vec![0; LONGEST];
        loop {
            // What came while the last was dealt with goes at once, the rest is waited for.
            let read = self.read_some(&mut buffer);
            let sent = self.send_some(&mut stream);
            if self.lock().ended && !read && !sent {
                return;
            }
            if !read && !sent {
                let _ = rustix::io::read(&self.wake, &mut [0; 8]);
                if !self.lock().outgoing.is_empty() {
                    continue;
                }
                let fds: Vec<BorrowedFd<'_>> =
                    self.taps.iter().map(|(tap, _)| tap.as_fd()).chain([self.wake.as_fd()]).collect();
                let mut polled: Vec<PollFd<'_>> =
                    fds.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
                if self.lock().ended {
                    continue;
                }
                // A signal is as good as a frame: it is looked again.
                let _ = poll(&mut polled, None);
            }
        }
    }

    /// Takes in what there is, of each interface some. Whether that was anything.
    fn read_some(&self, buffer: &mut [u8]) -> bool {
        let mut any = false;
        for (interface, (tap, mac)) in (0..).zip(&self.taps) {
            for _ in 0..BATCH {
                // An interface that was taken away has no more.
                let Ok(Some(length)) = tap.next(buffer) else { break };
                any = true;
                let frame = Frame { interface, content: buffer[..length].to_vec() };
                if mac.is_some_and(|mac| frame.is_from(mac)) {
                    // It speaks from its new place: whoever passes this on knows that place, and has passed on before what was for
                    // the old one.
                    let mut state = self.lock();
                    state.turned.insert(interface);
                    state.outgoing.push_back(Frame::turned(interface));
                }
                self.take(frame, *mac);
            }
        }
        any
    }

    fn take(&self, frame: Frame, mac: Option<Mac>) {
        let mut state = self.lock();
        let for_it = mac.map_or(!frame.is_for_many(), |mac| frame.is_to(mac));
        match &state.to {
            To::Nobody => {}
            To::Here(ways) => {
                let delivered = ways.deliver(&frame);
                state.dropped += u64::from(!delivered);
            }
            To::Either => {
                if state.paused {
                    state.outgoing.push_back(frame.clone());
                }
                state.kept.push(frame);
            }
            To::There if for_it => state.outgoing.push_back(frame),
            To::There => {}
        }
        if for_it {
            state.last = Instant::now();
        }
    }

    /// Writes what is to go. Whether that was anything.
    fn send_some(&self, stream: &mut Option<impl Write>) -> bool {
        // Not under the lock: a link that takes nothing holds up nobody else.
        let batch = std::mem::take(&mut self.lock().outgoing);
        if batch.is_empty() {
            return false;
        }
        let frames = batch.iter().filter(|frame| !frame.is_turned()).count() as u64;
        let written = stream.as_mut().is_some_and(|stream| {
            batch.iter().try_for_each(|frame| frame.write(stream)).and_then(|()| stream.flush()).is_ok()
        });
        let mut state = self.lock();
        if written {
            state.forwarded += frames;
            return true;
        }
        // Whoever waits for the destination finds out why.
        *stream = None;
        match state.to {
            To::There => state.dropped += frames,
            _ => state.stranded += frames,
        }
        true
    }
}
