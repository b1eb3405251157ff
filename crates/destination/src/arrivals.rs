//! The rendezvous of data connections with the sessions that they belong to.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use link::{DataHello, DataReceiver};
use tokio::sync::mpsc;
use uuid::Uuid;

/// Data connections of a session that may wait for it: as many as there can be streams of a mirror and of supply, once over. More are
/// closed; each holds a descriptor and a thread's worth of buffers.
const WAITING: usize = 40;

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
    arrivals: mpsc::Sender<(u16, DataReceiver)>,
}

/// Data connections of one session; no more are expected once it is dropped.
pub(super) struct Arrivals {
    session: Uuid,
    number: u64,
    all: DataConnections,
    pub(super) queue: mpsc::Receiver<(u16, DataReceiver)>,
}

impl DataConnections {
    /// A rendezvous at which nobody is expected.
    #[must_use]
    pub fn new() -> DataConnections {
        DataConnections::default()
    }

    /// Whether a data connection of this peer is expected, and there is room for it.
    #[must_use]
    pub fn expects(&self, peer: &str, hello: &DataHello) -> bool {
        let fits = |expected: &Expected| expected.peer == peer && expected.arrivals.capacity() > 0;
        self.lock().get(&hello.session).is_some_and(fits)
    }

    /// Brings a data connection to its session. One that nobody expects, or that comes from another peer than the
    /// session's, is closed, as is one of too many.
    pub fn deliver(&self, hello: &DataHello, receiver: DataReceiver) {
        match self.lock().get(&hello.session) {
            Some(expected) if expected.peer == receiver.peer().name => {
                if let Err(mpsc::error::TrySendError::Full((_, receiver))) =
                    expected.arrivals.try_send((hello.stream, receiver))
                {
                    tracing::warn!(peer = %receiver.peer(), session = %hello.session, "too many data connections");
                }
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
        let (arrivals, queue) = mpsc::channel(WAITING);
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

    #[tokio::test]
    async fn a_session_that_does_not_listen_holds_no_more_connections_than_it_has_streams() {
        let directory = tempfile::tempdir().unwrap();
        link::certificates::init(directory.path()).unwrap();
        let endpoint = |name: &str| {
            let addresses = ["127.0.0.1".to_owned()];
            let files = link::certificates::issue(directory.path(), name, &addresses).unwrap();
            let ca = directory.path().join("ca.pem");
            let identity = link::Identity::load(&ca, &files.certificate, &files.key).unwrap();
            link::Endpoint::new(&identity, link::Deadlines::default()).unwrap()
        };
        let (source, destination) = (endpoint("a"), endpoint("b"));
        let all = DataConnections::new();
        let hello = DataHello { session: Uuid::from_u128(7), stream: 0 };
        let mut arrivals = all.expect(hello.session, "a");
        let expected = all.clone();
        let admission = move |peer: &link::Peer, purpose: &link::Purpose| match purpose {
            link::Purpose::Data(hello) if expected.expects(&peer.name, hello) => Ok(()),
            _ => Err("not expected".to_owned()),
        };
        let limits = link::ListenerLimits::default();
        let listener =
            link::Listener::bind_with(&destination, "127.0.0.1:0", limits, admission).await.unwrap();
        let address = listener.local_addr().to_string();
        let mut open = Vec::new();
        for number in 0..WAITING + 3 {
            let (source, address) = (source.clone(), address.clone());
            let opened = tokio::task::spawn_blocking(move || {
                source.open_data(&address, Uuid::from_u128(7), 0, link::Bandwidth::new(None))
            })
            .await
            .unwrap();
            assert_eq!(opened.is_ok(), number < WAITING, "{number}");
            open.extend(opened);
            match listener.accept().await {
                Ok(link::Incoming::Data(receiver, _, hello)) => all.deliver(&hello, receiver),
                other => assert!(number >= WAITING, "{other:?}"),
            }
        }
        assert!(arrivals.queue.recv().await.is_some());
        assert!(all.expects("a", &hello), "there is room again");
    }

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
