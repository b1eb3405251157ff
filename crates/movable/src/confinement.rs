//! Seccomp filters that a machine's QEMU is under, and which of them are known to let it be tracked.

use dirty_tracker::{AttachError, InjectError, KnownFilters, may_attach, seccomp_filters};
use qemu::Spec;

use finding::{Finding, chain, kind};
use host::Host;
use host::vm::{Origin, Record};

/// Which of the filters that QEMU is under are known.
///
/// QEMU's own (`-sandbox on`, one for each) lets everything pass but what it lists, which no call that it is made to make is among (7.2 to
/// 10.0: `system/qemu-seccomp.c`). A QEMU that an agent of this host has started is under that agent's filters too, and we live under ours,
/// having made those calls ourselves. Nothing is known of what else an adopted one was put under.
pub fn known(host: &Host, record: &Record, spec: &Spec) -> KnownFilters {
    if host.trust_seccomp {
        return KnownFilters::All;
    }
    let inherited = match record.origin {
        Origin::Run | Origin::Arrived => seccomp_filters(std::process::id()).unwrap_or(0),
        Origin::Adopted => 0,
    };
    KnownFilters::Are(sandboxes(record, spec).saturating_add(inherited))
}

/// How many filters QEMU has put itself under: by what it was started with, which the record need not have word for word.
fn sandboxes(record: &Record, spec: &Spec) -> u32 {
    let Some(process) = &record.process else { return 0 };
    let words = std::fs::read(format!("/proc/{}/cmdline", process.pid)).unwrap_or_default();
    let words = String::from_utf8_lossy(&words);
    let argv: Vec<&str> = words.strip_suffix('\0').unwrap_or(&words).split('\0').collect();
    Spec::parse(&argv).map_or_else(|_| spec.sandboxes(), |started| started.sandboxes())
}

/// Whether QEMU could be tracked as far as leave to hold it goes. Nothing of it is stopped.
pub async fn check(host: &Host, record: &Record, spec: &Spec) -> Option<Finding> {
    let pid = record.process.as_ref()?.pid;
    let known = known(host, record, spec);
    let tried = tokio::task::spawn_blocking(move || may_attach(pid, known)).await.ok()?;
    match tried {
        // That is told by what looks at the process anyway.
        Ok(()) | Err(AttachError::Gone { .. }) => None,
        Err(error) => Some(untracked(&error)),
    }
}

/// Why tracking cannot begin.
pub fn untracked(error: &AttachError) -> Finding {
    let hint = match error {
        AttachError::Inject { source: InjectError::Confined { .. }, .. } => {
            "give the agent CAP_SYS_ADMIN; or, if you know that the filter lets userfaultfd, ioctl and close pass or fail, set \
             trust_seccomp = true in the agent's configuration"
        }
        AttachError::Inject { source: InjectError::DidNotStop { .. }, .. } => {
            "nothing was begun: see to what its main thread waits for, and try again"
        }
        _ => "see docs/operations.md on what tracking needs",
    };
    Finding::new(kind::TRACKING, chain(error), hint)
}
