//! The ways to a guest.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::PacketSocket;
use super::frames::Frame;

/// How long a guest may take none of what there is for it, before a frame is dropped.
const PATIENCE: Duration = Duration::from_millis(20);
const AGAIN: Duration = Duration::from_micros(200);

/// Sockets at a guest's interfaces, in their order.
pub(super) struct Ways {
    sockets: Vec<PacketSocket>,
    /// Interfaces that the guest takes nothing from: not waited for any more, until it does.
    stuck: Vec<AtomicBool>,
}

impl Ways {
    pub(super) fn new(sockets: Vec<PacketSocket>) -> Ways {
        let stuck = sockets.iter().map(|_| AtomicBool::new(false)).collect();
        Ways { sockets, stuck }
    }

    /// Gives the guest a frame. Whether it has taken it, or will when it runs.
    pub(super) fn deliver(&self, frame: &Frame) -> bool {
        let at = usize::from(frame.interface);
        let Some((socket, stuck)) = self.sockets.get(at).zip(self.stuck.get(at)) else { return false };
        let until = Instant::now() + PATIENCE;
        loop {
            match socket.send(&frame.content) {
                Ok(()) => {
                    stuck.store(false, Ordering::Relaxed);
                    return true;
                }
                // The queue of its tap is full: it is taking from it.
                Err(e) if is_full(&e) && !stuck.load(Ordering::Relaxed) && Instant::now() < until => {
                    std::thread::sleep(AGAIN);
                }
                Err(error) => {
                    stuck.store(is_full(&error), Ordering::Relaxed);
                    tracing::debug!(%error, "a frame could not be delivered");
                    return false;
                }
            }
        }
    }
}

fn is_full(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENOBUFS)
}
