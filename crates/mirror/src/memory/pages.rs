//! A set of pages: one bit for each page of the layout's index space.

use std::ops::Range;

use crate::layout::CHUNK_PAGES;

/// A set of pages of one layout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
}

impl PageSet {
    /// The empty set, over page indices below `end`.
    #[must_use]
    pub fn new(end: u64) -> PageSet {
        // Whole chunks, so that a chunk's words can be taken without a bounds case.
        let words = end.div_ceil(CHUNK_PAGES) * (CHUNK_PAGES / 64);
        PageSet { words: vec![0; usize::try_from(words).expect("a layout is bounded")] }
    }

    /// Adds a run of pages.
    pub fn insert(&mut self, pages: Range<u64>) {
        for_words(pages, |word, mask| self.words[word] |= mask);
    }

    /// Takes a run of pages out.
    pub fn remove(&mut self, pages: Range<u64>) {
        for_words(pages, |word, mask| self.words[word] &= !mask);
    }

    /// Whether a page is in the set.
    #[must_use]
    pub fn contains(&self, page: u64) -> bool {
        self.words.get((page / 64) as usize).is_some_and(|word| word & (1 << (page % 64)) != 0)
    }

    /// The pages of the chunk that begins with page `first`, a bit for each.
    #[must_use]
    pub fn chunk(&self, first: u64) -> [u64; (CHUNK_PAGES / 64) as usize] {
        let word = |n| self.words.get((first / 64) as usize + n).copied().unwrap_or(0);
        std::array::from_fn(word)
    }

    /// The set as words, a bit for each page, from page 0 on.
    #[must_use]
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Adds the pages of words, the first of which begins with page `first`, a multiple of 64. False, and nothing is
    /// added, where they go beyond the set.
    #[must_use]
    pub fn insert_words(&mut self, first: u64, words: &[u64]) -> bool {
        let start = usize::try_from(first / 64).ok().filter(|_| first.is_multiple_of(64));
        let end = start.and_then(|start| start.checked_add(words.len()));
        match start.zip(end).and_then(|(start, end)| self.words.get_mut(start..end)) {
            Some(here) => {
                here.iter_mut().zip(words).for_each(|(word, more)| *word |= more);
                true
            }
            None => false,
        }
    }

    /// Adds all pages of another set.
    pub fn extend(&mut self, other: &PageSet) {
        self.words.iter_mut().zip(&other.words).for_each(|(word, more)| *word |= more);
    }

    /// Takes all pages of another set out.
    pub fn subtract(&mut self, other: &PageSet) {
        self.words.iter_mut().zip(&other.words).for_each(|(word, less)| *word &= !less);
    }

    /// Empties the set.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// Number of pages in the set.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Whether no page is in the set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&word| word == 0)
    }

    /// The runs of pages of the set within a range, each as long as it can be.
    pub fn runs(&self, within: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let mut at = within.start;
        std::iter::from_fn(move || {
            let start = self.next(at, within.end, false)?;
            let end = self.next(start, within.end, true).unwrap_or(within.end);
            at = end;
            Some(start..end)
        })
    }

    /// The first page at or after `from` and below `end` that is in the set, or with `absent` that is not.
    fn next(&self, from: u64, end: u64, absent: bool) -> Option<u64> {
        let flip = if absent { u64::MAX } else { 0 };
        let mut at = from;
        while at < end {
            let word = self.words.get((at / 64) as usize).copied().unwrap_or(0) ^ flip;
            let rest = word & (u64::MAX << (at % 64));
            if rest != 0 {
                let found = at / 64 * 64 + u64::from(rest.trailing_zeros());
                return (found < end).then_some(found);
            }
            at = (at / 64 + 1) * 64;
        }
        None
    }
}

/// Calls `act` with each word that a run of pages touches, and the bits of it.
fn for_words(pages: Range<u64>, mut act: impl FnMut(usize, u64)) {
    let mut at = pages.start;
    while at < pages.end {
        let stop = ((at / 64 + 1) * 64).min(pages.end);
        let mask = (u64::MAX >> (64 - (stop - at))) << (at % 64);
        act((at / 64) as usize, mask);
        at = stop;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn behaves_as_a_set_of_numbers(
            runs in prop::collection::vec((0u64..2000, 0u64..200, any::<bool>()), 0..30), window in (0u64..2048, 0u64..600),
        ) {
            let (mut set, mut model) = (PageSet::new(2048), BTreeSet::new());
            for (start, len, add) in runs {
                let end = (start + len).min(2048);
                if add { set.insert(start..end); model.extend(start..end) }
                else { set.remove(start..end); model.retain(|page| !(start..end).contains(page)) }
            }
            prop_assert_eq!(set.len(), model.len() as u64);
            let within = window.0..(window.0 + window.1).min(2048);
            let runs: Vec<_> = set.runs(within.clone()).collect();
            prop_assert!(runs.windows(2).all(|two| two[0].end < two[1].start), "runs are as long as can be");
            let flat: Vec<u64> = runs.into_iter().flatten().collect();
            let expected: Vec<u64> = model.into_iter().filter(|page| within.contains(page)).collect();
            prop_assert_eq!(flat, expected);
        }
    }
}
