//! What the operator asked of a migration.

use std::num::{NonZeroU16, NonZeroU64};
use std::time::Duration;

use humantime_serde::re::humantime::format_duration;
use serde::{Deserialize, Serialize};

/// Whether to hand the machine over as soon as the mirror has caught up, or to keep it standing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Goal {
    /// `vmirror migrate`: switch over once the predicted downtime is low enough.
    Migrate,
    /// `vmirror mirror`: stay in sync until [`Command::Switch`](crate::Command::Switch) or a cancel.
    Mirror,
}

/// How much is compared before and after the hand-over. The gate is never optional.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verify {
    /// The ledgers of both sides are compared before the hand-over.
    Gate,
    /// In addition, the frozen RAM of the source is compared with its ledger after the hand-over.
    #[default]
    Proof,
    /// In addition, the destination reads its whole copy back during the pause: the downtime grows by the time that
    /// takes, and nothing that happened to the copy before can be overlooked.
    Strict,
}

/// What to do with the machine's disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Disks {
    /// Shared storage is recognised and not copied; everything else is mirrored, to where the destination has nothing yet.
    #[default]
    Auto,
    /// Every disk is mirrored, and what the destination has in its place is overwritten. Shared storage is refused.
    Mirror,
    /// The operator vouches that every disk is on shared storage: the probe is not made.
    Shared,
}

/// How much room an image gets that is made at the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskRoom {
    /// What its content takes: sparse stays sparse.
    #[default]
    Thin,
    /// All that it can ever need, from the beginning.
    Whole,
}

/// Whether what is sent is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Compress {
    /// Whatever moves the memory soonest, by measured speed of the CPU and the link.
    #[default]
    Auto,
    /// Nothing is.
    Off,
    /// With LZ4, always.
    Lz4,
    /// With Zstandard, always.
    Zstd,
}

/// What to do when the guest dirties its memory faster than the mirror can follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnDiverge {
    /// The guest's CPUs are slowed, step by step, until the mirror follows.
    #[default]
    Throttle,
    /// Switch over at once; what is missing at the destination is sent when the guest asks for it, and in the background.
    PostCopy,
    /// The migration fails, and says why. The machine stays.
    Fail,
}

/// What carries the memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Engine {
    /// The mirror: tracked, verified, proved.
    #[default]
    Mirror,
    /// QEMU's own migration stream, relayed over the link: for hosts whose kernel cannot track memory. Nothing is verified but
    /// that the stream was loaded.
    Qemu,
}

impl Engine {
    /// Its name in options and reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Engine::Mirror => "mirror",
            Engine::Qemu => "qemu",
        }
    }
}

/// Options of `vmirror migrate` and `vmirror mirror`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    /// The switch-over begins when the predicted downtime is at most this.
    #[serde(with = "humantime_serde")]
    pub downtime: Duration,
    /// When rounds stop shrinking, a predicted downtime up to this is accepted.
    #[serde(with = "humantime_serde")]
    pub max_downtime: Duration,
    /// Upper limit of all data streams together, in bytes per second; `None` is unlimited.
    pub bandwidth: Option<NonZeroU64>,
    /// Number of data connections; `None` lets the agent choose from its cores.
    pub streams: Option<NonZeroU16>,
    /// From the start until the switch-over must have begun; not counted while a mirror stands.
    #[serde(with = "humantime_serde")]
    pub timeout: Duration,
    /// How much is compared.
    pub verify: Verify,
    /// What happens to disks.
    pub disks: Disks,
    /// How much room images get that are made.
    pub disk_room: DiskRoom,
    /// Whether what is sent is compressed.
    pub compress: Compress,
    /// What to do when rounds do not shrink.
    pub on_diverge: OnDiverge,
    /// What carries the memory.
    pub engine: Engine,
    /// Networks whose connections end with the move, user-mode ones and sockets, are no reason against it.
    pub accept_disconnect: bool,
    /// What would start a machine again that nothing keeps from running twice is no reason against it.
    pub accept_supervisor: bool,
    /// The machine stays in the source's network, through a tunnel, until it is released.
    pub forward: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            downtime: Duration::from_millis(50),
            max_downtime: Duration::from_secs(1),
            bandwidth: None,
            streams: None,
            timeout: Duration::from_secs(600),
            verify: Verify::default(),
            disks: Disks::default(),
            disk_room: DiskRoom::default(),
            compress: Compress::default(),
            on_diverge: OnDiverge::default(),
            engine: Engine::default(),
            accept_disconnect: false,
            accept_supervisor: false,
            forward: false,
        }
    }
}

/// An option, or a pair of them, that makes no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OptionError {
    /// The limit is below what is aimed at.
    #[error("--max-downtime {max:?} is below --downtime {asked:?}")]
    MaxBelowAsked {
        /// `--max-downtime`.
        max: Duration,
        /// `--downtime`.
        asked: Duration,
    },
    /// A time that no migration can mean.
    #[error("{option} {} is above the most that makes sense, {}", format_duration(*given), format_duration(*most))]
    TooLong {
        /// The option.
        option: &'static str,
        /// What was given.
        given: Duration,
        /// The most that is accepted.
        most: Duration,
    },
    /// What is not there yet cannot be read back.
    #[error(
        "--verify strict reads the whole copy back before the hand-over, and with --on-diverge post-copy it is not whole by then"
    )]
    StrictPostCopy,
    /// Nothing can be done in no time.
    #[error("--timeout {} leaves no time to migrate", format_duration(*.0))]
    Timeout(Duration),
    /// Below this the control messages alone would fill the link.
    #[error("--bandwidth {0} bytes/s is below the least that makes sense, {MIN_BANDWIDTH} bytes/s")]
    Bandwidth(u64),
    /// More streams than a destination accepts.
    #[error("--streams {0} is above the limit of {MAX_STREAMS}")]
    Streams(u16),
    /// QEMU's stream is what it is.
    #[error("{0} is of the mirror: QEMU's own stream has no such thing")]
    NotOfQemu(&'static str),
}

/// Least `--bandwidth`, in bytes per second.
pub const MIN_BANDWIDTH: u64 = 64 * 1024;
/// Most data connections of one mirror.
pub const MAX_STREAMS: u16 = 16;
/// Least `--timeout`.
const MIN_TIMEOUT: Duration = Duration::from_secs(1);
/// Most `--timeout`: larger than any migration, and small enough to be added to any time.
const MAX_TIMEOUT: Duration = Duration::from_secs(365 * 86_400);
/// Most `--downtime` and `--max-downtime`: a guest that may stand still for longer can be stopped and copied.
const MAX_DOWNTIME: Duration = Duration::from_secs(3600);

impl Options {
    /// Whether the options make sense together.
    ///
    /// # Errors
    /// The first option, or pair, that does not.
    pub fn validate(&self) -> Result<(), OptionError> {
        for (option, given, most) in [
            ("--downtime", self.downtime, MAX_DOWNTIME),
            ("--max-downtime", self.max_downtime, MAX_DOWNTIME),
            ("--timeout", self.timeout, MAX_TIMEOUT),
        ] {
            if given > most {
                return Err(OptionError::TooLong { option, given, most });
            }
        }
        if self.max_downtime < self.downtime {
            return Err(OptionError::MaxBelowAsked { max: self.max_downtime, asked: self.downtime });
        }
        if self.timeout < MIN_TIMEOUT {
            return Err(OptionError::Timeout(self.timeout));
        }
        if (self.verify, self.on_diverge) == (Verify::Strict, OnDiverge::PostCopy) {
            return Err(OptionError::StrictPostCopy);
        }
        if self.engine == Engine::Qemu
            && let Some(option) = self.not_of_qemu()
        {
            return Err(OptionError::NotOfQemu(option));
        }
        match (self.bandwidth, self.streams) {
            (Some(bandwidth), _) if bandwidth.get() < MIN_BANDWIDTH => {
                Err(OptionError::Bandwidth(bandwidth.get()))
            }
            (_, Some(streams)) if streams.get() > MAX_STREAMS => Err(OptionError::Streams(streams.get())),
            _ => Ok(()),
        }
    }

    /// An option that was given and that the engine `qemu` cannot keep.
    fn not_of_qemu(&self) -> Option<&'static str> {
        match self {
            Options { verify: Verify::Strict, .. } => Some("--verify strict"),
            Options { disks: Disks::Mirror, .. } => Some("--disks mirror"),
            Options { on_diverge: OnDiverge::PostCopy, .. } => Some("--on-diverge post-copy"),
            Options { compress: Compress::Lz4 | Compress::Zstd, .. } => Some("--compress"),
            Options { streams: Some(streams), .. } if streams.get() > 1 => Some("more than one of --streams"),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_those_of_the_contract_and_valid() {
        let options = Options::default();
        assert_eq!(options.downtime, Duration::from_millis(50));
        assert_eq!(options.max_downtime, Duration::from_secs(1));
        assert_eq!(options.verify, Verify::Proof);
        options.validate().unwrap();
    }

    #[test]
    fn options_that_make_no_sense_are_refused_by_name() {
        let with = |change: fn(&mut Options)| {
            let mut options = Options::default();
            change(&mut options);
            options.validate().unwrap_err().to_string()
        };
        assert!(with(|o| o.max_downtime = Duration::from_millis(10)).contains("--max-downtime"));
        assert!(with(|o| o.timeout = Duration::ZERO).contains("--timeout"));
        assert!(with(|o| o.bandwidth = NonZeroU64::new(1)).contains("--bandwidth"));
        assert!(with(|o| o.streams = NonZeroU16::new(1000)).contains("--streams"));
        assert!(with(|o| o.timeout = Duration::MAX).contains("--timeout"));
        assert!(
            with(|o| (o.downtime, o.max_downtime) = (Duration::MAX, Duration::MAX)).contains("--downtime")
        );
        assert!(with(|o| o.max_downtime = Duration::from_secs(3601)).contains("--max-downtime 1h 1s"));
        let strict = with(|o| (o.verify, o.on_diverge) = (Verify::Strict, OnDiverge::PostCopy));
        assert!(strict.contains("--verify strict") && strict.contains("--on-diverge post-copy"));
        let by_qemu = |change: fn(&mut Options)| {
            let mut options = Options { engine: Engine::Qemu, ..Options::default() };
            options.validate().unwrap();
            change(&mut options);
            options.validate().unwrap_err().to_string()
        };
        assert!(by_qemu(|o| o.verify = Verify::Strict).contains("--verify strict"));
        assert!(by_qemu(|o| o.on_diverge = OnDiverge::PostCopy).contains("--on-diverge"));
        assert!(by_qemu(|o| o.compress = Compress::Zstd).contains("--compress"));
        assert!(by_qemu(|o| o.streams = NonZeroU16::new(2)).contains("--streams"));
    }
}
