//! Why a session did not become a machine here, and how that is said.

use finding::{Finding, chain, kind};
use host::Host;
use ownership::VmName;
use protocol::deadlines::BOOT_FILES;
use protocol::wire::Request as Asked;
use protocol::wire::bounds::Unheard;

/// Why a session did not become a machine here.
#[derive(Debug)]
pub(crate) enum End {
    /// The source gave it up.
    Cancelled,
    /// The link is gone.
    Link(link::LinkError),
    /// Something failed here.
    Failed(Vec<Finding>),
    /// The QEMU here has failed, and may have said why.
    Qemu(Finding),
}

impl From<link::LinkError> for End {
    fn from(error: link::LinkError) -> End {
        End::Link(error)
    }
}

pub(crate) fn failed(kind: &str, error: &dyn std::error::Error) -> End {
    End::Failed(vec![Finding::new(kind, chain(error), "see the log of the destination's agent")])
}

impl From<Unheard> for End {
    fn from(unheard: Unheard) -> End {
        match unheard {
            Unheard::Link(error) => End::Link(error),
            Unheard::Violation(what) => violation(&what),
        }
    }
}

pub(crate) fn violation(what: &str) -> End {
    let hint = "see whether both agents are of the same version";
    End::Failed(vec![Finding::new(kind::PROTOCOL, format!("the source {what}"), hint)])
}

/// What a source has to say while it should wait: that it does not want the copy, or that it is not there any more.
pub(crate) fn interrupted(word: Result<Asked, Unheard>) -> End {
    match word {
        Ok(Asked::Cancel(_)) => End::Cancelled,
        Ok(other) => violation(&format!("sent {other} out of order")),
        Err(error) => error.into(),
    }
}

pub(crate) fn too_slow(host: &str) -> End {
    let message = format!("the files that the VM boots from were not here within {BOOT_FILES:?}");
    let hint = format!("copy them to {host}, under the same paths, or allow the migration more bandwidth");
    End::Failed(vec![Finding::new("file-not-shipped", message, hint)])
}

pub(crate) fn no_copy(name: &str) -> End {
    let message = format!("the destination has no complete copy of VM {name}");
    End::Failed(vec![Finding::new(kind::NO_COPY, message, "see the destination's log")])
}

pub(crate) fn unknown_copy(host: &str, name: &str) -> End {
    let message = format!(
        "{host} knows nothing of that copy of VM {name}: its state directory is another one, or has been lost or set back; the VM may have run there"
    );
    let hint = "see whether its QEMU runs there; then use `vmirror resolve`";
    End::Failed(vec![Finding::new(kind::UNKNOWN_COPY, message, hint)])
}

pub(crate) fn qemu_gone() -> End {
    End::Qemu(Finding::new("qemu-gone", "QEMU at the destination has ended", ""))
}

/// What is wrong with the QEMU of a machine, with the last that it has said and where the rest is.
pub(crate) fn with_its_words(host: &Host, vm: &VmName, finding: Finding) -> Finding {
    let said = host.logs.last_words(vm).map(|said| format!("; it said: {said}")).unwrap_or_default();
    let log = format!("see its log there, {}", host.logs.of_ended(vm).display());
    let hint = if finding.hint.is_empty() { log } else { format!("{log}; {}", finding.hint) };
    Finding::new(&finding.kind, format!("{}{said}", finding.message), hint)
}
