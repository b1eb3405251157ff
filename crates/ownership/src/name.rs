//! The name of a virtual machine.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The name of a virtual machine: 1 to 48 of `a-z A-Z 0-9 . _ -`, beginning with a letter or digit.
/// It becomes part of file names, so nothing else is let in.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VmName(String);

/// A name that cannot be a machine's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} cannot name a VM: use 1 to 48 letters, digits, '.', '_' or '-', beginning with a letter or digit"
)]
pub struct BadName(pub String);

impl VmName {
    /// Most letters of one.
    pub const LONGEST: usize = 48;
}

impl TryFrom<String> for VmName {
    type Error = BadName;
    fn try_from(name: String) -> Result<VmName, BadName> {
        let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        let begins = name.starts_with(|c: char| c.is_ascii_alphanumeric());
        if begins && name.len() <= VmName::LONGEST && name.chars().all(fits) {
            Ok(VmName(name))
        } else {
            Err(BadName(name))
        }
    }
}

impl FromStr for VmName {
    type Err = BadName;
    fn from_str(name: &str) -> Result<VmName, BadName> {
        VmName::try_from(name.to_owned())
    }
}

impl From<VmName> for String {
    fn from(name: VmName) -> String {
        name.0
    }
}

impl fmt::Display for VmName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl AsRef<str> for VmName {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_the_directory_are_refused() {
        for bad in ["", ".", "..", "../x", "a/b", "-rf", ".hidden", "a b", "ä", &"x".repeat(49)] {
            assert_eq!(VmName::from_str(bad), Err(BadName(bad.to_owned())), "{bad:?}");
        }
        for good in ["web1", "a.b-c_d", "0", &"x".repeat(48)] {
            assert_eq!(VmName::from_str(good).unwrap().to_string(), *good);
        }
    }
}
