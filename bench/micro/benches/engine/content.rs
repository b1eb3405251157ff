//! What the memory of the benchmarks holds: made, not random, so that every run has the same.

use mirror::layout::PAGE_SIZE;

/// A kind of content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Content {
    /// Nothing to save: like encrypted or compressed data.
    Incompressible,
    /// Words of a small vocabulary, with numbers in between: like logs and source text.
    Text,
    /// Nine pages of ten are zero, all of them allocated; the tenth is text: like the free memory of a guest.
    MostlyZero,
}

impl Content {
    pub(crate) const ALL: [Content; 3] = [Content::Incompressible, Content::Text, Content::MostlyZero];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Content::Incompressible => "incompressible",
            Content::Text => "text",
            Content::MostlyZero => "mostly zero",
        }
    }

    /// Fills whole pages. Another seed makes other content of the same kind.
    pub(crate) fn fill(self, bytes: &mut [u8], seed: u64) {
        let mut numbers = Numbers(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        match self {
            Content::Incompressible => {
                for word in bytes.chunks_exact_mut(8) {
                    word.copy_from_slice(&numbers.next().to_le_bytes());
                }
            }
            Content::Text => write_text(bytes, &mut numbers),
            Content::MostlyZero => {
                for page in bytes.chunks_exact_mut(PAGE_SIZE) {
                    if numbers.next().is_multiple_of(10) {
                        write_text(page, &mut numbers);
                    } else {
                        page.fill(0);
                    }
                }
            }
        }
    }

    /// So many bytes of it.
    pub(crate) fn bytes(self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.fill(&mut bytes, 1);
        bytes
    }
}

/// xorshift64*: fast, and without a pattern that a compressor could find.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

const WORDS: &str = "the |page |guest |of |memory |a |error: |info |connection |to |from |request |in |disk |is |not |user=|time=|returned \
                     |and |kernel |value |set\n|{\n    ";

fn write_text(mut bytes: &mut [u8], numbers: &mut Numbers) {
    let words: Vec<&str> = WORDS.split('|').collect();
    while !bytes.is_empty() {
        let number = numbers.next();
        let figures = format!("{} ", number >> 44);
        let word = match (number >> 8) % 30 {
            at @ 0..24 => words[at as usize],
            _ => figures.as_str(),
        };
        let length = word.len().min(bytes.len());
        let (head, rest) = bytes.split_at_mut(length);
        head.copy_from_slice(&word.as_bytes()[..length]);
        bytes = rest;
    }
}
