//! The report of a migration: what was done, how long it took, and what was proved.
//!
//! The JSON form is the contract with scripts; `docs/report.md` describes each field.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use finding::{Failure, Finding};

/// The named steps of a migration, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Link up, versions and identities agreed.
    Initialize,
    /// The destination proves that it can hold and run the machine, and sets the resources aside.
    Reserve,
    /// Tracking begins, data streams open.
    Prepare,
    /// Rounds, while the machine runs.
    Synchronize,
    /// What the audit has put in doubt is settled before the pause.
    Verify,
    /// Pause, last round, gate, device state, hand-over.
    SwitchOver,
    /// The destination runs; the proof is made on the frozen source.
    Resume,
    /// Everything held on either host is given back.
    CleanUp,
    /// The machine's health has been watched at the destination.
    Complete,
}

impl Phase {
    /// The phase's name in reports and messages.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Phase::Initialize => "initialize",
            Phase::Reserve => "reserve",
            Phase::Prepare => "prepare",
            Phase::Synchronize => "synchronize",
            Phase::Verify => "verify",
            Phase::SwitchOver => "switch-over",
            Phase::Resume => "resume",
            Phase::CleanUp => "clean-up",
            Phase::Complete => "complete",
        }
    }
}

/// How a migration ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The machine runs at the destination.
    Completed,
    /// The machine runs where it was.
    Failed,
    /// The operator ended it; the machine runs where it was.
    Cancelled,
    /// Nobody but a person can tell where the machine should run.
    Uncertain,
}

/// One phase's place in time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PhaseTime {
    /// Which phase.
    pub name: Phase,
    /// From the start of the migration, in milliseconds.
    pub start_ms: f64,
    /// Length in milliseconds.
    pub duration_ms: f64,
}

/// One round: one scan for dirty pages and the sending of what it found. Counts are pages of
/// [`Memory::page_size`].
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Round {
    /// Number of the round; 0 is the first full copy.
    pub n: u32,
    /// Pages the scan found, with those still owed from earlier rounds.
    pub dirty_pages: u64,
    /// Hot pages that the guest had written again before their turn came: left to a later round, and not among the above.
    #[serde(default)]
    pub deferred: u64,
    /// Sent as zero.
    pub zero: u64,
    /// Not sent, because the destination already holds this content.
    pub unchanged: u64,
    /// Sent as a difference.
    pub delta: u64,
    /// Sent as what another page of the destination held already.
    #[serde(default)]
    pub duplicate: u64,
    /// Sent whole.
    pub plain: u64,
    /// Left out, to be supplied after the hand-over: post-copy.
    #[serde(default)]
    pub withheld: u64,
    /// Bytes of guest memory read for this round.
    pub raw_bytes: u64,
    /// Bytes written to the data streams, before encryption.
    pub wire_bytes: u64,
    /// From the scan to the destination's acknowledgement, in milliseconds.
    pub duration_ms: f64,
    /// The scan alone, in milliseconds.
    pub scan_ms: f64,
    /// So many rounds that followed are told together with this one: there were too many to tell each. Counts, bytes and durations are
    /// those of all of them.
    #[serde(default)]
    pub merged: u32,
    /// Whether the guest was paused meanwhile.
    pub paused: bool,
    /// What was estimated after this round; none for rounds of a paused guest, of which nothing is to be foreseen.
    #[serde(default)]
    pub estimate: Option<Estimated>,
}

impl Round {
    /// Tells another round, which followed, together with this one.
    pub fn take_in(&mut self, next: &Round) {
        self.dirty_pages += next.dirty_pages;
        self.deferred += next.deferred;
        self.zero += next.zero;
        self.unchanged += next.unchanged;
        self.delta += next.delta;
        self.duplicate += next.duplicate;
        self.plain += next.plain;
        self.withheld += next.withheld;
        self.raw_bytes += next.raw_bytes;
        self.wire_bytes += next.wire_bytes;
        self.duration_ms += next.duration_ms;
        self.scan_ms += next.scan_ms;
        self.merged += 1 + next.merged;
        self.estimate.clone_from(&next.estimate);
    }
}

/// What the rounds so far have foreseen. What happened then is in the rounds that follow, and in [`Report::pause`].
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Estimated {
    /// How fast the guest dirties memory, in bytes per second, as the last scan found.
    pub dirty_rate: f64,
    /// How fast guest memory is taken care of, in bytes per second.
    pub throughput: f64,
    /// The downtime if the switch-over began now, in milliseconds; none before two rounds.
    pub downtime_ms: Option<f64>,
    /// Until the guest's memory is all but equal, in milliseconds; none where the guest outruns the mirror.
    pub time_left_ms: Option<f64>,
}

/// Memory as a whole.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Memory {
    /// Pages of guest RAM.
    pub pages: u64,
    /// Bytes in a page.
    pub page_size: u64,
    /// Guest memory read, over all rounds.
    pub raw_bytes: u64,
    /// Bytes written to the data streams, over all rounds.
    pub wire_bytes: u64,
}

/// One disk.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Disk {
    /// The image's path as the guest's command line names it.
    pub name: String,
    /// Size in bytes.
    pub size: u64,
    /// Bytes copied from it or written to it meanwhile.
    pub raw_bytes: u64,
    /// Bytes sent for that, before encryption.
    pub wire_bytes: u64,
    /// Whether it was copied.
    pub mode: DiskMode,
}

/// How a disk came to the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskMode {
    /// Both hosts see the same storage.
    Shared,
    /// It was copied, and is proved equal.
    Mirrored,
}

impl DiskMode {
    /// The mode's name in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            DiskMode::Shared => "shared",
            DiskMode::Mirrored => "mirrored",
        }
    }
}

/// Frames of the guest's network cards.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Network {
    /// Diverted at the source from shortly before the pause on, and sent to the destination.
    pub frames_forwarded: u64,
    /// Lost for want of room.
    pub frames_dropped: u64,
    /// Connections that the source's firewall knew and the destination's was told of.
    #[serde(default)]
    pub flows_carried: u64,
    /// The source has seen the machine's announcement come from the network: it is known where the machine is now.
    #[serde(default)]
    pub turned: bool,
    /// The machine stays in the source's network, through tunnels from there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forwarding: Option<Forwarding>,
    /// What a person should see to: a hook that failed once the machine was handed over.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<Finding>,
}

/// Tunnels that lead from the source to where the machine is, until they are released.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forwarding {
    /// Where they lead to.
    pub to: Option<IpAddr>,
    /// Their interfaces at the source.
    pub interfaces: Vec<String>,
}

/// The answer of a comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Both sides are equal.
    Match,
    /// They are not.
    Mismatch,
    /// The comparison was not reached, or not asked for.
    #[default]
    NotMade,
}

/// What was compared, and what came of it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Verification {
    /// Pages read back and compared by the rolling audit, both sides together.
    pub audited_pages: u64,
    /// Pages sent again because an audit found them different.
    pub repaired_pages: u64,
    /// Both ledgers, before the hand-over.
    pub gate: Verdict,
    /// The frozen source against its ledger, after the hand-over.
    pub proof: Verdict,
    /// Pages covered by the proof.
    pub proof_pages: u64,
    /// Pages that the proof found different.
    pub mismatches: u64,
    /// Blocks of disks, of 64 KiB, read back and compared by the rolling audit at the destination.
    #[serde(default)]
    pub audited_blocks: u64,
    /// Blocks sent again because they were found different.
    #[serde(default)]
    pub repaired_blocks: u64,
    /// Blocks of mirrored disks covered by the proof.
    #[serde(default)]
    pub proof_blocks: u64,
    /// Blocks that the proof found different.
    #[serde(default)]
    pub mismatched_blocks: u64,
}

/// The downtime by part, on the source's clock, in milliseconds from the guest's STOP.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Pause {
    /// The agent knew that the guest had stopped.
    pub stopped_ms: f64,
    /// The destination had acknowledged the last pages.
    pub last_round_ms: f64,
    /// The disks' copies were complete, and QEMU's copy jobs had ended; 0 without mirrored disks.
    #[serde(default)]
    pub disks_ms: f64,
    /// QEMU had written its device state.
    pub device_state_ms: f64,
    /// The pages written while saving devices were acknowledged, and the gate had passed.
    pub gate_ms: f64,
    /// The destination's QEMU had loaded everything.
    pub ready_ms: f64,
    /// The hand-over was in the source's journal.
    pub handed_over_ms: f64,
    /// Word that the machine runs at the destination.
    pub running_ms: f64,
}

/// Everything about one migration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Identity of the migration.
    pub id: String,
    /// Name of the machine.
    pub vm: String,
    /// Name of the source agent.
    pub source: String,
    /// Name of the destination agent; its address until that is known.
    pub destination: String,
    /// When it began, in milliseconds since 1970-01-01 UTC.
    pub started_unix_ms: u64,
    /// Which engine carried the memory.
    pub engine: String,
    /// How it ended.
    pub outcome: Outcome,
    /// Why it did not complete.
    pub error: Option<Failure>,
    /// From the command to the end of the last phase, in milliseconds.
    pub total_ms: f64,
    /// From the guest's STOP to word that it runs at the destination, on the source's clock. Never less than the truth.
    pub downtime_ms: f64,
    /// What was asked for.
    pub downtime_asked_ms: f64,
    /// What was predicted when the switch-over began.
    pub downtime_predicted_ms: f64,
    /// Where the downtime went.
    pub pause: Pause,
    /// How long QEMU's main thread was held when tracking began, in milliseconds.
    pub tracking_hold_ms: f64,
    /// The phases that were entered.
    pub phases: Vec<PhaseTime>,
    /// Every round.
    pub rounds: Vec<Round>,
    /// Memory as a whole.
    pub memory: Memory,
    /// The machine's disks.
    pub disks: Vec<Disk>,
    /// The machine's network.
    pub network: Network,
    /// Size of QEMU's own stream, in bytes.
    pub device_state_bytes: u64,
    /// What was compared.
    pub verification: Verification,
    /// How the machine did at the destination after it resumed.
    pub health: Option<Health>,
    /// Where the machine was handed over before its memory was complete, how the rest came.
    #[serde(default)]
    pub post_copy: Option<PostCopy>,
    /// Where a disk bypasses the page cache, the stops that scans need for that.
    #[serde(default)]
    pub quiesced: Option<Quiesced>,
    /// Where the guest outran the mirror and was slowed, how.
    #[serde(default)]
    pub throttle: Option<Throttle>,
}

impl Report {
    /// Bytes written to the data streams, for memory and disks.
    #[must_use]
    pub fn wire_bytes(&self) -> u64 {
        self.disks.iter().fold(self.memory.wire_bytes, |sum, disk| sum.saturating_add(disk.wire_bytes))
    }
}

/// The stops of a guest whose memory can only be scanned while nothing is read into it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Quiesced {
    /// How many there were: one for each scan.
    pub stops: u64,
    /// The longest one, in milliseconds, from the order to stop to the word that it goes on.
    pub longest_ms: f64,
    /// All of them together, in milliseconds.
    pub total_ms: f64,
}

/// How a guest was slowed that outran its mirror.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Throttle {
    /// The largest share of the time for which its CPUs were stopped.
    pub highest_share: f64,
    /// For how long it was slowed, in milliseconds.
    pub duration_ms: f64,
    /// How often its CPUs were stopped.
    pub stops: u64,
    /// All stops together, in milliseconds.
    pub stopped_ms: f64,
    /// The longest one, in milliseconds.
    pub longest_stop_ms: f64,
}

/// How the memory came that was not there yet when the machine was handed over.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct PostCopy {
    /// Pages that were missing at the hand-over.
    pub pages: u64,
    /// Those that the guest had to wait for.
    pub faults: u64,
    /// Its longest wait for one, in milliseconds, from the kernel's word to the page in its place.
    pub longest_fault_ms: f64,
    /// Its mean wait, in milliseconds.
    pub mean_fault_ms: f64,
    /// From the hand-over until nothing was missing, in milliseconds.
    pub duration_ms: f64,
    /// Links that this took: more than one where the link was lost.
    pub links: u32,
    /// Which waits of the guest are in these figures.
    #[serde(default)]
    pub counted: Counted,
}

/// Which waits of a guest for memory have been counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Counted {
    /// All of them.
    #[default]
    All,
    /// Those since the destination's agent was last started.
    Part,
    /// None: nobody has said that the memory became complete, and the figures are 0 because they are not known.
    Nothing,
}

/// The machine's health after resume, watched by the destination.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Health {
    /// How long it was watched, in milliseconds.
    pub watched_ms: f64,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Those that used CPU time while watched; a halted one in an idle guest may not.
    pub vcpus_progressing: u32,
}
