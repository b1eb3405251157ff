//! Machines that do not end.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use finding::Finding;
use ownership::VmName;

/// Machines of which a process may run on, though they were to be forgotten. Clones are handles to the same.
#[derive(Debug, Clone, Default)]
pub struct Lingering(Arc<Mutex<HashMap<VmName, Finding>>>);

impl Lingering {
    /// Why a machine lingers, if it does.
    #[must_use]
    pub fn why(&self, name: &VmName) -> Option<Finding> {
        self.lock().get(name).cloned()
    }

    /// Notes what came of an attempt to end a machine: it lingers for that reason, or does not any more.
    pub fn note(&self, name: &VmName, ended: &Result<(), Finding>) {
        match ended {
            Ok(()) => drop(self.lock().remove(name)),
            Err(why) => drop(self.lock().insert(name.clone(), why.clone())),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<VmName, Finding>> {
        // Every change is one step.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
