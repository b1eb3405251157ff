//! Why a migration stops before its end.

use crate::failure::{Failure, Finding, Stage, chain};

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

impl From<crate::journal::JournalError> for Stop {
    fn from(error: crate::journal::JournalError) -> Stop {
        Stop::because("journal", &error, "see to the source agent's state_dir")
    }
}
