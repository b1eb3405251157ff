//! MAC addresses.

use std::fmt;
use std::str::FromStr;

/// An Ethernet address of 48 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac([u8; 6]);

/// What is no MAC address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MacError {
    /// Not of the form.
    #[error("{0:?} is not a MAC address, which is six bytes in hexadecimal with colons between them")]
    Malformed(String),
}

impl Mac {
    /// The address of these bytes, in the order in which they travel.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 6]) -> Mac {
        Mac(bytes)
    }

    /// Its bytes, in the order in which they travel.
    #[must_use]
    pub const fn bytes(self) -> [u8; 6] {
        self.0
    }

    /// Whether it stands for a group, as multicast and broadcast do, and so is nobody's own.
    #[must_use]
    pub const fn is_group(self) -> bool {
        self.0[0] & 1 != 0
    }
}

impl FromStr for Mac {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Mac, MacError> {
        parse(text).map(Mac).ok_or_else(|| MacError::Malformed(text.to_owned()))
    }
}

/// A byte may be of one digit, as it may on QEMU's command line.
fn parse(text: &str) -> Option<[u8; 6]> {
    let mut bytes = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut bytes {
        // Not left to `from_str_radix`, which takes a sign.
        let digits = parts.next().filter(|part| part.bytes().all(|digit| digit.is_ascii_hexdigit()))?;
        *byte = u8::from_str_radix(digits, 16).ok().filter(|_| digits.len() <= 2)?;
    }
    parts.next().is_none().then_some(bytes)
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_written_is_read(bytes in any::<[u8; 6]>()) {
            let mac = Mac::from_bytes(bytes);
            prop_assert_eq!(mac.to_string().parse(), Ok(mac));
            prop_assert_eq!(mac.to_string().to_uppercase().parse(), Ok(mac));
        }

        #[test]
        fn no_text_makes_it_panic(text in ".{0,30}") {
            let _ = text.parse::<Mac>();
        }
    }

    #[test]
    fn it_is_read_as_qemu_reads_it_and_written_in_full() {
        let mac: Mac = "52:54:0:AB:cd:3".parse().unwrap();
        assert_eq!(mac.bytes(), [0x52, 0x54, 0, 0xab, 0xcd, 3]);
        assert_eq!(mac.to_string(), "52:54:00:ab:cd:03");
    }

    #[test]
    fn anything_else_is_refused_by_name() {
        for text in [
            "",
            ":::::",
            "52:54:00:12:34",
            "52:54:00:12:34:56:78",
            "52:54:00:12:34:+5",
            "52:54:00:12:34:056",
            "g2:54:00:12:34:56",
            "52:54:00:12:34:56 ",
        ] {
            assert_eq!(text.parse::<Mac>(), Err(MacError::Malformed(text.to_owned())));
        }
    }

    #[test]
    fn a_group_is_told_by_its_first_bit_on_the_wire() {
        let is_group = |text: &str| text.parse::<Mac>().unwrap().is_group();
        assert!(
            is_group("ff:ff:ff:ff:ff:ff") && is_group("33:33:00:00:00:01") && is_group("01:00:5e:00:00:01")
        );
        assert!(!is_group("52:54:00:12:34:56") && !is_group("00:01:01:01:01:01"));
    }
}
