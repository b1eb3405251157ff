//! The files that hold guest RAM, or the process that does.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use dirty_tracker::Resident;
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;

use super::huge::{self, HugeMapping};
use crate::hash::is_zero;
use crate::layout::{CHUNK_PAGES, Layout, PAGE_SIZE, PageIndex};

/// Which part of guest RAM one of the tracker's ranges is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrackedRange {
    /// The RAM block.
    pub block: usize,
    /// Where in the block the range begins, in bytes; a multiple of the page size.
    pub offset: u64,
}

/// The RAM files of one machine, in the order of the layout's blocks. They are read by `pread`, and written by `pwrite` or,
/// on hugetlbfs, once they are allocated: a page of a hole that is only read stays a hole, and a full file system is an
/// error instead of a signal.
#[derive(Debug)]
pub struct Ram {
    layout: Layout,
    files: Vec<Backing>,
}

/// A RAM file, and what its file system can do.
#[derive(Debug)]
struct Backing {
    file: File,
    offset: u64,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    /// tmpfs, or a file system on a disk.
    Pages,
    /// The memory of a process, which alone has it: what it has never touched is told by its page table, unless a file is behind it.
    Process(Option<Resident>),
    /// hugetlbfs, with pages of so many bytes; mapped where a copy is written.
    Huge { page_size: u64, mapping: Option<HugeMapping> },
}

/// The file of one RAM block.
#[derive(Debug)]
pub struct RamFile {
    /// Open for reading; at the destination for writing too.
    pub file: File,
    /// Where in the file the block begins, in bytes.
    pub offset: u64,
    /// Of RAM that is private to a process, and read through its memory (`/proc/PID/mem`): that process. None of a file.
    pub process: Option<RamProcess>,
}

/// A process that has RAM to itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamProcess {
    /// Process id.
    pub pid: u32,
    /// No file is behind it: what was never touched of it is zero.
    pub anonymous: bool,
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
        let backing = |(number, RamFile { file, offset, process }): (usize, RamFile)| {
            if let Some(RamProcess { pid, anonymous }) = process {
                let resident = anonymous.then(|| Resident::open(pid)).transpose().map_err(|source| {
                    let block = layout.blocks()[number].id.clone();
                    RamError::Io { action: "examine", block, source }
                })?;
                return Ok(Backing { file, offset, kind: Kind::Process(resident) });
            }
            let kind = match huge::page_size(&file) {
                Ok(Some(page_size)) => Kind::Huge { page_size, mapping: None },
                Ok(None) => Kind::Pages,
                Err(source) => {
                    let block = layout.blocks()[number].id.clone();
                    return Err(RamError::Io { action: "examine", block, source });
                }
            };
            Ok(Backing { file, offset, kind })
        };
        let files = files.into_iter().enumerate().map(backing).collect::<Result<_, _>>()?;
        let ram = Ram { layout, files };
        for (number, block) in ram.layout.blocks().iter().enumerate() {
            if matches!(ram.files[number].kind, Kind::Process(_)) {
                continue;
            }
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

    /// Makes the files ready to take a copy: writable, and all zero.
    ///
    /// # Errors
    /// [`RamError::Io`].
    pub fn begin_copy(&mut self) -> Result<(), RamError> {
        for number in 0..self.files.len() {
            if let Kind::Huge { page_size, .. } = self.files[number].kind {
                let mapping = HugeMapping::new(&self.files[number].file, page_size)
                    .map_err(|e| self.error("map", number, e))?;
                self.files[number].kind = Kind::Huge { page_size, mapping: Some(mapping) };
            }
            let pages = self.layout.blocks()[number].pages.clone();
            if self.is_hole(PageIndex(pages.start), pages.end - pages.start)? {
                continue;
            }
            match &self.files[number].kind {
                Kind::Pages | Kind::Process(_) => {
                    self.clear(PageIndex(pages.start), pages.end - pages.start)?
                }
                Kind::Huge { .. } => self.clear_what_is_not(pages)?,
            }
        }
        Ok(())
    }

    /// Makes pages zero that are not, and leaves the others as they are.
    fn clear_what_is_not(&self, pages: std::ops::Range<u64>) -> Result<(), RamError> {
        let mut buffer = vec![0; CHUNK_PAGES as usize * PAGE_SIZE];
        for first in pages.clone().step_by(CHUNK_PAGES as usize) {
            let count = CHUNK_PAGES.min(pages.end - first);
            let content = &mut buffer[..count as usize * PAGE_SIZE];
            self.read(PageIndex(first), content)?;
            if !content.chunks_exact(PAGE_SIZE).all(is_zero) {
                self.clear(PageIndex(first), count)?;
            }
        }
        Ok(())
    }

    /// Writes pages that begin at `page`; all of one block.
    ///
    /// # Errors
    /// [`RamError::Io`]; a full tmpfs among others, or a host without a huge page left.
    pub fn write(&self, page: PageIndex, bytes: &[u8]) -> Result<(), RamError> {
        let (block, offset) = self.place(page);
        let Backing { file, kind, .. } = &self.files[block];
        match kind {
            Kind::Huge { mapping: Some(mapping), .. } => mapping.write(file, bytes, offset),
            // Of a file on hugetlbfs that no copy was begun in, the system says that it cannot be written.
            Kind::Pages | Kind::Process(_) | Kind::Huge { mapping: None, .. } => {
                file.write_all_at(bytes, offset)
            }
        }
        .map_err(|e| self.error("write", block, e))
    }

    /// Makes pages zero, all of one block, and gives their memory back where that takes nothing from the guest: the
    /// pages of hugetlbfs stay, for they were set aside for it.
    ///
    /// # Errors
    /// [`RamError::Io`].
    pub fn clear(&self, page: PageIndex, count: u64) -> Result<(), RamError> {
        let (block, offset) = self.place(page);
        let Backing { file, kind, .. } = &self.files[block];
        let len = count * PAGE_SIZE as u64;
        if let Kind::Huge { mapping: Some(mapping), .. } = kind {
            let len = usize::try_from(len).unwrap_or(usize::MAX);
            return mapping.clear(file, offset, len).map_err(|e| self.error("clear", block, e));
        }
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(file, flags, offset, len).map_err(|e| self.error("punch a hole in", block, e.into()))
    }

    /// Whether all of a run of pages of one block was never written: a hole, which reads as zeros. Where the file system
    /// cannot tell, the answer is no.
    ///
    /// # Errors
    /// [`RamError::Io`].
    pub fn is_hole(&self, page: PageIndex, count: u64) -> Result<bool, RamError> {
        let (block, offset) = self.place(page);
        let Backing { file, kind, .. } = &self.files[block];
        match kind {
            // All of it is data to SEEK_DATA there, holes or not.
            Kind::Huge { .. } => {
                return huge::is_empty(file).map_err(|e| self.error("find holes in", block, e));
            }
            Kind::Process(None) => return Ok(false),
            Kind::Process(Some(resident)) => {
                let range = offset..offset + count * PAGE_SIZE as u64;
                return resident.is_empty(&range).map_err(|e| self.error("find holes in", block, e));
            }
            Kind::Pages => {}
        }
        // Threads share the file's position, but the answer is the call's result; the position is never used.
        match seek(file.as_fd(), SeekFrom::Data(offset)) {
            Ok(data) => Ok(data >= offset + count * PAGE_SIZE as u64),
            Err(Errno::NXIO) => Ok(true),
            Err(e) => Err(self.error("find holes in", block, e.into())),
        }
    }

    /// The parts of a run of pages of one block that hold nothing: holes, or, on hugetlbfs, which tells of none, zeros.
    ///
    /// # Errors
    /// [`RamError::Io`].
    pub fn empty(&self, pages: Range<u64>) -> Result<Vec<Range<u64>>, RamError> {
        let (block, _) = self.place(PageIndex(pages.start));
        if matches!(self.files[block].kind, Kind::Pages | Kind::Process(Some(_))) {
            return self.holes(pages);
        }
        let mut empty: Vec<Range<u64>> = Vec::new();
        let mut buffer = vec![0; CHUNK_PAGES as usize * PAGE_SIZE];
        for first in pages.clone().step_by(CHUNK_PAGES as usize) {
            let content = &mut buffer[..CHUNK_PAGES.min(pages.end - first) as usize * PAGE_SIZE];
            self.read(PageIndex(first), content)?;
            for (page, content) in (first..).zip(content.chunks_exact(PAGE_SIZE)) {
                match empty.last_mut() {
                    _ if !is_zero(content) => {}
                    Some(last) if last.end == page => last.end = page + 1,
                    _ => empty.push(page..page + 1),
                }
            }
        }
        Ok(empty)
    }

    /// The holes in a run of pages of one block: what was never written, or punched.
    ///
    /// # Errors
    /// [`RamError::Io`].
    pub fn holes(&self, pages: Range<u64>) -> Result<Vec<Range<u64>>, RamError> {
        let mut holes = Vec::new();
        let (block, offset) = self.place(PageIndex(pages.start));
        if let Kind::Process(None) = &self.files[block].kind {
            return Ok(holes);
        }
        if let Kind::Process(Some(resident)) = &self.files[block].kind {
            let range = offset..offset + (pages.end - pages.start) * PAGE_SIZE as u64;
            let page = |address: u64| pages.start + (address - offset) / PAGE_SIZE as u64;
            let found = resident.empty(&range, |hole| holes.push(page(hole.start)..page(hole.end)));
            return found.map(|()| holes).map_err(|e| self.error("find holes in", block, e));
        }
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
