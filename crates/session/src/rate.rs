//! Rates as people write them.

use std::num::NonZeroU64;
use std::str::FromStr as _;

use bytesize::ByteSize;

/// Text that is no limit of bandwidth.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RateError {
    /// It does not say how much.
    #[error("{0:?} is not a rate such as 500MiB/s, nor \"unlimited\"")]
    NotARate(String),
    /// It is zero.
    #[error("at this rate nothing would ever move")]
    Zero,
}

/// A limit such as `500MiB/s`, in bytes per second; `unlimited` is none.
///
/// # Errors
/// [`RateError`], with what was given.
pub fn limit(text: &str) -> Result<Option<NonZeroU64>, RateError> {
    let text = text.trim();
    if text == "unlimited" {
        return Ok(None);
    }
    let size = text.strip_suffix("/s").unwrap_or(text);
    let size = ByteSize::from_str(size).map_err(|_| RateError::NotARate(text.to_owned()))?.as_u64();
    NonZeroU64::new(size).map(Some).ok_or(RateError::Zero)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_read_with_and_without_their_unit() {
        for (text, bytes) in [("500MiB/s", 500 << 20), (" 1GB ", 1_000_000_000), ("65536", 65_536)] {
            assert_eq!(limit(text), Ok(NonZeroU64::new(bytes)), "{text}");
        }
        assert_eq!(limit("unlimited"), Ok(None));
    }

    #[test]
    fn what_is_no_rate_is_refused_with_what_was_given() {
        assert_eq!(limit("0"), Err(RateError::Zero));
        for text in ["", "fast", "-5MiB/s", "MiB/s", "5 parsecs", "NaN"] {
            assert_eq!(limit(text), Err(RateError::NotARate(text.to_owned())));
        }
    }
}
