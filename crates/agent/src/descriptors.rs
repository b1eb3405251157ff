//! How many files the agent may have open.

use crate::error::chain;

/// Enough for a thousand machines, some of them in a migration. A machine takes two, its record and its monitor; its migration some
/// fifty more.
const ENOUGH: u64 = 4096;

/// Raises the limit of open files as far as this process may, and says in the log where that is not far. To be called once, by the
/// program. The QEMUs and hooks that it starts get the former limit.
pub fn raise_descriptor_limit() {
    match qemu::raise_descriptor_limit() {
        Ok(Some(limit)) if limit < ENOUGH => tracing::warn!(
            limit,
            "few files may be open at once: two for each VM, some fifty for each migration; raise LimitNOFILE= of the \
             agent's unit, or `ulimit -Hn`"
        ),
        Ok(_) => {}
        Err(error) => tracing::warn!(error = chain(&error), "the limit of open files cannot be raised"),
    }
}
