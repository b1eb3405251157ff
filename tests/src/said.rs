//! What a `vmirror` command said, and how it exited.

use std::process::Output;

use serde_json::Value;
use session::Report;

/// A command that has ended.
#[derive(Debug, Clone)]
pub struct Said {
    /// Exit code; none where a signal ended it.
    pub code: Option<i32>,
    /// All of its standard output.
    pub stdout: String,
    /// All of its standard error.
    pub stderr: String,
}

impl From<Output> for Said {
    fn from(output: Output) -> Said {
        Said {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl Said {
    /// The one JSON document on standard output.
    ///
    /// # Panics
    /// If it is anything else.
    #[must_use]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout)
            .unwrap_or_else(|error| panic!("not one JSON document: {error}: {self:?}"))
    }

    /// The report on standard output.
    ///
    /// # Panics
    /// If it is anything else.
    #[must_use]
    pub fn report(&self) -> Report {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("not a report: {error}: {self:?}"))
    }

    /// Itself, if it exited with 0.
    ///
    /// # Panics
    /// If not.
    #[must_use]
    #[track_caller]
    pub fn done(self) -> Said {
        assert_eq!(self.code, Some(0), "{self:?}");
        self
    }

    /// The `error` document of a command that was refused before anything began, with exit code 2 and one line for a person.
    ///
    /// # Panics
    /// If it was not.
    #[must_use]
    #[track_caller]
    pub fn refusal(&self) -> Value {
        assert_eq!(self.code, Some(2), "{self:?}");
        let document = self.json();
        let error = &document["error"];
        let complete = ["kind", "message", "hint"]
            .iter()
            .all(|part| error[part].as_str().is_some_and(|text| !text.is_empty()));
        assert!(complete, "{self:?}");
        error.clone()
    }
}
