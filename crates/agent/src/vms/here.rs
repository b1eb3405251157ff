//! Machines come and go: recovered, started, taken in, arrived, stopped, ended.

use std::path::Path;
use std::time::Duration;

use migration::lifecycle::{self, Recovered, RunError, Stopped};
use migration::{Origin, Vm, VmName};
use tokio_util::sync::CancellationToken;

use super::{Entry, Vms};
use crate::api::types::{EventKind, RemovalReason};
use crate::error::AgentError;
use crate::{findings, monitor};

/// How often, and how many times, to look again at a QEMU whose monitor has closed, until its process is gone. QEMU
/// closes its monitor first and takes down guest memory last, which can take seconds.
const LOOK_AGAIN: (Duration, u32) = (Duration::from_millis(250), 40);

impl Vms {
    /// Finds again the machines of the journal, after a restart of the agent.
    pub async fn recover(&self) {
        for record in self.host().journal.all() {
            match lifecycle::recover(self.host(), record).await {
                Recovered::Running(vm) => {
                    tracing::info!(vm = %vm.record.name, "found again");
                    self.keep(*vm);
                }
                Recovered::Gone(name) => {
                    tracing::info!(vm = %name, "gone while no agent was here; its remains are removed");
                }
                Recovered::Uncertain(record) => self.doubt(record),
                Recovered::Silent(record, why) => self.silent(record, why),
            }
        }
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
                self.tell(name, EventKind::VmAdded { origin });
                Ok(())
            }
            Err(error) => {
                self.entries().remove(name);
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
            lifecycle::forget(self.host(), &record, None).await;
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
            Err(error) => findings::of_qmp(&error),
        };
        // Listening begins anew, and cleans up should QEMU be gone after all.
        self.keep(vm);
        Err(AgentError::Refused(refused))
    }

    /// Listens to a machine's QEMU until the token that is returned is cancelled, or QEMU is gone.
    pub(super) fn listen(&self, vm: &Vm) -> CancellationToken {
        let token = self.inner.closing.child_token();
        let (vms, vm, until) = (self.clone(), vm.clone(), token.clone());
        self.inner.tasks.spawn(async move {
            let name = vm.record.name.clone();
            tokio::select! {
                () = until.cancelled() => {}
                () = monitor::listen(&vm.qmp, |kind| vms.tell(&name, kind)) => vms.ended(&name, &until).await,
            }
        });
        token
    }

    /// QEMU's monitor has closed: the guest powered off, or QEMU crashed or was killed.
    async fn ended(&self, name: &VmName, until: &CancellationToken) {
        let record = match self.entries().get_mut(name) {
            // A migration notices by itself, and whoever ends it looks at the machine again.
            Some(Entry::Here(here)) if here.session.is_none() && here.held.is_none() => {
                here.held = Some("cleaned up after");
                here.vm.record.clone()
            }
            _ => return,
        };
        let (pause, times) = LOOK_AGAIN;
        let mut last = (record.clone(), "its monitor has closed".to_owned());
        for _ in 0..times {
            match lifecycle::recover(self.host(), record.clone()).await {
                Recovered::Gone(_) => {
                    tracing::info!(vm = %name, "ended by itself");
                    return self.drop_entry(name, RemovalReason::Ended);
                }
                // The process is there, its monitor open again: it had only lost this connection.
                Recovered::Running(vm) => return self.keep(*vm),
                Recovered::Uncertain(record) => return self.doubt(record),
                Recovered::Silent(record, why) => last = (record, why),
            }
            tokio::select! {
                () = until.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
        }
        self.silent(last.0, last.1);
    }
}
