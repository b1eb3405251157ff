//! A virtual machine as an agent keeps it: what must survive the agent, and the live connection.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use qemu::spec::render::Place;
use qemu::{Nic, NicKind, Process, Qmp, Spec};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::handed_in::HandedIn;
use crate::ownership::Standing;
use crate::settings::Settings;
use crate::which_file::WhichFile;
use network::interfaces::port::Port;

/// The name of a virtual machine: 1 to 48 of `a-z A-Z 0-9 . _ -`, beginning with a letter or digit.
/// It becomes part of file names, so nothing else is let in.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VmName(String);

/// A name that cannot be a machine's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} cannot name a VM: use 1 to 48 letters, digits, '.', '_' or '-', beginning with a letter or digit"
)]
pub struct BadName(pub String);

impl VmName {
    /// Most letters of one.
    pub const LONGEST: usize = 48;
}

impl TryFrom<String> for VmName {
    type Error = BadName;
    fn try_from(name: String) -> Result<VmName, BadName> {
        let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        let begins = name.starts_with(|c: char| c.is_ascii_alphanumeric());
        if begins && name.len() <= VmName::LONGEST && name.chars().all(fits) {
            Ok(VmName(name))
        } else {
            Err(BadName(name))
        }
    }
}

impl FromStr for VmName {
    type Err = BadName;
    fn from_str(name: &str) -> Result<VmName, BadName> {
        VmName::try_from(name.to_owned())
    }
}

impl From<VmName> for String {
    fn from(name: VmName) -> String {
        name.0
    }
}

impl fmt::Display for VmName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl AsRef<str> for VmName {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

/// Which side of a hand-over this host is on. The number beside it in [`Record`] makes a stale side powerless.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ownership {
    /// The machine is this host's.
    Owner,
    /// This host holds a copy that may not run until the source commits.
    Incoming {
        /// The migration.
        session: Uuid,
        /// Name of the source agent.
        from: String,
        /// The copy is complete and paused; from here on only the source or a person decides.
        ready: bool,
    },
    /// This host has given the machine away and never resumes it by itself.
    HandedOver {
        /// The migration.
        session: Uuid,
        /// Name of the destination agent.
        to: String,
        /// Its address.
        address: String,
        /// Identity of the state directory of the agent there, whose word on the copy counts; not on record of earlier versions, and
        /// not told by them.
        #[serde(default)]
        keeper: Option<Uuid>,
    },
}

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

/// A tap that stays in the network of the host that its machine came from: a port of a bridge of its own, which a tunnel leads out of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forwarded {
    /// The tap.
    pub tap: String,
    /// The bridge that it was a port of there: that of this name is its own here, once it is not forwarded any more.
    pub home: String,
    /// Its settings as a port of that.
    pub(crate) port: Option<Port>,
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

/// A switch-over under way.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Outgoing {
    /// The migration.
    pub session: Uuid,
    /// Name of the destination's agent; not on record of earlier versions.
    #[serde(default)]
    pub to: Option<String>,
    /// Address of the destination's agent.
    pub address: String,
}

impl Outgoing {
    /// The agent there: by its name, or where it is.
    pub(crate) fn whose(&self) -> &str {
        self.to.as_ref().unwrap_or(&self.address)
    }
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

/// How it went for a machine until it lacked nothing any more.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Supplied {
    /// Pages that the guest had to wait for.
    pub faults: u64,
    /// Its longest wait, in microseconds.
    pub longest_us: u64,
    /// All its waits together, in microseconds.
    pub total_us: u64,
    /// An agent that ended has not told its part of them.
    pub taken_over: bool,
}

/// What is remembered of a machine that was this host's, beyond its record.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Departed {
    /// It ended while it lacked memory.
    #[serde(default)]
    pub lacked: bool,
    /// Its memory came after the hand-over, all of it.
    #[serde(default)]
    pub supplied: Option<Supplied>,
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
    pub(crate) fn new(name: VmName, standing: Standing, origin: Origin) -> Record {
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
            handed_in: Vec::new(),
            made: Made::default(),
            left_behind: Vec::new(),
        };
        record.stand(standing);
        record
    }

    /// Whether its guest may stand still by our doing, by a switch-over, a scan of its memory or the end of a copy job, or was to be let run
    /// and was not seen to: it is this host's and is let run where it is found so.
    #[must_use]
    pub fn may_stand_still(&self) -> bool {
        self.switching || self.resuming || self.pauses
    }

    /// The name of the tap interface of one of the machine's network back ends, if it is on one, and that has a name.
    pub(crate) fn interface(&self, nic: &Nic) -> Option<String> {
        let NicKind::Tap { ifname, .. } = &nic.kind else { return None };
        ifname.clone().or_else(|| self.handed_in(nic).map(|handed_in| handed_in.ifname.clone()))
    }

    /// Whether that is a macvtap.
    pub(crate) fn has_macvtap(&self, nic: &Nic) -> bool {
        self.handed_in(nic).is_some_and(|handed_in| handed_in.macvtap.is_some())
    }

    fn handed_in(&self, nic: &Nic) -> Option<&HandedIn> {
        self.handed_in.iter().find(|handed_in| handed_in.netdev == nic.netdev)
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

    #[test]
    fn names_that_could_leave_the_directory_are_refused() {
        for bad in ["", ".", "..", "../x", "a/b", "-rf", ".hidden", "a b", "ä", &"x".repeat(49)] {
            assert_eq!(VmName::from_str(bad), Err(BadName(bad.to_owned())), "{bad:?}");
        }
        for good in ["web1", "a.b-c_d", "0", &"x".repeat(48)] {
            assert_eq!(VmName::from_str(good).unwrap().to_string(), *good);
        }
    }
}
