//! What is asked of a migration, how it goes, and what came of it.
//!
//! * [`options`] and [`rate`] are what an operator asks for.
//! * A [`Session`] is a migration under way, as the agent of its source has it: it takes [`Command`]s and shows its [`progress`]. At [`points`] of
//!   it a test can hold it.
//! * [`report`] is what it leaves, and [`Readiness`] what a rehearsal does. Their JSON is the contract with scripts.
//!
//! How all that is done is not known here.

mod handle;
pub mod options;
pub mod points;
pub mod progress;
pub mod rate;
mod readiness;
pub mod report;

pub use handle::{Command, Conductor, Ended, Session};
pub use options::{Compress, DiskRoom, Disks, Engine, Goal, OnDiverge, OptionError, Options, Verify};
pub use progress::{DiskProgress, Progress};
pub use readiness::{PlannedDisk, Readiness};
pub use report::{Outcome, Phase, Report};
