//! A page that describes itself: which it is, which write it holds, and a checksum over all of it.
//!
//! | bytes | content |
//! | --- | --- |
//! | 0..8 | [`MAGIC`] |
//! | 8..16 | page number within the filled area |
//! | 16..24 | generation: how many times the page was written, from 1 |
//! | 24..32 | a random number drawn at boot, so that pages of another boot or machine are told apart |
//! | 32..4088 | body, by [`Content`] |
//! | 4088..4096 | XXH64 of the first 4088 bytes |
//!
//! Numbers are little-endian. The checksum stands last so that it is one pass over what precedes it; XXH64 because it
//! needs nothing but 64-bit arithmetic, which an emulated CPU does well.

use twox_hash::XxHash64;

/// Bytes of a page.
pub const SIZE: usize = 4096;
/// The first eight bytes of every page of the filled area.
pub const MAGIC: u64 = u64::from_le_bytes(*b"VMIRRORp");

const NUMBER: usize = 8;
const GENERATION: usize = 16;
const BOOT: usize = 24;
const BODY: usize = 32;
const CHECKSUM: usize = SIZE - 8;

/// What the body of a page holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// The same bytes whatever the generation: a write changes the generation and the checksum, 16 bytes at most.
    Still,
    /// New with each generation, and compressible to about a quarter: runs of one word between random words.
    Text,
    /// New with each generation, and incompressible.
    Noise,
    /// Zeros: all but 40 bytes of the page.
    Zero,
}

impl Content {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Still, Self::Text, Self::Noise, Self::Zero];

    /// The content of that name, as on the kernel command line.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|content| content.name() == name)
    }

    /// The content's name on the kernel command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Still => "still",
            Self::Text => "text",
            Self::Noise => "noise",
            Self::Zero => "zero",
        }
    }
}

/// What identifies one write of one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The page's number within the filled area.
    pub number: u64,
    /// How many times the page was written, from 1.
    pub generation: u64,
    /// The random number of this boot.
    pub boot: u64,
}

/// What is wrong with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The checksum does not fit the rest: parts of different writes, or bytes that nobody wrote.
    Torn,
    /// A whole page, of another generation than the last one written.
    Stale {
        /// The generation found.
        found: u64,
    },
    /// Zeros, or a whole page that belongs elsewhere.
    Lost,
}

/// Writes the page `identity` with that content.
///
/// Between two generations of [`Content::Still`] and [`Content::Zero`] only the generation and the checksum change, and
/// only these are stored, so that a tracker of writes sees no more than there is.
///
/// # Panics
/// When `page` is not [`SIZE`] bytes long.
pub fn write(page: &mut [u8], identity: Identity, content: Content) {
    assert_eq!(page.len(), SIZE, "a page has {SIZE} bytes");
    let body_stays = matches!(content, Content::Still | Content::Zero);
    if !(body_stays && identity.generation > 1) {
        put(page, 0, MAGIC);
        put(page, NUMBER, identity.number);
        put(page, BOOT, identity.boot);
        fill_body(&mut page[BODY..CHECKSUM], identity, content);
    }
    put(page, GENERATION, identity.generation);
    let checksum = checksum(page);
    put(page, CHECKSUM, checksum);
}

/// Checks that the page holds what was written as `expected`.
///
/// # Errors
/// The [`Fault`], the most telling one first: zeros are lost rather than torn, a torn page has no generation to believe.
///
/// # Panics
/// When `page` is not [`SIZE`] bytes long.
pub fn check(page: &[u8], expected: Identity) -> Result<(), Fault> {
    let Some(found) = identify(page) else {
        let zero = page.iter().all(|byte| *byte == 0);
        return Err(if zero { Fault::Lost } else { Fault::Torn });
    };
    if found.number != expected.number || found.boot != expected.boot {
        return Err(Fault::Lost);
    }
    if found.generation != expected.generation {
        return Err(Fault::Stale { found: found.generation });
    }
    Ok(())
}

/// Who the page is, if it is a whole page of this format: for finding the filled area from outside the guest.
///
/// # Panics
/// When `page` is not [`SIZE`] bytes long.
pub fn identify(page: &[u8]) -> Option<Identity> {
    assert_eq!(page.len(), SIZE, "a page has {SIZE} bytes");
    if get(page, 0) != MAGIC || get(page, CHECKSUM) != checksum(page) {
        return None;
    }
    Some(Identity { number: get(page, NUMBER), generation: get(page, GENERATION), boot: get(page, BOOT) })
}

fn checksum(page: &[u8]) -> u64 {
    XxHash64::oneshot(MAGIC, &page[..CHECKSUM])
}

/// Fills what is not header or checksum. The body's length must be a multiple of eight.
pub(crate) fn fill_body(body: &mut [u8], identity: Identity, content: Content) {
    let seed = identity.boot ^ identity.number.rotate_left(32);
    match content {
        Content::Zero => body.fill(0),
        Content::Still => text(body, Sequence::new(seed)),
        Content::Text => text(body, Sequence::new(seed ^ identity.generation)),
        Content::Noise => {
            let mut sequence = Sequence::new(seed ^ identity.generation);
            for word in body.chunks_exact_mut(8) {
                word.copy_from_slice(&sequence.next().to_le_bytes());
            }
        }
    }
}

/// One random word, then seven times another: an eighth plus what the repetition costs.
fn text(body: &mut [u8], mut sequence: Sequence) {
    for run in body.chunks_mut(64) {
        let repeated = sequence.next().to_le_bytes();
        for word in run.chunks_exact_mut(8) {
            word.copy_from_slice(&repeated);
        }
        run[..8].copy_from_slice(&sequence.next().to_le_bytes());
    }
}

pub(crate) fn get(page: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&page[at..at + 8]);
    u64::from_le_bytes(word)
}

pub(crate) fn put(page: &mut [u8], at: usize, value: u64) {
    page[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

/// A sequence of pseudo-random words: SplitMix64 (Steele, Lea, Flood, OOPSLA 2014). Every seed gives another one.
#[derive(Clone, Debug)]
pub struct Sequence(u64);

impl Sequence {
    /// The sequence of that seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next word.
    #[expect(clippy::should_implement_trait, reason = "it never ends, so an Option would only be in the way")]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, as good as evenly spread for bounds far below 2^64.
    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const IDENTITY: Identity = Identity { number: 7, generation: 3, boot: 99 };
    const CONTENTS: [Content; 4] = [Content::Still, Content::Text, Content::Noise, Content::Zero];

    fn written(identity: Identity, content: Content) -> Vec<u8> {
        let mut page = vec![0; SIZE];
        for generation in 1..=identity.generation {
            write(&mut page, Identity { generation, ..identity }, content);
        }
        page
    }

    #[test]
    fn a_written_page_is_what_it_says() {
        for content in CONTENTS {
            let page = written(IDENTITY, content);
            assert_eq!(check(&page, IDENTITY), Ok(()), "{content:?}");
            assert_eq!(identify(&page), Some(IDENTITY));
        }
    }

    #[test]
    fn an_older_generation_is_stale() {
        for content in CONTENTS {
            let page = written(IDENTITY, content);
            let expected = Identity { generation: 4, ..IDENTITY };
            assert_eq!(check(&page, expected), Err(Fault::Stale { found: 3 }));
        }
    }

    #[test]
    fn zeros_and_pages_from_elsewhere_are_lost() {
        assert_eq!(check(&[0; SIZE], IDENTITY), Err(Fault::Lost));
        let page = written(IDENTITY, Content::Noise);
        assert_eq!(check(&page, Identity { number: 8, ..IDENTITY }), Err(Fault::Lost));
        assert_eq!(check(&page, Identity { boot: 1, ..IDENTITY }), Err(Fault::Lost));
    }

    #[test]
    fn half_a_write_is_torn() {
        for content in CONTENTS {
            let old = written(IDENTITY, content);
            let new = written(Identity { generation: 4, ..IDENTITY }, content);
            let mut mixed = new.clone();
            mixed[SIZE / 2..].copy_from_slice(&old[SIZE / 2..]);
            assert_eq!(check(&mixed, Identity { generation: 4, ..IDENTITY }), Err(Fault::Torn));
        }
    }

    #[test]
    fn still_pages_change_by_sixteen_bytes_at_most() {
        for content in [Content::Still, Content::Zero] {
            let old = written(IDENTITY, content);
            let new = written(Identity { generation: 4, ..IDENTITY }, content);
            let differing = old.iter().zip(&new).filter(|(a, b)| a != b).count();
            assert!(differing <= 16, "{content:?}: {differing} bytes");
        }
        let old = written(IDENTITY, Content::Noise);
        let new = written(Identity { generation: 4, ..IDENTITY }, Content::Noise);
        assert!(old.iter().zip(&new).filter(|(a, b)| a != b).count() > SIZE * 9 / 10);
    }

    proptest! {
        #[test]
        fn any_changed_byte_is_noticed(at in 0..SIZE, by in 1u8.., number: u64, boot: u64) {
            let identity = Identity { number, generation: 1, boot };
            for content in CONTENTS {
                let mut page = written(identity, content);
                page[at] ^= by;
                prop_assert!(check(&page, identity).is_err());
            }
        }

        #[test]
        fn numbers_stay_below_their_bound(seed: u64, bound in 1u64..1 << 40) {
            prop_assert!(Sequence::new(seed).below(bound) < bound);
        }
    }
}
