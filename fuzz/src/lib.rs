//! What all fuzz targets share. They stand beside what they fuzz, in `crates/*/fuzz`; `fuzz/run` builds and runs them.
//!
//! A target is a `fuzz_target!` in a file of its own. It may assume nothing of the bytes it is given, and fails by a panic, an
//! allocation beyond [`LARGEST`], or taking longer than a minute. What it asserts beyond that is a property: what was understood
//! is said again the same way, what was taken in is what was sent.

mod bounded;
mod seeds;

pub use bounded::{Bounded, LARGEST};
pub use seeds::Seeds;

/// A message of parts. They are taken from the input one by one, and what is missing is zero.
#[derive(Debug, Clone, Copy)]
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    /// The next two bytes.
    pub fn short(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    /// The next so many bytes, or what there is.
    pub fn take(&mut self, length: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(length.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// Whether nothing is left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
