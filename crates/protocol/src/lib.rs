//! What two agents say to each other about a migration.
//!
//! [`wire`] are the messages, by what they are called, and held against limits where they come in; [`deadlines`] is how long either side waits
//! for the other. `docs/protocol.md` says in which order they are said. What is done about them is the controllers'.

pub mod deadlines;
pub mod wire;
