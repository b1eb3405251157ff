//! Audits of both copies, what they find wrong, and whether anything is left to doubt.

use std::time::Duration;

use mirror::layout::PAGE_SIZE;
use mirror::memory::source::{MemorySource, Proof, SourceError};
use mirror::storage::layout::BLOCK_SIZE;

use super::super::disks::blocks;
use super::super::peer::{Destination, violation};
use super::super::stop::Stop;
use super::{Rounds, broken};
use protocol::deadlines::ROUND;
use protocol::wire::{Audited, Reply, Request};
use session::report::Verification;

/// What a destination reads back of its copy at the least, in bytes per second.
const SLOWEST_AUDIT: u64 = 100 << 20;

impl Rounds {
    /// Has the destination read its whole copy back.
    pub(in crate::source) async fn read_back(
        &mut self,
        destination: &mut Destination,
    ) -> Result<Audited, Stop> {
        let disks = self.storage.as_ref().map_or(0, |storage| storage.layout().block_count());
        let size = self.totals.pages * PAGE_SIZE as u64 + disks * BLOCK_SIZE as u64;
        let limit = ROUND + Duration::from_secs(size / SLOWEST_AUDIT);
        destination.send(Request::Audit(protocol::wire::Nothing {})).await?;
        loop {
            match destination.receive_within(limit, "read its copy back").await? {
                Reply::Audited(audited) => {
                    let Audited { pages, differing, blocks, differing_blocks } = audited;
                    if pages > self.totals.pages
                        || blocks > disks
                        || differing > pages
                        || differing_blocks > blocks
                    {
                        return Err(violation("has audited more than there is"));
                    }
                    self.audited_there = self.audited_there.saturating_add(pages);
                    self.audited_blocks = self.audited_blocks.saturating_add(blocks);
                    return Ok(audited);
                }
                reply @ (Reply::Mismatch(_) | Reply::WrongBlocks(_)) => self.inbox.note(reply)?,
                other => return Err(violation(&format!("said {other} instead of what its audit found"))),
            }
        }
    }

    /// Has the destination read back a copy to which nothing comes any more. Whether all of it is what was sent.
    pub(in crate::source) async fn is_read_back_equal(
        &mut self,
        destination: &mut Destination,
    ) -> Result<bool, Stop> {
        let audited = self.read_back(destination).await?;
        if audited.differing > 0 || audited.differing_blocks > 0 || self.repairs_due() {
            return Ok(false);
        }
        // Only what was found wrong is not compared. Blocks may still be on their way to be settled.
        if audited.pages < self.totals.pages {
            let (pages, all) = (audited.pages, self.totals.pages);
            return Err(violation(&format!("was to audit {all} pages and has audited {pages}")));
        }
        Ok(true)
    }

    /// Compares all of the source's RAM with the ledger. What differs is settled by the next rounds.
    pub(in crate::source) async fn audit(&mut self, destination: &mut Destination) -> Result<(), Stop> {
        self.with(destination, |memory| Ok(memory.audit()?)).await.map(drop)
    }

    /// Compares all of the frozen RAM with the ledger.
    pub(in crate::source) async fn prove(&mut self) -> Result<Proof, Stop> {
        let memory = self.memory.take().ok_or_else(|| broken(&SourceError::Ended))?;
        let work = tokio::task::spawn_blocking(move || {
            let proof = memory.prove();
            (memory, proof)
        });
        let (memory, proof) = work.await.map_err(|e| broken(&e))?;
        self.memory = Some(memory);
        proof.map_err(|e| broken(&e))
    }

    /// Whether the destination has asked for pages that it has not yet been sent again.
    pub(in crate::source) fn repairs_due(&self) -> bool {
        self.inbox.repairs() > 0 || self.inbox.has_blocks()
    }

    /// Whether an audit has raised a doubt that further rounds must settle.
    pub(in crate::source) fn in_doubt(&self) -> bool {
        self.repairs_due() || !self.equal || self.memory.as_ref().is_some_and(MemorySource::in_doubt)
    }

    /// Whether anything at all is not certain: of a guest that stands still nothing may be.
    pub(in crate::source) fn is_certain(&self) -> bool {
        let settled = self.storage.as_ref().is_none_or(|storage| storage.uncertain() == 0);
        settled && !self.in_doubt() && !self.memory.as_ref().is_some_and(MemorySource::has_suspects)
    }

    /// What the audits have done so far.
    pub(in crate::source) fn verification(&self) -> Verification {
        let (audited, missed) =
            self.memory.as_ref().map_or((0, 0), |memory| (memory.audited(), memory.missed()));
        Verification {
            audited_pages: audited.saturating_add(self.audited_there),
            repaired_pages: self.repaired + self.inbox.repairs() as u64 + missed,
            audited_blocks: self.audited_blocks,
            repaired_blocks: self.repaired_blocks,
            ..Verification::default()
        }
    }

    /// Has blocks sent again that the destination has found wrong.
    pub(super) fn repair_blocks(&mut self) -> Result<(), Stop> {
        for wrong in self.inbox.take_blocks() {
            // A check fails where the guest has written the block since: that is no discrepancy.
            if !wrong.checked {
                self.repaired_blocks += wrong.blocks.len() as u64;
            }
            let repaired = self.storage.as_ref().is_some_and(|storage| storage.repair(&blocks(&wrong)));
            if !repaired {
                return Err(violation("finds blocks wrong that there are not"));
            }
        }
        Ok(())
    }

    /// Of a paused guest: checks that have failed, because the guest had written a block since, are settled. What else is wrong with
    /// blocks stays to be judged.
    pub(in crate::source) async fn settle_checks(&mut self) -> Result<(), Stop> {
        let Some(storage) = self.storage.clone() else { return Ok(()) };
        let (checked, wrong): (Vec<_>, Vec<_>) =
            self.inbox.take_blocks().into_iter().partition(|wrong| wrong.checked);
        wrong.into_iter().try_for_each(|wrong| self.inbox.note(Reply::WrongBlocks(wrong)))?;
        if !checked.iter().all(|wrong| storage.repair(&blocks(wrong))) {
            return Err(violation("finds blocks wrong that there are not"));
        }
        let settled = tokio::task::spawn_blocking(move || {
            while storage.uncertain() > 0 && !storage.is_over() {
                storage.settle()?;
            }
            Ok::<_, (usize, std::io::Error)>(())
        });
        settled.await.map_err(|e| broken(&e))?.map_err(|(_, e)| broken(&e))
    }
}
