//! A virtual machine as an agent keeps it: what must survive the agent, and the live connection.

use std::path::PathBuf;

use ownership::{Claim, Departed, OnRecord, Outgoing, Ownership, Standing, Supplied, VmName};
use qemu::spec::render::Place;
use qemu::{Nic, NicKind, Process, Qmp, RamAddresses, Spec};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::handed_in::HandedIn;
use crate::settings::Settings;
use crate::which_file::WhichFile;
use network::interfaces::port::Port;

/// The records of all machines of one agent.
pub type Journal = ownership::Journal<Record>;

/// How the machine came to this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// `vmirror run`.
    Run,
    /// `vmirror adopt`.
    Adopted,
    /// A migration.
    Arrived,
}

/// What this agent has made for the machine on this host, and so removes when the machine leaves.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Made {
    /// RAM files, sockets, pid files.
    pub files: Vec<PathBuf>,
    /// Tap interfaces.
    pub taps: Vec<String>,
    /// Taps of its that stay in the network of the host that it came from.
    #[serde(default)]
    pub forwarded: Vec<Forwarded>,
    /// Images that disks are mirrored to. They are the machine's once it is this host's.
    #[serde(default)]
    pub images: Vec<MadeImage>,
    /// They may have been written to.
    #[serde(default)]
    pub images_written: bool,
    /// Files that it boots from, which were shipped here. They are the machine's once it is this host's.
    #[serde(default)]
    pub shipped: Vec<PathBuf>,
    /// What its QEMU makes when it starts, by its command line, and was not there: a copy that goes takes its sockets along, and files
    /// with nothing in them.
    #[serde(default)]
    pub by_qemu: Vec<PathBuf>,
    /// Sockets that its QEMU has at a place of its own, and where their users look for them.
    #[serde(default)]
    pub places: Vec<Place>,
    /// The process that serves some of the images meanwhile.
    #[serde(default)]
    pub storage_daemon: Option<Process>,
    /// Cgroups, empty but for its QEMU.
    #[serde(default)]
    pub cgroups: Vec<PathBuf>,
    /// The machine's own table in the firewall has been made.
    #[serde(default)]
    pub nft: bool,
    /// Only to find out whether it could come.
    #[serde(default)]
    pub rehearsal: bool,
    /// The operator's hook for what goes has been run.
    #[serde(default)]
    pub hooked_down: bool,
}

impl Made {
    /// The interfaces by which the machine is in the network of the host that it came from.
    pub fn forwarding(&self) -> Vec<String> {
        self.forwarded.iter().flat_map(|tap| [tap.tunnel.clone(), tap.bridge.clone()]).collect()
    }
}

/// A tap that stays in the network of the host that its machine came from: a port of a bridge of its own, which a tunnel leads out of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forwarded {
    /// The tap.
    pub tap: String,
    /// The bridge that it was a port of there: that of this name is its own here, once it is not forwarded any more.
    pub home: String,
    /// Its settings as a port of that.
    pub port: Option<Port>,
    /// The bridge that was made for it here.
    pub bridge: String,
    /// The tunnel.
    pub tunnel: String,
}

/// An image that a disk is mirrored to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MadeImage {
    /// Where.
    pub path: PathBuf,
    /// It is made for the mirror, and was not there before.
    pub fresh: bool,
    /// What it is called until it is complete: nobody else's file is ever called so.
    #[serde(default)]
    pub made_as: Option<PathBuf>,
    /// Which file was made, once it was; what is found at the path is ours only if it is this one. Not on record of earlier versions.
    #[serde(default)]
    pub file: Option<WhichFile>,
}

/// On record none, and one alone, are as earlier versions have them, which knew no more than one.
mod outgoing {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::Outgoing;

    #[derive(Deserialize)]
    #[serde(untagged)]
    enum OnRecord {
        One(Outgoing),
        Several(Vec<Outgoing>),
    }

    pub(super) fn serialize<S: Serializer>(outgoing: &[Outgoing], serializer: S) -> Result<S::Ok, S::Error> {
        match outgoing {
            [] => serializer.serialize_none(),
            [one] => one.serialize(serializer),
            several => several.serialize(serializer),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Outgoing>, D::Error> {
        Ok(match Option::deserialize(deserializer)? {
            None => Vec::new(),
            Some(OnRecord::One(one)) => vec![one],
            Some(OnRecord::Several(several)) => several,
        })
    }
}

/// A machine that runs, or may be run, before its memory is complete.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PostCopy {
    /// The number, inside QEMU, of the descriptor by which it waits for pages.
    pub descriptor: i32,
    /// The file that says what was missing when it began.
    pub missing: PathBuf,
    /// What QEMU was given to make that descriptor from; to be taken back.
    #[serde(default)]
    pub given: Option<GivenDescriptor>,
}

/// A descriptor that QEMU was given over QMP.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GivenDescriptor {
    /// The set that it is in.
    pub set: i64,
    /// Its number inside QEMU.
    pub number: i32,
}

/// Everything about a machine that must survive the agent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The machine.
    pub name: VmName,
    /// Grows by one with every hand-over.
    pub generation: u64,
    /// Which side of a hand-over this host is on.
    pub ownership: Ownership,
    /// How it came here.
    pub origin: Origin,
    /// The migration by which it came, so that its source can be told so again.
    pub arrived_by: Option<Uuid>,
    /// Name of the agent that it came from.
    #[serde(default)]
    pub arrived_from: Option<String>,
    /// Address of that agent's link, where it told one: it can be asked.
    #[serde(default)]
    pub arrived_from_address: Option<String>,
    /// That agent has said that it keeps nothing of the machine.
    #[serde(default)]
    pub released: bool,
    /// The switch-over that this host is the source of, and earlier ones: where copies may wait that are worthless if it is not handed over
    /// by these.
    #[serde(default, with = "outgoing")]
    pub outgoing: Vec<Outgoing>,
    /// A switch-over of ours has begun, and its guest was not seen to run since: found paused by one, it was paused by us.
    #[serde(default)]
    pub switching: bool,
    /// What its QEMU's migration was set to before ours, to be given back if it stays.
    #[serde(default)]
    pub settings: Option<Settings>,
    /// Its memory is not complete here: the rest is still at the host it came from.
    #[serde(default)]
    pub post_copy: Option<PostCopy>,
    /// Its memory was not complete here when it was handed over, and is by now.
    #[serde(default)]
    pub supplied: Option<Supplied>,
    /// It is stopped for moments, at each scan of its memory or when its copy jobs are taken out of QEMU: found paused after a
    /// crash, it was paused by that.
    #[serde(default, alias = "quiesced_scans")]
    pub pauses: bool,
    /// It was handed over before its memory was complete there: the rest is only here.
    #[serde(default)]
    pub supplies: bool,
    /// This host owns it but may not have resumed it yet: a crash fell between the two.
    pub resuming: bool,
    /// Its guest has run here since it came.
    #[serde(default)]
    pub has_run: bool,
    /// The QEMU process; none until it has been launched.
    pub process: Option<Process>,
    /// Its command line.
    pub argv: Vec<String>,
    /// Its QMP socket.
    pub qmp_socket: PathBuf,
    /// Its guest RAM, in bytes.
    pub memory: u64,
    /// Where its QEMU has RAM that is no named file: it was not started here, nor came here.
    #[serde(default, skip_serializing_if = "RamAddresses::is_empty")]
    pub ram: RamAddresses,
    /// Interfaces that its QEMU was given by descriptor.
    #[serde(default)]
    pub handed_in: Vec<HandedIn>,
    /// What to remove when it leaves.
    pub made: Made,
    /// Images of its that were mirrored to where it was handed over: what stays of them here is older than the machine's disks.
    #[serde(default)]
    pub left_behind: Vec<PathBuf>,
}

impl Record {
    /// Of a machine of this name, of which nothing is known yet.
    pub fn new(name: VmName, standing: Standing, origin: Origin) -> Record {
        let mut record = Record {
            name,
            generation: 0,
            ownership: Ownership::Owner,
            origin,
            arrived_by: None,
            arrived_from: None,
            arrived_from_address: None,
            released: false,
            outgoing: Vec::new(),
            switching: false,
            settings: None,
            post_copy: None,
            supplied: None,
            pauses: false,
            supplies: false,
            resuming: false,
            has_run: false,
            process: None,
            argv: Vec::new(),
            qmp_socket: PathBuf::new(),
            memory: 0,
            ram: RamAddresses::new(),
            handed_in: Vec::new(),
            made: Made::default(),
            left_behind: Vec::new(),
        };
        record.stand(standing);
        record
    }

    /// What it is taken for.
    #[must_use]
    pub fn claim(&self) -> Claim {
        Claim::of(&self.name, &self.standing())
    }

    /// Whether its QEMU, when it is handed over, saves its devices alone: no migration by QEMU is ours then, and what has stopped is only
    /// `paused`.
    #[must_use]
    pub fn saves_devices_alone(&self) -> bool {
        !self.ram.is_empty() && self.settings.is_none()
    }

    /// Whether its guest may stand still by our doing, by a switch-over, a scan of its memory or the end of a copy job, or was to be let run
    /// and was not seen to: it is this host's and is let run where it is found so.
    #[must_use]
    pub fn may_stand_still(&self) -> bool {
        self.switching || self.resuming || self.pauses
    }

    /// The name of the tap interface of one of the machine's network back ends, if it is on one, and that has a name.
    pub fn interface(&self, nic: &Nic) -> Option<String> {
        let NicKind::Tap { ifname, .. } = &nic.kind else { return None };
        ifname.clone().or_else(|| self.handed_in(nic).map(|handed_in| handed_in.ifname.clone()))
    }

    /// Whether that is a macvtap.
    pub fn has_macvtap(&self, nic: &Nic) -> bool {
        self.handed_in(nic).is_some_and(|handed_in| handed_in.macvtap.is_some())
    }

    fn handed_in(&self, nic: &Nic) -> Option<&HandedIn> {
        self.handed_in.iter().find(|handed_in| handed_in.netdev == nic.netdev)
    }
}

impl OnRecord for Record {
    fn name(&self) -> &VmName {
        &self.name
    }

    fn standing(&self) -> Standing {
        Standing {
            generation: self.generation,
            ownership: self.ownership.clone(),
            arrived_by: self.arrived_by,
            arrived_from: self.arrived_from.clone(),
            outgoing: self.outgoing.clone(),
            switching: self.switching,
            resuming: self.resuming,
            // Not on record of earlier versions; what has never come from elsewhere was started here.
            has_run: self.has_run || self.arrived_by.is_none(),
            supplies: self.supplies,
            released: self.released,
        }
    }

    fn stand(&mut self, standing: Standing) {
        let Standing {
            generation,
            ownership,
            arrived_by,
            arrived_from,
            outgoing,
            switching,
            resuming,
            has_run,
            supplies,
            released,
        } = standing;
        self.generation = generation;
        self.ownership = ownership;
        self.arrived_by = arrived_by;
        self.arrived_from = arrived_from;
        self.outgoing = outgoing;
        self.switching = switching;
        self.resuming = resuming;
        self.has_run = has_run;
        self.supplies = supplies;
        self.released = released;
    }

    fn departed(&self) -> Departed {
        Departed { lacked: self.post_copy.is_some(), supplied: self.supplied }
    }
}

/// A machine that this host owns, with a live connection to its QEMU.
#[derive(Debug, Clone)]
pub struct Vm {
    /// What is on disk about it.
    pub record: Record,
    /// Its command line, understood.
    pub spec: Spec,
    /// The connection.
    pub qmp: Qmp,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(name: &str) -> Record {
        Record::new(name.parse().unwrap(), Standing::own(), Origin::Run)
    }

    #[test]
    fn copies_left_elsewhere_are_read_as_earlier_versions_have_written_them() {
        let outgoing = |number: u128| Outgoing {
            session: Uuid::from_u128(number),
            to: Some(format!("host-{number}")),
            address: "b:1".into(),
        };
        let on_record = |outgoing: Vec<Outgoing>| {
            serde_json::to_value(Record { outgoing, ..record("a") }).unwrap()["outgoing"].clone()
        };
        // None and one are what they were; these have no other form, so an earlier version reads them too.
        assert_eq!(on_record(Vec::new()), serde_json::Value::Null);
        assert_eq!(on_record(vec![outgoing(1)]), serde_json::to_value(outgoing(1)).unwrap());
        for several in [vec![], vec![outgoing(1)], vec![outgoing(1), outgoing(2)]] {
            let mut json = serde_json::to_value(Record { outgoing: several.clone(), ..record("a") }).unwrap();
            json.as_object_mut().unwrap().remove("has_run");
            let read: Record = serde_json::from_value(json).unwrap();
            assert_eq!((read.outgoing, read.has_run), (several, false));
        }
        let mut json = serde_json::to_value(record("a")).unwrap();
        json.as_object_mut().unwrap().remove("outgoing");
        assert_eq!(serde_json::from_value::<Record>(json).unwrap().outgoing, []);
    }
}
