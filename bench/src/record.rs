//! Everything that was seen in a run: what `report.json` holds.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use session::Report;
use testbed::surroundings::Surroundings;

use crate::measure::Beats;

/// A way of moving a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// `vmirror migrate`.
    Vmirror,
    /// QEMU's own pre-copy migration as it is without any setting.
    QemuDefault,
    /// The same without a limit of bandwidth.
    QemuTuned,
    /// The same, over several connections.
    QemuMultifdPlain,
    /// The same, over several connections and compressed with zstd.
    QemuMultifd,
    /// QEMU's own post-copy migration, without a limit of bandwidth: begun when all has been sent once.
    QemuPostCopy,
    /// QEMU's own storage migration as libvirt does it, and its pre-copy without a limit of bandwidth.
    QemuNbd,
}

impl Method {
    /// Those that the demo compares.
    pub const DEMO: [Self; 3] = [Self::Vmirror, Self::QemuDefault, Self::QemuTuned];

    /// Its names: for people, and on the command line.
    fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::Vmirror => ("vmirror", "vmirror"),
            Self::QemuDefault => ("QEMU, defaults", "qemu-default"),
            Self::QemuTuned => ("QEMU, tuned", "qemu-tuned"),
            Self::QemuMultifdPlain => ("QEMU, multifd", "qemu-multifd"),
            Self::QemuMultifd => ("QEMU, multifd zstd", "qemu-multifd-zstd"),
            Self::QemuPostCopy => ("QEMU, post-copy", "qemu-post-copy"),
            Self::QemuNbd => ("QEMU, NBD mirror", "qemu-nbd"),
        }
    }

    /// Its name for people.
    pub fn name(self) -> &'static str {
        self.names().0
    }

    /// Its name on the command line.
    pub fn key(self) -> &'static str {
        self.names().1
    }
}

/// Why a migration has no figures.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "kebab-case", tag = "why")]
pub enum Miss {
    /// It went on and on, and was given up after so long, in milliseconds.
    #[error("not converged in {}", readable::measured_ms(*after_ms))]
    NotConverged { after_ms: f64 },
    /// It ended with an error.
    #[error("{message}")]
    Failed { message: String },
    /// The guest came to the other side and did not survive it: it has booted since.
    #[error("its guest crashed at the destination")]
    Crashed,
}

/// What QEMU itself says about a migration of its own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct QemuReport {
    /// `total-time`, in milliseconds.
    pub total_ms: f64,
    /// `downtime`, in milliseconds: until the source had sent everything, not until the guest ran again.
    pub downtime_ms: f64,
    /// `setup-time`, in milliseconds.
    pub setup_ms: Option<f64>,
    /// Its figures about RAM.
    pub ram: Value,
    /// The migration parameters that were set.
    pub settings: Value,
}

/// When a disk was copied.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct DiskCopy {
    /// From the command until copying began, in milliseconds.
    pub began_ms: f64,
    /// From the command until everything had been copied once, in milliseconds.
    pub copied_ms: f64,
}

impl DiskCopy {
    /// What copying took, in milliseconds.
    pub fn took_ms(self) -> f64 {
        self.copied_ms - self.began_ms
    }
}

/// One migration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// How the guest was moved.
    pub method: Method,
    /// Number of the round that it belongs to, from 0: in each, every method has its turn.
    pub round: u32,
    /// Name of the source.
    pub from: String,
    /// Name of the destination.
    pub to: String,
    /// When it began, in milliseconds since 1970.
    pub began_unix_ms: f64,
    /// In milliseconds; see the [crate].
    pub total_ms: f64,
    /// From the command until the guest ran at the destination, in milliseconds.
    pub until_running_ms: f64,
    /// In milliseconds; see the [crate].
    pub downtime_ms: f64,
    /// CPU time at the source, in milliseconds.
    pub cpu_source_ms: f64,
    /// CPU time at the destination, in milliseconds.
    pub cpu_destination_ms: f64,
    /// Bytes that the source put on its link, headers, encryption and device state included; none without a link of its own.
    #[serde(default)]
    pub link_bytes: Option<u64>,
    /// Bytes that memory took by the program's own count: vmirror's before encryption, QEMU's `transferred`.
    pub sent_bytes: u64,
    /// What the client noticed.
    pub heartbeats: Option<Beats>,
    /// How its disk came; none where it has none that moves with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<DiskCopy>,
    /// vmirror's report.
    pub report: Option<Report>,
    /// QEMU's.
    pub qemu: Option<QemuReport>,
}

/// What is measured of a migration: milliseconds, bytes or a number; none where it was not, or where there is no such thing.
pub type Measure = fn(&Sample) -> Option<f64>;

/// All that goals, tables and pictures show.
impl Sample {
    pub const DOWNTIME: Measure = |sample| Some(sample.downtime_ms);
    pub const TOTAL: Measure = |sample| Some(sample.total_ms);
    pub const UNTIL_RUNNING: Measure = |sample| Some(sample.until_running_ms);
    pub const CPU_SOURCE: Measure = |sample| Some(sample.cpu_source_ms);
    pub const CPU_DESTINATION: Measure = |sample| Some(sample.cpu_destination_ms);
    /// Of both sides.
    pub const CPU: Measure = |sample| Some(sample.cpu_source_ms + sample.cpu_destination_ms);
    pub const LINK_BYTES: Measure = |sample| Some(sample.link_bytes? as f64);
    pub const SENT_BYTES: Measure = |sample| Some(sample.sent_bytes as f64);
    /// The longest heartbeat gap, where it ended.
    pub const GAP: Measure = |sample| sample.heartbeats?.gap_ms();
    pub const HEARTBEATS_LOST: Measure = |sample| Some(sample.heartbeats?.lost as f64);
    /// Of its disk, once.
    pub const COPYING: Measure = |sample| Some(sample.disk?.took_ms());
    /// From when the guest is known to be stopped until its disks are complete.
    pub const PAUSE_OF_DISKS: Measure = |sample| {
        let pause = &sample.report.as_ref()?.pause;
        (pause.disks_ms > 0.0).then_some(pause.disks_ms - pause.stopped_ms)
    };
    /// As QEMU counts its own.
    pub const DOWNTIME_OF_QEMU: Measure = |sample| Some(sample.qemu.as_ref()?.downtime_ms);
}

/// What came of an attempt to move a guest.
#[derive(Clone, Debug, PartialEq)]
pub struct Moved {
    /// The figures, or why there are none.
    pub result: Result<Sample, Miss>,
    /// Memory that moving it took on the side where it took more; none where the system does not tell.
    pub overhead_bytes: Option<u64>,
}

/// Something that must hold for the run to have succeeded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// What.
    pub name: String,
    /// Whether it does.
    pub held: bool,
    /// What was found.
    pub found: String,
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// Since the beginning, in milliseconds.
    pub at_ms: f64,
    /// What.
    pub text: String,
}

/// The guests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestFacts {
    /// Memory, in MiB.
    pub memory_mib: u64,
    /// Of that, filled with pages that the guest checks itself, in MiB.
    pub fill_mib: u64,
    /// Virtual CPUs.
    pub cpus: u32,
    /// What runs them.
    pub accelerator: String,
    /// Command line of the guest that vmirror moves, as given to `vmirror run`.
    pub command_line: Vec<String>,
}

/// A run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// When it began.
    pub started: String,
    /// How long it took, in milliseconds.
    pub took_ms: f64,
    /// The machine and the programs.
    pub surroundings: Surroundings,
    /// The guests; none if none was started.
    pub guest: Option<GuestFacts>,
    /// Whether there was a network, with a client on it.
    pub network: bool,
    /// Heartbeats of the guest before it was moved for the first time.
    pub unmigrated: Option<Beats>,
    /// Every migration, in order.
    pub samples: Vec<Sample>,
    /// What had to hold.
    pub checks: Vec<Check>,
    /// What happened.
    pub steps: Vec<Step>,
    /// Why the run did not come to its end.
    pub failure: Option<String>,
}

impl Record {
    /// Whether the run came to its end and everything held that had to. Goals that were missed do not matter here.
    pub fn succeeded(&self) -> bool {
        self.failure.is_none() && !self.checks.is_empty() && self.checks.iter().all(|check| check.held)
    }

    /// The migrations by one method.
    pub fn by(&self, method: Method) -> impl Iterator<Item = &Sample> {
        self.samples.iter().filter(move |sample| sample.method == method)
    }

    /// The reports of vmirror.
    pub fn reports(&self) -> impl Iterator<Item = &Report> {
        self.samples.iter().filter_map(|sample| sample.report.as_ref())
    }

    /// vmirror's report with the median downtime: of an even number, the shorter of the two in the middle.
    pub fn typical(&self) -> Option<&Report> {
        let mut reports: Vec<&Report> = self.reports().collect();
        reports.sort_by(|a, b| a.downtime_ms.total_cmp(&b.downtime_ms));
        reports.get(reports.len().saturating_sub(1) / 2).copied()
    }

    /// Notes whether something held that had to.
    pub fn check(&mut self, name: impl Into<String>, held: bool, found: impl Into<String>) {
        self.checks.push(Check { name: name.into(), held, found: found.into() });
    }
}
