//! The read half of a connection, and the run state that is known from what has come in by it.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;

/// The half by which answers and events come, and what they have told of the guest.
#[derive(Debug)]
pub(super) struct ReadHalf {
    stream: OwnedReadHalf,
    /// Somebody has, or is about to have, what was not looked at yet; or nobody looks any more.
    reading: AtomicBool,
    events: AtomicU64,
    /// When QEMU was last asked that answered that its guest runs, and how many events had come by then.
    running: Mutex<Option<(Instant, u64)>>,
}

impl ReadHalf {
    pub(super) fn new(stream: OwnedReadHalf) -> ReadHalf {
        ReadHalf {
            stream,
            reading: AtomicBool::new(true),
            events: AtomicU64::new(0),
            running: Mutex::default(),
        }
    }

    /// Waits for more, and reads it. Everything that was read before has been looked at, unless it is a part of something.
    pub(super) async fn read(&self, buffer: &mut Vec<u8>) -> io::Result<usize> {
        self.reading.store(!buffer.is_empty(), Ordering::SeqCst);
        loop {
            self.stream.readable().await?;
            self.reading.store(true, Ordering::SeqCst);
            match self.stream.try_read_buf(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.reading.store(!buffer.is_empty(), Ordering::SeqCst);
                }
                read => return read,
            }
        }
    }

    /// Nobody reads any more.
    pub(super) fn end(&self) {
        self.reading.store(true, Ordering::SeqCst);
    }

    /// An event has come.
    pub(super) fn count_event(&self) {
        self.events.fetch_add(1, Ordering::SeqCst);
    }

    pub(super) fn event_count(&self) -> u64 {
        self.events.load(Ordering::SeqCst)
    }

    /// QEMU was asked then, after so many events, and has answered that its guest runs.
    pub(super) fn note_running(&self, asked: Instant, events: u64) {
        *self.running.lock().unwrap_or_else(PoisonError::into_inner) = Some((asked, events));
    }

    pub(super) fn is_known_to_run(&self, within: Duration) -> bool {
        let running = *self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((asked, events)) = running else { return false };
        // In this order: what is not in the socket any more is being read, or has been looked at.
        asked.elapsed() < within
            && self.is_drained()
            && !self.reading.load(Ordering::SeqCst)
            && self.event_count() == events
    }

    /// Whether nothing waits in the socket, not even its end.
    fn is_drained(&self) -> bool {
        let stream: &UnixStream = self.stream.as_ref();
        let mut polled = [PollFd::new(stream, PollFlags::IN)];
        poll(&mut polled, Some(&Timespec::default())).is_ok_and(|ready| ready == 0)
    }
}
