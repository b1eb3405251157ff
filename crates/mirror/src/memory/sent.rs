//! What was last sent of pages that are sent again and again: what deltas are made against.
//!
//! A page has one place it can be in, so nothing is searched or allocated. A page that is still being sent keeps its
//! place against others: when more pages are hot than fit, some have their deltas and the rest do without, instead of
//! all driving each other out.

use crate::hash::ContentHash;
use crate::layout::{CHUNK_PAGES, PAGE_SIZE, PageIndex};

/// A page that was not sent for so many rounds loses its place to another.
const FORGOTTEN_AFTER: u32 = 2;

/// The last sent content of some pages of one stream.
#[derive(Debug)]
pub(super) struct LastSent {
    streams: u64,
    places: Vec<Option<Place>>,
    /// As many pages as places; not touched, and so not there, until used.
    content: Vec<u8>,
}

#[derive(Debug, Clone, Copy)]
struct Place {
    page: PageIndex,
    hash: ContentHash,
    round: u32,
}

impl LastSent {
    /// Room for so many pages of one of so many streams.
    pub(super) fn new(pages: usize, streams: u16) -> LastSent {
        LastSent {
            streams: u64::from(streams.max(1)),
            places: vec![None; pages],
            content: vec![0; pages * PAGE_SIZE],
        }
    }

    /// A page's place. Every so many chunks one is this stream's: numbered through, they take up all places.
    fn place(&self, page: PageIndex) -> Option<usize> {
        let number = page.0 / CHUNK_PAGES / self.streams * CHUNK_PAGES + page.0 % CHUNK_PAGES;
        (!self.places.is_empty()).then(|| (number % self.places.len() as u64) as usize)
    }

    /// The content that was last sent of a page, if it is here and is what the hash says.
    pub(super) fn get(&self, page: PageIndex, hash: ContentHash) -> Option<&[u8]> {
        let at = self.place(page)?;
        let here = self.places[at].is_some_and(|place| place.page == page && place.hash == hash);
        here.then(|| &self.content[at * PAGE_SIZE..(at + 1) * PAGE_SIZE])
    }

    /// Keeps what is sent of a page in this round, if there is a place for it.
    pub(super) fn keep(&mut self, page: PageIndex, hash: ContentHash, round: u32, content: &[u8]) {
        let Some(at) = self.place(page) else { return };
        let taken = self.places[at]
            .is_some_and(|other| other.page != page && other.round.saturating_add(FORGOTTEN_AFTER) > round);
        if !taken {
            self.places[at] = Some(Place { page, hash, round });
            self.content[at * PAGE_SIZE..(at + 1) * PAGE_SIZE].copy_from_slice(content);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_found_only_with_the_content_that_the_ledger_knows() {
        let mut sent = LastSent::new(8, 1);
        let (page, hash) = (PageIndex(3), ContentHash::from_bits(5));
        assert_eq!(sent.get(page, hash), None);
        sent.keep(page, hash, 1, &[7; PAGE_SIZE]);
        assert_eq!(sent.get(page, hash), Some(&[7; PAGE_SIZE][..]));
        assert_eq!(sent.get(page, ContentHash::from_bits(6)), None, "another content");
        assert_eq!(sent.get(PageIndex(11), hash), None, "another page of that place");
    }

    #[test]
    fn a_hot_page_keeps_its_place_and_one_that_cooled_loses_it() {
        let mut sent = LastSent::new(8, 1);
        let hash = ContentHash::from_bits(5);
        sent.keep(PageIndex(3), hash, 1, &[7; PAGE_SIZE]);
        sent.keep(PageIndex(11), hash, 2, &[8; PAGE_SIZE]);
        assert!(sent.get(PageIndex(3), hash).is_some() && sent.get(PageIndex(11), hash).is_none());
        sent.keep(PageIndex(11), hash, 3, &[8; PAGE_SIZE]);
        assert!(sent.get(PageIndex(3), hash).is_none() && sent.get(PageIndex(11), hash).is_some());
    }

    #[test]
    fn without_room_nothing_is_kept() {
        let mut sent = LastSent::new(0, 1);
        sent.keep(PageIndex(3), ContentHash::from_bits(5), 1, &[7; PAGE_SIZE]);
        assert_eq!(sent.get(PageIndex(3), ContentHash::from_bits(5)), None);
    }
}
