//! What the destination says beside the answers that are waited for.

use std::collections::VecDeque;

use mirror::layout::PageIndex;

use super::peer::violation;
use super::stop::Stop;
use protocol::wire::{Reply, WrongBlocks};

/// Replies that may wait to be looked at. A destination says one thing for each that it is asked.
const MOST_REPLIES: usize = 64;

/// What was heard and not yet looked at. A destination that says more than makes sense ends the migration, so it cannot
/// fill this host's memory.
#[derive(Debug)]
pub(super) struct Inbox {
    /// The destination asked for these again; they are due in the next round.
    repairs: Vec<PageIndex>,
    /// Replies that were not for the rounds.
    others: VecDeque<Reply>,
    /// What it says of blocks of disks, likewise.
    blocks: Vec<WrongBlocks>,
    /// Pages of the machine, and blocks of its disks.
    pages: u64,
    most_blocks: u64,
}

impl Inbox {
    pub(super) fn new(pages: u64, blocks: u64) -> Inbox {
        let (repairs, others) = (Vec::new(), VecDeque::new());
        Inbox { repairs, others, blocks: Vec::new(), pages, most_blocks: blocks }
    }

    /// Takes in a reply.
    pub(super) fn note(&mut self, reply: Reply) -> Result<(), Stop> {
        match reply {
            Reply::Mismatch(pages) => self.repairs.extend(pages.pages.into_iter().map(PageIndex)),
            Reply::WrongBlocks(blocks) => self.blocks.push(blocks),
            other => self.others.push_back(other),
        }
        let blocks: u64 = self.blocks.iter().map(|wrong| wrong.blocks.len() as u64 + 1).sum();
        if blocks > self.most_blocks.saturating_mul(4) {
            return Err(violation("says more than there is to say"));
        }
        // Within a round a page is asked for once by whoever wrote it, and once by the audit.
        if self.repairs.len() as u64 > self.pages.saturating_mul(2) || self.others.len() > MOST_REPLIES {
            return Err(violation("says more than there is to say"));
        }
        Ok(())
    }

    /// The next reply that was not for the rounds.
    pub(super) fn other(&mut self) -> Option<Reply> {
        self.others.pop_front()
    }

    /// Takes the pages that were asked for again.
    pub(super) fn take_repairs(&mut self) -> Vec<PageIndex> {
        std::mem::take(&mut self.repairs)
    }

    /// Takes what was said of blocks.
    pub(super) fn take_blocks(&mut self) -> Vec<WrongBlocks> {
        std::mem::take(&mut self.blocks)
    }

    /// Whether something was said of blocks.
    pub(super) fn has_blocks(&self) -> bool {
        !self.blocks.is_empty()
    }

    /// How many pages were asked for again.
    pub(super) fn repairs(&self) -> usize {
        self.repairs.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::wire::{Nothing, Pages};

    #[test]
    fn a_destination_cannot_fill_the_memory_of_this_host_with_words() {
        let mismatch = || Reply::Mismatch(Pages { pages: vec![7; 100] });
        let mut heard = Inbox::new(100, 0);
        assert!(heard.note(mismatch()).is_ok() && heard.note(mismatch()).is_ok());
        assert!(heard.note(mismatch()).is_err(), "{} pages of 100", heard.repairs());
        assert_eq!(heard.take_repairs().len(), 300);
        for _ in 0..MOST_REPLIES {
            heard.note(Reply::Ready(Nothing {})).unwrap();
        }
        assert!(heard.note(Reply::Ready(Nothing {})).is_err());
        assert!(heard.other().is_some());
    }
}
