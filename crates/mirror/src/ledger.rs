//! The ledger: for every page, the hash of the content that the destination holds.
//!
//! Each side keeps its own: the source from what it sends, the destination from what it has written. An
//! order-independent sum over (page, hash) is kept up to date with every entry, so comparing two whole ledgers is
//! comparing two numbers. A ledger covers the pages of one stream and is touched by that stream's worker alone,
//! but for the audit.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::hash::{ContentHash, Secret};
use crate::layout::{CHUNK_PAGES, Layout, PageIndex};

/// The order-independent 128-bit sum over the (page, hash) pairs of a ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct Sum(pub u128);

impl Sum {
    fn add(&mut self, page: PageIndex, hash: ContentHash) {
        self.0 = self.0.wrapping_add(mix(page, hash));
    }

    fn remove(&mut self, page: PageIndex, hash: ContentHash) {
        self.0 = self.0.wrapping_sub(mix(page, hash));
    }
}

/// Ties a hash to its page. Without this, two pages that changed places would leave the sum as it was. The
/// multiply and fold are those of common 128-bit finalisers; the hash coming in is already uniform and secret.
fn mix(page: PageIndex, hash: ContentHash) -> u128 {
    const ODD_A: u128 = 0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835;
    const ODD_B: u128 = 0xc2b2_ae3d_27d4_eb4f_1656_67b1_9e37_79f9;
    let mut x = hash.bits() ^ u128::from(page.0).wrapping_add(1).wrapping_mul(ODD_A);
    x ^= x >> 67;
    x = x.wrapping_mul(ODD_B);
    x ^ (x >> 59)
}

/// The ledger of one stream's pages.
#[derive(Debug)]
pub struct Ledger {
    /// By page number within the stream; 0 is "unknown".
    hashes: Vec<u128>,
    streams: u64,
    sum: Sum,
}

impl Ledger {
    /// A ledger of a stream whose pages are all known to be zero, as those of a new RAM file are.
    #[must_use]
    pub fn all_zero(layout: &Layout, stream: u16, secret: &Secret) -> Ledger {
        let streams = u64::from(layout.streams());
        let chunks = layout.end().div_ceil(CHUNK_PAGES).div_ceil(streams);
        let len = usize::try_from(chunks * CHUNK_PAGES).expect("a layout is bounded");
        let mut ledger = Ledger { hashes: vec![0; len], streams, sum: Sum::default() };
        for (_, pages) in layout.chunks(stream) {
            for page in pages {
                ledger.record(PageIndex(page), secret.zero_page());
            }
        }
        ledger
    }

    fn slot(&self, page: PageIndex) -> usize {
        let local = page.0 / CHUNK_PAGES / self.streams * CHUNK_PAGES + page.0 % CHUNK_PAGES;
        usize::try_from(local).expect("a layout is bounded")
    }

    /// What the destination holds; `None` when that is in doubt.
    #[must_use]
    pub fn get(&self, page: PageIndex) -> Option<ContentHash> {
        match self.hashes[self.slot(page)] {
            0 => None,
            bits => Some(ContentHash::from_bits(bits)),
        }
    }

    /// The destination holds this content, or will once the stream has been read this far.
    pub fn record(&mut self, page: PageIndex, hash: ContentHash) {
        self.forget(page);
        let slot = self.slot(page);
        self.hashes[slot] = hash.bits();
        self.sum.add(page, hash);
    }

    /// What the destination holds is in doubt: the next content is sent whatever it is.
    pub fn forget(&mut self, page: PageIndex) {
        if let Some(old) = self.get(page) {
            self.sum.remove(page, old);
            let slot = self.slot(page);
            self.hashes[slot] = 0;
        }
    }

    /// The sum over all entries.
    #[must_use]
    pub fn sum(&self) -> Sum {
        self.sum
    }
}

/// The ledgers of all streams. Each is locked for a batch at a time: by its stream's worker, or by the audit.
#[derive(Debug)]
pub struct Ledgers {
    streams: Vec<Mutex<Ledger>>,
}

impl Ledgers {
    /// Ledgers of a machine whose RAM is all zero at the destination.
    #[must_use]
    pub fn all_zero(layout: &Layout, secret: &Secret) -> Ledgers {
        let of = |stream| Mutex::new(Ledger::all_zero(layout, stream, secret));
        Ledgers { streams: (0..layout.streams()).map(of).collect() }
    }

    /// The ledger of one stream. A worker that panicked ends its mirror, so what it left is never relied on.
    pub fn lock(&self, stream: u16) -> MutexGuard<'_, Ledger> {
        self.streams[usize::from(stream)].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn layout() -> Layout {
        Layout::new([("a", 4096 * 700), ("b", 4096 * 100)], 1).unwrap()
    }

    proptest! {
        #[test]
        fn equal_content_means_equal_sums_in_any_order(
            writes in prop::collection::vec((0u64..700, 1u128..9, any::<bool>()), 0..200), seed: u64,
        ) {
            let (layout, secret) = (layout(), Secret::from([3; 192]));
            let mut one = Ledger::all_zero(&layout, 0, &secret);
            for &(page, hash, forget) in &writes {
                if forget { one.forget(PageIndex(page)) } else { one.record(PageIndex(page), ContentHash::from_bits(hash)) }
            }
            // The same final content, reached in another order and without the detours.
            let mut other = Ledger::all_zero(&layout, 0, &secret);
            let mut pages: Vec<u64> = (0..700).collect();
            pages.sort_by_key(|page| page.wrapping_mul(seed | 1));
            for page in pages.into_iter().map(PageIndex) {
                match one.get(page) { Some(hash) => other.record(page, hash), None => other.forget(page) }
            }
            prop_assert_eq!(one.sum(), other.sum());
        }

        #[test]
        fn one_differing_page_is_never_hidden(page in 0u64..700, a in 1u128.., b in 1u128..) {
            prop_assume!(a != b);
            let (layout, secret) = (layout(), Secret::from([3; 192]));
            let mut one = Ledger::all_zero(&layout, 0, &secret);
            let mut other = Ledger::all_zero(&layout, 0, &secret);
            one.record(PageIndex(page), ContentHash::from_bits(a));
            other.record(PageIndex(page), ContentHash::from_bits(b));
            prop_assert_ne!(one.sum(), other.sum());
        }

        #[test]
        fn two_pages_that_changed_places_are_never_hidden(x in 0u64..700, y in 0u64..700, a in 1u128.., b in 1u128..) {
            prop_assume!(x != y && a != b);
            let (layout, secret) = (layout(), Secret::from([3; 192]));
            let mut one = Ledger::all_zero(&layout, 0, &secret);
            let mut other = Ledger::all_zero(&layout, 0, &secret);
            one.record(PageIndex(x), ContentHash::from_bits(a));
            one.record(PageIndex(y), ContentHash::from_bits(b));
            other.record(PageIndex(x), ContentHash::from_bits(b));
            other.record(PageIndex(y), ContentHash::from_bits(a));
            prop_assert_ne!(one.sum(), other.sum());
        }
    }

    #[test]
    fn streams_share_no_entry_and_cover_all() {
        let layout = Layout::new([("a", 4096 * 2000)], 3).unwrap();
        let secret = Secret::from([9; 192]);
        let whole = Ledger::all_zero(&Layout::new([("a", 4096 * 2000)], 1).unwrap(), 0, &secret).sum();
        let parts = (0..3)
            .fold(0u128, |all, stream| all.wrapping_add(Ledger::all_zero(&layout, stream, &secret).sum().0));
        assert_eq!(whole, Sum(parts));
    }
}
