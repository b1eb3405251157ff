//! What a record has to say whatever else is in it.

use std::fmt;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{Departed, Standing, VmName};

/// What is on record of a machine, whatever else that is: whose it is.
pub trait OnRecord: Clone + PartialEq + fmt::Debug + Serialize + DeserializeOwned {
    /// The machine.
    fn name(&self) -> &VmName;

    /// Whose it is.
    fn standing(&self) -> Standing;

    /// Takes on a standing.
    fn stand(&mut self, standing: Standing);

    /// What is remembered of it when it was this host's and goes.
    fn departed(&self) -> Departed;
}
