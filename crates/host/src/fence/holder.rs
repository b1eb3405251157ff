//! Who holds locks, as it is on record.

use std::path::PathBuf;

use ownership::VmName;
use qemu::Process;
use serde::{Deserialize, Serialize};

/// A process that holds locks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Holder {
    pub(super) vm: VmName,
    pub(super) process: Process,
    /// Of these images.
    pub(super) images: Vec<PathBuf>,
}
