//! What crosses the API, in both directions: shared with every client.
//!
//! Requests refuse fields they do not know, so that a misspelt option is never an ignored one. Answers may
//! grow; a client ignores what it does not know. Times are milliseconds, sizes bytes.

use std::fmt;
use std::num::NonZeroU64;
use std::path::PathBuf;

use finding::{Failure, Finding};
use host::Origin;
use ownership::VmName;
use serde::{Deserialize, Serialize};
use session::PlannedDisk;
use session::{Goal, Options, Outcome, Phase, Progress, Report};
use uuid::Uuid;

/// `GET /v1/agent`: who answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentInfo {
    /// The agent's name, as in its certificate.
    pub name: String,
    /// The version of the program.
    pub version: String,
    /// Where its link listens.
    pub link: String,
    /// When it started, in milliseconds since 1970-01-01 UTC.
    pub started_unix_ms: u64,
    /// How many machines it keeps.
    pub vms: usize,
    /// How many of them it still looks for since it has started.
    #[serde(default)]
    pub recovering: usize,
    /// How many migrations it is the source of now.
    pub sessions: usize,
    /// What it does without, and what to do about that.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<Finding>,
}

/// What a machine does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmState {
    /// Its virtual CPUs run.
    Running,
    /// They do not, and nobody is at fault.
    Paused,
    /// The guest's own kernel gave up.
    Panicked,
    /// QEMU stopped it for an error of its own or of its storage.
    Broken,
    /// It is being started or taken in.
    Starting,
    /// The agent has just started, and still looks for its QEMU.
    Recovering,
    /// Its record cannot be read.
    Unreadable,
    /// In the middle of a hand-over whose end is not known: it does not run here.
    Uncertain,
    /// QEMU does not answer.
    Unreachable,
    /// It has left, and what comes for it here is forwarded to where it runs.
    Forwarded,
    /// It has left, and its images here are kept locked.
    Left,
}

impl VmState {
    /// The state's name in lists and messages.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            VmState::Running => "running",
            VmState::Paused => "paused",
            VmState::Panicked => "panicked",
            VmState::Broken => "broken",
            VmState::Starting => "starting",
            VmState::Recovering => "recovering",
            VmState::Unreadable => "unreadable",
            VmState::Uncertain => "uncertain",
            VmState::Unreachable => "unreachable",
            VmState::Forwarded => "forwarded",
            VmState::Left => "left",
        }
    }
}

/// One machine. `GET /v1/vms` answers with a list of them, `GET /v1/vms/{name}` with one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VmView {
    /// Its name.
    pub name: String,
    /// What it does.
    pub state: VmState,
    /// QEMU's own word for that, where it answers.
    pub qemu_status: Option<String>,
    /// How it came to this host.
    pub origin: Origin,
    /// Grows by one with every hand-over.
    pub generation: u64,
    /// Process id of its QEMU.
    pub pid: Option<u32>,
    /// Guest RAM, in bytes.
    pub memory: u64,
    /// Its QMP socket.
    pub qmp_socket: PathBuf,
    /// Its command line.
    pub argv: Vec<String>,
    /// Files made for it here, removed when it leaves.
    pub files: Vec<PathBuf>,
    /// What its QEMU writes, and its guest on a console that is QEMU's; none of a machine that was started elsewhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log: Option<PathBuf>,
    /// Tap interfaces made for it here, removed when it leaves.
    pub taps: Vec<String>,
    /// The migration it is in.
    pub session: Option<Progress>,
    /// Why nobody knows whether it should run here.
    pub doubt: Option<Doubt>,
    /// Why nothing can be done to it at present, and what to do about that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<Finding>,
    /// What is not as it should be though it runs, or would keep it from moving, and what to do about that. Only told of one machine, not in a list.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<Finding>,
    /// Where what comes for it here is forwarded to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forward: Option<ForwardView>,
    /// Name of the agent in whose network it is, where that is not this host's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network_of: Option<String>,
    /// Images of its that are kept locked here, as it has left.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept: Option<KeptView>,
}

/// What is kept here of a machine that has left.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptView {
    /// Name of the agent that it was handed over to; none where no record says so any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
    /// Since when, in milliseconds since 1970-01-01 UTC.
    pub since_unix_ms: u64,
    /// Its images.
    pub images: Vec<KeptImageView>,
}

/// An image that is kept locked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptImageView {
    /// Where it is.
    pub path: PathBuf,
    /// Why it is not kept from others as it should be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// `POST /v1/vms/{name}/forget-images`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ForgetImagesRequest {
    /// Although something was found that may start the machine from them.
    #[serde(default)]
    pub force: bool,
}

/// `POST /v1/vms/{name}/forget-images`: what is not kept any more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForgetImagesReply {
    /// The machine.
    pub vm: String,
    /// Its images, which anybody may open from here on.
    pub images: Vec<PathBuf>,
}

/// A machine that has left, and stays in the network here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForwardView {
    /// Name of the agent that has it.
    pub to: String,
    /// Address of that agent.
    pub address: String,
    /// Since when, in milliseconds since 1970-01-01 UTC.
    pub since_unix_ms: u64,
}

/// A hand-over whose end is not known.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum Doubt {
    /// It was given away, and there is no word whether it runs there.
    HandedOver {
        /// The migration.
        session: Uuid,
        /// Name of the destination agent.
        to: String,
        /// Its address.
        address: String,
    },
    /// A complete copy of it is here, and there is no word whether it may run.
    Received {
        /// The migration.
        session: Uuid,
        /// Name of the source agent.
        from: String,
    },
    /// The journal could not be written at the hand-over: the VM is paused until it can.
    Journal,
}

impl Doubt {
    /// The other agent, where there is one that can be asked.
    #[must_use]
    pub fn peer(&self) -> Option<&str> {
        match self {
            Doubt::HandedOver { to, .. } => Some(to),
            Doubt::Received { from, .. } => Some(from),
            Doubt::Journal => None,
        }
    }
}

impl fmt::Display for Doubt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Doubt::HandedOver { to, address, .. } => {
                write!(f, "handed over to {to} at {address}, and there is no word whether it runs there")
            }
            Doubt::Received { from, .. } => {
                write!(f, "received in full from {from}, and there is no word whether it may run here")
            }
            Doubt::Journal => f.write_str("paused, as the journal cannot say whose it is"),
        }
    }
}

/// `POST /v1/vms/{name}/release`: it is in the network of the host that it is on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReleaseRequest {
    /// On this host only, if the other cannot be told.
    #[serde(default)]
    pub force: bool,
}

/// Its answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReleaseReply {
    /// The machine.
    pub vm: String,
    /// Name of the other agent, where that has not been told.
    pub untold: Option<String>,
}

/// `POST /v1/vms`: start a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunRequest {
    /// Its name.
    pub name: VmName,
    /// Its QEMU command line, the program first.
    pub argv: Vec<String>,
    /// The directory that relative paths in it are seen from.
    pub directory: PathBuf,
    /// Start it even from images that a migration has left here.
    #[serde(default)]
    pub stale_disks: bool,
}

/// `POST /v1/vms/{name}/adopt`: take in a QEMU that runs already.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdoptRequest {
    /// Its QMP socket, absolute.
    pub qmp: PathBuf,
}

/// `POST /v1/vms/{name}/stop`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StopRequest {
    /// End QEMU instead of asking the guest to power off.
    #[serde(default)]
    pub force: bool,
}

/// `POST /v1/vms/{name}/migrate`, `…/mirror` and `…/check`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigrateRequest {
    /// The destination agent's link, `HOST:PORT`.
    pub to: String,
    /// How to go about it.
    #[serde(default)]
    pub options: Options,
}

/// Answer of `check`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckReply {
    /// The machine.
    pub vm: String,
    /// The destination agent's name.
    pub destination: String,
    /// Every reason why a migration would fail; none means that it would be begun.
    pub findings: Vec<Finding>,
    /// What would become of its disks; empty where something stands in the way.
    #[serde(default)]
    pub disks: Vec<PlannedDisk>,
    /// What is not as it should be, though it keeps no migration from being begun.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<Finding>,
}

/// Answer of `migrate`, `mirror`, `switch`, `bandwidth` and `cancel`: the session that was begun or spoken to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionRef {
    /// Its identity.
    pub id: Uuid,
}

/// `POST /v1/vms/{name}/bandwidth`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BandwidthRequest {
    /// Limit of all data streams together, in bytes per second; `null` is unlimited.
    pub bandwidth: Option<NonZeroU64>,
    /// Where the machine must be on its way to, `HOST:PORT` as the migration was given it; left out, anywhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
    /// What must be under way, a migration or a standing mirror; left out, either.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub goal: Option<session::Goal>,
}

/// `POST /v1/vms/{name}/resolve`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResolveRequest {
    /// What a person has found out.
    pub decision: Decision,
    /// Run it here even if the other agent says that it is its own, or knows nothing of it.
    #[serde(default)]
    pub force: bool,
}

/// Its answer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
// An agent that runs since before there were images to tell of answers nothing.
#[serde(default)]
pub struct ResolveReply {
    /// The machine.
    pub vm: String,
    /// Images here of a complete copy that was given up: they stay until somebody removes them.
    pub images: Vec<PathBuf>,
}

/// What a person decides about a machine whose hand-over is uncertain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Decision {
    /// It does not run at the destination and never will: resume it here.
    RunHere,
    /// It runs at the destination: remove what is left of it here.
    GiveUp,
}

/// `GET /v1/sessions/{id}`: one migration, under way or ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "state")]
pub enum SessionView {
    /// Under way.
    Active {
        /// Where it is.
        progress: Box<Progress>,
    },
    /// Ended.
    Ended {
        /// What came of it.
        report: Box<Report>,
    },
}

/// One message of `GET /v1/sessions/{id}/events`: any number of `progress`, then one `report`, then the end.
/// The SSE event's name is the variant, its data the content.
#[derive(Debug, Clone, PartialEq)]
pub enum SessionEvent {
    /// Where it is now.
    Progress(Box<Progress>),
    /// It has ended, and the history has it.
    Report(Box<Report>),
}

/// One line of `GET /v1/history`, newest first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HistoryEntry {
    /// Identity of the migration.
    pub id: String,
    /// Name of the machine.
    pub vm: String,
    /// Name of the source agent.
    pub source: String,
    /// Name of the destination agent.
    pub destination: String,
    /// When it began, in milliseconds since 1970-01-01 UTC.
    pub started_unix_ms: u64,
    /// How it ended.
    pub outcome: Outcome,
    /// Why it did not complete.
    pub error: Option<String>,
    /// Total time, in milliseconds.
    pub total_ms: f64,
    /// Downtime, in milliseconds.
    pub downtime_ms: f64,
    /// Bytes written to the data streams, for memory and disks.
    pub wire_bytes: u64,
}

impl HistoryEntry {
    /// Why it ended, if it did not complete, in words that follow others; else nothing.
    #[must_use]
    pub fn how_it_ended(&self) -> String {
        let id = self.id.get(..8).unwrap_or(&self.id);
        match &self.error {
            Some(why) => format!("; the last one, {id} to {}, ended because {why}", self.destination),
            None => String::new(),
        }
    }
}

/// One event of `GET /v1/events`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Number of the event since the agent started, from 1; a gap means that some were missed.
    pub seq: u64,
    /// When, in milliseconds since 1970-01-01 UTC.
    pub at_unix_ms: u64,
    /// The machine it is about.
    pub vm: Option<String>,
    /// What happened.
    #[serde(flatten)]
    pub kind: EventKind,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "event")]
pub enum EventKind {
    /// A machine is kept by this agent from now on.
    VmAdded {
        /// How it came here.
        origin: Origin,
    },
    /// A machine is no longer kept by this agent.
    VmRemoved {
        /// Why.
        reason: RemovalReason,
    },
    /// Its virtual CPUs were stopped.
    VmPaused,
    /// They run again.
    VmResumed,
    /// The guest's kernel gave up.
    VmPanicked,
    /// A migration away from here began.
    SessionStarted {
        /// Its identity.
        session: Uuid,
        /// What it is to lead to.
        goal: Goal,
        /// The destination's address.
        to: String,
    },
    /// It entered a phase. Phases shorter than the agent's look may be left out.
    PhaseEntered {
        /// Its identity.
        session: Uuid,
        /// The phase.
        phase: Phase,
    },
    /// Where it is, about once a second.
    Progress {
        /// The same as on the session's own stream.
        progress: Box<Progress>,
    },
    /// It has ended.
    SessionFinished {
        /// Its identity.
        session: Uuid,
        /// How it ended.
        outcome: Outcome,
        /// Downtime, in milliseconds.
        downtime_ms: f64,
        /// Why it did not complete.
        error: Option<Failure>,
    },
    /// A machine that has left may have been started here once more: two copies may run.
    StartedAgain {
        /// Process id.
        pid: u32,
        /// What it has of the machine's, in words.
        has: Vec<String>,
    },
    /// An image of a machine that has left is not kept from others as it should be.
    ImageNotKept {
        /// The image.
        image: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// An image of a machine that has left is not kept locked any more.
    ImageReleased {
        /// The image.
        image: PathBuf,
        /// Why.
        reason: ReleaseReason,
    },
    /// An uncertain hand-over has been settled with the destination, or by a person.
    Settled {
        /// Where the machine runs.
        runs: Place,
    },
}

/// Why an image is no longer kept locked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ReleaseReason {
    /// `vmirror forget-images`.
    Forgotten,
    /// It was removed.
    Removed,
}

/// Why a machine is no longer kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RemovalReason {
    /// It runs elsewhere now.
    Migrated,
    /// `vmirror stop`.
    Stopped,
    /// The guest powered off, or its QEMU ended.
    Ended,
    /// A person gave it up.
    GivenUp,
    /// `vmirror forget`: it runs on, and nobody here keeps it.
    Forgotten,
    /// Its source has taken back a copy that never ran here.
    Withdrawn,
}

/// Where a machine runs after an uncertain hand-over was settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Place {
    /// On this host.
    Here,
    /// At the destination.
    There,
}

/// Body of every answer that is an error.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// The error.
    pub error: ErrorDetail,
}

/// An error: a name for scripts, and words for people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorDetail {
    /// Stable name of the kind, such as `unknown-vm`.
    pub kind: String,
    /// What went wrong and why.
    pub message: String,
    /// What to do about it.
    pub hint: String,
    /// Further reasons found at the same time.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub more: Vec<Finding>,
}
