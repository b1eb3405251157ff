//! The content hash: XXH3-128 with a secret that is new for every mirror.
//!
//! The secret keeps a guest from preparing two contents of equal hash. XXH3 is no cryptographic hash and need not
//! be one here: both ends are authenticated by the link; what it must find is accident, and a guest that wants to
//! pass off one of its own pages for another.

use std::fmt;

use crate::layout::PAGE_SIZE;
use crate::storage::layout::BLOCK_SIZE;

/// Bytes of key material: the length that XXH3 specifies for a custom secret.
pub const SECRET_LENGTH: usize = 192;

/// The key material of one mirror's hashes, shared by its two ends.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret {
    bytes: [u8; SECRET_LENGTH],
    zero_page: ContentHash,
    zero_block: ContentHash,
}

/// The hash of one page's content. Never zero, so that a ledger can keep zero for "unknown".
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ContentHash(u128);

/// Key material of the wrong length.
#[derive(Debug, thiserror::Error)]
#[error("a mirror's hash secret has {SECRET_LENGTH} bytes, not {0}")]
pub struct SecretLength(pub usize);

impl Secret {
    /// A new secret from the system's source of randomness.
    ///
    /// # Errors
    /// Those of `getrandom(2)`.
    pub fn random() -> std::io::Result<Secret> {
        let mut bytes = [0; SECRET_LENGTH];
        let mut filled = 0;
        while filled < bytes.len() {
            filled += rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty())?;
        }
        Ok(Secret::from(bytes))
    }

    /// The key material, for the other end.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; SECRET_LENGTH] {
        &self.bytes
    }

    /// The hash of content: of a page, as a rule.
    #[must_use]
    pub fn hash(&self, page: &[u8]) -> ContentHash {
        let hash = twox_hash::XxHash3_128::oneshot_with_secret(&self.bytes, page)
            .expect("the secret is longer than the least that XXH3 takes");
        ContentHash::from_bits(hash)
    }

    /// A fingerprint of a part of a page: XXH3-64 with the same secret.
    pub(crate) fn fingerprint(&self, part: &[u8]) -> u64 {
        twox_hash::XxHash3_64::oneshot_with_secret(&self.bytes, part)
            .expect("the secret is longer than the least that XXH3 takes")
    }

    /// The hash of a disk block's content. A disk's last block may be short; it counts as if zeros followed, so that every block of
    /// zeros has the same hash.
    #[must_use]
    pub fn hash_block(&self, block: &[u8]) -> ContentHash {
        if is_zero(block) {
            return self.zero_block;
        }
        if block.len() == BLOCK_SIZE {
            return self.hash(block);
        }
        let mut padded = vec![0; BLOCK_SIZE];
        padded[..block.len()].copy_from_slice(block);
        self.hash(&padded)
    }

    /// The hash of a disk block of zeros.
    #[must_use]
    pub fn zero_block(&self) -> ContentHash {
        self.zero_block
    }

    /// The hash of a page of zeros.
    #[must_use]
    pub fn zero_page(&self) -> ContentHash {
        self.zero_page
    }
}

impl From<[u8; SECRET_LENGTH]> for Secret {
    fn from(bytes: [u8; SECRET_LENGTH]) -> Secret {
        let mut secret = Secret { bytes, zero_page: ContentHash(1), zero_block: ContentHash(1) };
        secret.zero_page = secret.hash(&[0; PAGE_SIZE]);
        secret.zero_block = secret.hash(&vec![0; BLOCK_SIZE]);
        secret
    }
}

impl TryFrom<&[u8]> for Secret {
    type Error = SecretLength;
    fn try_from(bytes: &[u8]) -> Result<Secret, SecretLength> {
        let bytes: [u8; SECRET_LENGTH] = bytes.try_into().map_err(|_| SecretLength(bytes.len()))?;
        Ok(Secret::from(bytes))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

impl ContentHash {
    /// From its bits; the one value reserved for "unknown" is mapped to its neighbour.
    #[must_use]
    pub fn from_bits(bits: u128) -> ContentHash {
        ContentHash(if bits == 0 { 1 } else { bits })
    }

    /// The bits.
    #[must_use]
    pub fn bits(self) -> u128 {
        self.0
    }
}

impl fmt::Debug for ContentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// Whether a page is all zeros. Most pages that are not differ in their first bytes, so those are looked at first.
#[must_use]
pub fn is_zero(page: &[u8]) -> bool {
    let (head, rest) = page.split_at(page.len().min(64));
    head.iter().all(|&b| b == 0) && {
        // Folding a cache line at a time lets the compiler use the widest registers.
        let lines = rest.chunks_exact(64);
        lines.remainder().iter().all(|&b| b == 0)
            && lines.into_iter().all(|line| line.iter().fold(0, |all, &b| all | b) == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bit_anywhere_changes_the_hash_and_is_not_zero() {
        let secret = Secret::random().unwrap();
        let mut page = vec![0; PAGE_SIZE];
        assert!(is_zero(&page));
        assert_eq!(secret.hash(&page), secret.zero_page());
        for bit in (0..PAGE_SIZE * 8).step_by(61) {
            page[bit / 8] ^= 1 << (bit % 8);
            assert!(!is_zero(&page), "bit {bit}");
            assert_ne!(secret.hash(&page), secret.zero_page(), "bit {bit}");
            page[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn mirrors_with_different_secrets_have_different_hashes() {
        let page = [7; PAGE_SIZE];
        assert_ne!(Secret::random().unwrap().hash(&page), Secret::random().unwrap().hash(&page));
    }

    #[test]
    fn a_secret_of_another_length_is_refused() {
        assert!(Secret::try_from(&[0u8; SECRET_LENGTH - 1][..]).is_err());
    }
}
