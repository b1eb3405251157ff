//! Pieces of what is to be sent of a disk, and the requests that wait for them.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use super::layout::{BLOCK_SIZE, BlockIndex};
use nbd::server::Reply;

/// Answers a request when nobody holds it any more.
#[derive(Debug)]
pub(super) struct Answer(Mutex<Option<Reply>>);

impl Answer {
    pub(super) fn new(reply: Reply) -> Arc<Answer> {
        Arc::new(Answer(Mutex::new(Some(reply))))
    }

    #[cfg(test)]
    pub(super) fn to_nobody() -> Arc<Answer> {
        Arc::new(Answer(Mutex::new(None)))
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if let Some(reply) = self.0.get_mut().unwrap_or_else(PoisonError::into_inner).take() {
            reply.done(Ok(()));
        }
    }
}

/// What an item brings.
#[derive(Debug)]
pub(super) enum Content {
    /// Bytes that were written.
    Bytes {
        /// All that was written with them.
        data: Arc<Vec<u8>>,
        /// Which of it.
        range: Range<usize>,
    },
    /// So many blocks of zeros.
    Zero(u64),
    /// All of a block, read from the source's image.
    Settled {
        /// Its content.
        data: Vec<u8>,
        /// What the destination has may be something else; if not, only nobody here has seen it whole.
        owed: bool,
    },
    /// Everything before is to be put on stable storage.
    Sync,
}

/// A piece that waits to be sent: within one chunk, and at most [`MAX_PAYLOAD`](super::codec::MAX_PAYLOAD) bytes.
#[derive(Debug)]
pub(super) struct Item {
    /// The first block.
    pub(super) block: BlockIndex,
    /// Where in it the piece begins, in bytes.
    pub(super) at: usize,
    pub(super) content: Content,
}

impl Item {
    pub(super) fn bytes(&self) -> usize {
        match &self.content {
            Content::Bytes { range, .. } => range.len(),
            Content::Settled { data, .. } => data.len(),
            Content::Zero(_) | Content::Sync => 0,
        }
    }

    /// The blocks that it touches.
    pub(super) fn blocks(&self) -> Range<u64> {
        let count = match &self.content {
            Content::Bytes { range, .. } => (self.at + range.len()).div_ceil(BLOCK_SIZE) as u64,
            Content::Zero(count) => *count,
            Content::Settled { .. } => 1,
            Content::Sync => 0,
        };
        self.block.0..self.block.0 + count
    }
}
