//! What the fuzz targets in `fuzz/` are given of this crate beyond its interface. Compiled for nobody else.

use prost::bytes::BufMut as _;

use crate::VersionRange;
use crate::control::{Frames, MAX_FRAME};
use crate::hello::{self, Answer, Hello};

/// Cuts a control connection's bytes, which come in pieces of such lengths, into frames: each as text, and why it ended.
///
/// # Panics
/// If more is held than the longest frame takes.
#[must_use]
pub fn frames(mut bytes: &[u8], mut pieces: impl Iterator<Item = usize>) -> (Vec<String>, Option<String>) {
    let (mut frames, mut found) = (Frames::default(), Vec::new());
    while !bytes.is_empty() {
        let (now, later) = bytes.split_at(pieces.next().unwrap_or(usize::MAX).clamp(1, bytes.len()));
        frames.space().put_slice(now);
        assert!(
            frames.buffer.capacity() <= 2 * (MAX_FRAME + 4096),
            "{} bytes held",
            frames.buffer.capacity()
        );
        bytes = later;
        loop {
            match frames.next() {
                Ok(Some(frame)) => found.push(format!("{frame:?}")),
                Ok(None) => break,
                Err(error) => return (found, Some(error.to_string())),
            }
        }
    }
    (found, None)
}

/// Understands a first message, of either side.
///
/// # Panics
/// If one that was understood is said in another way.
pub fn hello(bytes: &[u8]) {
    let Some((envelope, body)) = bytes.split_first_chunk() else { return };
    let Ok(length) = hello::body_length(envelope) else { return };
    let body = &body[..length.min(body.len())];
    let again = |bytes: &[u8]| bytes[hello::ENVELOPE..].to_vec();
    if let Ok(said) = Hello::decode(body) {
        assert_eq!(Hello::decode(&again(&said.encode())).expect("our own"), said);
    }
    if let Ok(said) = Answer::decode(body, VersionRange::SPOKEN) {
        assert_eq!(Answer::decode(&again(&said.encode()), VersionRange::SPOKEN).expect("our own"), said);
        assert!(said.encode().len() <= hello::ENVELOPE + hello::MAX_HELLO);
    }
}
