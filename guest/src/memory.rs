//! The filled area, and beside it the record of what each of its pages must hold.
//!
//! Chunks of pages with their record are guarded by a lock each, so writer and checker never see half of each other's work: an
//! error that the checker reports came from outside the guest.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::page::{self, Content, Fault, Identity};

/// Pages that share a lock.
const CHUNK_PAGES: usize = 64;

/// The filled area.
#[derive(Debug)]
pub struct Memory {
    boot: u64,
    content: Content,
    pages: u64,
    chunks: Vec<Mutex<Chunk>>,
}

#[derive(Debug)]
struct Chunk {
    bytes: &'static mut [u8],
    generations: Vec<u64>,
}

impl Memory {
    /// Fills `bytes` with pages of generation 1.
    ///
    /// The area should begin at a page boundary, so that its pages are the machine's. A rest smaller than a page stays unused.
    pub fn fill(bytes: &'static mut [u8], boot: u64, content: Content) -> Self {
        let pages = bytes.len() / page::SIZE;
        let memory = Self {
            boot,
            content,
            pages: pages as u64,
            chunks: bytes[..pages * page::SIZE]
                .chunks_mut(CHUNK_PAGES * page::SIZE)
                .map(|bytes| Mutex::new(Chunk { generations: vec![0; bytes.len() / page::SIZE], bytes }))
                .collect(),
        };
        for number in 0..memory.pages {
            memory.write(number);
        }
        memory
    }

    /// Pages in the area.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Writes the next generation of a page; gives back its number.
    ///
    /// # Panics
    /// When there is no such page.
    pub fn write(&self, number: u64) -> u64 {
        let (mut chunk, index) = self.locate(number);
        // The record first: from here to the end of the write nobody else can look, and a page that misses the write is stale.
        let generation = chunk.generations[index] + 1;
        chunk.generations[index] = generation;
        let identity = Identity { number, generation, boot: self.boot };
        page::write(chunk.page(index), identity, self.content);
        generation
    }

    /// Checks one page against the record; on a fault, also gives the generation that was expected.
    ///
    /// # Errors
    /// What is wrong with the page.
    ///
    /// # Panics
    /// When there is no such page.
    pub fn check(&self, number: u64) -> Result<(), (Fault, u64)> {
        let (mut chunk, index) = self.locate(number);
        let generation = chunk.generations[index];
        let identity = Identity { number, generation, boot: self.boot };
        page::check(chunk.page(index), identity).map_err(|fault| (fault, generation))
    }

    fn locate(&self, number: u64) -> (MutexGuard<'_, Chunk>, usize) {
        assert!(number < self.pages, "page {number} of {}", self.pages);
        let number = number as usize;
        // A poisoned lock means that a thread panicked, and a panic ends the guest.
        let chunk = self.chunks[number / CHUNK_PAGES].lock().unwrap_or_else(PoisonError::into_inner);
        (chunk, number % CHUNK_PAGES)
    }

    /// Changes the bytes of a page behind the record's back, as a faulty migration would.
    #[cfg(test)]
    pub(crate) fn damage(&self, number: u64, change: impl FnOnce(&mut [u8])) {
        let (mut chunk, index) = self.locate(number);
        change(chunk.page(index));
    }
}

impl Chunk {
    fn page(&mut self, index: usize) -> &mut [u8] {
        &mut self.bytes[index * page::SIZE..(index + 1) * page::SIZE]
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn memory(pages: usize, content: Content) -> Memory {
        Memory::fill(vec![0xaa; pages * page::SIZE].leak(), 5, content)
    }

    #[test]
    fn a_filled_area_is_whole_and_stays_so_under_writes() {
        let memory = memory(130, Content::Text);
        assert_eq!(memory.pages(), 130);
        for number in 0..130 {
            assert_eq!(memory.check(number), Ok(()));
        }
        assert_eq!(memory.write(129), 2);
        assert_eq!(memory.write(129), 3);
        assert_eq!(memory.check(129), Ok(()));
    }

    #[test]
    fn injected_faults_are_told_apart() {
        let memory = memory(4, Content::Still);
        let mut old = Vec::new();
        memory.damage(0, |page| old = page.to_vec());
        memory.write(0);
        memory.damage(0, |page| page.copy_from_slice(&old));
        memory.damage(1, |page| page[2000] ^= 1);
        memory.damage(2, |page| page.fill(0));
        memory.damage(3, |page| page.copy_from_slice(&old));
        assert_eq!(memory.check(0), Err((Fault::Stale { found: 1 }, 2)));
        assert_eq!(memory.check(1), Err((Fault::Torn, 1)));
        assert_eq!(memory.check(2), Err((Fault::Lost, 1)));
        assert_eq!(memory.check(3), Err((Fault::Lost, 1)));
    }
}
