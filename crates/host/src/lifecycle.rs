//! A machine's life on one host: started, adopted, stopped, let go of, forgotten.

mod disown;
mod forget;
mod in_use;
mod paths;
mod ran;
mod start;
mod taps;

use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::time::Duration;

use qemu::{QmpError, User};

use crate::host::Host;
use crate::room::Shortage;
use crate::vm::{Record, Vm};
use finding::Finding;
use ownership::JournalError;
use ownership::VmName;

pub use disown::{DisownError, disown};
pub use forget::forget_decided;
pub use forget::{Forgotten, Lingering, forget, forget_incomplete};
pub use forget::{ended, session_over};
pub use paths::{LONGEST_SOCKET_PATH, NameTooLong, longest_name};
pub use paths::{Paths, fits};
pub use ran::{NEVER_RAN, Ran, has_run, may_never_have_run, may_run_here, runs_here};
pub use start::{adopt, run};
pub use taps::raise_taps;

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
    /// Its name is too long for its sockets.
    #[error(transparent)]
    NameTooLong(#[from] NameTooLong),
    /// Its memory size makes no sense.
    #[error("the VM's memory size makes no sense")]
    Size(#[from] qemu::spec::SizeError),
    /// There is no file for its memory that is nobody else's.
    #[error(transparent)]
    RamFile(#[from] qemu::RamFileError),
    /// Its memory cannot be found.
    #[error("its memory cannot be found")]
    Ram(#[from] qemu::RamError),
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
    /// The agent that it was handed over to answers, and knows nothing of it.
    #[error(
        "{to} knows nothing of VM {name}: its state directory may have been lost, and the VM may run there"
    )]
    UnknownThere {
        /// The machine.
        name: VmName,
        /// Name of the destination agent.
        to: String,
    },
    /// The agent that it comes from says that it is its own.
    #[error("{from} says that VM {name} is its own: what is here is a copy that is worth nothing")]
    OwnedThere {
        /// The machine.
        name: VmName,
        /// Name of the source agent.
        from: String,
    },
    /// The other agent of its hand-over could not be asked.
    #[error("{peer} cannot be asked what it has of VM {name}")]
    Unheard {
        /// The machine.
        name: VmName,
        /// Name of that agent.
        peer: String,
    },
    /// It never ran at its destination, and never will: it is this host's again.
    #[error("{to} has no copy of VM {name} and never ran it: the VM is this host's again, and runs on here")]
    CopyLost {
        /// The machine.
        name: VmName,
        /// Name of the destination agent.
        to: String,
    },
    /// The journal may say either that it is this host's or that it was handed over.
    #[error("what becomes of VM {name} cannot be put on record: {why}")]
    Unsettled {
        /// The machine.
        name: VmName,
        /// What the journal says.
        why: String,
    },
    /// It was not seen to run here, and does.
    #[error("VM {0} runs here")]
    RunsHere(VmName),
    /// It was not seen to run here, and its QEMU cannot be asked.
    #[error("VM {name} may run here: {why}")]
    MayRunHere {
        /// The machine.
        name: VmName,
        /// Why it cannot be told.
        why: String,
    },
    /// Its destination lacks memory that is only here.
    #[error("VM {0} runs at its destination and lacks memory that is only here")]
    Supplies(VmName),
    /// Somebody else has migrated it away.
    #[error("VM {0} was migrated by another program (QEMU says postmigrate): it may run elsewhere")]
    MigratedByOthers(VmName),
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
    /// A process of it does not end, or nobody can tell whether it has.
    #[error("{}", .0.message)]
    Lingers(Finding),
    /// An image that it names is kept locked.
    #[error(
        "{} is an image of VM {vm}, which has left{}: it is kept locked here, so that the VM is not started twice",
        image.display(),
        for_where(to.as_deref())
    )]
    Kept {
        /// The image.
        image: PathBuf,
        /// Whose it is.
        vm: VmName,
        /// Name of the agent that has that VM, if that is known.
        to: Option<String>,
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

/// Makes, or finds, a machine's own directory: the one place where its QEMU, which may run as another user, and the agent meet at
/// sockets of either. Nobody else may enter it.
pub fn meet(host: &Host, record: &Record) -> std::io::Result<()> {
    let own = Paths::of(host, &record.name).own;
    match std::fs::DirBuilder::new().mode(0o700).create(&own) {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => return Err(e),
        _ => {}
    }
    let Some(process) = &record.process else { return Ok(()) };
    let user = User::of_process(process.pid)?;
    if user.uid() == std::fs::symlink_metadata(&own)?.uid() {
        return Ok(());
    }
    user.give(&own)?;
    // It is beside those of other machines.
    let passed = std::fs::Permissions::from_mode(0o711);
    if user.is_ours() { Ok(()) } else { std::fs::set_permissions(&host.run_dir, passed) }
}

/// Removes a machine's own directory, if there is nothing in it.
pub fn part(host: &Host, name: &VmName) {
    let _ = std::fs::remove_dir(Paths::of(host, name).own);
}

/// Where a machine has left for, as the end of that sentence.
#[must_use]
pub fn for_where(to: Option<&str>) -> String {
    to.map_or_else(|| ", nobody knows where to".to_owned(), |to| format!(" for {to}"))
}

/// What disks were mirrored to is the machine's from here on: nothing removes it or takes it for what a migration has left.
pub fn own_disks(host: &Host, record: &Record) {
    host.left.no_remnants(record.made.images.iter().map(|image| image.path.as_path()));
}

/// The same on record, with what was shipped to be booted from.
pub fn has_own_disks(record: &mut Record) {
    record.made.images.clear();
    record.made.shipped.clear();
}

/// Ends a machine: asks the guest to power off, or with `force` ends QEMU at once.
///
/// # Errors
/// [`QmpError`] when QEMU cannot be told; the machine then still runs.
pub async fn stop(host: &Host, vm: &Vm, force: bool) -> Result<Stopped, QmpError> {
    if let Some(process) = vm.record.process.as_ref().filter(|_| !force) {
        vm.qmp.execute_raw("system_powerdown", serde_json::json!({})).await?;
        if !process.wait_for_end(POWER_OFF).await {
            return Ok(Stopped::StillRuns);
        }
    }
    Ok(match forget(host, &vm.record, Some(&vm.qmp)).await {
        Forgotten::Done | Forgotten::Changed => Stopped::Ended,
        Forgotten::Lingers(why) => Stopped::Lingers(why),
    })
}

/// How [`stop`] ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stopped {
    /// The machine is gone.
    Ended,
    /// The guest did not follow the request to power off.
    StillRuns,
    /// A process of it does not end, or nobody can tell whether it has.
    Lingers(Finding),
}
