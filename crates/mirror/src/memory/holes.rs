//! Memory that a guest has given back. Its pages are holes of the RAM file from then on, and read as zeros, which no scan for written
//! pages tells: a balloon, reports of free pages and virtio-mem punch them behind pages that stay protected.

use std::ops::Range;
use std::time::{Duration, Instant};

use super::RamError;
use super::pages::PageSet;
use super::round::Guest;
use crate::audit::Subject;
use crate::layout::{CHUNK_PAGES, PageIndex};

/// While the guest runs, holes are looked for at most in such a part of the time. Measured for 1 GiB in pages of 4 KiB that are there and
/// not mapped: 9 ms, as each has to be looked up in the file; for what is mapped, 0.8 ms.
const SPARING: u32 = 10;

/// The search for holes of one mirror.
#[derive(Debug)]
pub(super) struct Holes {
    /// The guest may give memory back.
    wanted: bool,
    /// Not before, while it runs.
    next: Option<Instant>,
}

impl Holes {
    /// For a guest that may give memory back, or not.
    pub(super) fn new(wanted: bool) -> Holes {
        Holes { wanted, next: None }
    }

    /// Whether to look now. Of a paused guest always: it is the last time.
    pub(super) fn are_due(&self, guest: Guest) -> bool {
        let due = self.next.is_none_or(|next| Instant::now() >= next);
        self.wanted && (guest == Guest::Paused || due)
    }

    /// It has taken so long to look.
    pub(super) fn looked(&mut self, took: Duration) {
        self.next = Some(Instant::now() + took * SPARING);
    }
}

/// Adds to `owed` those of these pages, all of one block, that are holes, and of which the destination holds something else than zeros.
/// No content is read but on hugetlbfs, which tells of no holes.
///
/// What the destination is in doubt about is left out: that is owed, or withheld, already.
pub(super) fn find(subject: &Subject, pages: Range<u64>, owed: &mut PageSet) -> Result<(), RamError> {
    let Subject { ram, ledgers, secret } = subject;
    let zero = secret.zero_page();
    for hole in ram.empty(pages)? {
        let mut at = hole.start;
        while at < hole.end {
            let end = hole.end.min((at / CHUNK_PAGES + 1) * CHUNK_PAGES);
            let ledger = ledgers.lock(ram.layout().stream_of(PageIndex(at)));
            for page in at..end {
                if ledger.get(PageIndex(page)).is_some_and(|known| known != zero) {
                    owed.insert(page..page + 1);
                }
            }
            at = end;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_running_guest_is_not_searched_all_the_time_and_a_paused_one_always() {
        let mut holes = Holes::new(true);
        assert!(holes.are_due(Guest::Running));
        holes.looked(Duration::from_secs(60));
        assert!(!holes.are_due(Guest::Running) && holes.are_due(Guest::Paused));
        holes.looked(Duration::ZERO);
        assert!(holes.are_due(Guest::Running));
        assert!(!Holes::new(false).are_due(Guest::Paused));
    }
}
