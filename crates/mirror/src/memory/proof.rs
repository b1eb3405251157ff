//! The proof after the pause.

use crate::layout::PageIndex;

/// What the proof found: the frozen RAM against the ledger.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Proof {
    /// Pages compared: all of them.
    pub pages: u64,
    /// Pages whose content is not what the destination was given.
    pub mismatches: u64,
    /// The first few of them.
    pub examples: Vec<PageIndex>,
}

/// Differing pages that are kept by number, of however many.
const EXAMPLES: usize = 16;

impl Proof {
    pub(super) fn differs(&mut self, page: PageIndex) {
        self.mismatches += 1;
        if self.examples.len() < EXAMPLES {
            self.examples.push(page);
        }
    }

    /// Takes in what was found on another stream.
    pub(super) fn add(&mut self, part: Proof) {
        self.pages += part.pages;
        self.mismatches += part.mismatches;
        let room = EXAMPLES - self.examples.len();
        self.examples.extend(part.examples.into_iter().take(room));
    }
}
