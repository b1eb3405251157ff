//! Machines that cannot be looked after: their QEMU is there but does not answer, as another program may have its monitor, or it hangs; or
//! it is not what the record says.

use std::time::Duration;

use host::Record;
use migration::{Recovered, When};
use ownership::VmName;

use super::{Entry, Silent, Vms};
use crate::api::types::RemovalReason;
use crate::findings;

/// First and longest wait between two attempts to reach it.
const TRY_AGAIN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

impl Vms {
    /// Keeps a machine whose QEMU does not answer, and tries again until it does or is gone.
    pub(super) fn silent(&self, record: Record, why: String) {
        let name = record.name.clone();
        // Of what is kept for a reason of its own, that is told.
        let kept = self.host().lingering.why(&name).filter(|kept| kept.message == why);
        let problem = kept.unwrap_or_else(|| findings::silent(&name, &why));
        tracing::warn!(vm = %name, kind = problem.kind, "{}; {}", problem.message, problem.hint);
        let until = self.inner.closing.child_token();
        let silent = Silent { record: record.clone(), problem };
        self.put(name, Entry::Silent(Box::new(silent), until.clone()));
        let vms = self.clone();
        self.inner.tasks.spawn(async move {
            tokio::select! {
                () = until.cancelled() => {}
                () = vms.reach(record) => {}
            }
        });
    }

    async fn reach(&self, record: Record) {
        let name = record.name.clone();
        let (mut wait, longest) = TRY_AGAIN;
        loop {
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(longest);
            match migration::recover(self.host(), record.clone(), When::Later).await {
                Recovered::Silent(..) => {}
                Recovered::Running(vm) => {
                    tracing::info!(vm = %name, "its QEMU answers again");
                    return self.keep(*vm);
                }
                Recovered::Gone(_) => {
                    tracing::info!(vm = %name, "its QEMU is gone");
                    return self.drop_entry(&name, RemovalReason::Ended);
                }
                Recovered::Uncertain(record) => return self.doubt(record),
                Recovered::Replaced(_) => return self.drop_entry(&name, RemovalReason::Migrated),
            }
        }
    }

    /// The record of a machine that does not answer; from now on nobody tries to reach it.
    pub(super) fn take_silent(&self, name: &VmName) -> Option<Record> {
        self.take_silent_if(name, |_| true)
    }

    /// The same, of one of which this holds.
    pub(super) fn take_silent_if(&self, name: &VmName, wanted: impl Fn(&Silent) -> bool) -> Option<Record> {
        match self.entries().get(name) {
            Some(Entry::Silent(silent, reaching)) if !reaching.is_cancelled() && wanted(silent) => {
                reaching.cancel();
                Some(silent.record.clone())
            }
            _ => None,
        }
    }
}
