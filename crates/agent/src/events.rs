//! What happens on this host, numbered and kept for a while, so that a follower who comes late or
//! falls behind sees either every event or, by a gap in the numbers, that it missed some.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::sync::watch;

use crate::api::types::{Event, EventKind};

/// How many events are kept for those who come late.
pub const KEPT: usize = 512;

/// The events of this host. Clones are handles to the same.
#[derive(Debug, Clone)]
pub struct Events {
    kept: Arc<Mutex<VecDeque<Event>>>,
    latest: watch::Sender<u64>,
}

/// A place in the stream of events.
#[derive(Debug)]
pub struct Follower {
    events: Events,
    latest: watch::Receiver<u64>,
    after: u64,
}

impl Default for Events {
    fn default() -> Self {
        Events { kept: Arc::default(), latest: watch::Sender::new(0) }
    }
}

impl Events {
    /// Tells everybody. The first event has number 1.
    pub fn tell(&self, vm: Option<&str>, kind: EventKind) {
        let mut kept = self.lock();
        let seq = *self.latest.borrow() + 1;
        if kept.len() == KEPT {
            kept.pop_front();
        }
        kept.push_back(Event { seq, at_unix_ms: unix_ms(), vm: vm.map(str::to_owned), kind });
        self.latest.send_replace(seq);
    }

    /// The events after number `after` that are still kept.
    #[must_use]
    pub fn since(&self, after: u64) -> Vec<Event> {
        self.lock().iter().filter(|event| event.seq > after).cloned().collect()
    }

    /// Follows from the event after number `after`; 0 begins with the oldest kept.
    #[must_use]
    pub fn follow(&self, after: u64) -> Follower {
        Follower { events: self.clone(), latest: self.latest.subscribe(), after }
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Event>> {
        // Nothing in this file panics with the lock held half-way through a change.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Follower {
    /// The next events, at least one; waits for it where there is none yet.
    pub async fn next(&mut self) -> Vec<Event> {
        loop {
            let events = self.events.since(self.after);
            if let Some(last) = events.last() {
                self.after = last.seq;
                return events;
            }
            // The sender lives in `self.events`, so waiting only fails if that is gone too.
            let after = self.after;
            if self.latest.wait_for(|latest| *latest > after).await.is_err() {
                return Vec::new();
            }
        }
    }
}

/// Milliseconds since 1970-01-01 UTC.
pub(crate) fn unix_ms() -> u64 {
    unix_ms_of(SystemTime::now())
}

/// A time, in milliseconds since 1970-01-01 UTC.
pub(crate) fn unix_ms_of(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seqs(events: &[Event]) -> Vec<u64> {
        events.iter().map(|event| event.seq).collect()
    }

    #[tokio::test]
    async fn a_late_follower_sees_what_was_kept_and_then_what_comes() {
        let events = Events::default();
        events.tell(Some("a"), EventKind::VmPaused);
        events.tell(Some("a"), EventKind::VmResumed);
        let mut follower = events.follow(0);
        assert_eq!(seqs(&follower.next().await), [1, 2]);
        let waiting = tokio::spawn(async move { follower.next().await });
        events.tell(Some("b"), EventKind::VmPanicked);
        let came = waiting.await.unwrap();
        assert_eq!(seqs(&came), [3]);
        assert_eq!(came[0].vm.as_deref(), Some("b"));
    }

    #[tokio::test]
    async fn one_who_fell_behind_sees_a_gap_in_the_numbers() {
        let events = Events::default();
        let mut follower = events.follow(0);
        for _ in 0..KEPT + 10 {
            events.tell(None, EventKind::VmPaused);
        }
        let came = follower.next().await;
        assert_eq!(came.len(), KEPT);
        assert_eq!(came[0].seq, 11);
    }

    #[test]
    fn following_from_a_number_leaves_out_what_was_seen() {
        let events = Events::default();
        for _ in 0..5 {
            events.tell(None, EventKind::VmPaused);
        }
        assert_eq!(seqs(&events.since(3)), [4, 5]);
    }
}
