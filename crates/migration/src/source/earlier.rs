//! Copies of earlier migrations that failed. Each waits at its destination until that has heard that it is worthless, which may be long after
//! the machine is migrated once more: its own destination may be what is down.

use uuid::Uuid;

use super::settlement::withdrawn;
use finding::Finding;
use host::Host;
use ownership::MOST_OUTGOING;
use ownership::{Outgoing, VmName};

fn left(host: &Host, name: &VmName) -> Vec<Outgoing> {
    host.journal.get(name).map(|record| record.outgoing).unwrap_or_default()
}

/// The migrations whose copies are worthless, as a destination is told when it is asked to take the machine: a complete copy that waits
/// there gives way to no other word.
pub(super) fn named(host: &Host, name: &VmName) -> Vec<u8> {
    left(host, name).iter().flat_map(|outgoing| outgoing.session.into_bytes()).collect()
}

/// Why a machine does not go to `to` that has left copies at too many other places.
pub(super) fn too_many(host: &Host, name: &VmName, to: &str) -> Option<Finding> {
    let left = left(host, name);
    let elsewhere: Vec<&str> =
        left.iter().filter(|outgoing| outgoing.to.as_deref() != Some(to)).map(Outgoing::whose).collect();
    (elsewhere.len() >= MOST_OUTGOING).then(|| copies_left(name, &elsewhere))
}

/// What is said of that.
pub(super) fn copies_left(name: &VmName, elsewhere: &[&str]) -> Finding {
    Finding::new(
        "copies-left",
        format!(
            "copies of VM {name} wait at {}, and none of these could be told that they are worthless",
            elsewhere.join(", ")
        ),
        "bring the agent of one of them back: it is told then. Or migrate the VM to one of them",
    )
}

/// The agent `to` has set everything aside for the machine, so it has nothing of it from before.
pub(super) fn replaced(host: &Host, name: &VmName, to: &str) {
    let there = |outgoing: &Outgoing| outgoing.to.as_deref() == Some(to);
    let sessions: Vec<Uuid> =
        left(host, name).iter().filter(|o| there(o)).map(|outgoing| outgoing.session).collect();
    for session in sessions {
        // If not, it is told again.
        let _ = withdrawn(host, name, session);
    }
}
