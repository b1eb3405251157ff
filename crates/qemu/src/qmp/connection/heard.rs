//! What has been heard of a QEMU, and whether that is all that it has said.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;

/// The end of a connection at which QEMU is heard, and what came of that.
#[derive(Debug)]
pub(super) struct Heard {
    read: OwnedReadHalf,
    /// Somebody has, or is about to have, what was not looked at yet; or nobody looks any more.
    reading: AtomicBool,
    events: AtomicU64,
    /// When QEMU was asked that has said that its guest runs, and how many events had come.
    runs: Mutex<Option<(Instant, u64)>>,
}

impl Heard {
    pub(super) fn new(read: OwnedReadHalf) -> Heard {
        Heard { read, reading: AtomicBool::new(true), events: AtomicU64::new(0), runs: Mutex::default() }
    }

    /// Waits for more, and reads it. Everything that was read before has been looked at, unless it is a part of something.
    pub(super) async fn read(&self, buffer: &mut Vec<u8>) -> io::Result<usize> {
        self.reading.store(!buffer.is_empty(), Ordering::SeqCst);
        loop {
            self.read.readable().await?;
            self.reading.store(true, Ordering::SeqCst);
            match self.read.try_read_buf(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.reading.store(!buffer.is_empty(), Ordering::SeqCst);
                }
                read => return read,
            }
        }
    }

    /// Nobody reads any more.
    pub(super) fn ends(&self) {
        self.reading.store(true, Ordering::SeqCst);
    }

    /// An event has come.
    pub(super) fn event(&self) {
        self.events.fetch_add(1, Ordering::SeqCst);
    }

    pub(super) fn events(&self) -> u64 {
        self.events.load(Ordering::SeqCst)
    }

    pub(super) fn runs(&self, asked: Instant, events: u64) {
        *self.runs.lock().unwrap_or_else(PoisonError::into_inner) = Some((asked, events));
    }

    pub(super) fn is_known_to_run(&self, within: Duration) -> bool {
        let runs = *self.runs.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((asked, events)) = runs else { return false };
        // In this order: what is not in the socket any more is being read, or has been looked at.
        asked.elapsed() < within
            && self.has_nothing_to_say()
            && !self.reading.load(Ordering::SeqCst)
            && self.events() == events
    }

    /// Whether nothing waits in the socket, not even its end.
    fn has_nothing_to_say(&self) -> bool {
        let stream: &UnixStream = self.read.as_ref();
        let mut polled = [PollFd::new(stream, PollFlags::IN)];
        poll(&mut polled, Some(&Timespec::default())).is_ok_and(|ready| ready == 0)
    }
}
