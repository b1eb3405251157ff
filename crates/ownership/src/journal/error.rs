//! Why the journal could not be read or written.

use std::io;
use std::path::PathBuf;

use super::slots;
use crate::VmName;

/// Why the journal could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JournalError {
    /// Another machine has the name.
    #[error("a VM named {0} is already here")]
    NameTaken(VmName),
    /// No machine has the name.
    #[error("no VM named {0} is here")]
    Unknown(VmName),
    /// The machine is not any more what it is taken for.
    #[error("VM {0} is not what it was: its hand-over was settled, or it was forgotten, in the meantime")]
    Changed(VmName),
    /// There is a record of that name that nothing is known of.
    #[error("what is on record of VM {0} cannot be read")]
    Unreadable(VmName),
    /// A record that does not fit a slot.
    #[error("the record of VM {name} has {length} bytes, more than the {} that a journal holds", slots::SLOT)]
    TooLarge {
        /// The machine.
        name: VmName,
        /// Bytes of its record.
        length: usize,
    },
    /// No slot holds a record.
    #[error("{} holds no readable record", .0.display())]
    Corrupt(PathBuf),
    /// The newest record is whole, and of a later version.
    #[error("{} was written by a later version", path.display())]
    NotUnderstood {
        /// The file.
        path: PathBuf,
        /// What is not understood; nothing where not even the format is.
        #[source]
        source: Option<serde_json::Error>,
    },
    /// The system refused.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}
