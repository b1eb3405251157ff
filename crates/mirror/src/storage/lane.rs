//! Blocks of disks on one stream of the source. The stream is the memory worker's; whenever that is between two frames, or has
//! nothing to do, it sends what waits here.

use std::io::Write;
use std::sync::Arc;

use crossbeam_channel::Receiver;

use super::codec::Entry;
use super::item::{Content, Item};
use super::layout::{BLOCK_SIZE, BlockIndex};
use super::shared::Shared;
use crate::ledger::Sum;
use crate::memory::source_error::SourceError;
use crate::memory::writer::FrameWriter;

/// The sending end of what waits of disks on one stream. When it is dropped, nothing is taken from there any more.
#[derive(Debug)]
pub struct Lane {
    shared: Arc<Shared>,
    stream: u16,
    woken: Receiver<()>,
    items: Vec<Item>,
    entries: Vec<Entry>,
}

/// Where a piece of payload is.
struct Piece {
    item: usize,
    range: std::ops::Range<usize>,
}

impl Lane {
    pub(super) fn new(shared: Arc<Shared>, stream: u16, woken: Receiver<()>) -> Lane {
        Lane { shared, stream, woken, items: Vec::new(), entries: Vec::new() }
    }

    /// Tells when something waits.
    pub(crate) fn woken(&self) -> &Receiver<()> {
        &self.woken
    }

    /// Sends what is urgent, and one frame of what is not.
    pub(crate) fn send<W: Write>(&mut self, writer: &mut FrameWriter<W>) -> Result<(), SourceError> {
        self.send_waiting(writer, false)?;
        self.frame(writer, true).map(drop)
    }

    /// Sends all that waits now. What comes meanwhile is left: a guest that writes all the time must not keep memory from its turn.
    pub(crate) fn send_all<W: Write>(&mut self, writer: &mut FrameWriter<W>) -> Result<(), SourceError> {
        self.send_waiting(writer, true)
    }

    fn send_waiting<W: Write>(
        &mut self,
        writer: &mut FrameWriter<W>,
        copy_too: bool,
    ) -> Result<(), SourceError> {
        let mut left = self.shared.queue().resume(self.stream);
        while left > 0 {
            match self.frame(writer, copy_too)? {
                0 => break,
                sent => left = left.saturating_sub(sent),
            }
        }
        Ok(())
    }

    /// The sum of this stream's ledger of disks.
    pub(crate) fn sum(&self) -> Sum {
        self.shared.ledgers.lock(self.stream).sum()
    }

    /// Sends one frame. Returns how many of those that waited it was.
    fn frame<W: Write>(&mut self, writer: &mut FrameWriter<W>, copy_too: bool) -> Result<usize, SourceError> {
        let answered = self.shared.queue().take(self.stream, copy_too, &mut self.items);
        // Whoever waited for room, and without the lock.
        drop(answered);
        let sent = self.items.len();
        let Some(first) = self.items.first() else { return Ok(0) };
        if matches!(first.content, Content::Sync) {
            writer.sync()?;
            writer.flush()?;
        } else {
            let disk = self.shared.layout.locate(first.block).map_or(0, |place| place.disk);
            let pieces = self.classify();
            let raw: usize = self.items.iter().map(Item::bytes).sum();
            let mut wire = 0;
            if !self.entries.is_empty() {
                let items = &self.items;
                let payload = pieces.iter().map(|piece| match &items[piece.item].content {
                    Content::Bytes { data, .. } => &data[piece.range.clone()],
                    Content::Settled { data, .. } => &data[piece.range.clone()],
                    Content::Zero(_) | Content::Sync => &[],
                });
                wire = writer.blocks(&self.entries, payload)?;
            }
            self.shared.count(disk, raw as u64, wire);
        }
        self.entries.clear();
        self.items.clear();
        // It may have been given up for lost meanwhile, and there may be nothing else to send for long.
        self.shared.queue().resume(self.stream);
        self.shared.taken.notify_all();
        Ok(sent)
    }

    /// Turns what was taken into entries of a table, and says where their payload is.
    fn classify(&mut self) -> Vec<Piece> {
        let Shared { layout, secret, ledgers, .. } = &*self.shared;
        // Hashed before the ledger is locked, as for memory.
        let mut found = Vec::new();
        for (number, item) in self.items.iter().enumerate() {
            match &item.content {
                Content::Bytes { data, range } => {
                    let (mut block, mut within, mut at) = (item.block.0, item.at, range.start);
                    while at < range.end {
                        let length = (BLOCK_SIZE - within).min(range.end - at);
                        let piece = at..at + length;
                        let whole = layout.locate(BlockIndex(block)).map_or(0, |place| place.length);
                        let hash =
                            (within == 0 && length == whole).then(|| secret.hash_block(&data[piece.clone()]));
                        found.push((number, BlockIndex(block), within, piece, hash));
                        (block, within, at) = (block + 1, 0, at + length);
                    }
                }
                Content::Settled { data, .. } => {
                    found.push((number, item.block, 0, 0..data.len(), Some(secret.hash_block(data))));
                }
                Content::Zero(count) => {
                    for block in item.block.0..item.block.0 + count {
                        found.push((number, BlockIndex(block), 0, 0..0, Some(secret.zero_block())));
                    }
                }
                Content::Sync => {}
            }
        }
        let zero = secret.zero_block();
        let mut pieces = Vec::new();
        let mut ledger = ledgers.lock(self.stream);
        for (item, block, offset, range, hash) in found {
            let Some(hash) = hash else {
                let Content::Bytes { data, .. } = &self.items[item].content else { continue };
                ledger.forget(block);
                let fingerprint = secret.fingerprint(&data[range.clone()]);
                self.entries.push(Entry::Part { block, offset, length: range.len(), fingerprint });
                pieces.push(Piece { item, range });
                continue;
            };
            let known = ledger.get(block);
            if known == Some(hash) {
                continue;
            }
            ledger.record(block, hash);
            let only_unseen = matches!(self.items[item].content, Content::Settled { owed: false, .. });
            if known.is_none() && only_unseen {
                self.entries.push(Entry::Check { block, hash });
            } else if hash == zero {
                push_zero(&mut self.entries, block);
            } else {
                self.entries.push(Entry::Whole { block, hash, length: range.len() });
                pieces.push(Piece { item, range });
            }
        }
        pieces
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        let gone = self.shared.queue().close(self.stream);
        // Answers go out without the lock.
        drop(gone);
    }
}

/// Adds a zero block to a table, in the last entry if it follows on there within the same chunk.
fn push_zero(entries: &mut Vec<Entry>, block: BlockIndex) {
    use super::layout::CHUNK_BLOCKS;
    if let Some(Entry::Zero { block: first, count }) = entries.last_mut()
        && first.0 + *count == block.0
        && first.0 / CHUNK_BLOCKS == block.0 / CHUNK_BLOCKS
    {
        *count += 1;
    } else {
        entries.push(Entry::Zero { block, count: 1 });
    }
}
