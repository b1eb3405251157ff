//! The destination's side of frames in flight: what was on its way to the guest at the source reaches it here, and in order.
//!
//! What the network sends here already must not overtake what it had sent there before. So that is held back, diverted to
//! [taps of our own](super::tap::OwnTap), until the source says that the network has turned and nothing more comes to it.

use std::io::{self, Read};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::PacketSocket;
use super::frames::{Backlog, Frame, LONGEST};
use super::tap::OwnTap;
use super::ways::Ways;

/// What comes here is held back for no longer: the source may be in another network, or gone.
const HELD_BACK: Duration = Duration::from_millis(30);
/// While something is held back, it is looked so often whether it may go.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 500_000 };

/// What became of frames.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Played {
    /// From the source; the guest has got them.
    pub delivered: u64,
    /// Held back, until those had come.
    pub held_back: u64,
    /// There was no room for them.
    pub dropped: u64,
}

struct State {
    /// None as long as the guest is not this host's.
    ways: Option<Arc<Ways>>,
    waiting: Backlog,
    /// Of each interface, whether nothing more comes for it at the source.
    turned: Vec<bool>,
    ended: bool,
    played: Played,
}

/// Frames that come for a guest which is to run here.
pub struct NetworkDestination {
    state: Arc<Mutex<State>>,
    thread: Option<JoinHandle<()>>,
}

/// What is held back, of each interface.
pub struct HeldBack {
    state: Arc<Mutex<State>>,
    taps: Vec<OwnTap>,
    ways: Arc<Ways>,
}

impl NetworkDestination {
    /// Begins to read frames. They wait for [`play`](Self::play). The thread ends with the stream.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn start(mut stream: impl Read + Send + 'static) -> io::Result<NetworkDestination> {
        let state = State {
            ways: None,
            waiting: Backlog::default(),
            turned: Vec::new(),
            ended: false,
            played: Played::default(),
        };
        let state = Arc::new(Mutex::new(state));
        let reading = Arc::clone(&state);
        let thread = std::thread::Builder::new().name("network".into()).spawn(move || {
            loop {
                match Frame::read(&mut stream) {
                    Ok(Some(frame)) => lock(&reading).take(frame),
                    Ok(None) => break,
                    Err(error) => {
                        tracing::debug!(%error, "no more frames come");
                        break;
                    }
                }
            }
            lock(&reading).ended = true;
        })?;
        Ok(NetworkDestination { state, thread: Some(thread) })
    }

    /// The guest is this host's: it gets by these sockets, one for each of its interfaces in their order, what has come, and then what
    /// comes. Their interfaces must be up, and what else is sent to them be diverted to `taps`; where that is not so, nothing is held
    /// back.
    pub fn play(&self, sockets: Vec<PacketSocket>, taps: Vec<OwnTap>) -> HeldBack {
        let ways = Arc::new(Ways::new(sockets));
        let mut state = lock(&self.state);
        while let Some(frame) = state.waiting.pop() {
            state.deliver(&ways, &frame);
        }
        state.ways = Some(Arc::clone(&ways));
        HeldBack { state: Arc::clone(&self.state), taps, ways }
    }

    /// Waits for the end of the stream. The source ends it when nothing more comes to it.
    pub fn finish(mut self) -> Played {
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let state = lock(&self.state);
        Played { dropped: state.played.dropped + state.waiting.dropped(), ..state.played }
    }
}

impl HeldBack {
    /// Holds back what is diverted to the taps until it may go, and lets it go. Blocks until all may; what is diverted then is passed on by
    /// [`pass_on`](Self::pass_on).
    pub fn hold(&self) {
        let until = Instant::now() + HELD_BACK;
        let mut held: Vec<Backlog> = self.taps.iter().map(|_| Backlog::default()).collect();
        let mut open: Vec<bool> = self.taps.iter().map(|_| false).collect();
        let mut buffer = vec![0; LONGEST];
        while open.iter().any(|open| !open) {
            let mut polled: Vec<PollFd<'_>> =
                self.taps.iter().map(|tap| PollFd::from_borrowed_fd(tap.as_fd(), PollFlags::IN)).collect();
            // A signal is as good as a frame: it is looked again.
            let _ = poll(&mut polled, Some(&LOOK));
            for (at, tap) in self.taps.iter().enumerate() {
                while let Ok(Some(length)) = tap.next(&mut buffer) {
                    held[at].push(Frame { interface: at as u8, content: buffer[..length].to_vec() });
                }
                let mut state = lock(&self.state);
                let late = state.ended || Instant::now() >= until;
                open[at] = open[at] || late || state.turned.get(at) == Some(&true);
                if open[at] {
                    while let Some(frame) = held[at].pop() {
                        state.played.held_back += 1;
                        let delivered = self.ways.deliver(&frame);
                        state.played.dropped += u64::from(!delivered);
                    }
                }
            }
        }
        let dropped: u64 = held.iter().map(Backlog::dropped).sum();
        lock(&self.state).played.dropped += dropped;
    }

    /// Passes on what has been diverted since.
    pub fn pass_on(&self) {
        let mut buffer = vec![0; LONGEST];
        for (interface, tap) in (0..).zip(&self.taps) {
            while let Ok(Some(length)) = tap.next(&mut buffer) {
                let delivered = self.ways.deliver(&Frame { interface, content: buffer[..length].to_vec() });
                lock(&self.state).played.dropped += u64::from(!delivered);
            }
        }
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    fn take(&mut self, frame: Frame) {
        if frame.is_turned() {
            let at = usize::from(frame.interface);
            self.turned.resize(self.turned.len().max(at + 1), false);
            self.turned[at] = true;
            return;
        }
        match self.ways.clone() {
            Some(ways) => self.deliver(&ways, &frame),
            None => self.waiting.push(frame),
        }
    }

    fn deliver(&mut self, ways: &Ways, frame: &Frame) {
        match ways.deliver(frame) {
            true => self.played.delivered += 1,
            false => self.played.dropped += 1,
        }
    }
}
