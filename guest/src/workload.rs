//! Which pages are dirtied, in which order, and with what.

use crate::page::{Content, Sequence};

/// A way of dirtying memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// Pages of the working set at random, with new compressible content.
    Random,
    /// One page after the other, with new compressible content.
    Sequential,
    /// Pages at random, of which only a counter and the checksum change.
    Counter,
    /// Pages at random, with content that no compression and no delta makes smaller.
    Incompressible,
}

impl Pattern {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Random, Self::Sequential, Self::Counter, Self::Incompressible];

    /// The pattern of that name, as on the kernel command line.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|pattern| pattern.name() == name)
    }

    /// The pattern's name on the kernel command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Random => "random",
            Self::Sequential => "sequential",
            Self::Counter => "counter",
            Self::Incompressible => "incompressible",
        }
    }

    /// The content that goes with the pattern where none is chosen.
    pub fn content(self) -> Content {
        match self {
            Self::Random | Self::Sequential => Content::Text,
            Self::Counter => Content::Still,
            Self::Incompressible => Content::Noise,
        }
    }
}

/// The pages to write next, for ever.
#[derive(Debug)]
pub struct Order {
    pattern: Pattern,
    pages: u64,
    next: u64,
    random: Sequence,
}

impl Order {
    /// An order over the first `pages` pages, the working set.
    ///
    /// # Panics
    /// When there are none.
    pub fn new(pattern: Pattern, pages: u64, seed: u64) -> Self {
        assert!(pages > 0, "a working set has pages");
        Self { pattern, pages, next: 0, random: Sequence::new(seed) }
    }

    /// The number of the page to write next.
    pub fn next_page(&mut self) -> u64 {
        match self.pattern {
            Pattern::Sequential => {
                let page = self.next;
                self.next = (page + 1) % self.pages;
                page
            }
            Pattern::Random | Pattern::Counter | Pattern::Incompressible => self.random.below(self.pages),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn names_lead_back_to_their_patterns() {
        for pattern in Pattern::ALL {
            assert_eq!(Pattern::named(pattern.name()), Some(pattern));
        }
        assert_eq!(Pattern::named("Random"), None);
    }

    #[test]
    fn every_order_reaches_every_page_of_the_working_set_and_no_other() {
        for pattern in Pattern::ALL {
            let mut order = Order::new(pattern, 50, 1);
            let seen: HashSet<u64> = (0..2000).map(|_| order.next_page()).collect();
            assert_eq!(seen, (0..50).collect(), "{pattern:?}");
        }
    }

    #[test]
    fn sequential_goes_round_in_order() {
        let mut order = Order::new(Pattern::Sequential, 3, 1);
        assert_eq!([0; 5].map(|_| order.next_page()), [0, 1, 2, 0, 1]);
    }
}
