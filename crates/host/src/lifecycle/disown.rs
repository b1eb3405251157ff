//! A machine that was adopted is let go of: it runs on as it does, and this agent knows nothing of it any more.

use crate::host::Host;
use crate::vm::{Origin, Record};
use finding::Finding;
use ownership::JournalError;
use ownership::{Outgoing, Ownership};

/// Why a machine is not let go of.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DisownError {
    /// It is not one that can be.
    #[error("{}", .0.message)]
    Refused(Finding),
    /// The journal failed.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

/// Lets go of an adopted machine. Nothing about it is changed; only its record goes.
///
/// # Errors
/// [`DisownError`] where something of it is this agent's, or it is not what the caller's record says; it is kept then.
pub async fn disown(host: &Host, record: &Record) -> Result<(), DisownError> {
    let name = &record.name;
    let _deciding = host.journal.decide(name).await;
    let now = host.journal.get(name).filter(|now| now.claim() == record.claim());
    let now = now.ok_or_else(|| JournalError::Changed(name.clone()))?;
    if now.ownership != Ownership::Owner || now.resuming {
        return Err(JournalError::Changed(name.clone()).into());
    }
    if now.origin != Origin::Adopted {
        return Err(DisownError::Refused(Finding::new(
            "not-adopted",
            format!("VM {name} was not adopted: its memory and its sockets are in files of this agent's"),
            format!("end it with `vmirror stop {name}`, or migrate it"),
        )));
    }
    if !now.outgoing.is_empty() {
        let to: Vec<&str> = now.outgoing.iter().map(Outgoing::whose).collect();
        let to = to.join(" and at ");
        return Err(DisownError::Refused(Finding::new(
            "copy-left",
            format!(
                "a copy of VM {name} may wait at {to}, which has not been told yet that it is worth nothing"
            ),
            format!(
                "bring the agent of {to} back: it is told within 10 minutes, and the VM can be let go of"
            ),
        )));
    }
    host.journal.remove(name, None)?;
    host.guest_addresses.forget(name);
    Ok(())
}
