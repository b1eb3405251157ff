//! The rest of a machine's memory, where the machine runs here before all of it has come. What brings it is above this crate; it is asked,
//! and told, when such a machine is forgotten.

use std::fmt::Debug;

use ownership::Supplied;
use uuid::Uuid;

/// What brings the rest of the memory of machines here, each by the migration that the machine came by.
pub trait PostCopyMemory: Debug + Send + Sync {
    /// How the guest has fared, if it lacks nothing any more. None also where it never lacked anything.
    fn supplied(&self, session: Uuid) -> Option<Supplied>;

    /// Its machine has gone: nothing more is brought.
    fn end(&self, session: Uuid);
}
