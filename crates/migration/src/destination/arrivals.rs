//! The rendezvous of data connections with the sessions that they belong to.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use link::{DataHello, DataReceiver};
use tokio::sync::mpsc;
use uuid::Uuid;

/// The rendezvous of data connections with the sessions that they belong to. Clones are handles to the same one.
#[derive(Debug, Clone, Default)]
pub struct DataConnections {
    expected: Arc<Mutex<HashMap<Uuid, Expected>>>,
    /// How often a session was expected: tells one expectation of it from the next.
    times: Arc<AtomicU64>,
}

#[derive(Debug)]
struct Expected {
    number: u64,
    peer: String,
    arrivals: mpsc::UnboundedSender<(u16, DataReceiver)>,
}

/// Data connections of one session; no more are expected once it is dropped.
pub(super) struct Arrivals {
    session: Uuid,
    number: u64,
    all: DataConnections,
    pub(super) queue: mpsc::UnboundedReceiver<(u16, DataReceiver)>,
}

impl DataConnections {
    /// A rendezvous at which nobody is expected.
    #[must_use]
    pub fn new() -> DataConnections {
        DataConnections::default()
    }

    /// Whether a data connection of this peer is expected.
    #[must_use]
    pub fn expects(&self, peer: &str, hello: &DataHello) -> bool {
        self.lock().get(&hello.session).is_some_and(|expected| expected.peer == peer)
    }

    /// Brings a data connection to its session. One that nobody expects, or that comes from another peer than the
    /// session's, is closed.
    pub fn deliver(&self, hello: &DataHello, receiver: DataReceiver) {
        match self.lock().get(&hello.session) {
            Some(expected) if expected.peer == receiver.peer().name => {
                let _ = expected.arrivals.send((hello.stream, receiver));
            }
            _ => {
                tracing::warn!(peer = %receiver.peer(), session = %hello.session, "unexpected data connection")
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Uuid, Expected>> {
        self.expected.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn expect(&self, session: Uuid, peer: &str) -> Arrivals {
        let (arrivals, queue) = mpsc::unbounded_channel();
        let number = self.times.fetch_add(1, Ordering::Relaxed);
        self.lock().insert(session, Expected { number, peer: peer.to_owned(), arrivals });
        Arrivals { session, number, all: self.clone(), queue }
    }
}

impl Drop for Arrivals {
    fn drop(&mut self) {
        // The same session may be expected again by now, on another connection.
        let mut expected = self.all.lock();
        if expected.get(&self.session).is_some_and(|expected| expected.number == self.number) {
            expected.remove(&self.session);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_lost_connection_does_not_undo_what_the_next_one_expects() {
        let all = DataConnections::new();
        let hello = DataHello { session: Uuid::from_u128(7), stream: 0 };
        let old = all.expect(hello.session, "a");
        let new = all.expect(hello.session, "a");
        drop(old);
        assert!(all.expects("a", &hello));
        drop(new);
        assert!(!all.expects("a", &hello));
    }
}
