//! The source's side of frames in flight: what arrives for a guest that is about to be paused, or has gone.
//!
//! Frames are diverted *before* the guest is paused, to [taps of our own](super::tap::OwnTap). What is in the queues of QEMU's taps
//! then, the guest still takes, if it is given a moment; what it leaves is read from there. To do only that would lose one frame of each
//! queue: a QEMU that has just stopped its guest takes one more, cannot deliver it, and throws it away.

use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use super::PacketSocket;
use super::destination::deliver;
use super::frames::{Backlog, Frame, LONGEST};
use super::mac::Mac;
use super::tap::{OwnTap, QemuQueue};

/// So many frames of an interface at most before the next has its turn, and what was read is sent.
const BATCH: usize = 64;

/// What became of diverted frames.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Diverted {
    /// Sent to the destination.
    pub forwarded: u64,
    /// There was no room for them, or nobody took them any more.
    pub dropped: u64,
}

/// Who the frames go to.
enum To {
    /// The destination, and kept as well: the guest may stay here.
    Either,
    /// The destination, which has the guest.
    There,
    /// The guest, which has stayed: by these.
    Here(Vec<PacketSocket>),
}

struct State {
    to: To,
    /// The guest is paused: what was left of earlier frames goes before those that were diverted.
    paused: bool,
    kept: Backlog,
    /// None once it cannot be written to any more.
    stream: Option<Box<dyn Write + Send>>,
    forwarded: u64,
    dropped: u64,
    /// When the last frame came that was for this guest alone.
    last: Instant,
    ended: bool,
}

struct Shared {
    state: Mutex<State>,
    taps: Vec<(OwnTap, Option<Mac>)>,
    wake: OwnedFd,
}

/// Frames that are diverted from a guest.
pub struct NetworkSource {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl NetworkSource {
    /// Begins to read what is diverted to these, one for each of the machine's interfaces, in their order, with the address of its
    /// card. From the [pause](Self::is_paused) on all of it is written to the stream, which the destination's side reads, and kept until
    /// it is known where the guest goes on.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn start(
        taps: Vec<(OwnTap, Option<Mac>)>,
        stream: impl Write + Send + 'static,
    ) -> io::Result<NetworkSource> {
        let state = State {
            to: To::Either,
            paused: false,
            kept: Backlog::default(),
            stream: Some(Box::new(stream)),
            forwarded: 0,
            dropped: 0,
            last: Instant::now(),
            ended: false,
        };
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let shared = Arc::new(Shared { state: Mutex::new(state), taps, wake });
        let reading = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("network".into()).spawn(move || reading.run())?;
        Ok(NetworkSource { shared, thread: Some(thread) })
    }

    /// The guest is paused for good. What its QEMU has left in its queues, of each interface, goes first.
    pub fn is_paused(&self, queues: &[Vec<QemuQueue>]) {
        let left = (0..).zip(queues).flat_map(|(interface, queues)| {
            queues.iter().flat_map(QemuQueue::drain).map(move |content| Frame { interface, content })
        });
        let left: Vec<Frame> = left.collect();
        let mut state = self.shared.lock();
        state.kept.precede(left);
        state.paused = true;
        let State { kept, stream, forwarded, .. } = &mut *state;
        for frame in kept.iter() {
            let written = stream.as_mut().map(|stream| frame.write(stream));
            match written {
                Some(Ok(())) => *forwarded += 1,
                Some(Err(_)) => *stream = None,
                None => {}
            }
        }
        if stream.as_mut().is_some_and(|stream| stream.flush().is_err()) {
            *stream = None;
        }
    }

    /// The guest is the destination's: nothing is kept any more. What is for everybody does not travel from here on, as it reaches the
    /// guest where it is.
    pub fn has_gone(&self) {
        let mut state = self.shared.lock();
        state.to = To::There;
        state.kept.clear();
    }

    /// The guest has stayed: it gets by these sockets, one for each interface, what was kept from it, and what comes until it is
    /// diverted no more.
    pub fn has_stayed(&self, sockets: Vec<PacketSocket>) {
        let mut state = self.shared.lock();
        while let Some(frame) = state.kept.pop() {
            state.dropped += u64::from(!deliver(&sockets, &frame));
        }
        state.to = To::Here(sockets);
        state.stream = None;
    }

    /// For how long nothing has come for this guest alone.
    #[must_use]
    pub fn quiet_for(&self) -> Duration {
        self.shared.lock().last.elapsed()
    }

    /// Reads no more. The taps are gone when this returns.
    pub fn finish(mut self) -> Diverted {
        self.end();
        let state = self.shared.lock();
        Diverted { forwarded: state.forwarded, dropped: state.dropped + state.kept.dropped() }
    }

    fn end(&mut self) {
        self.shared.lock().ended = true;
        // Full is as good as written.
        let _ = rustix::io::write(&self.shared.wake, &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        self.shared.lock().stream = None;
    }
}

impl Drop for NetworkSource {
    fn drop(&mut self) {
        self.end();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut buffer = vec![0; LONGEST];
        loop {
            // What came while the last was dealt with goes at once, the rest is waited for.
            let read = self.read_some(&mut buffer);
            let more = self.sent();
            if !more && !read {
                return;
            }
            if !read {
                let fds: Vec<BorrowedFd<'_>> =
                    self.taps.iter().map(|(tap, _)| tap.as_fd()).chain([self.wake.as_fd()]).collect();
                let mut polled: Vec<PollFd<'_>> =
                    fds.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
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
                    self.take(Frame::turned(interface));
                }
                self.take(frame);
            }
        }
        any
    }

    fn take(&self, frame: Frame) {
        let mut state = self.lock();
        if !frame.is_for_many() && !frame.is_turned() {
            state.last = Instant::now();
        }
        match &state.to {
            To::Here(_) if frame.is_turned() => return,
            To::Here(sockets) => {
                let delivered = deliver(sockets, &frame);
                state.dropped += u64::from(!delivered);
                return;
            }
            To::There if frame.is_for_many() => return,
            To::Either | To::There => {}
        }
        if !state.paused {
            state.kept.push(frame);
            return;
        }
        let written = state.stream.as_mut().map(|stream| frame.write(stream));
        match written {
            Some(Ok(())) => state.forwarded += u64::from(!frame.is_turned()),
            // Whoever waits for the destination finds out why.
            Some(Err(_)) => state.stream = None,
            None => {}
        }
        let there = matches!(state.to, To::There);
        if !there {
            if !frame.is_turned() {
                state.kept.push(frame);
            }
        } else if state.stream.is_none() {
            state.dropped += 1;
        }
    }

    /// Lets what was written go. Whether there is to be more.
    fn sent(&self) -> bool {
        let mut state = self.lock();
        if state.stream.as_mut().is_some_and(|stream| stream.flush().is_err()) {
            state.stream = None;
        }
        !state.ended
    }
}
