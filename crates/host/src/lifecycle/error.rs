//! Why a machine is not run here.

use std::path::PathBuf;

use qemu::QmpError;

use crate::paths::NameTooLong;
use crate::room::Shortage;
use ownership::{JournalError, VmName};

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
    /// Somebody else has migrated it away.
    #[error("VM {0} was migrated by another program (QEMU says postmigrate): it may run elsewhere")]
    MigratedByOthers(VmName),
    /// It was to be handed over, and nothing is on record of that: the record is older than what became of the machine.
    #[error(
        "the guest of VM {0} is paused, and was to be handed over to another host, which its record does not say: it may run there"
    )]
    Leaving(VmName),
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

/// Where a machine has left for, as the end of that sentence.
#[must_use]
pub fn for_where(to: Option<&str>) -> String {
    to.map_or_else(|| ", nobody knows where to".to_owned(), |to| format!(" for {to}"))
}
