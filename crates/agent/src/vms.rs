//! The machines of this host: which there are, what is being done to each, and what follows from that.
//!
//! The journal decides who owns what and survives the agent; this is the live side of it. Every change of a
//! machine goes through here, so that no two things are done to one machine at a time.

mod again;
mod forwards;
mod here;
mod left;
mod sessions;
mod silent;
mod uncertain;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use finding::Finding;
use futures::future::join_all;
use host::{Origin, Record, Vm, guest_ram};
use migration::LinkedHost;
use ownership::{Ownership, VmName};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::api::types::{Doubt, EventKind, RemovalReason, VmState, VmView};
use crate::error::AgentError;
use crate::events::Events;
use crate::history::History;
use crate::monitor;
use crate::sessions::Active;
use again::StartedAgain;

/// The machines of this host. Clones are handles to the same.
#[derive(Debug, Clone)]
pub struct Vms {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    host: Arc<LinkedHost>,
    history: History,
    events: Events,
    entries: Mutex<BTreeMap<VmName, Entry>>,
    /// What has left, and may run here all the same.
    again: StartedAgain,
    /// Cancelled when the agent goes down: nothing new begins, background work ends.
    closing: CancellationToken,
    /// Everything that must have ended before the agent may.
    tasks: TaskTracker,
}

/// One name that is taken.
#[derive(Debug)]
enum Entry {
    /// Being started or taken in.
    Starting(Origin),
    /// On record, and still looked for since the agent has started.
    Recovering(Box<Record>),
    /// Its record cannot be read: nobody knows whose it is, and the name is nobody else's.
    Unreadable(Finding),
    /// A machine that is this host's.
    Here(Box<Here>),
    /// In the middle of a hand-over whose end is not known. The token ends the attempts to find out.
    Uncertain(Box<Record>, CancellationToken),
    /// This host's, but its QEMU does not answer. The token ends the attempts to reach it.
    Silent(Box<Silent>, CancellationToken),
}

/// A machine whose QEMU does not answer, or is not what the record says.
#[derive(Debug)]
struct Silent {
    record: Record,
    problem: Finding,
}

/// A machine that is this host's.
#[derive(Debug)]
struct Here {
    vm: Vm,
    /// The migration it is in.
    session: Option<Arc<Active>>,
    /// What else is being done to it, as in "web1 is being stopped".
    held: Option<&'static str>,
    /// Ends the task that listens to its QEMU.
    monitor: CancellationToken,
}

impl Here {
    /// Whether nobody does anything to it.
    fn is_idle(&self) -> bool {
        self.session.is_none() && self.held.is_none()
    }
}

impl Vms {
    /// No machines yet: [`Vms::recover`] finds those of the journal.
    #[must_use]
    pub fn new(host: Arc<LinkedHost>, history: History, events: Events, closing: CancellationToken) -> Vms {
        let (entries, again) = (Mutex::default(), StartedAgain::default());
        let tasks = TaskTracker::new();
        Vms { inner: Arc::new(Inner { host, history, events, entries, again, closing, tasks }) }
    }

    /// The host they are on.
    #[must_use]
    pub fn host(&self) -> &Arc<LinkedHost> {
        &self.inner.host
    }

    /// What happens to them.
    #[must_use]
    pub fn events(&self) -> &Events {
        &self.inner.events
    }

    /// The migrations that have ended.
    #[must_use]
    pub fn history(&self) -> &History {
        &self.inner.history
    }

    /// What this agent does without.
    #[must_use]
    pub fn problems(&self) -> Vec<Finding> {
        let logs = self.host().logs.directory();
        let no_logs = (!logs.is_dir()).then(|| {
            let message = format!("{} is no directory: no VM can be started or received", logs.display());
            Finding::new(
                "logs-off",
                message,
                "see to log_dir and restart the agent; VMs that run are not concerned",
            )
        });
        let off = self.history().problem().into_iter().chain(no_logs);
        off.chain(self.host().left.problems()).chain(self.host().forwards.problem()).collect()
    }

    /// How many of them are still looked for since the agent has started.
    #[must_use]
    pub fn recovering(&self) -> usize {
        self.entries().values().filter(|entry| matches!(entry, Entry::Recovering(_))).count()
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.entries().len()
    }

    /// All of them, by name.
    pub async fn views(&self) -> Vec<VmView> {
        let shots: Vec<Shot> = {
            let entries = self.entries();
            let standing = entries.iter().filter(|(_, entry)| self.stands(entry));
            standing.map(|(name, entry)| Shot::of(name, entry)).collect()
        };
        // Most need not be asked: a list is had without a task, a timer and a wait for each machine.
        let (mut views, mut asked) = (Vec::with_capacity(shots.len()), Vec::new());
        for mut shot in shots {
            if shot.is_known() {
                views.push(shot.view);
            } else {
                asked.push(shot.view());
            }
        }
        views.extend(join_all(asked).await);
        let mut views: Vec<VmView> = views.into_iter().map(|view| self.placed(view)).collect();
        views.extend(self.forwarded());
        let mut views = self.with_kept(views);
        views.sort_by(|a, b| a.name.cmp(&b.name));
        views
    }

    /// One of them.
    ///
    /// # Errors
    /// [`AgentError::UnknownVm`].
    pub async fn view(&self, name: &VmName) -> Result<VmView, AgentError> {
        let shot =
            self.entries().get(name).filter(|entry| self.stands(entry)).map(|entry| Shot::of(name, entry));
        let view = match shot {
            Some(shot) => {
                Some(VmView { warnings: self.warnings(name).await, ..self.placed(shot.view().await) })
            }
            None => self.forwarded().into_iter().find(|view| view.name == name.as_ref()),
        };
        match (view, self.left(name)) {
            (Some(view), Some(left)) => {
                Ok(VmView { kept: left.kept, problem: left.problem.or(view.problem.clone()), ..view })
            }
            (Some(view), None) => Ok(view),
            (None, Some(left)) => Ok(left),
            (None, None) => Err(self.unknown(name)),
        }
    }

    /// What is not as it should be with a machine that is here, and what would keep it from leaving.
    async fn warnings(&self, name: &VmName) -> Vec<Finding> {
        let (vms, of) = (self.clone(), name.clone());
        let mut warnings = tokio::task::spawn_blocking(move || vms.exposed(&of)).await.unwrap_or_default();
        let idle = match self.entries().get(name) {
            Some(Entry::Here(here)) if here.session.is_none() => Some(here.vm.clone()),
            _ => None,
        };
        if let Some(vm) = idle {
            warnings.extend(host::lifecycle::may_never_have_run(&vm).await);
            warnings.extend(movable::tied(self.host(), &vm).await);
        }
        warnings
    }

    /// What of a machine that is here others can read, and who may start it again. A service manager is asked, and waited for.
    fn exposed(&self, name: &VmName) -> Vec<Finding> {
        let vm = match self.entries().get(name) {
            Some(Entry::Here(here)) => here.vm.clone(),
            _ => return Vec::new(),
        };
        let supervised = host::supervised::warning(&vm.record, &vm.spec);
        guest_ram::exposed(&vm.record, &vm.spec).into_iter().chain(supervised).collect()
    }

    /// The same, in the log.
    fn warn(&self, name: &VmName) {
        let (vms, name) = (self.clone(), name.clone());
        tokio::task::spawn_blocking(move || {
            for Finding { kind, message, hint } in vms.exposed(&name) {
                tracing::warn!(vm = %name, kind, "{message}; {hint}");
            }
        });
    }

    /// With where its log is, and the network that it is in, which the journal knows: it may have been released by its former host.
    fn placed(&self, view: VmView) -> VmView {
        let name = view.name.parse::<VmName>().ok();
        let network_of = name.as_ref().and_then(|name| self.host().journal.of(name, network_of).flatten());
        let log = name.filter(|_| view.origin != Origin::Adopted).map(|name| self.host().logs.of(&name));
        VmView { network_of, log: log.filter(|log| log.exists()), ..view }
    }

    /// Whether what is in doubt still is: the journal knows sooner than who looks after the entry.
    fn stands(&self, entry: &Entry) -> bool {
        let Entry::Uncertain(record, _) = entry else { return true };
        let now = self.host().journal.get(&record.name);
        now.is_some_and(|now| now.arrived_by == record.arrived_by && now.ownership == record.ownership)
    }

    /// Waits until everything that was begun here has ended. Nothing new begins once the token given to
    /// [`Vms::new`] is cancelled.
    pub async fn idle(&self) {
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
    }

    fn entries(&self) -> MutexGuard<'_, BTreeMap<VmName, Entry>> {
        // Every change under this lock is a single assignment: a panic leaves nothing half done.
        self.inner.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, name: &VmName, kind: EventKind) {
        self.inner.events.tell(Some(name.as_ref()), kind);
    }

    fn open(&self) -> Result<(), AgentError> {
        if self.inner.closing.is_cancelled() { Err(AgentError::ShuttingDown) } else { Ok(()) }
    }

    fn unknown(&self, name: &VmName) -> AgentError {
        if let Some(forward) = self.host().forwards.of(name) {
            return AgentError::Forwarded { vm: name.to_string(), to: forward.to };
        }
        if let Some(left) = self.host().fence.left().into_iter().find(|left| left.vm == *name) {
            return AgentError::HasLeft { vm: name.to_string(), to: left.to };
        }
        let known = self.entries().keys().map(ToString::to_string).collect();
        AgentError::UnknownVm { name: name.to_string(), known }
    }

    /// Changes a machine that is here and that nothing is being done to.
    fn with_idle<T>(&self, name: &VmName, change: impl FnOnce(&mut Here) -> T) -> Result<T, AgentError> {
        self.open()?;
        let mut entries = self.entries();
        match entries.get_mut(name) {
            Some(Entry::Here(here)) => {
                if let Some(session) = &here.session {
                    return Err(AgentError::InSession { vm: name.to_string(), to: session.to.clone() });
                }
                if let Some(doing) = here.held {
                    return Err(AgentError::Held { vm: name.to_string(), doing });
                }
                Ok(change(here))
            }
            other => Err(match other.as_deref() {
                Some(entry) => not_here(name, entry),
                None => {
                    drop(entries);
                    self.unknown(name)
                }
            }),
        }
    }

    /// Puts a machine that runs here under its name and listens to its QEMU.
    ///
    /// In this order: its QEMU may have ended already, and who hears of that looks for the machine under its name.
    fn keep(&self, vm: Vm) {
        let monitor = self.inner.closing.child_token();
        let here = Here { vm: vm.clone(), session: None, held: None, monitor: monitor.clone() };
        self.put(vm.record.name.clone(), Entry::Here(Box::new(here)));
        self.listen(vm, monitor);
    }

    /// Puts something under a name, and ends the tasks of what was there.
    fn put(&self, name: VmName, entry: Entry) {
        if let Some(token) = self.entries().insert(name, entry).as_ref().and_then(Entry::token) {
            token.cancel();
        }
    }

    fn drop_entry(&self, name: &VmName, reason: RemovalReason) {
        let entry = self.entries().remove(name);
        if let Some(token) = entry.as_ref().and_then(Entry::token) {
            token.cancel();
        }
        self.tell(name, EventKind::VmRemoved { reason });
    }
}

/// Why nothing can be done to an entry that is not a machine of this host.
fn not_here(name: &VmName, entry: &Entry) -> AgentError {
    let vm = name.to_string();
    match entry {
        Entry::Starting(Origin::Adopted) => AgentError::Held { vm, doing: "taken in" },
        Entry::Starting(_) => AgentError::Held { vm, doing: "started" },
        Entry::Recovering(_) => AgentError::Held { vm, doing: "looked for, as the agent has just started" },
        Entry::Unreadable(why) => AgentError::Refused(why.clone()),
        Entry::Here(_) => AgentError::NotUncertain(vm),
        Entry::Silent(silent, _) => AgentError::Refused(silent.problem.clone()),
        Entry::Uncertain(record, _) => AgentError::Uncertain { vm, doubt: doubt(record) },
    }
}

/// In whose network a machine of this host is, where not in this one's.
fn network_of(record: &Record) -> Option<String> {
    record.arrived_from.clone().filter(|_| !record.made.forwarded.is_empty())
}

/// What is in doubt about a machine, going by its record.
fn doubt(record: &Record) -> Doubt {
    match &record.ownership {
        // One that is this host's is in doubt only while its journal is.
        Ownership::Owner => Doubt::Journal,
        Ownership::HandedOver { session, to, address, .. } => {
            Doubt::HandedOver { session: *session, to: to.clone(), address: address.clone() }
        }
        Ownership::Incoming { session, from, .. } => {
            Doubt::Received { session: *session, from: from.clone() }
        }
    }
}

impl Entry {
    /// What ends the tasks that look after it.
    fn token(&self) -> Option<&CancellationToken> {
        match self {
            Entry::Starting(_) | Entry::Recovering(_) | Entry::Unreadable(_) => None,
            Entry::Here(here) => Some(&here.monitor),
            Entry::Uncertain(_, token) | Entry::Silent(_, token) => Some(token),
        }
    }
}

/// What is known of an entry without asking its QEMU.
struct Shot {
    view: VmView,
    /// Its QEMU says what state it is in.
    live: Option<qemu::Qmp>,
    /// Nothing is being done to it from here.
    idle: bool,
}

impl Shot {
    fn of(name: &VmName, entry: &Entry) -> Shot {
        let shot = |record: Option<&Record>, origin, state| Shot {
            view: VmView {
                name: name.to_string(),
                state,
                qemu_status: None,
                origin,
                generation: record.map_or(0, |record| record.generation),
                pid: record.and_then(|record| record.process.as_ref()).map(monitor::pid),
                memory: record.map_or(0, |record| record.memory),
                qmp_socket: record.map_or_else(PathBuf::new, |record| record.qmp_socket.clone()),
                argv: record.map_or_else(Vec::new, |record| record.argv.clone()),
                files: record.map_or_else(Vec::new, |record| record.made.files.clone()),
                log: None,
                taps: record.map_or_else(Vec::new, |record| record.made.taps.clone()),
                session: None,
                doubt: record.filter(|_| state == VmState::Uncertain).map(doubt),
                problem: None,
                warnings: Vec::new(),
                forward: None,
                network_of: None,
                kept: None,
            },
            live: None,
            idle: false,
        };
        let with_problem = |shot: Shot, why: &Finding| Shot {
            view: VmView { problem: Some(why.clone()), ..shot.view },
            ..shot
        };
        match entry {
            Entry::Starting(origin) => shot(None, *origin, VmState::Starting),
            Entry::Recovering(record) => shot(Some(record), record.origin, VmState::Recovering),
            Entry::Unreadable(why) => with_problem(shot(None, Origin::Run, VmState::Unreadable), why),
            Entry::Uncertain(record, _) => shot(Some(record), record.origin, VmState::Uncertain),
            Entry::Silent(silent, _) => {
                let record = &silent.record;
                with_problem(shot(Some(record), record.origin, VmState::Unreachable), &silent.problem)
            }
            Entry::Here(here) => {
                let record = &here.vm.record;
                let mut shot = shot(Some(record), record.origin, VmState::Unreachable);
                shot.view.session =
                    here.session.as_ref().map(|active| active.session.progress().borrow().clone());
                shot.live = Some(here.vm.qmp.clone());
                shot.idle = here.is_idle();
                shot
            }
        }
    }

    /// Whether its QEMU need not be asked: what it said last holds.
    fn is_known(&mut self) -> bool {
        let Some(qmp) = &self.live else { return true };
        let Some((state, status)) = monitor::known(qmp).filter(|_| self.idle) else { return false };
        (self.view.state, self.view.qemu_status) = (state, status);
        true
    }

    async fn view(self) -> VmView {
        let Some(qmp) = &self.live else { return self.view };
        let (state, qemu_status) = monitor::state(qmp).await;
        VmView { state, qemu_status, ..self.view }
    }
}
