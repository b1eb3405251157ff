//! Pages that hold what another page of the same stream already holds at the destination.
//!
//! The destination takes such a page from the other one, which is safe within a stream: both sides see its pages change
//! in the same order. Pages of different streams change in no order, so they are not looked at.

use crate::hash::ContentHash;
use crate::layout::PageIndex;
use crate::ledger::Ledger;

/// Bounds of the number of places of one stream: 16 KiB to 4 MiB.
const PLACES: (usize, usize) = (1 << 10, 1 << 18);

/// For each of some contents, the page that was last seen with it. A content has one place it can be in; the ledger says
/// whether what is found there is still so.
#[derive(Debug)]
pub(super) struct Twins {
    places: Vec<Option<PageIndex>>,
}

impl Twins {
    /// For a stream of so many pages.
    pub(super) fn new(pages: usize) -> Twins {
        let places = (pages / 4).clamp(PLACES.0, PLACES.1).next_power_of_two();
        Twins { places: vec![None; places] }
    }

    fn place(&self, hash: ContentHash) -> usize {
        // A power of two: the low bits of a hash are as good as any.
        (hash.bits() as usize) & (self.places.len() - 1)
    }

    /// A page other than this one that holds the content, by the ledger. From now on this one is looked at.
    pub(super) fn find(&mut self, hash: ContentHash, page: PageIndex, ledger: &Ledger) -> Option<PageIndex> {
        let place = self.place(hash);
        let twin = self.places[place].replace(page);
        twin.filter(|&twin| twin != page && ledger.get(twin) == Some(hash))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash::Secret;
    use crate::layout::Layout;

    #[test]
    fn a_page_that_holds_something_else_by_now_is_no_twin() {
        let layout = Layout::new([("ram", 4096 * 600)], 1).unwrap();
        let mut ledger = Ledger::all_zero(&layout, 0, &Secret::from([3; 192]));
        let mut twins = Twins::new(600);
        let hash = ContentHash::from_bits(5);
        let [first, second, third] = [1, 2, 3].map(PageIndex);
        ledger.record(first, hash);
        assert_eq!(twins.find(hash, first, &ledger), None, "the first of its kind, and not its own twin");
        assert_eq!(twins.find(hash, first, &ledger), None);
        ledger.record(second, hash);
        assert_eq!(twins.find(hash, second, &ledger), Some(first));
        ledger.record(second, ContentHash::from_bits(6));
        ledger.record(third, hash);
        assert_eq!(twins.find(hash, third, &ledger), None, "the second was written since");
        let other = ContentHash::from_bits(5 + (1 << 20));
        assert_eq!(twins.find(other, first, &ledger), None, "another content in the same place");
    }
}
