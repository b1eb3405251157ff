//! Migrations of this host's machines: begun, steered, ended.

use std::num::NonZeroU64;
use std::sync::Arc;

use host::Record;
use ownership::{Ownership, VmName};
use session::Readiness;
use session::report::Verification;
use session::{Command, Goal, Options, Outcome, Report};
use tokio::sync::oneshot;
use uuid::Uuid;

use super::{Entry, Vms, not_here};
use crate::api::types::{EventKind, HistoryEntry, RemovalReason};
use crate::error::AgentError;
use crate::heap;
use crate::sessions::Active;

impl Vms {
    /// Begins a migration or a mirror, and returns at once with its identity.
    ///
    /// # Errors
    /// When the machine is not here or something is being done to it, or an option makes no sense. Whatever the
    /// destination refuses comes later, in the report.
    pub fn migrate(&self, name: &VmName, goal: Goal, to: &str, options: Options) -> Result<Uuid, AgentError> {
        options.validate()?;
        address(to)?;
        let host = Arc::clone(self.host());
        let active = self.with_idle(name, |here| {
            let session = migration::source::start(host, here.vm.clone(), to.to_owned(), goal, options);
            let active = Arc::new(Active::new(name.clone(), to.to_owned(), session));
            here.session = Some(Arc::clone(&active));
            active
        })?;
        let id = active.id();
        tracing::info!(vm = %name, session = %id, to, ?goal, "migration begun");
        self.tell(name, EventKind::SessionStarted { session: id, goal, to: to.to_owned() });
        let vms = self.clone();
        self.inner.tasks.spawn(async move {
            let report = active.follow(vms.events()).await;
            vms.session_ended(&active, report).await;
            drop(active);
            heap::give_back();
        });
        Ok(id)
    }

    /// Every reason why a migration would fail, without beginning one.
    ///
    /// # Errors
    /// When the machine is not here, or the destination could not even be asked.
    pub async fn check(&self, name: &VmName, to: &str, options: &Options) -> Result<Readiness, AgentError> {
        options.validate()?;
        address(to)?;
        // Held: at the destination a rehearsal takes the same name as a migration.
        let vm = self.with_idle(name, |here| {
            here.held = Some("checked");
            here.vm.clone()
        })?;
        let host = Arc::clone(self.host());
        let readiness = migration::source::check(host, vm, to, options).await;
        self.let_go(name);
        readiness.map_err(|failure| AgentError::Migration(Box::new(failure)))
    }

    /// The migrations under way.
    #[must_use]
    pub fn sessions(&self) -> Vec<Arc<Active>> {
        let entries = self.entries();
        let of = |entry: &Entry| match entry {
            Entry::Here(here) => here.session.clone(),
            Entry::Starting(_)
            | Entry::Recovering(_)
            | Entry::Unreadable(_)
            | Entry::Uncertain(..)
            | Entry::Silent(..) => None,
        };
        entries.values().filter_map(of).collect()
    }

    /// The migration under way that has this identity.
    #[must_use]
    pub fn session(&self, id: Uuid) -> Option<Arc<Active>> {
        self.sessions().into_iter().find(|active| active.id() == id)
    }

    /// Switches a machine over now.
    ///
    /// # Errors
    /// [`AgentError::NoSession`] when it has no mirror, [`AgentError::SessionEnded`] when that is over.
    pub async fn switch(&self, name: &VmName) -> Result<Uuid, AgentError> {
        let active = self.session_of(name)?;
        if active.session.progress().borrow().goal == Goal::Migrate {
            // It switches over by itself as soon as it can.
            return Err(AgentError::NotStanding(name.to_string()));
        }
        command_of(name, &active, Command::Switch).await
    }

    /// Ends a migration; the machine stays here.
    ///
    /// # Errors
    /// As [`Vms::switch`].
    pub async fn cancel(&self, name: &VmName) -> Result<Uuid, AgentError> {
        self.command(name, Command::Cancel).await
    }

    /// Changes the bandwidth limit of a migration; where `to` or `goal` is given, only of one that leads there, or is for that.
    ///
    /// # Errors
    /// As [`Vms::switch`], when the limit is too low to make sense, or [`AgentError::InSession`] when the machine is on
    /// its way to somewhere else.
    pub async fn bandwidth(
        &self,
        name: &VmName,
        limit: Option<NonZeroU64>,
        to: Option<&str>,
        goal: Option<Goal>,
    ) -> Result<Uuid, AgentError> {
        Options { bandwidth: limit, ..Options::default() }.validate()?;
        let active = self.session_of(name)?;
        let other_goal = goal.is_some_and(|goal| goal != active.session.progress().borrow().goal);
        if other_goal || to.is_some_and(|to| to != active.to) {
            return Err(AgentError::InSession { vm: name.to_string(), to: active.to.clone() });
        }
        command_of(name, &active, Command::Bandwidth(limit)).await
    }

    /// Compares every page on both sides with the ledgers.
    ///
    /// # Errors
    /// As [`Vms::switch`], or why the comparison could not be made.
    pub async fn verify(&self, name: &VmName) -> Result<Verification, AgentError> {
        let (answer, answered) = oneshot::channel();
        self.command(name, Command::Verify(answer)).await?;
        match answered.await {
            Ok(result) => result.map_err(AgentError::Refused),
            Err(_) => Err(AgentError::SessionEnded(name.to_string())),
        }
    }

    /// Ends every migration, as when the agent goes down: the machines stay here.
    pub async fn cancel_all(&self) {
        for active in self.sessions() {
            tracing::info!(vm = %active.vm, session = %active.id(), "cancelled: the agent is going down");
            // One that has ended meanwhile needs no cancelling.
            let _ = active.session.command(Command::Cancel).await;
        }
    }

    async fn command(&self, name: &VmName, command: Command) -> Result<Uuid, AgentError> {
        let active = self.session_of(name)?;
        command_of(name, &active, command).await
    }

    fn session_of(&self, name: &VmName) -> Result<Arc<Active>, AgentError> {
        let entries = self.entries();
        match entries.get(name) {
            Some(Entry::Here(here)) => match here.session.clone() {
                Some(active) => Ok(active),
                None => {
                    drop(entries);
                    let last = self.history().list(Some(name.as_ref()), 1).unwrap_or_default();
                    let last = last.first().map(HistoryEntry::how_it_ended).unwrap_or_default();
                    Err(AgentError::NoSession { vm: name.to_string(), last })
                }
            },
            Some(entry) => Err(not_here(name, entry)),
            None => {
                drop(entries);
                Err(self.unknown(name))
            }
        }
    }

    /// Puts the report into the history, makes the list of machines true again, and only then lets those who
    /// wait go on. In this order there is no moment at which the migration is in neither.
    async fn session_ended(&self, active: &Active, report: Arc<Report>) {
        let name = &active.vm;
        let (history, kept) = (self.history().clone(), Arc::clone(&report));
        match tokio::task::spawn_blocking(move || history.add(&kept)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!(session = %active.id(), %error, "the report could not be kept"),
            Err(error) => tracing::error!(session = %active.id(), %error, "the report could not be kept"),
        }
        // The journal, not the report, decides where the machine is: it is what a restart would go by. It may be on its way back here
        // already, or be back.
        let was = self.arrival(name, active.id());
        let now = || self.host().journal.get(name).filter(|now| was == Some(now.arrived_by));
        match was.map(|_| now()) {
            None => {}
            Some(None) => {
                let left = match self.entries().get(name) {
                    Some(Entry::Here(here)) => Some(here.vm.record.clone()),
                    _ => None,
                };
                self.drop_entry(name, RemovalReason::Migrated);
                if let Some(record) = left {
                    self.watch(&record, &report.destination);
                }
            }
            Some(Some(record)) => self.stays(record),
        }
        let (outcome, error) = (report.outcome, report.error.clone());
        let why = error.as_ref().map(|failure| failure.finding.message.as_str());
        match outcome {
            Outcome::Completed => {
                tracing::info!(vm = %name, session = %active.id(), downtime_ms = report.downtime_ms, "migrated");
            }
            _ => tracing::warn!(vm = %name, session = %active.id(), ?outcome, why, "migration ended"),
        }
        let downtime_ms = report.downtime_ms;
        let kind = EventKind::SessionFinished { session: active.id(), outcome, downtime_ms, error };
        self.tell(name, kind);
        active.end(report);
    }
}

impl Vms {
    /// Keeps a machine that a migration has not taken away, as what its record says.
    fn stays(&self, record: Record) {
        let name = record.name.clone();
        if matches!(record.ownership, Ownership::HandedOver { .. }) {
            return self.doubt(record);
        }
        if self.host().journal.is_unsettled(&name) {
            return self.unsettled(record);
        }
        if record.may_stand_still() {
            // Tried again until its QEMU does as it is told, or is gone.
            let why = "its guest is paused by a migration and could not be resumed";
            return self.silent(record, why.to_owned());
        }
        let vm = match self.entries().get_mut(&name) {
            Some(Entry::Here(here)) => {
                here.vm.record = record;
                Some(here.vm.clone())
            }
            _ => None,
        };
        // Listening begins anew, for a QEMU that ended meanwhile was not cleaned up after.
        if let Some(vm) = vm {
            self.keep(vm);
        }
    }

    /// How the machine came here that this session is of, as long as its name is still the session's.
    fn arrival(&self, name: &VmName, session: Uuid) -> Option<Option<Uuid>> {
        match self.entries().get(name) {
            Some(Entry::Here(here)) if here.session.as_ref().is_some_and(|active| active.id() == session) => {
                Some(here.vm.record.arrived_by)
            }
            _ => None,
        }
    }
}

async fn command_of(name: &VmName, active: &Active, command: Command) -> Result<Uuid, AgentError> {
    let sent = active.session.command(command).await;
    sent.map_err(|_| AgentError::SessionEnded(name.to_string()))?;
    Ok(active.id())
}

/// Whether this could be the address of an agent's link.
fn address(to: &str) -> Result<(), AgentError> {
    let fits = to.rsplit_once(':').is_some_and(|(host, port)| {
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        let host_fits = match bare {
            Some(inner) => inner.parse::<std::net::Ipv6Addr>().is_ok(),
            None => !host.is_empty() && !host.contains([':', '/', ' ']),
        };
        host_fits && port.parse::<u16>().is_ok_and(|port| port != 0)
    });
    if fits { Ok(()) } else { Err(AgentError::Address(to.to_owned())) }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::{Duration, Instant};

    use host::Vm;
    use qemu::{Process, Qmp, Spec};
    use serde_json::{Value, json};
    use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
    use tokio::net::UnixListener;
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::Daemon;
    use crate::api::tests::config;
    use crate::api::types::VmState;
    use crate::monitor;

    /// A QEMU whose guest is in that state and stays so. It counts how often it is asked for that.
    async fn stays(status: &'static str, listener: UnixListener, asked: Arc<AtomicUsize>) {
        while let Ok((stream, _)) = listener.accept().await {
            let (read, mut write) = stream.into_split();
            let greeting = json!({"QMP": {"version": {"qemu": {}}, "capabilities": []}});
            write.write_all(format!("{greeting}\n").as_bytes()).await.unwrap();
            let mut lines = BufReader::new(read).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                let request: Value = serde_json::from_str(&line).unwrap();
                let mut answer = match request["execute"].as_str() {
                    Some("qmp_capabilities") => json!({"return": {}}),
                    Some("query-status") => {
                        asked.fetch_add(1, Ordering::Relaxed);
                        json!({"return": {"status": status, "running": status == "running"}})
                    }
                    _ => json!({"error": {"class": "GenericError", "desc": "no"}}),
                };
                answer["id"] = request["id"].clone();
                write.write_all(format!("{answer}\n").as_bytes()).await.unwrap();
            }
        }
    }

    async fn stays_paused(listener: UnixListener) {
        stays("paused", listener, Arc::default()).await;
    }

    /// A machine of this host that is this process, with this on record.
    async fn machine(vms: &Vms, name: &str, qmp_socket: &Path, on_record: Value) -> Vm {
        let mut record = json!({
            "name": name, "generation": 0, "ownership": "owner", "origin": "adopted", "arrived_by": null,
            "arrived_from": null, "resuming": false, "process": null, "argv": ["qemu-system-x86_64"],
            "qmp_socket": qmp_socket, "memory": 0, "made": { "files": [], "taps": [] },
        });
        record.as_object_mut().unwrap().extend(on_record.as_object().unwrap().clone());
        let mut record: Record = serde_json::from_value(record).unwrap();
        record.process = Some(Process::of_pid(std::process::id(), qmp_socket).unwrap());
        vms.host().journal.claim(record.clone()).unwrap();
        let spec = Spec::parse(&record.argv).unwrap();
        Vm { record, spec, qmp: Qmp::connect(qmp_socket).await.unwrap() }
    }

    /// How a machine is listed whose migration has ended, with this on record.
    async fn listed(on_record: Value) -> VmState {
        let directory = tempfile::tempdir().unwrap();
        let daemon = Daemon::start(config(directory.path())).await.unwrap();
        let vms = daemon.vms().clone();
        let qmp_socket: PathBuf = directory.path().join("qmp");
        tokio::spawn(stays_paused(UnixListener::bind(&qmp_socket).unwrap()));
        let vm = machine(&vms, "web1", &qmp_socket, on_record).await;
        let record = vm.record.clone();
        vms.keep(vm);
        vms.stays(record.clone());
        vms.view(&record.name).await.unwrap().state
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_machine_whose_qemu_has_ended_before_it_was_kept_does_not_stay() {
        let directory = tempfile::tempdir().unwrap();
        let daemon = Daemon::start(config(directory.path())).await.unwrap();
        let vms = daemon.vms().clone();
        // Others use the table too, so that either may be first to have it: who puts a machine there, or who hears that its QEMU has ended.
        let (stop, others) = (CancellationToken::new(), vms.clone());
        let stopped = stop.clone();
        let busy = std::thread::spawn(move || {
            while !stopped.is_cancelled() {
                let entries = others.entries();
                std::thread::sleep(Duration::from_millis(1));
                drop(entries);
                std::thread::sleep(Duration::from_micros(10));
            }
        });
        for number in 0..40 {
            let qmp_socket = directory.path().join(format!("qmp{number}"));
            let qemu = tokio::spawn(stays_paused(UnixListener::bind(&qmp_socket).unwrap()));
            let mut vm = machine(&vms, &format!("web{number}"), &qmp_socket, json!({})).await;
            qemu.abort();
            while vm.qmp.status().await.is_ok() {}
            // Another process has its number by now.
            let ended = vm.record.process.take().map(|process| Process { start_time: 1, ..process });
            vms.host().journal.amend(&mut vm.record, |now| now.process = ended).unwrap();
            vms.keep(vm);
        }
        stop.cancel();
        busy.join().unwrap();
        while vms.count() > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    #[tokio::test]
    async fn a_machine_that_was_just_heard_to_run_is_listed_without_asking_unless_something_is_done_to_it() {
        let directory = tempfile::tempdir().unwrap();
        let daemon = Daemon::start(config(directory.path())).await.unwrap();
        let vms = daemon.vms().clone();
        let qmp_socket = directory.path().join("qmp");
        let asked = Arc::new(AtomicUsize::new(0));
        tokio::spawn(stays("running", UnixListener::bind(&qmp_socket).unwrap(), Arc::clone(&asked)));
        let vm = machine(&vms, "web1", &qmp_socket, json!({})).await;
        let name = vm.record.name.clone();
        let listed = async || {
            assert_eq!(vms.views().await[0].state, VmState::Running);
            asked.load(Ordering::Relaxed)
        };
        // Two lists before it is asked by itself, however long they take here.
        loop {
            let begun = Instant::now();
            vms.keep(vm.clone());
            let (first, second) = (listed().await, listed().await);
            if begun.elapsed() < monitor::ASKED_FIRST {
                assert!(first > 0);
                assert_eq!(second, first);
                break;
            }
        }
        let before = asked.load(Ordering::Relaxed);
        assert_eq!(vms.view(&name).await.unwrap().state, VmState::Running);
        let shown = asked.load(Ordering::Relaxed);
        assert!(shown > before, "who wants to know of one machine has it asked");
        vms.with_idle(&name, |here| here.held = Some("checked")).unwrap();
        assert_eq!((listed().await, listed().await), (shown + 1, shown + 2));
    }

    #[tokio::test]
    async fn a_machine_that_was_not_resumed_is_not_listed_as_one_that_somebody_has_paused() {
        assert_eq!(listed(json!({})).await, VmState::Paused);
        for flag in ["switching", "resuming", "pauses"] {
            assert_eq!(listed(json!({ flag: true })).await, VmState::Unreachable, "{flag}");
        }
    }

    #[test]
    fn addresses_without_a_host_or_a_port_are_refused() {
        for good in ["10.9.0.3:7600", "host-b:7600", "[::1]:7600", "host.example.org:1"] {
            assert!(address(good).is_ok(), "{good}");
        }
        for bad in
            ["", "host-b", ":7600", "host-b:", "host-b:0", "host-b:65536", "::1:7600", "[x]:1", "http://a:1"]
        {
            assert!(address(bad).is_err(), "{bad}");
        }
    }
}
