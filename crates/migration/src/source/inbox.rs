//! What the destination says beside the answers that are waited for.

use std::collections::VecDeque;

use mirror::layout::{Layout, PageIndex};
use mirror::storage::layout::DiskLayout;

use super::disks::blocks;
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
    /// The machine's pages, and the blocks of its disks where any is mirrored.
    layout: Layout,
    disks: Option<DiskLayout>,
}

impl Inbox {
    pub(super) fn new(layout: Layout, disks: Option<DiskLayout>) -> Inbox {
        let (repairs, others) = (Vec::new(), VecDeque::new());
        Inbox { repairs, others, blocks: Vec::new(), layout, disks }
    }

    /// Takes in a reply.
    pub(super) fn note(&mut self, reply: Reply) -> Result<(), Stop> {
        match reply {
            Reply::Mismatch(pages) => {
                let pages = pages.pages.into_iter().map(PageIndex);
                // Here, so that it is said who was wrong: what is said in the pause is in no round any more.
                if !pages.clone().all(|page| self.layout.locate(page).is_some()) {
                    return Err(violation("finds pages wrong that there are not"));
                }
                self.repairs.extend(pages);
            }
            Reply::WrongBlocks(wrong) => {
                let is_there = |block| self.disks.as_ref().is_some_and(|disks| disks.locate(block).is_some());
                if !blocks(&wrong).into_iter().all(is_there) {
                    return Err(violation("finds blocks wrong that there are not"));
                }
                self.blocks.push(wrong);
            }
            other => self.others.push_back(other),
        }
        let said: u64 = self.blocks.iter().map(|wrong| wrong.blocks.len() as u64 + 1).sum();
        let most = self.disks.as_ref().map_or(0, DiskLayout::block_count);
        if said > most.saturating_mul(4) {
            return Err(violation("says more than there is to say"));
        }
        // Within a round a page is asked for once by whoever wrote it, and once by the audit.
        let most = self.layout.page_count().saturating_mul(2);
        if self.repairs.len() as u64 > most || self.others.len() > MOST_REPLIES {
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
    use mirror::storage::layout::BLOCK_SIZE;
    use protocol::wire::{Nothing, Pages};

    /// Two blocks of RAM, with pages that there are not between them, and so of disks.
    fn inbox() -> Inbox {
        let layout = Layout::new([("pc.ram", 100 * 4096), ("pc.rom", 4096)], 1).unwrap();
        let disks = DiskLayout::new([3 * BLOCK_SIZE as u64, 1], 1).unwrap();
        Inbox::new(layout, Some(disks))
    }

    fn wrong(blocks: &[u64]) -> Reply {
        Reply::WrongBlocks(WrongBlocks { blocks: blocks.to_vec(), checked: false })
    }

    #[test]
    fn a_destination_cannot_fill_the_memory_of_this_host_with_words() {
        let mismatch = || Reply::Mismatch(Pages { pages: vec![7; 101] });
        let mut heard = inbox();
        assert!(heard.note(mismatch()).is_ok() && heard.note(mismatch()).is_ok());
        assert!(heard.note(mismatch()).is_err(), "{} pages of 101", heard.repairs());
        assert_eq!(heard.take_repairs().len(), 303);
        for _ in 0..MOST_REPLIES {
            heard.note(Reply::Ready(Nothing {})).unwrap();
        }
        assert!(heard.note(Reply::Ready(Nothing {})).is_err());
        assert!(heard.other().is_some());
        let mut heard = inbox();
        for _ in 0..8 {
            heard.note(wrong(&[2])).unwrap();
        }
        assert!(heard.note(wrong(&[2])).is_err(), "each of four blocks has been told four times");
    }

    #[test]
    fn what_a_destination_finds_wrong_is_there() {
        let page = |page: &u64| inbox().note(Reply::Mismatch(Pages { pages: vec![*page] })).is_ok();
        assert!([0, 99, 512].iter().all(page) && ![100, 511, 513, u64::MAX].iter().any(page));
        let block = |block: &u64| inbox().note(wrong(&[*block])).is_ok();
        assert!([0, 2, 32].iter().all(block) && ![3, 31, 33, u64::MAX].iter().any(block));
        let mut without = Inbox::new(Layout::new([("pc.ram", 4096)], 1).unwrap(), None);
        assert!(without.note(wrong(&[0])).is_err() && without.note(wrong(&[])).is_err());
    }
}
