//! How guest RAM is numbered, and which stream carries which page.
//!
//! The pages of all RAM blocks form one index space. Every block begins at a multiple of [`CHUNK_PAGES`], so a chunk
//! never spans two blocks. A page always travels on the same stream, chunk number modulo streams: its updates arrive
//! in order without any lock or sequence number.

use std::ops::Range;

/// Bytes in a page of the ledger. Larger pages of the host are tracked as such and sent in these.
pub const PAGE_SIZE: usize = 4096;

/// Pages in a chunk: 2 MiB.
pub const CHUNK_PAGES: u64 = 512;

/// Upper limit of guest RAM that a layout describes: 16 TiB. A peer's numbers are held against it before anything
/// is allocated.
pub const MAX_PAGES: u64 = 1 << 32;

/// Most RAM blocks of one machine.
pub const MAX_BLOCKS: usize = 256;

/// The number of a page in the index space of all RAM blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageIndex(pub u64);

/// A number of an index space: of a page of memory, or of a block of a disk.
pub trait Index: Copy {
    /// The number.
    fn number(self) -> u64;
}

impl Index for PageIndex {
    fn number(self) -> u64 {
        self.0
    }
}

/// One RAM block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// Its name, the same on both hosts.
    pub id: String,
    /// Its pages, in the index space.
    pub pages: Range<u64>,
}

/// The index space, and its division among streams.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    blocks: Vec<Block>,
    streams: u16,
}

/// RAM that cannot be described.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// No RAM at all.
    #[error("a machine without RAM blocks cannot be mirrored")]
    Empty,
    /// Not a whole number of pages.
    #[error("RAM block {id} has {size} bytes, which is not a positive multiple of {PAGE_SIZE}")]
    Size {
        /// The block.
        id: String,
        /// Its size in bytes.
        size: u64,
    },
    /// Beyond what is supported.
    #[error("more than {MAX_BLOCKS} RAM blocks, or more than {MAX_PAGES} pages")]
    TooLarge,
    /// A mirror needs at least one stream.
    #[error("a mirror needs at least one stream")]
    NoStreams,
}

impl Layout {
    /// The layout of blocks, given as name and size in bytes.
    ///
    /// # Errors
    /// [`LayoutError`] when sizes are not whole pages or exceed the limits.
    pub fn new<'a>(
        blocks: impl IntoIterator<Item = (&'a str, u64)>,
        streams: u16,
    ) -> Result<Layout, LayoutError> {
        if streams == 0 {
            return Err(LayoutError::NoStreams);
        }
        let mut layout = Layout { blocks: Vec::new(), streams };
        let mut next = 0u64;
        for (id, size) in blocks {
            if size == 0 || size % PAGE_SIZE as u64 != 0 {
                return Err(LayoutError::Size { id: id.to_owned(), size });
            }
            let end = next.saturating_add(size / PAGE_SIZE as u64);
            if end > MAX_PAGES || layout.blocks.len() == MAX_BLOCKS {
                return Err(LayoutError::TooLarge);
            }
            layout.blocks.push(Block { id: id.to_owned(), pages: next..end });
            next = end.next_multiple_of(CHUNK_PAGES);
        }
        if layout.blocks.is_empty() { Err(LayoutError::Empty) } else { Ok(layout) }
    }

    /// The blocks, in their order.
    #[must_use]
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// Number of streams.
    #[must_use]
    pub fn streams(&self) -> u16 {
        self.streams
    }

    /// Pages of guest RAM.
    #[must_use]
    pub fn page_count(&self) -> u64 {
        self.blocks.iter().map(|block| block.pages.end - block.pages.start).sum()
    }

    /// One past the last page index.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.blocks.last().map_or(0, |block| block.pages.end)
    }

    /// The block that a page lies in, and its byte offset there. `None` for an index that is no page.
    #[must_use]
    pub fn locate(&self, page: PageIndex) -> Option<(usize, u64)> {
        let block = self.blocks.partition_point(|block| block.pages.end <= page.0);
        let start = self.blocks.get(block)?.pages.start;
        (start <= page.0).then(|| (block, (page.0 - start) * PAGE_SIZE as u64))
    }

    /// Whether all of a run of pages is RAM of one chunk, as everything that travels must be.
    #[must_use]
    pub fn in_one_chunk(&self, page: PageIndex, count: u64) -> bool {
        let Some(last) = count.checked_sub(1).and_then(|more| page.0.checked_add(more)) else { return false };
        page.0 / CHUNK_PAGES == last / CHUNK_PAGES
            && self.locate(page).is_some()
            && self.locate(PageIndex(last)).is_some()
    }

    /// The stream that carries a page.
    #[must_use]
    pub fn stream_of(&self, page: PageIndex) -> u16 {
        let stream = (page.0 / CHUNK_PAGES) % u64::from(self.streams);
        u16::try_from(stream).expect("a remainder of a u16 fits it")
    }

    /// The chunks that a stream carries: for each, its block and its pages.
    pub fn chunks(&self, stream: u16) -> impl Iterator<Item = (usize, Range<u64>)> + '_ {
        let streams = u64::from(self.streams);
        self.blocks.iter().enumerate().flat_map(move |(number, block)| {
            let (first, last) = (block.pages.start / CHUNK_PAGES, (block.pages.end - 1) / CHUNK_PAGES);
            // The first chunk of the block that belongs to the stream.
            let own = first + (u64::from(stream) + streams - first % streams) % streams;
            (own..=last).step_by(usize::from(self.streams)).map(move |chunk| {
                (number, chunk * CHUNK_PAGES..((chunk + 1) * CHUNK_PAGES).min(block.pages.end))
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_page_is_carried_by_exactly_one_stream(
            sizes in prop::collection::vec(1u64..3000, 1..6), streams in 1u16..9,
        ) {
            let blocks: Vec<_> = sizes.iter().map(|pages| ("ram", pages * PAGE_SIZE as u64)).collect();
            let layout = Layout::new(blocks, streams).unwrap();
            let mut seen = vec![0u8; usize::try_from(layout.end()).unwrap()];
            for stream in 0..streams {
                for (block, pages) in layout.chunks(stream) {
                    prop_assert!(layout.in_one_chunk(PageIndex(pages.start), pages.end - pages.start));
                    for page in pages {
                        prop_assert_eq!(layout.stream_of(PageIndex(page)), stream);
                        prop_assert_eq!(layout.locate(PageIndex(page)).map(|(block, _)| block), Some(block));
                        seen[usize::try_from(page).unwrap()] += 1;
                    }
                }
            }
            let carried = seen.iter().map(|&n| u64::from(n)).sum::<u64>();
            prop_assert_eq!(carried, layout.page_count());
            prop_assert!(seen.iter().all(|&n| n <= 1));
        }
    }

    #[test]
    fn what_is_no_page_has_no_place() {
        let layout = Layout::new([("a", 4096 * 3), ("b", 4096)], 2).unwrap();
        assert_eq!(layout.locate(PageIndex(2)), Some((0, 8192)));
        assert_eq!(layout.locate(PageIndex(3)), None);
        assert_eq!(layout.locate(PageIndex(512)), Some((1, 0)));
        assert_eq!(layout.locate(PageIndex(513)), None);
        assert!(!layout.in_one_chunk(PageIndex(1), 3));
        assert!(!layout.in_one_chunk(PageIndex(u64::MAX), 2));
        assert!(!layout.in_one_chunk(PageIndex(0), 0));
    }

    #[test]
    fn absurd_memory_is_refused_before_anything_is_allocated() {
        assert!(matches!(Layout::new([("a", u64::MAX - 4095)], 1), Err(LayoutError::TooLarge)));
        assert!(matches!(Layout::new([("a", 5000)], 1), Err(LayoutError::Size { .. })));
        assert!(matches!(Layout::new([], 1), Err(LayoutError::Empty)));
        assert!(matches!(Layout::new([("a", 4096)], 0), Err(LayoutError::NoStreams)));
    }
}
