//! A record with no more in it than tests of the journal look at.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{Departed, OnRecord, Outgoing, Ownership, Standing, Supplied, VmName};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Plain {
    pub(crate) name: VmName,
    pub(crate) generation: u64,
    pub(crate) ownership: Ownership,
    pub(crate) arrived_by: Option<Uuid>,
    pub(crate) outgoing: Vec<Outgoing>,
    pub(crate) switching: bool,
    pub(crate) released: bool,
    pub(crate) lacks: bool,
    pub(crate) supplied: Option<Supplied>,
    pub(crate) memory: u64,
    pub(crate) content: Vec<String>,
}

impl Plain {
    pub(crate) fn new(name: VmName) -> Plain {
        Plain {
            name,
            generation: 0,
            ownership: Ownership::Owner,
            arrived_by: None,
            outgoing: Vec::new(),
            switching: false,
            released: false,
            lacks: false,
            supplied: None,
            memory: 5,
            content: Vec::new(),
        }
    }
}

impl OnRecord for Plain {
    fn name(&self) -> &VmName {
        &self.name
    }

    fn standing(&self) -> Standing {
        Standing {
            generation: self.generation,
            ownership: self.ownership.clone(),
            arrived_by: self.arrived_by,
            outgoing: self.outgoing.clone(),
            switching: self.switching,
            released: self.released,
            ..Standing::own()
        }
    }

    fn stand(&mut self, standing: Standing) {
        self.generation = standing.generation;
        self.ownership = standing.ownership;
        self.arrived_by = standing.arrived_by;
        self.outgoing = standing.outgoing;
        self.switching = standing.switching;
        self.released = standing.released;
    }

    fn departed(&self) -> Departed {
        Departed { lacked: self.lacks, supplied: self.supplied }
    }
}
