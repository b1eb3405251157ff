//! From arguments to [`Spec`] and back.
//!
//! QEMU takes one or two dashes before an option, has options with and without a value, and takes an argument
//! without a dash as the image of the first hard disk. Which options take no value is the only thing that has to
//! be known here to split a command line; the list is that of QEMU 7.2 to 10.0 (`qemu-options.hx`) with the ones
//! that were removed since 4.0. An option that is not known keeps the next argument if that does not begin with a dash.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::argument::Argument;
use crate::memory;
use crate::names::{FLAGS, WITH_VALUE, option_name};
use crate::options::Properties;
use crate::spec::Spec;

/// Why a command line cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ParseError {
    /// There is not even a binary.
    #[error("the command line is empty")]
    Empty,
    /// The last option wants a value.
    #[error("option {option} is the last word, but it needs a value")]
    MissingValue {
        /// The option as it was written.
        option: String,
    },
    /// A value that begins with `{` is not a JSON object.
    #[error("the value of {option} is not valid JSON: {text}")]
    Json {
        /// The option as it was written.
        option: String,
        /// Its value.
        text: String,
        /// What the JSON parser says.
        #[source]
        source: serde_json::Error,
    },
    /// A memory size that QEMU would not accept either.
    #[error("{option} has a size that cannot be read")]
    Size {
        /// The option and its value.
        option: String,
        /// The size in it.
        #[source]
        source: memory::SizeError,
    },
}

impl Spec {
    /// Reads a command line; `argv[0]` is the binary.
    ///
    /// # Errors
    /// When it is empty, an option lacks its value, a JSON value is malformed, or a memory size is not one.
    /// Everything else that QEMU might refuse is kept as it is.
    pub fn parse<S: AsRef<str>>(argv: &[S]) -> Result<Spec, ParseError> {
        let (binary, rest) = argv.split_first().ok_or(ParseError::Empty)?;
        if binary.as_ref().is_empty() {
            return Err(ParseError::Empty);
        }
        let mut words = rest.iter().map(AsRef::as_ref).peekable();
        let mut arguments = Vec::new();
        while let Some(word) = words.next() {
            let Some(name) = option_name(word) else {
                arguments.push(Argument::image(word));
                continue;
            };
            let value = if FLAGS.contains(&name) {
                None
            } else if WITH_VALUE.contains(&name) {
                let value =
                    words.next().ok_or_else(|| ParseError::MissingValue { option: word.to_owned() })?;
                Some(value.to_owned())
            } else {
                words.next_if(|next| !next.starts_with('-')).map(str::to_owned)
            };
            arguments.push(Argument::option(word, value));
        }
        let spec = Spec { binary: PathBuf::from(binary.as_ref()), arguments };
        spec.check()?;
        Ok(spec)
    }

    /// The command line again: for a specification that was not changed, word for word what was parsed.
    #[must_use]
    pub fn to_argv(&self) -> Vec<String> {
        let mut argv = vec![self.binary.to_string_lossy().into_owned()];
        for argument in &self.arguments {
            argv.push(argument.word().to_owned());
            argv.extend(argument.value().map(str::to_owned));
        }
        argv
    }

    /// What later steps rely on, so that they cannot fail: JSON is JSON, sizes are sizes.
    fn check(&self) -> Result<(), ParseError> {
        for argument in &self.arguments {
            let Some(value) = argument.value() else { continue };
            if !(value.starts_with('{') && argument.takes_json()) {
                continue;
            }
            Properties::parse(value, None).map_err(|source| ParseError::Json {
                option: argument.word().to_owned(),
                text: value.to_owned(),
                source,
            })?;
        }
        memory::check(self).map_err(|(option, source)| ParseError::Size { option, source })
    }
}

impl TryFrom<Vec<String>> for Spec {
    type Error = ParseError;

    fn try_from(argv: Vec<String>) -> Result<Spec, ParseError> {
        Spec::parse(&argv)
    }
}

impl From<Spec> for Vec<String> {
    fn from(spec: Spec) -> Vec<String> {
        spec.to_argv()
    }
}

/// A specification is stored as its command line.
impl Serialize for Spec {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.to_argv().serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Spec {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Spec, D::Error> {
        let argv = Vec::<String>::deserialize(deserializer)?;
        Spec::parse(&argv).map_err(serde::de::Error::custom)
    }
}
