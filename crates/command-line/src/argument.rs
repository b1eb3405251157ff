//! One word of a command line, or two: an option with its value.

use std::fmt;

use crate::names::{FLAGS, implied_key, option_name};
use crate::options::Properties;

/// One option with its value, or the image of the first hard disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Argument {
    /// As written, dashes included.
    pub(crate) word: String,
    pub(crate) value: Option<String>,
}

impl Argument {
    pub(crate) fn image(path: &str) -> Argument {
        Argument { word: path.to_owned(), value: None }
    }

    pub(crate) fn option(word: &str, value: Option<String>) -> Argument {
        Argument { word: word.to_owned(), value }
    }

    pub(crate) fn with_value(word: &str, value: impl Into<String>) -> Argument {
        Argument { word: word.to_owned(), value: Some(value.into()) }
    }

    pub(crate) fn word(&self) -> &str {
        &self.word
    }

    pub(crate) fn value(&self) -> Option<&str> {
        self.value.as_deref()
    }

    /// The option's name without dashes and with `-M` as `machine`; empty for an image.
    pub(crate) fn name(&self) -> &str {
        let name = match self.word.strip_prefix('-') {
            Some(name) => name.strip_prefix('-').unwrap_or(name),
            None => return "",
        };
        if name == "M" { "machine" } else { name }
    }

    pub(crate) fn is_image(&self) -> bool {
        !self.word.starts_with('-')
    }

    /// Whether QEMU reads a value that begins with `{` as JSON.
    pub(crate) fn takes_json(&self) -> bool {
        matches!(self.name(), "device" | "blockdev" | "object" | "netdev" | "audiodev" | "display")
    }

    /// The value as properties. Not to be used for options whose value is not a list of properties.
    pub(crate) fn properties(&self) -> Properties {
        let text = self.value().unwrap_or("");
        let implied = implied_key(self.name());
        if !self.takes_json() {
            return Properties::parse_pairs(text, implied);
        }
        Properties::parse(text, implied).expect("JSON values were checked when the command line was parsed")
    }
}

impl fmt::Display for Argument {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.value {
            Some(value) => write!(f, "{} {value}", self.word),
            None => f.write_str(&self.word),
        }
    }
}

/// Whether two arguments, one after the other, would be read as an option and its value.
pub(crate) fn would_be_one(option: &Argument, next: &Argument) -> bool {
    let takes_next =
        option_name(option.word()).is_some_and(|name| !FLAGS.contains(&name)) && option.value().is_none();
    takes_next && option_name(next.word()).is_none()
}
