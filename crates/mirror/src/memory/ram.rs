//! The files that hold guest RAM.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;

use crate::layout::{Layout, PAGE_SIZE, PageIndex};

/// The RAM files of one machine, in the order of the layout's blocks. All access is by `pread` and `pwrite`: a page
/// of a hole that is only read stays a hole, and a full tmpfs is an error instead of a signal.
#[derive(Debug)]
pub struct Ram {
    layout: Layout,
    files: Vec<RamFile>,
}

/// The file of one RAM block.
#[derive(Debug)]
pub struct RamFile {
    /// Open for reading; at the destination for writing too.
    pub file: File,
    /// Where in the file the block begins, in bytes.
    pub offset: u64,
}

/// RAM files that do not fit the layout, or an access to one that failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RamError {
    /// Not one file for each block.
    #[error("{files} RAM files for {blocks} RAM blocks")]
    Count {
        /// Files given.
        files: usize,
        /// Blocks of the layout.
        blocks: usize,
    },
    /// A file is shorter than its block.
    #[error("the RAM file of block {block} has {size} bytes and must have {expected}")]
    Size {
        /// Name of the block.
        block: String,
        /// Size of the file.
        size: u64,
        /// Bytes it must have.
        expected: u64,
    },
    /// The system refused.
    #[error("cannot {action} the RAM of block {block}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// Name of the block.
        block: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl Ram {
    /// The RAM of a layout.
    ///
    /// # Errors
    /// When the files are not one for each block, each at least as large.
    pub fn new(layout: Layout, files: Vec<RamFile>) -> Result<Ram, RamError> {
        if files.len() != layout.blocks().len() {
            return Err(RamError::Count { files: files.len(), blocks: layout.blocks().len() });
        }
        let ram = Ram { layout, files };
        for (number, block) in ram.layout.blocks().iter().enumerate() {
            let size = ram.files[number].file.metadata().map_err(|e| ram.error("examine", number, e))?.len();
            let expected =
                ram.files[number].offset + (block.pages.end - block.pages.start) * PAGE_SIZE as u64;
            if size < expected {
                return Err(RamError::Size { block: block.id.clone(), size, expected });
            }
        }
        Ok(ram)
    }

    /// Its layout.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    fn error(&self, action: &'static str, block: usize, source: io::Error) -> RamError {
        RamError::Io { action, block: self.layout.blocks()[block].id.clone(), source }
    }

    fn place(&self, page: PageIndex) -> (usize, u64) {
        let (block, offset) =
            self.layout.locate(page).expect("pages are checked against the layout where they come in");
        (block, self.files[block].offset + offset)
    }

    /// Reads the pages that begin at `page` and fill `buffer`; all of one block.
    ///
    /// # Errors
    /// [`RamError::Io`].
    pub fn read(&self, page: PageIndex, buffer: &mut [u8]) -> Result<(), RamError> {
        let (block, offset) = self.place(page);
        self.files[block].file.read_exact_at(buffer, offset).map_err(|e| self.error("read", block, e))
    }

    /// Writes pages that begin at `page`; all of one block.
    ///
    /// # Errors
    /// [`RamError::Io`]; a full tmpfs among others.
    pub fn write(&self, page: PageIndex, bytes: &[u8]) -> Result<(), RamError> {
        let (block, offset) = self.place(page);
        self.files[block].file.write_all_at(bytes, offset).map_err(|e| self.error("write", block, e))
    }

    /// Makes pages zero and gives their memory back; all of one block.
    ///
    /// # Errors
    /// [`RamError::Io`].
    pub fn punch(&self, page: PageIndex, count: u64) -> Result<(), RamError> {
        let (block, offset) = self.place(page);
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&self.files[block].file, flags, offset, count * PAGE_SIZE as u64)
            .map_err(|e| self.error("punch a hole in", block, e.into()))
    }

    /// Whether all of a run of pages of one block was never written: a hole, which reads as zeros.
    ///
    /// # Errors
    /// [`RamError::Io`].
    pub fn is_hole(&self, page: PageIndex, count: u64) -> Result<bool, RamError> {
        let (block, offset) = self.place(page);
        // Threads share the file's position, but the answer is the call's result; the position is never used.
        match seek(self.files[block].file.as_fd(), SeekFrom::Data(offset)) {
            Ok(data) => Ok(data >= offset + count * PAGE_SIZE as u64),
            Err(Errno::NXIO) => Ok(true),
            Err(e) => Err(self.error("find holes in", block, e.into())),
        }
    }

    /// The holes in a run of pages of one block: what was never written, or punched.
    ///
    /// # Errors
    /// [`RamError::Io`].
    pub fn holes(&self, pages: Range<u64>) -> Result<Vec<Range<u64>>, RamError> {
        let mut holes = Vec::new();
        let mut at = pages.start;
        while at < pages.end {
            let (block, offset) = self.place(PageIndex(at));
            let file = self.files[block].file.as_fd();
            let find = |what| match seek(file, what) {
                Ok(found) => Ok(at + (found - offset) / PAGE_SIZE as u64),
                Err(Errno::NXIO) => Ok(pages.end),
                Err(e) => Err(self.error("find holes in", block, e.into())),
            };
            let data = find(SeekFrom::Data(offset))?.min(pages.end);
            if data > at {
                holes.push(at..data);
                at = data;
            } else {
                at = find(SeekFrom::Hole(offset))?;
            }
        }
        Ok(holes)
    }
}
