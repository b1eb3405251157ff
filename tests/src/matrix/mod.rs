//! Faults as a matrix: every fault, at every point of a migration, in both directions. After each it is judged who runs, whether the
//! guest has lost anything, and what is left over.
//!
//! A [`Cell`] says what is done, and with a seed a [`Strike`] says it exactly. A [`Lane`] is a pair of hosts and a guest that goes from
//! cell to cell for as long as it lives, and gives a [`Run`] for each. [`Results`] keeps them, so that a matrix that was interrupted goes on
//! where it was, and writes the table.

mod cell;
mod chance;
mod judge;
mod lane;
mod results;
mod side;
mod strike;
mod trial;
mod watch;
mod work;

pub use cell::{Cell, Direction, Fault, Kind, Role, points};
pub use chance::Chance;
pub use judge::{Outcome, Run};
pub use lane::Lane;
pub use results::Results;
pub use side::Side;
pub use strike::Strike;
pub use watch::Watch;
pub use work::work;
