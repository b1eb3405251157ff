//! What was last sent of pages that are sent again and again: what deltas are made against.
//!
//! For as many pages as there is room for it is their content, which gives the shortest deltas. For sixteen times as many
//! it is a fingerprint of each of their parts: enough to tell which parts were written since, and those are the delta.
//!
//! A page has one place it can be in, so nothing is searched or allocated. A page that is still being sent keeps its
//! place against others: when more pages are hot than fit, some have their deltas and the rest do without, instead of
//! all driving each other out.

use super::delta;
use crate::hash::{ContentHash, Secret};
use crate::layout::{CHUNK_PAGES, PAGE_SIZE, PageIndex};

/// A page that was not sent for so many rounds loses its place to another.
const FORGOTTEN_AFTER: u32 = 2;
/// Bytes of a part that has a fingerprint: two cache lines, so that a counter costs 132 bytes.
const PART: usize = 128;
/// The fingerprints of a page. With 64 bits each, a part that was written goes unnoticed once in 2^64 writes; the content hash of
/// the page then tells the destination, which asks for it again.
type Fingerprints = [u64; PAGE_SIZE / PART];
/// How the room is shared: so much of it is for content, the rest for fingerprints.
const CONTENT: (usize, usize) = (2, 3);

/// What was last sent of some pages of one stream.
#[derive(Debug)]
pub(super) struct LastSent {
    content_places: Places,
    /// As many pages as places; not touched, and so not there, until used.
    content: Vec<u8>,
    print_places: Places,
    prints: Vec<Fingerprints>,
}

impl LastSent {
    /// Room of so many bytes for one of so many streams, which has so many pages.
    pub(super) fn new(bytes: usize, pages: usize, streams: u16) -> LastSent {
        let for_content = bytes * CONTENT.0 / CONTENT.1;
        let whole = pages.min(for_content / PAGE_SIZE);
        let printed = (pages - whole).min((bytes - for_content) / size_of::<Fingerprints>());
        LastSent {
            content_places: Places::new(whole, streams),
            content: vec![0; whole * PAGE_SIZE],
            print_places: Places::new(printed, streams),
            prints: vec![[0; PAGE_SIZE / PART]; printed],
        }
    }

    /// Appends the delta from what was last sent of a page, which had that hash, to what it is now. Returns its length;
    /// none where there is no delta that is worth it, and then `out` is as it was.
    pub(super) fn delta(
        &self,
        page: PageIndex,
        known: ContentHash,
        new: &[u8],
        secret: &Secret,
        out: &mut Vec<u8>,
    ) -> Option<usize> {
        if let Some(at) = self.content_places.find(page, known) {
            return delta::encode(&self.content[at * PAGE_SIZE..(at + 1) * PAGE_SIZE], new, out);
        }
        let old = &self.prints[self.print_places.find(page, known)?];
        delta::encode_parts::<PART>(new, out, |part| {
            secret.fingerprint(&new[part * PART..(part + 1) * PART]) != old[part]
        })
    }

    /// Keeps what is sent of a page in this round, if there is a place for it.
    pub(super) fn keep(
        &mut self,
        page: PageIndex,
        hash: ContentHash,
        round: u32,
        content: &[u8],
        secret: &Secret,
    ) {
        if let Some(at) = self.content_places.take(page, hash, round) {
            self.content[at * PAGE_SIZE..(at + 1) * PAGE_SIZE].copy_from_slice(content);
        } else if let Some(at) = self.print_places.take(page, hash, round) {
            for (print, part) in self.prints[at].iter_mut().zip(content.chunks_exact(PART)) {
                *print = secret.fingerprint(part);
            }
        }
    }
}

/// Who has which place.
#[derive(Debug)]
struct Places {
    streams: u64,
    places: Vec<Option<Place>>,
}

#[derive(Debug, Clone, Copy)]
struct Place {
    page: PageIndex,
    hash: ContentHash,
    round: u32,
}

impl Places {
    fn new(count: usize, streams: u16) -> Places {
        Places { streams: u64::from(streams.max(1)), places: vec![None; count] }
    }

    /// A page's place. Every so many chunks one is this stream's: numbered through, they take up all places.
    fn place(&self, page: PageIndex) -> Option<usize> {
        let number = page.0 / CHUNK_PAGES / self.streams * CHUNK_PAGES + page.0 % CHUNK_PAGES;
        (!self.places.is_empty()).then(|| (number % self.places.len() as u64) as usize)
    }

    /// The place of a page, if it has one with what the hash says.
    fn find(&self, page: PageIndex, hash: ContentHash) -> Option<usize> {
        let at = self.place(page)?;
        self.places[at].is_some_and(|place| place.page == page && place.hash == hash).then_some(at)
    }

    /// Gives a page its place, unless another one has it that is still being sent.
    fn take(&mut self, page: PageIndex, hash: ContentHash, round: u32) -> Option<usize> {
        let at = self.place(page)?;
        let taken = self.places[at]
            .is_some_and(|other| other.page != page && other.round.saturating_add(FORGOTTEN_AFTER) > round);
        if taken {
            return None;
        }
        self.places[at] = Some(Place { page, hash, round });
        Some(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: [u8; PAGE_SIZE] = [7; PAGE_SIZE];

    fn secret() -> Secret {
        Secret::from([3; 192])
    }

    /// Room for so many pages by content and so many by fingerprints.
    fn room(content: usize, printed: usize) -> LastSent {
        LastSent {
            content_places: Places::new(content, 1),
            content: vec![0; content * PAGE_SIZE],
            print_places: Places::new(printed, 1),
            prints: vec![[0; PAGE_SIZE / PART]; printed],
        }
    }

    /// The delta to a page of which one byte was written; it must give that page.
    fn delta(sent: &LastSent, page: u64, hash: ContentHash) -> Option<usize> {
        let mut new = OLD;
        new[1000] = 8;
        let mut out = Vec::new();
        let length = sent.delta(PageIndex(page), hash, &new, &secret(), &mut out);
        if length.is_some() {
            let mut made = OLD;
            delta::apply(&out, &mut made).unwrap();
            assert_eq!(made, new);
        }
        length
    }

    #[test]
    fn a_page_is_found_only_with_the_content_that_the_ledger_knows() {
        for (mut sent, length) in [(room(8, 0), 12), (room(0, 8), 132)] {
            let hash = ContentHash::from_bits(5);
            assert_eq!(delta(&sent, 3, hash), None);
            sent.keep(PageIndex(3), hash, 1, &OLD, &secret());
            assert_eq!(delta(&sent, 3, hash), Some(length));
            assert_eq!(delta(&sent, 3, ContentHash::from_bits(6)), None, "another content");
            assert_eq!(delta(&sent, 11, hash), None, "another page of that place");
        }
    }

    #[test]
    fn a_hot_page_keeps_its_place_and_one_that_cooled_loses_it() {
        let mut sent = room(8, 0);
        let hash = ContentHash::from_bits(5);
        sent.keep(PageIndex(3), hash, 1, &OLD, &secret());
        sent.keep(PageIndex(11), hash, 2, &OLD, &secret());
        assert!(delta(&sent, 3, hash).is_some() && delta(&sent, 11, hash).is_none());
        sent.keep(PageIndex(11), hash, 3, &OLD, &secret());
        assert!(delta(&sent, 3, hash).is_none() && delta(&sent, 11, hash).is_some());
    }

    #[test]
    fn a_page_without_room_for_its_content_has_its_fingerprints() {
        let mut sent = room(8, 16);
        let hash = ContentHash::from_bits(5);
        sent.keep(PageIndex(3), hash, 1, &OLD, &secret());
        sent.keep(PageIndex(11), hash, 1, &OLD, &secret());
        assert_eq!((delta(&sent, 3, hash), delta(&sent, 11, hash)), (Some(12), Some(132)));
    }

    #[test]
    fn the_room_is_shared_and_never_more_than_the_stream_has_pages() {
        let places = |sent: &LastSent| (sent.content_places.places.len(), sent.print_places.places.len());
        assert_eq!(places(&LastSent::new(96 << 20, 1 << 20, 1)), (16_384, 131_072));
        assert_eq!(places(&LastSent::new(96 << 20, 20_000, 1)), (16_384, 3616));
        assert_eq!(places(&LastSent::new(96 << 20, 100, 1)), (100, 0));
        assert_eq!(places(&LastSent::new(0, 100, 1)), (0, 0));
        let mut none = LastSent::new(0, 100, 1);
        none.keep(PageIndex(3), ContentHash::from_bits(5), 1, &OLD, &secret());
        assert_eq!(delta(&none, 3, ContentHash::from_bits(5)), None);
    }
}
