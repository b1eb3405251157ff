//! What is said of a thing that is not as it should be: in words for a person, with what to do, and a name for scripts.

use serde::{Deserialize, Serialize};

/// How far things had gone, which is what the operator must know first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// Nothing had begun: nothing was changed on either host.
    Refused,
    /// It had begun; the machine runs where it was.
    Failed,
    /// The operator ended it; the machine runs where it was.
    Cancelled,
    /// A person must decide.
    Uncertain,
}

/// Kinds of findings on which something depends; the others are for people and scripts alone.
pub mod kind {
    /// Tracking of memory cannot begin.
    pub const TRACKING: &str = "tracking";
    /// The copy is not equal to the original.
    pub const GATE: &str = "gate";
    /// Memory that was missing at the hand-over does not come.
    pub const POST_COPY: &str = "post-copy";
    /// The machine was handed over and has ended at the destination before its memory was complete.
    pub const ENDED_THERE: &str = "ended-there";
    /// The destination has no complete copy, and will never run one.
    pub const NO_COPY: &str = "no-copy";
    /// Nothing can be said of the machine now: ask again.
    pub const BUSY: &str = "busy";
    /// What is on record of the machine cannot be read: nobody can say anything of it.
    pub const RECORD_UNREADABLE: &str = "record-unreadable";
    /// The destination knows nothing of the copy: it may have run, or may not.
    pub const UNKNOWN_COPY: &str = "unknown-copy";
    /// The CPUs of the destination lack what the guest was given. The source completes it with the names of what is missing.
    pub const CPU_FEATURE_MISSING: &str = "cpu-feature-missing";
    /// The peer does not keep to the protocol.
    pub const PROTOCOL: &str = "protocol";
    /// Somebody else has let the machine run, or changed it, while it was to be handed over.
    pub const TOUCHED: &str = "touched";
    /// Another program migrates the machine, or has.
    pub const MIGRATES_ALREADY: &str = "migrates-already";
    /// The machine is in no other host's network.
    pub const NOT_FORWARDED: &str = "not-forwarded";
}

/// One reason, in words for a person and a name for a script.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// Stable name of the kind, such as `cpu-feature-missing`.
    pub kind: String,
    /// What is wrong, with the offending value.
    pub message: String,
    /// What to do about it.
    pub hint: String,
}

/// Why a migration ended other than asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// How far it had gone.
    pub stage: Stage,
    /// The first reason.
    #[serde(flatten)]
    pub finding: Finding,
    /// Further reasons found at the same time.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub more: Vec<Finding>,
}

impl Finding {
    /// A finding from its parts.
    pub fn new(kind: impl Into<String>, message: impl Into<String>, hint: impl Into<String>) -> Finding {
        Finding { kind: kind.into(), message: message.into(), hint: hint.into() }
    }
}

/// An error and its causes in one line, as messages for people show them.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        // A transparent layer says the same as what it wraps.
        if !text.ends_with(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
}
