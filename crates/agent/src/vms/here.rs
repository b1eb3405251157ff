//! Machines come and go: recovered, started, taken in, arrived, stopped, ended.

use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use host::lifecycle::{self, DisownError, Forgotten, RunError, Stopped};
use host::{Origin, Record, Vm};
use migration::{Recovered, When};
use ownership::{Ownership, VmName};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::{Entry, Vms};
use crate::api::types::{EventKind, RemovalReason};
use crate::error::AgentError;
use crate::{findings, logs, monitor};

/// How many machines are looked for at once after the agent's start, and how long one is waited for before the next is begun with all
/// the same: a QEMU that hangs holds up no other.
const AT_ONCE: usize = 32;
const PATIENCE: Duration = Duration::from_millis(250);
/// How long what depends on the machines that are here waits until they are found.
const FOUND: Duration = Duration::from_secs(10);
/// How often, and how many times, to look again at a QEMU whose monitor has closed, until its process is gone. QEMU
/// closes its monitor first and takes down guest memory last, which can take seconds.
const LOOK_AGAIN: (Duration, u32) = (Duration::from_millis(250), 40);

/// What a start of the agent has removed.
fn removed(was: &Ownership) -> &'static str {
    match was {
        Ownership::Incoming { ready: false, .. } => "a copy that was never complete; it is thrown away",
        Ownership::Incoming { .. } => {
            "a complete copy that never ran, and whose QEMU has ended; its remains are removed"
        }
        Ownership::Owner | Ownership::HandedOver { .. } => {
            "had ended when the agent started; its remains are removed"
        }
    }
}

impl Vms {
    /// Begins to find again the machines of the journal, after a restart of the agent. Until it is found each is known by name, and
    /// nothing can be done to it.
    pub fn recover(&self) {
        for (name, error) in self.host().journal.unreadable() {
            let why = findings::unreadable(name, error);
            tracing::error!(vm = %name, "{}; {}", why.message, why.hint);
            self.put(name.clone(), Entry::Unreadable(why));
        }
        let records = self.host().journal.all();
        self.host().recovering.begin(records.iter().map(|record| record.name.clone()));
        let places = Arc::new(Semaphore::new(AT_ONCE));
        for record in records {
            self.put(record.name.clone(), Entry::Recovering(Box::new(record.clone())));
            let (vms, places) = (self.clone(), Arc::clone(&places));
            self.until_closing(async move { vms.find_again(record, places).await });
        }
        logs::keep_bounded(Arc::clone(self.host()), self.inner.closing.clone());
        let vms = self.clone();
        self.until_closing(async move { vms.keep_images().await });
        self.watch_again();
        let vms = self.clone();
        self.until_closing(async move {
            // What depends on which machines are here comes after them; but not after one whose QEMU hangs.
            let _ = tokio::time::timeout(FOUND, vms.found()).await;
            // Storage that does not answer holds up nobody else.
            let host = Arc::clone(vms.host());
            std::thread::spawn(move || host.left.expire(&host.journal));
            vms.keep_forwarding().await;
        });
    }

    /// Waits until all machines of the journal are found again, or found to be gone.
    pub async fn found(&self) {
        self.host().recovering.all_found().await;
    }

    pub(super) fn until_closing(&self, work: impl Future<Output = ()> + Send + 'static) {
        let closing = self.inner.closing.clone();
        self.inner.tasks.spawn(async move {
            tokio::select! {
                () = closing.cancelled() => {}
                () = work => {}
            }
        });
    }

    async fn find_again(&self, record: Record, places: Arc<Semaphore>) {
        let name = record.name.clone();
        let was = record.ownership.clone();
        // Never closed.
        let place = places.acquire_owned().await.ok();
        let mut recovering = pin!(migration::recover(self.host(), record, When::Start));
        let recovered = match tokio::time::timeout(PATIENCE, &mut recovering).await {
            Ok(recovered) => recovered,
            Err(_) => {
                drop(place);
                recovering.await
            }
        };
        match recovered {
            Recovered::Running(vm) => {
                tracing::info!(vm = %name, "found again");
                self.keep(*vm);
            }
            Recovered::Gone(_) => {
                tracing::info!(vm = %name, "{}", removed(&was));
                self.entries().remove(&name);
            }
            Recovered::Uncertain(record) => self.doubt(record),
            Recovered::Silent(record, why) => self.silent(record, why),
            Recovered::Replaced(_) => drop(self.entries().remove(&name)),
        }
        // Only now may a peer change anything about it.
        self.host().recovering.is_found(&name);
        self.warn(&name);
    }

    /// Starts a machine.
    ///
    /// # Errors
    /// [`AgentError::NameTaken`], or why QEMU could not be started as asked.
    pub async fn run(
        &self,
        name: VmName,
        argv: &[String],
        directory: &Path,
        stale_disks: bool,
    ) -> Result<(), AgentError> {
        self.begin(&name, Origin::Run)?;
        let started = lifecycle::run(self.host(), name.clone(), argv, directory, stale_disks).await;
        self.begun(&name, Origin::Run, started)
    }

    /// Takes in a QEMU that runs already.
    ///
    /// # Errors
    /// [`AgentError::NameTaken`], or why it cannot be mirrored as it is.
    pub async fn adopt(&self, name: VmName, qmp: &Path) -> Result<(), AgentError> {
        self.begin(&name, Origin::Adopted)?;
        let adopted = lifecycle::adopt(self.host(), name.clone(), qmp).await;
        self.begun(&name, Origin::Adopted, adopted)
    }

    fn begin(&self, name: &VmName, origin: Origin) -> Result<(), AgentError> {
        self.open()?;
        let mut entries = self.entries();
        if entries.contains_key(name) {
            return Err(AgentError::NameTaken(name.to_string()));
        }
        entries.insert(name.clone(), Entry::Starting(origin));
        Ok(())
    }

    fn begun(&self, name: &VmName, origin: Origin, outcome: Result<Vm, RunError>) -> Result<(), AgentError> {
        match outcome {
            Ok(vm) => {
                tracing::info!(vm = %name, ?origin, "runs");
                self.keep(vm);
                self.warn(name);
                self.tell(name, EventKind::VmAdded { origin });
                Ok(())
            }
            Err(error) => {
                // A QEMU of it may linger.
                match self.host().journal.get(name).zip(self.host().lingering.why(name)) {
                    Some((record, why)) => self.silent(record, why.message),
                    None => drop(self.entries().remove(name)),
                }
                Err(AgentError::Refused(findings::of_run(&error)))
            }
        }
    }

    /// Keeps a machine that a peer has sent.
    pub fn arrived(&self, vm: Vm) {
        let name = vm.record.name.clone();
        tracing::info!(vm = %name, "arrived");
        self.keep(vm);
        self.tell(&name, EventKind::VmAdded { origin: Origin::Arrived });
    }

    /// Powers a machine off; with `force`, ends its QEMU at once.
    ///
    /// # Errors
    /// When it is in a migration, or did not power off in time.
    pub async fn stop(&self, name: &VmName, force: bool) -> Result<(), AgentError> {
        if force && let Some(record) = self.take_silent(name) {
            if let Forgotten::Lingers(why) = lifecycle::forget(self.host(), &record, None).await {
                self.silent(record, why.message.clone());
                return Err(AgentError::Refused(why));
            }
            self.drop_entry(name, RemovalReason::Stopped);
            return Ok(());
        }
        let vm = self.with_idle(name, |here| {
            here.held = Some("stopped");
            here.monitor.cancel();
            here.vm.clone()
        })?;
        let refused = match lifecycle::stop(self.host(), &vm, force).await {
            Ok(Stopped::Ended) => {
                tracing::info!(vm = %name, force, "stopped");
                self.drop_entry(name, RemovalReason::Stopped);
                return Ok(());
            }
            Ok(Stopped::StillRuns) => findings::still_runs(name),
            Ok(Stopped::Lingers(why)) => why,
            Err(error) => findings::of_qmp(&error),
        };
        // Listening begins anew, and cleans up should QEMU be gone after all.
        self.keep(vm);
        Err(AgentError::Refused(refused))
    }

    /// Lets go of a machine that was adopted: it runs on, and is not this agent's any more.
    ///
    /// # Errors
    /// When it was not adopted, is in a migration or in doubt, or a copy of it may be left elsewhere.
    pub async fn forget(&self, name: &VmName) -> Result<(), AgentError> {
        let vm = self.with_idle(name, |here| {
            here.held = Some("let go of");
            here.monitor.cancel();
            here.vm.clone()
        })?;
        match lifecycle::disown(self.host(), &vm.record).await {
            Ok(()) => {
                tracing::info!(vm = %name, "let go of; it runs on");
                self.drop_entry(name, RemovalReason::Forgotten);
                Ok(())
            }
            Err(error) => {
                self.keep(vm);
                Err(match error {
                    DisownError::Refused(why) => AgentError::Refused(why),
                    DisownError::Journal(error) => AgentError::Journal(error),
                    other => AgentError::BadRequest(other.to_string()),
                })
            }
        }
    }

    /// What was done to a machine that was held has been done. Listening begins anew, for a QEMU that ended meanwhile was not cleaned
    /// up after.
    pub(super) fn let_go(&self, name: &VmName) {
        let vm = match self.entries().get(name) {
            Some(Entry::Here(here)) => here.vm.clone(),
            _ => return,
        };
        self.keep(vm);
    }

    /// Listens to a machine's QEMU, and asks it now and then, until the token is cancelled, or QEMU is gone.
    pub(super) fn listen(&self, vm: Vm, until: CancellationToken) {
        let vms = self.clone();
        self.inner.tasks.spawn(async move {
            let name = vm.record.name.clone();
            tokio::select! {
                () = until.cancelled() => {}
                () = monitor::listen(&vm.qmp, |kind| vms.tell(&name, kind)) => vms.ended(&name, &until).await,
                () = monitor::keep_asking(&vm.qmp, &name, || vms.is_idle(&name)) => {}
            }
        });
    }

    /// Whether a machine runs here and nobody has anything to do with it.
    fn is_idle(&self, name: &VmName) -> bool {
        matches!(self.entries().get(name), Some(Entry::Here(here)) if here.is_idle())
    }

    /// QEMU's monitor has closed: the guest powered off, or QEMU crashed or was killed.
    async fn ended(&self, name: &VmName, until: &CancellationToken) {
        let record = match self.entries().get_mut(name) {
            // A migration notices by itself, and whoever ends it looks at the machine again.
            Some(Entry::Here(here)) if here.is_idle() => {
                here.held = Some("cleaned up after");
                here.vm.record.clone()
            }
            _ => return,
        };
        // It has left and comes back already: what arrives is its session's, which throws it away if need be.
        let comes = |now: &Record| matches!(now.ownership, Ownership::Incoming { .. });
        if self.host().journal.get(name).is_some_and(|now| comes(&now)) {
            return self.drop_entry(name, RemovalReason::Migrated);
        }
        let (pause, times) = LOOK_AGAIN;
        let mut last = (record.clone(), "its monitor has closed".to_owned());
        for _ in 0..times {
            match migration::recover(self.host(), record.clone(), When::Later).await {
                Recovered::Gone(_) => {
                    tracing::info!(vm = %name, "ended by itself");
                    return self.drop_entry(name, RemovalReason::Ended);
                }
                // The process is there, its monitor open again: it had only lost this connection.
                Recovered::Running(vm) => return self.keep(*vm),
                Recovered::Uncertain(record) => return self.doubt(record),
                Recovered::Silent(record, why) => last = (record, why),
                Recovered::Replaced(_) => return self.drop_entry(name, RemovalReason::Migrated),
            }
            tokio::select! {
                () = until.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
        }
        self.silent(last.0, last.1);
    }
}
