//! The ledger: for every page of memory, and every block of a disk, the hash of the content that the destination holds.
//!
//! Each side keeps its own: the source from what it sends, the destination from what it has written. An
//! order-independent sum over (number, hash) is kept up to date with every entry, so comparing two whole ledgers is
//! comparing two numbers. A ledger covers the pages or blocks of one stream and is touched by that stream's worker
//! alone, but for the audit.

use std::marker::PhantomData;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::hash::{ContentHash, Secret};
use crate::layout::{CHUNK_PAGES, Index, Layout, PageIndex};

/// The order-independent 128-bit sum over the (number, hash) pairs of a ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct Sum(pub u128);

impl Sum {
    fn add(&mut self, number: u64, hash: ContentHash) {
        self.0 = self.0.wrapping_add(mix(number, hash));
    }

    fn remove(&mut self, number: u64, hash: ContentHash) {
        self.0 = self.0.wrapping_sub(mix(number, hash));
    }
}

/// Ties a hash to its place. Without this, two pages that changed places would leave the sum as it was. The
/// multiply and fold are those of common 128-bit finalisers; the hash coming in is already uniform and secret.
fn mix(number: u64, hash: ContentHash) -> u128 {
    const ODD_A: u128 = 0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835;
    const ODD_B: u128 = 0xc2b2_ae3d_27d4_eb4f_1656_67b1_9e37_79f9;
    let mut x = hash.bits() ^ u128::from(number).wrapping_add(1).wrapping_mul(ODD_A);
    x ^= x >> 67;
    x = x.wrapping_mul(ODD_B);
    x ^ (x >> 59)
}

/// The ledger of what one stream carries: pages of memory, or blocks of disks.
#[derive(Debug)]
pub struct Ledger<I = PageIndex> {
    /// By number within the stream; 0 is "unknown".
    hashes: Vec<u128>,
    chunk: u64,
    streams: u64,
    sum: Sum,
    numbers: PhantomData<fn(I)>,
}

impl Ledger<PageIndex> {
    /// A ledger of a stream whose pages are all known to be zero, as those of a new RAM file are.
    #[must_use]
    pub fn all_zero(layout: &Layout, stream: u16, secret: &Secret) -> Ledger {
        let mut ledger = Ledger::unknown(layout.end(), CHUNK_PAGES, layout.streams());
        for (_, pages) in layout.chunks(stream) {
            for page in pages {
                ledger.record(PageIndex(page), secret.zero_page());
            }
        }
        ledger
    }
}

impl<I: Index> Ledger<I> {
    /// A ledger of one of so many streams that knows nothing, of numbers below `end` that are dealt out in chunks.
    #[must_use]
    pub fn unknown(end: u64, chunk: u64, streams: u16) -> Ledger<I> {
        let streams = u64::from(streams);
        let chunks = end.div_ceil(chunk).div_ceil(streams);
        let len = usize::try_from(chunks * chunk).expect("a layout is bounded");
        Ledger { hashes: vec![0; len], chunk, streams, sum: Sum::default(), numbers: PhantomData }
    }

    fn slot(&self, index: I) -> usize {
        let number = index.number();
        let local = number / self.chunk / self.streams * self.chunk + number % self.chunk;
        usize::try_from(local).expect("a layout is bounded")
    }

    /// What the destination holds; `None` when that is in doubt.
    #[must_use]
    pub fn get(&self, index: I) -> Option<ContentHash> {
        match self.hashes[self.slot(index)] {
            0 => None,
            bits => Some(ContentHash::from_bits(bits)),
        }
    }

    /// The destination holds this content, or will once the stream has been read this far.
    pub fn record(&mut self, index: I, hash: ContentHash) {
        self.forget(index);
        let slot = self.slot(index);
        self.hashes[slot] = hash.bits();
        self.sum.add(index.number(), hash);
    }

    /// What the destination holds is in doubt: the next content is sent whatever it is.
    pub fn forget(&mut self, index: I) {
        if let Some(old) = self.get(index) {
            self.sum.remove(index.number(), old);
            let slot = self.slot(index);
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
pub struct Ledgers<I = PageIndex> {
    streams: Vec<Mutex<Ledger<I>>>,
}

impl<I> From<Vec<Ledger<I>>> for Ledgers<I> {
    fn from(streams: Vec<Ledger<I>>) -> Ledgers<I> {
        Ledgers { streams: streams.into_iter().map(Mutex::new).collect() }
    }
}

impl Ledgers {
    /// Ledgers of a machine whose RAM is all zero at the destination.
    #[must_use]
    pub fn all_zero(layout: &Layout, secret: &Secret) -> Ledgers {
        let of = |stream| Ledger::all_zero(layout, stream, secret);
        (0..layout.streams()).map(of).collect::<Vec<_>>().into()
    }
}

impl<I> Ledgers<I> {
    /// The ledger of one stream. A worker that panicked ends its mirror, so what it left is never relied on.
    pub fn lock(&self, stream: u16) -> MutexGuard<'_, Ledger<I>> {
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
