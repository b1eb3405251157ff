//! Who of those that wait is next: sessions have equal parts, however many streams each has.
//!
//! Of those who wait, the one is next whose session has had the least. A session that had nothing to send has not saved up for
//! it: it goes on from where the others are (start-time fair queueing, Goyal, Vin and Cheng 1996).

use std::collections::HashMap;

/// Who takes; streams of one session are the same to a queue that sessions share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Member(u64);

/// Who takes where sessions share nothing.
pub(crate) const ALONE: Member = Member(0);

/// Somebody who waits.
#[derive(Debug, Clone, Copy)]
struct Waiting {
    ticket: u64,
    member: Member,
    /// What the member will have had when it is this one's turn.
    start: u64,
}

/// Those who wait, and what each session has had.
#[derive(Debug, Default)]
pub(crate) struct FairQueue {
    waiting: Vec<Waiting>,
    next: u64,
    /// Bytes that each member has had or waits for, counted from where the others were when it came.
    had: HashMap<Member, u64>,
    /// The start of who was served last: where the others are.
    at: u64,
    members: u64,
}

impl FairQueue {
    /// A new session that shares it.
    pub(crate) fn join(&mut self) -> Member {
        self.members += 1;
        Member(self.members)
    }

    /// A session has ended.
    pub(crate) fn forget(&mut self, member: Member) {
        self.had.remove(&member);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Who is next: whose member has had the least, and of those the first that came.
    pub(crate) fn front(&self) -> Option<u64> {
        self.waiting
            .iter()
            .min_by_key(|waiting| (waiting.start, waiting.ticket))
            .map(|waiting| waiting.ticket)
    }

    /// Puts somebody in who wants so many bytes. Returns the ticket.
    pub(crate) fn enter(&mut self, member: Member, bytes: usize) -> u64 {
        let ticket = self.next;
        self.next += 1;
        let had = self.had.entry(member).or_default();
        // Streams of a session that is alone are served as they come: nobody is to be compared with.
        let start = if member == ALONE { 0 } else { (*had).max(self.at) };
        *had = start + bytes as u64;
        self.waiting.push(Waiting { ticket, member, start });
        ticket
    }

    /// Takes somebody out, who was served or has given up.
    pub(crate) fn leave(&mut self, ticket: u64, served: bool) {
        let Some(place) = self.waiting.iter().position(|waiting| waiting.ticket == ticket) else { return };
        let Waiting { member, start, .. } = self.waiting.swap_remove(place);
        if served {
            self.at = start;
        } else if let Some(had) = self.had.get_mut(&member) {
            *had = start;
        }
    }
}

#[cfg(test)]
impl FairQueue {
    pub(crate) fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Whether no session is known that shares it.
    pub(crate) fn knows_nobody(&self) -> bool {
        self.had.keys().all(|member| *member == ALONE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Serves whoever is next, who comes again at once. Returns whose turn it was.
    fn serve(queue: &mut FairQueue, sizes: &HashMap<Member, usize>) -> Member {
        let ticket = queue.front().expect("somebody waits");
        let waiting = *queue.waiting.iter().find(|waiting| waiting.ticket == ticket).expect("it is in there");
        queue.leave(ticket, true);
        queue.enter(waiting.member, sizes[&waiting.member]);
        waiting.member
    }

    proptest! {
        #[test]
        fn sessions_share_equally_whatever_their_streams_and_sizes(
            sessions in prop::collection::vec((1usize..9, 1usize..300_000), 2..6),
        ) {
            let mut queue = FairQueue::default();
            let mut sizes = HashMap::new();
            for (member, &(streams, size)) in (1..).map(Member).zip(&sessions) {
                sizes.insert(member, size);
                for _ in 0..streams { queue.enter(member, size); }
            }
            let mut had: HashMap<Member, u64> = HashMap::new();
            while had.values().sum::<u64>() < 30_000_000 {
                let member = serve(&mut queue, &sizes);
                *had.entry(member).or_default() += sizes[&member] as u64;
            }
            let largest = *sizes.values().max().expect("not empty") as u64;
            let (least, most) = (had.values().min().expect("some"), had.values().max().expect("some"));
            prop_assert!(had.len() == sessions.len() && most - least <= 2 * largest, "{had:?} {sizes:?}");
        }
    }

    #[test]
    fn a_session_that_paused_has_not_saved_up_for_it() {
        let mut queue = FairQueue::default();
        let sizes = HashMap::from([(Member(1), 1000), (Member(2), 1000)]);
        queue.enter(Member(1), 1000);
        for _ in 0..500 {
            assert_eq!(serve(&mut queue, &sizes), Member(1), "what nobody else wants it gets");
        }
        queue.enter(Member(2), 1000);
        let of_second = (0..100).filter(|_| serve(&mut queue, &sizes) == Member(2)).count();
        assert!((49..=51).contains(&of_second), "{of_second} of 100");
    }

    #[test]
    fn who_gives_up_has_had_nothing() {
        let mut queue = FairQueue::default();
        let ticket = queue.enter(Member(1), 1_000_000);
        queue.enter(Member(2), 10);
        queue.leave(ticket, false);
        queue.enter(Member(1), 10);
        let sizes = HashMap::from([(Member(1), 10), (Member(2), 10)]);
        let of_first = (0..10).filter(|_| serve(&mut queue, &sizes) == Member(1)).count();
        assert_eq!(of_first, 5);
    }
}
