//! Deltas: what a page is now, given what it was.
//!
//! A delta is a sequence of changes, each `skip u16 · length u16 · length bytes` (little-endian): so many bytes stay as
//! they are, then these come. What follows the last change stays. It holds new bytes rather than differences, so that
//! applying it twice is as good as once.

use crate::layout::PAGE_SIZE;

/// Changes are told apart word by word.
const WORD: usize = 8;
/// Bytes before the content of a change.
const CHANGE_HEAD: usize = 4;
/// Longest delta in bytes: a longer one saves too little to be worth the work of making and applying it.
pub const MAX_DELTA: usize = PAGE_SIZE / 2;

/// A delta that cannot be one of a page.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("a delta of {length} bytes does not describe a page")]
pub struct DeltaError {
    /// Its length in bytes.
    pub length: usize,
}

/// Appends the delta from `old` to `new`, both pages, to `out`. Returns its length, or none where it would be longer
/// than [`MAX_DELTA`]; then `out` is as it was.
pub fn encode(old: &[u8], new: &[u8], out: &mut Vec<u8>) -> Option<usize> {
    encode_parts::<WORD>(new, out, |word| {
        let bytes = word * WORD..(word + 1) * WORD;
        old[bytes.clone()] != new[bytes]
    })
}

/// Appends a delta that holds the parts of `new`, of `SIZE` bytes each, that differ by their number; as [`encode`].
pub(super) fn encode_parts<const SIZE: usize>(
    new: &[u8],
    out: &mut Vec<u8>,
    differs: impl Fn(usize) -> bool,
) -> Option<usize> {
    let begin = out.len();
    let parts = PAGE_SIZE / SIZE;
    let (mut part, mut told) = (0, 0);
    while let Some(first) = (part..parts).find(|&part| differs(part)) {
        let end = (first..parts).find(|&part| !differs(part)).unwrap_or(parts);
        let content = &new[first * SIZE..end * SIZE];
        if out.len() - begin + CHANGE_HEAD + content.len() > MAX_DELTA {
            out.truncate(begin);
            return None;
        }
        let field = |bytes: usize| u16::try_from(bytes).expect("a page has 4096 bytes").to_le_bytes();
        out.extend_from_slice(&field((first - told) * SIZE));
        out.extend_from_slice(&field(content.len()));
        out.extend_from_slice(content);
        (part, told) = (end, end);
    }
    Some(out.len() - begin)
}

/// Makes `page` what the delta says.
///
/// # Errors
/// [`DeltaError`] when it reaches beyond the page, or ends within a change.
pub fn apply(delta: &[u8], page: &mut [u8]) -> Result<(), DeltaError> {
    let error = DeltaError { length: delta.len() };
    let (mut rest, mut at) = (delta, 0);
    while let Some((head, after)) = rest.split_first_chunk::<CHANGE_HEAD>() {
        let skip = usize::from(u16::from_le_bytes([head[0], head[1]]));
        let length = usize::from(u16::from_le_bytes([head[2], head[3]]));
        let begin = at + skip;
        let (Some(content), Some(place)) = (after.get(..length), page.get_mut(begin..begin + length)) else {
            return Err(error);
        };
        place.copy_from_slice(content);
        (rest, at) = (&after[length..], begin + length);
    }
    if rest.is_empty() { Ok(()) } else { Err(error) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn applied_to_the_old_page_it_gives_the_new_one(
            old in prop::collection::vec(any::<u8>(), PAGE_SIZE),
            changes in prop::collection::vec((0..PAGE_SIZE, any::<u8>()), 0..60),
        ) {
            let mut new = old.clone();
            for (at, byte) in changes {
                new[at] = byte;
            }
            let mut delta = vec![7];
            let length = encode(&old, &new, &mut delta).unwrap();
            prop_assert_eq!(length + 1, delta.len());
            prop_assert!(length <= MAX_DELTA);
            let mut page = old;
            for _ in 0..2 {
                apply(&delta[1..], &mut page).unwrap();
                prop_assert_eq!(&page, &new);
            }
        }

        #[test]
        fn no_bytes_of_a_peer_reach_beyond_the_page(delta in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut page = [0; PAGE_SIZE];
            let _ = apply(&delta, &mut page);
        }
    }

    #[test]
    fn a_counter_is_a_dozen_bytes_and_another_page_no_delta() {
        let (old, mut new) = (vec![3; PAGE_SIZE], vec![3; PAGE_SIZE]);
        let mut out = Vec::new();
        assert_eq!(encode(&old, &new, &mut out), Some(0));
        new[800] = 4;
        assert_eq!(encode(&old, &new, &mut out), Some(12));
        assert_eq!(encode(&old, &[9; PAGE_SIZE], &mut out), None);
        assert_eq!(out.len(), 12, "what does not fit leaves nothing");
    }

    #[test]
    fn a_delta_that_is_cut_off_is_refused() {
        let mut page = [0; PAGE_SIZE];
        for delta in [&[0, 0, 8, 0, 1][..], &[1, 0, 0][..], &[0xff, 0xff, 1, 0, 1][..]] {
            assert_eq!(apply(delta, &mut page), Err(DeltaError { length: delta.len() }));
        }
    }
}
