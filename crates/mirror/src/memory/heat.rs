//! Which pages the guest writes again and again.

use std::ops::Range;

use crate::layout::PageIndex;

/// For each page, in which of the last eight scans it was found written.
#[derive(Debug)]
pub(super) struct Heat {
    /// A bit for each scan, the last one the lowest.
    scans: Vec<u8>,
}

impl Heat {
    /// Of pages below `end`, none of them written yet.
    pub(super) fn new(end: u64) -> Heat {
        Heat { scans: vec![0; usize::try_from(end).expect("a layout is bounded")] }
    }

    /// Another scan is being made.
    pub(super) fn next_scan(&mut self) {
        self.scans.iter_mut().for_each(|scans| *scans <<= 1);
    }

    /// It has found these.
    pub(super) fn found(&mut self, pages: Range<u64>) {
        let pages = usize::try_from(pages.start).ok().zip(usize::try_from(pages.end).ok());
        let found = pages.and_then(|(start, end)| self.scans.get_mut(start..end));
        found.into_iter().flatten().for_each(|scans| *scans |= 1);
    }

    /// Whether a page was found in three of the last four scans.
    pub(super) fn is_hot(&self, page: PageIndex) -> bool {
        self.lately(page) >= 3
    }

    /// In how many of the last four scans a page was found.
    pub(super) fn lately(&self, page: PageIndex) -> u32 {
        let scans = usize::try_from(page.0).ok().and_then(|page| self.scans.get(page));
        scans.map_or(0, |scans| (scans & 0b1111).count_ones())
    }

    /// In how many of the last eight scans a page was found.
    pub(super) fn of(&self, page: PageIndex) -> u32 {
        let scans = usize::try_from(page.0).ok().and_then(|page| self.scans.get(page));
        scans.map_or(0, |scans| scans.count_ones())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_cools_when_it_is_found_no_more() {
        let mut heat = Heat::new(10);
        for _ in 0..20 {
            heat.next_scan();
            heat.found(2..5);
        }
        assert!(heat.is_hot(PageIndex(2)) && !heat.is_hot(PageIndex(1)));
        assert_eq!([1, 2, 4, 5].map(|page| heat.of(PageIndex(page))), [0, 8, 8, 0]);
        for _ in 0..3 {
            heat.next_scan();
        }
        assert_eq!(heat.of(PageIndex(3)), 5);
        assert!(!heat.is_hot(PageIndex(3)));
        (0..8).for_each(|_| heat.next_scan());
        assert_eq!(heat.of(PageIndex(3)), 0);
        assert_eq!(heat.of(PageIndex(99)), 0, "and one that is none has no heat");
    }
}
