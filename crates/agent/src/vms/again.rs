//! Machines that have left and may have been started here once more: looked for after each hand-over, and told as loudly as can be.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use finding::Finding;
use host::Record;
use host::left_images::Watched;
use host::second_copy::{Marks, Second};
use ownership::VmName;

use super::Vms;
use crate::api::types::EventKind;

/// For how long after a hand-over it is looked for, and how often.
const WATCH: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(500);
/// One that has been there for so long has not failed at a lock.
const RUNS: Duration = Duration::from_secs(2);

/// Those that were found.
#[derive(Debug, Default)]
pub(super) struct StartedAgain(Mutex<BTreeMap<VmName, (Second, Finding)>>);

impl StartedAgain {
    /// Why a machine that has left may run twice, for as long as that is so.
    pub(super) fn all(&self) -> BTreeMap<VmName, Finding> {
        let mut found = self.lock();
        found.retain(|_, (second, _)| !second.process.look().is_gone());
        found.iter().map(|(name, (_, finding))| (name.clone(), finding.clone())).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<VmName, (Second, Finding)>> {
        // Every change is one step.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Vms {
    /// Watches for a while whether a machine that has left is started here once more.
    pub(super) fn watch(&self, record: &Record, to: &str) {
        let watched = Watched { vm: record.name.clone(), to: to.to_owned(), argv: record.argv.clone() };
        self.host().left.watch(watched.clone());
        self.go_on_watching(watched);
    }

    /// Goes on with what an earlier agent did not come to the end of: nobody has looked in between.
    pub(super) fn watch_again(&self) {
        for watched in self.host().left.watched() {
            self.go_on_watching(watched);
        }
    }

    fn go_on_watching(&self, watched: Watched) {
        let vms = self.clone();
        self.until_closing(async move {
            if let Some(marks) = Marks::of_argv(&watched.argv) {
                vms.watch_for(watched.vm.clone(), watched.to.clone(), Arc::new(marks)).await;
            }
            vms.host().left.watch_no_more(&watched);
        });
    }

    async fn watch_for(&self, name: VmName, to: String, marks: Arc<Marks>) {
        let begin = Instant::now();
        let (mut since, mut told) = (HashMap::new(), HashSet::new());
        while begin.elapsed() < WATCH {
            let records = self.host().journal.all();
            if records.iter().any(|record| record.name == name) {
                // It comes back.
                return;
            }
            let ours: Vec<u32> =
                records.into_iter().filter_map(|record| record.process).map(|process| process.pid).collect();
            let marks = Arc::clone(&marks);
            let Ok(found) = tokio::task::spawn_blocking(move || marks.look(&ours)).await else { return };
            since.retain(|process, _| found.iter().any(|second| second.process == *process));
            for second in found {
                let first = *since.entry(second.process.clone()).or_insert_with(Instant::now);
                if first.elapsed() >= RUNS && told.insert(second.process.clone()) {
                    self.started_again(&name, &to, second);
                }
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    fn started_again(&self, name: &VmName, to: &str, second: Second) {
        let pid = second.process.pid;
        let has = second.has.join(", ");
        let finding = Finding::new(
            "started-again",
            format!("{name} has left for {to}, and process {pid} here has its {has}: two copies may run"),
            format!(
                "find out what started that process (`ps -fp {pid}`), keep that from doing it, and end it (`kill {pid}`) if the VM runs on {to}"
            ),
        );
        tracing::error!(vm = %name, pid, "{}; {}", finding.message, finding.hint);
        self.tell(name, EventKind::StartedAgain { pid, has: second.has.clone() });
        self.host().left.may_start(name, Some(&finding));
        self.inner.again.lock().insert(name.clone(), (second, finding));
    }
}
