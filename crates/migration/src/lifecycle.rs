//! A machine's life on one host: started, adopted, found again after a restart of the agent, stopped, forgotten.

mod forget;
mod taps;

use std::path::{Path, PathBuf};
use std::time::Duration;

use qemu::spec::Mirrorable;
use qemu::{Presence, Process, Qmp, QmpError, Spec};

use crate::destination::network;
use crate::disks;
use crate::failure::chain;
use crate::handed_in;
use crate::host::Host;
use crate::journal::JournalError;
use crate::room::{self, Shortage};
use crate::source::Withdrawal;
use crate::source::disks::Uncleared;
use crate::vm::{Made, Origin, Outgoing, Ownership, Record, Vm, VmName};

pub(crate) use forget::forget_decided;
use forget::same_claim;
pub use forget::{forget, forget_incomplete};
pub(crate) use taps::raise_taps;

/// How long a guest may take to power off when asked to.
const POWER_OFF: Duration = Duration::from_secs(30);

/// Why a machine could not be started or adopted. Nothing is left of the attempt.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// The name is taken, or the journal failed.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The command line cannot be understood.
    #[error("the QEMU command line cannot be understood")]
    Parse(#[from] qemu::ParseError),
    /// The machine cannot be made mirrorable.
    #[error("the VM cannot be made mirrorable")]
    NotMirrorable(#[from] qemu::NotMirrorable),
    /// Its memory size makes no sense.
    #[error("the VM's memory size makes no sense")]
    Size(#[from] qemu::spec::SizeError),
    /// QEMU would not start.
    #[error("QEMU did not start")]
    Launch(#[from] qemu::LaunchError),
    /// The running QEMU cannot be taken in.
    #[error("the running QEMU cannot be adopted")]
    Adopt(#[from] Box<qemu::AdoptError>),
    /// Another machine of this agent is the same process.
    #[error("process {pid} is already here, as VM {name}")]
    AlreadyHere {
        /// The process.
        pid: u32,
        /// Its name here.
        name: VmName,
    },
    /// It was in doubt when it was looked at, and is not any more.
    #[error("VM {0} has settled its hand-over in the meantime")]
    Settled(VmName),
    /// It was handed over and runs at its destination.
    #[error("VM {name} runs on {to}")]
    RunsThere {
        /// The machine.
        name: VmName,
        /// Name of the destination agent.
        to: String,
    },
    /// QEMU does not answer.
    #[error("QEMU does not answer")]
    Qmp(#[from] QmpError),
    /// There is no room for its memory.
    #[error("{0}")]
    NoRoom(Shortage),
    /// A machine of that name has left, and stays in the network here.
    #[error("a VM called {name} runs on {to}, and what comes for it here is forwarded there")]
    Forwarded {
        /// The machine.
        name: VmName,
        /// Name of the agent that has it.
        to: String,
    },
    /// A migration has left an image that it names.
    #[error(
        "{} is what a migration of VM {vm} has left here: it is older than the disk of the VM where that is now, or only a part of it",
        image.display()
    )]
    Stale {
        /// The image.
        image: PathBuf,
        /// Whose it was.
        vm: VmName,
    },
}

/// What became of a machine while the agent was away.
#[derive(Debug)]
pub enum Recovered {
    /// It is this host's, and QEMU is there.
    Running(Box<Vm>),
    /// It has ended, or was a copy that was never complete: nothing is left of it.
    Gone(VmName),
    /// It was given away, or is a complete copy that may not run yet: the source, the destination or a person decides.
    Uncertain(Record),
    /// Its QEMU is there but does not answer.
    Silent(Record, String),
}

/// What a person decided about a machine in doubt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resolution {
    /// It runs here; the person has made sure that it runs nowhere else.
    RunHere,
    /// It does not run here any more; what is here of it is thrown away.
    GiveUp,
}

/// Paths that this agent makes for a machine.
pub(crate) struct Paths {
    pub(crate) qmp: PathBuf,
    pub(crate) pid: PathBuf,
    pub(crate) log: PathBuf,
    pub(crate) device: PathBuf,
    /// A directory for a storage daemon.
    pub(crate) storage: PathBuf,
}

impl Paths {
    pub(crate) fn of(host: &Host, name: &VmName) -> Paths {
        let file = |kind| host.run_dir.join(format!("{name}.{kind}"));
        Paths {
            qmp: file("qmp"),
            pid: file("pid"),
            log: file("log"),
            device: file("device"),
            storage: file("storage"),
        }
    }

    pub(crate) fn all(self) -> Vec<PathBuf> {
        vec![self.qmp, self.pid, self.log, self.device]
    }
}

/// The RAM files that a command line names.
pub(crate) fn ram_files(spec: &Spec) -> Vec<PathBuf> {
    spec.ram_backends().into_iter().filter_map(|backend| backend.mem_path).collect()
}

/// Those of them that are this agent's own; a user's file is never removed with them.
pub(crate) fn own_ram_files(host: &Host, spec: &Spec) -> Vec<PathBuf> {
    let own = |file: &PathBuf| {
        let Some((name, directory)) = file.file_name().zip(file.parent()) else { return false };
        let name = name.as_encoded_bytes();
        // Outside of its own directory an agent puts RAM on hugetlbfs only, and its own name behind the file's.
        let marks = if directory == host.ram_dir { 0 } else { 2 };
        let marked = name.iter().filter(|byte| **byte == b'@').count() >= marks;
        let placed = directory == host.ram_dir || qemu::huge_page_size(directory).is_some();
        name.starts_with(b"vmirror-") && marked && placed
    };
    ram_files(spec).into_iter().filter(own).collect()
}

/// Starts a machine from the user's own command line, made mirrorable. Relative paths are seen from `directory`. With `stale_disks` even
/// from images that a migration has left.
///
/// # Errors
/// [`RunError`]; nothing is left of the attempt then.
pub async fn run(
    host: &Host,
    name: VmName,
    argv: &[String],
    directory: &Path,
    stale_disks: bool,
) -> Result<Vm, RunError> {
    is_not_forwarded(host, &name)?;
    let mut spec = Spec::parse(argv)?;
    spec.make_paths_absolute(directory);
    let left = |(image, ..): (PathBuf, bool, bool)| host.remnants.whose(&image).map(|vm| (image, vm));
    if let Some((image, vm)) = disks::images(&spec).into_iter().find_map(left).filter(|_| !stale_disks) {
        return Err(RunError::Stale { image, vm });
    }
    let paths = Paths::of(host, &name);
    spec.make_mirrorable(&Mirrorable {
        name: name.to_string(),
        host: host.name.clone(),
        ram_dir: host.ram_dir.clone(),
        qmp_socket: paths.qmp.clone(),
        pid_file: Some(paths.pid.clone()),
    })?;
    let memory = spec.memory()?;
    let promising = host.journal.promise().await;
    if let Some(short) = room::shortages(host, &room::demands(&spec)).into_iter().next() {
        return Err(RunError::NoRoom(short));
    }
    let (qmp_socket, log) = (paths.qmp.clone(), paths.log.clone());
    let mut files = paths.all();
    files.extend(own_ram_files(host, &spec));
    let mut record = Record {
        name,
        generation: 0,
        ownership: Ownership::Owner,
        origin: Origin::Run,
        arrived_by: None,
        arrived_from: None,
        outgoing: None,
        post_copy: None,
        supplied: None,
        supplies: false,
        pauses: false,
        resuming: false,
        process: None,
        argv: spec.to_argv(),
        qmp_socket,
        memory,
        handed_in: Vec::new(),
        made: Made { files, ..Made::default() },
    };
    host.journal.claim(record.clone())?;
    drop(promising);
    let launched = async {
        // The name is ours now, so a RAM file of that name is a remnant, and no guest may boot on its content.
        for stale in own_ram_files(host, &spec) {
            let _ = std::fs::remove_file(stale);
        }
        qemu::launch(&spec, &log, Vec::new(), |process| {
            record.process = Some(process.clone());
            Ok(host.journal.update(&record)?)
        })
        .await?;
        Ok(Qmp::connect(&record.qmp_socket).await?)
    };
    match launched.await {
        Ok(qmp) => {
            has_its_disks(host, &spec);
            host.neighbourhood.listen(&record, &spec);
            Ok(Vm { record, spec, qmp })
        }
        Err(e) => {
            forget(host, &record, None).await;
            Err(e)
        }
    }
}

/// Takes in a QEMU that is already running.
///
/// # Errors
/// [`RunError`]; the QEMU was not changed.
pub async fn adopt(host: &Host, name: VmName, qmp_socket: &Path) -> Result<Vm, RunError> {
    if host.journal.get(&name).is_some() {
        return Err(JournalError::NameTaken(name).into());
    }
    is_not_forwarded(host, &name)?;
    let same_socket = |record: &Record| {
        let real = |path: &Path| std::fs::canonicalize(path).ok();
        real(&record.qmp_socket).is_some_and(|known| real(qmp_socket) == Some(known))
    };
    if let Some(other) = host.journal.all().into_iter().find(same_socket) {
        let pid = other.process.as_ref().map_or(0, |process| process.pid);
        return Err(RunError::AlreadyHere { pid, name: other.name });
    }
    let adopted = qemu::adopt(qmp_socket).await.map_err(Box::new)?;
    let same = |record: &Record| {
        record.process.as_ref().is_some_and(|process| {
            process.pid == adopted.vm.process.pid && process.start_time == adopted.vm.process.start_time
        })
    };
    if let Some(other) = host.journal.all().into_iter().find(same) {
        return Err(RunError::AlreadyHere { pid: adopted.vm.process.pid, name: other.name });
    }
    let handed_in = handed_in::to(&adopted.vm.process, &adopted.vm.spec).await;
    let record = Record {
        name,
        generation: 0,
        ownership: Ownership::Owner,
        origin: Origin::Adopted,
        arrived_by: None,
        arrived_from: None,
        outgoing: None,
        post_copy: None,
        supplied: None,
        supplies: false,
        pauses: false,
        resuming: false,
        process: Some(adopted.vm.process),
        argv: adopted.vm.spec.to_argv(),
        qmp_socket: adopted.vm.qmp_socket,
        memory: adopted.vm.spec.memory()?,
        handed_in,
        made: Made::default(),
    };
    host.journal.claim(record.clone())?;
    has_its_disks(host, &adopted.vm.spec);
    host.neighbourhood.listen(&record, &adopted.vm.spec);
    Ok(Vm { record, spec: adopted.vm.spec, qmp: adopted.qmp })
}

/// A name is a machine's for as long as what comes for it is forwarded.
fn is_not_forwarded(host: &Host, name: &VmName) -> Result<(), RunError> {
    match host.forwards.of(name) {
        Some(forward) => Err(RunError::Forwarded { name: name.clone(), to: forward.to }),
        None => Ok(()),
    }
}

/// What disks were mirrored to, and what was shipped to be booted from, is the machine's from here on: nothing removes it or takes it
/// for what a migration has left.
pub(crate) fn own_disks(host: &Host, record: &mut Record) {
    for image in std::mem::take(&mut record.made.images) {
        host.remnants.taken(&image.path);
    }
    record.made.shipped.clear();
}

/// What an earlier machine has left is this one's now, and nobody else's to overwrite.
fn has_its_disks(host: &Host, spec: &Spec) {
    for (path, ..) in disks::images(spec) {
        host.remnants.taken(&path);
    }
}

/// Finds out what became of a machine while the agent was away, and puts right what a crash has left half-done.
///
/// A machine that is this host's and that its own switch-over had paused runs again: the destination was never told to
/// run it, because that is only done after the journal says so.
pub async fn recover(host: &Host, record: Record) -> Recovered {
    // The caller's may be older than what was put on record since: that its memory has become complete, among others.
    let now = host.journal.get(&record.name).filter(|now| same_claim(now, &record));
    let record = now.unwrap_or(record);
    let exists = record.process.as_ref().is_some_and(Process::exists);
    if exists && let Err(why) = crate::destination::post_copy::recover(host, &record).await {
        return Recovered::Silent(record, why);
    }
    match record.ownership {
        // A copy that was complete but whose QEMU is gone has never run and never will.
        Ownership::Incoming { ready, .. } if !ready || !exists => {
            forget(host, &record, None).await;
            return Recovered::Gone(record.name);
        }
        Ownership::Incoming { .. } | Ownership::HandedOver { .. } => return Recovered::Uncertain(record),
        Ownership::Owner => {}
    }
    let presence = match &record.process {
        Some(process) => qemu::find(process).await,
        None => Presence::Gone,
    };
    match presence {
        Presence::Gone if record.resuming => {
            // It became this host's, and nobody knows whether it ran before it was gone: its source may still have it,
            // and only a person can weigh that.
            Recovered::Silent(record, "QEMU has ended, and the VM was not seen to run here".to_owned())
        }
        Presence::Gone => {
            forget(host, &record, None).await;
            Recovered::Gone(record.name)
        }
        Presence::Silent(e) => Recovered::Silent(record, chain(&e)),
        Presence::Alive => match reconnect(host, record.clone()).await {
            Ok(vm) => {
                host.neighbourhood.listen(&vm.record, &vm.spec);
                Recovered::Running(Box::new(vm))
            }
            Err(e) => Recovered::Silent(record, chain(&e)),
        },
    }
}

async fn reconnect(host: &Host, mut record: Record) -> Result<Vm, RunError> {
    let spec = Spec::parse(&record.argv)?;
    if let Some(process) = record.process.as_ref().filter(|_| record.handed_in.is_empty()) {
        // Not on record of an agent that did not look for them.
        record.handed_in = handed_in::to(process, &spec).await;
    }
    let qmp = Qmp::connect(&record.qmp_socket).await?;
    if let Some(tail) = record.arrived_by.and_then(|session| host.post_copies.get(session)) {
        tail.monitor(qmp.clone());
    }
    let status = qmp.status().await?.status;
    let paused_by_us = record.resuming
        || ["finish-migrate", "postmigrate"].contains(&status.as_str())
        || (record.pauses && status == "paused");
    if paused_by_us {
        tracing::warn!(vm = %record.name, status, "resuming a VM that was paused when the agent ended");
        raise_taps(&record).await;
        crate::source::resume_here(&qmp).await?;
        network::turn(host, &record, &qmp);
    } else {
        // A stream that was under way has lost its reader; QEMU ends it by itself, or is told to.
        let _ = qmp.migrate_cancel().await;
    }
    if crate::source::disks::has_jobs(&qmp).await {
        // It is stopped while they are given up.
        record.pauses = true;
        host.journal.update(&record)?;
    }
    match crate::source::disks::clear_after(host, &record.name, &qmp).await {
        Ok(()) => {}
        // It is on record that it is to be resumed.
        Err(Uncleared::Stopped(e)) => return Err(e.into()),
        Err(Uncleared::There(e)) => {
            tracing::error!(vm = %record.name, error = chain(&e), "QEMU keeps a copy job of ours");
        }
    }
    let outgoing = record.outgoing.clone();
    if outgoing.is_some() {
        crate::source::reset_capabilities(&qmp).await;
    }
    if record.resuming || record.pauses || !record.handed_in.is_empty() {
        (record.resuming, record.pauses) = (false, false);
        host.journal.update(&record)?;
    }
    if let Some(outgoing) = outgoing {
        crate::source::abandon(host, &record, outgoing);
    }
    Ok(Vm { record, spec, qmp })
}

/// Ends a machine: asks the guest to power off, or with `force` ends QEMU at once.
///
/// # Errors
/// [`QmpError`] when QEMU cannot be told; the machine then still runs.
pub async fn stop(host: &Host, vm: &Vm, force: bool) -> Result<Stopped, QmpError> {
    let Some(process) = &vm.record.process else {
        forget(host, &vm.record, Some(&vm.qmp)).await;
        return Ok(Stopped::Ended);
    };
    if !force {
        vm.qmp.execute_raw("system_powerdown", serde_json::json!({})).await?;
        if !process.wait_for_end(POWER_OFF).await {
            return Ok(Stopped::StillRuns);
        }
    }
    forget(host, &vm.record, Some(&vm.qmp)).await;
    Ok(Stopped::Ended)
}

/// How [`stop`] ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stopped {
    /// The machine is gone.
    Ended,
    /// The guest did not follow the request to power off.
    StillRuns,
}

/// Carries out what a person decided about a machine in doubt.
///
/// # Errors
/// [`RunError`] when QEMU is not there to be resumed.
pub async fn resolve(host: &Host, record: Record, resolution: Resolution) -> Result<Option<Vm>, RunError> {
    // The person has decided about what they saw; the machine may have settled its fate in the meantime.
    let deciding = host.journal.decide(&record.name).await;
    let Some(record) = host.journal.get(&record.name).filter(|now| same_claim(now, &record)) else {
        return Err(RunError::Settled(record.name));
    };
    match resolution {
        Resolution::GiveUp => {
            forget_decided(host, &record, None).await;
            drop(deciding);
            Ok(None)
        }
        Resolution::RunHere => {
            let mut record = record;
            if let Ownership::HandedOver { session, to, address } = record.ownership.clone() {
                // The person may have looked before the last word from here arrived there. A destination that can be
                // asked gives its copy up first; one that cannot is told as soon as it can.
                let outgoing = Outgoing { session, address };
                match crate::source::withdraw(host, &record, &outgoing).await {
                    Withdrawal::RunsThere => return Err(RunError::RunsThere { name: record.name, to }),
                    Withdrawal::Done => record.outgoing = None,
                    Withdrawal::Unheard => record.outgoing = Some(outgoing),
                }
                host.forwards.undo(session).await;
            }
            record.generation += 1;
            own_disks(host, &mut record);
            record.ownership = Ownership::Owner;
            record.resuming = true;
            host.journal.update(&record)?;
            reconnect(host, record).await.map(Some)
        }
    }
}
