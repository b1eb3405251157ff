//! Why a migration stops before its end.

use finding::{Failure, Finding, Stage, chain, kind};

/// Why a migration stops before its end.
#[derive(Debug)]
pub(super) enum Stop {
    /// Nothing has begun: these are the reasons.
    Refused(Vec<Finding>),
    /// The operator wants it so.
    Cancelled,
    /// It failed; the machine stays here.
    Failed(Finding),
    /// The machine was handed over and nobody knows whether it runs there.
    Uncertain(Finding),
}

impl Stop {
    /// A failure with its causes in one line.
    pub(super) fn because(kind: &str, error: &dyn std::error::Error, hint: &str) -> Stop {
        Stop::Failed(Finding::new(kind, chain(error), hint))
    }

    /// A failure of QEMU at the source.
    pub(super) fn qemu(error: qemu::QmpError) -> Stop {
        Stop::because("qemu", &error, "see the VM's log on the source")
    }

    /// With the name of the peer, where it is one that does not keep to the protocol.
    pub(super) fn of(self, destination: &str) -> Stop {
        let named = |mut finding: Finding| {
            if finding.kind == kind::PROTOCOL {
                finding.message = format!("{destination}: {}", finding.message);
            }
            finding
        };
        match self {
            Stop::Failed(finding) => Stop::Failed(named(finding)),
            Stop::Uncertain(finding) => Stop::Uncertain(named(finding)),
            stop => stop,
        }
    }

    /// For the report. What failed before anything began was refused.
    pub(super) fn into_failure(self, failed: Stage) -> Failure {
        let failure = |stage, finding| Failure { stage, finding, more: Vec::new() };
        match self {
            Stop::Refused(mut findings) => {
                let unknown =
                    || Finding::new("refused", "the destination refused without a reason", "see its log");
                let first = if findings.is_empty() { unknown() } else { findings.remove(0) };
                Failure { stage: Stage::Refused, finding: first, more: findings }
            }
            Stop::Cancelled => failure(
                Stage::Cancelled,
                Finding::new("cancelled", "cancelled", "the VM runs on where it was"),
            ),
            Stop::Failed(finding) => failure(failed, finding),
            Stop::Uncertain(finding) => failure(Stage::Uncertain, finding),
        }
    }
}

impl From<ownership::JournalError> for Stop {
    fn from(error: ownership::JournalError) -> Stop {
        Stop::because("journal", &error, "see to the source agent's state_dir")
    }
}

/// A phase misses what the one before it provides.
pub(super) fn nothing_held() -> Stop {
    Stop::Failed(Finding::new("agent", "a phase ran without what the one before it provides", "report this"))
}
