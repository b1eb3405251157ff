//! Points of a migration at which a test can hold it, to strike exactly there.
//!
//! An agent that has [`DIRECTORY`] in its environment looks for a file of the point's name in that directory whenever a migration comes
//! to one. Where there is one, that migration, and nothing else of the agent, waits there: the file is renamed to `NAME.reached`, and
//! the wait ends when that is removed. Without the variable, as in every agent that is not tested, a point is a look at a word of memory:
//! so the program that is tested is the very one that is installed (decision 0039).

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use crate::report::Phase;

/// The environment variable that names the directory.
pub const DIRECTORY: &str = "VMIRROR_TEST_POINTS";
/// Between looks whether the wait is over.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// Where a migration can be held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Point {
    /// The source has entered this phase and done nothing of it.
    Phase(Phase),
    /// Source: the guest has just been paused.
    Paused,
    /// Source: memory, disks and devices are sent, and nothing was said of loading them.
    Sent,
    /// Source: the destination was told to load.
    LoadSaid,
    /// Destination: it was told to load, and QEMU was given nothing.
    LoadHeard,
    /// Destination: QEMU has loaded, and nothing is on record.
    Loaded,
    /// Destination: that the copy is ready is on record, and not said.
    Ready,
    /// Source: it has heard so, and nothing is on record.
    ReadyHeard,
    /// Source: the hand-over is on record, and not said.
    HandedOver,
    /// Destination: the source's word has come, and nothing is on record.
    CommitHeard,
    /// Destination: that the machine is its own is on record, and the machine does not run.
    Owned,
    /// Destination: the machine runs, and that was not said.
    Resumed,
    /// Source: it has heard so.
    RunningHeard,
}

impl Point {
    /// Within the switch-over, in their order.
    pub const OF_SWITCH_OVER: [Point; 12] = [
        Point::Paused,
        Point::Sent,
        Point::LoadSaid,
        Point::LoadHeard,
        Point::Loaded,
        Point::Ready,
        Point::ReadyHeard,
        Point::HandedOver,
        Point::CommitHeard,
        Point::Owned,
        Point::Resumed,
        Point::RunningHeard,
    ];

    /// Its name, and that of its file.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Point::Phase(phase) => phase.name(),
            Point::Paused => "paused",
            Point::Sent => "sent",
            Point::LoadSaid => "load-said",
            Point::LoadHeard => "load-heard",
            Point::Loaded => "loaded",
            Point::Ready => "ready",
            Point::ReadyHeard => "ready-heard",
            Point::HandedOver => "handed-over",
            Point::CommitHeard => "commit-heard",
            Point::Owned => "owned",
            Point::Resumed => "resumed",
            Point::RunningHeard => "running-heard",
        }
    }

    /// Whether it is the destination's agent that comes to it.
    #[must_use]
    pub fn is_destinations(self) -> bool {
        use Point::{CommitHeard, LoadHeard, Loaded, Owned, Ready, Resumed};
        matches!(self, LoadHeard | Loaded | Ready | CommitHeard | Owned | Resumed)
    }
}

/// A migration has come to a point.
pub async fn reach(point: Point) {
    static HOLDS: OnceLock<Option<PathBuf>> = OnceLock::new();
    if let Some(directory) = HOLDS.get_or_init(|| std::env::var_os(DIRECTORY).map(PathBuf::from)) {
        hold(directory, point).await;
    }
}

async fn hold(directory: &Path, point: Point) {
    let reached = directory.join(format!("{}.reached", point.name()));
    if std::fs::rename(directory.join(point.name()), &reached).is_err() {
        return;
    }
    tracing::warn!(point = point.name(), "held by a test");
    while reached.exists() {
        tokio::time::sleep(LOOK_AGAIN).await;
    }
    tracing::warn!(point = point.name(), "goes on");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_is_asked_for_waits_and_others_pass() {
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str| directory.path().join(name);
        std::fs::write(file("ready"), "").unwrap();
        hold(directory.path(), Point::Loaded).await;
        let path = directory.path().to_owned();
        let held = tokio::spawn(async move { hold(&path, Point::Ready).await });
        while !file("ready.reached").exists() {
            assert!(!held.is_finished());
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        tokio::time::sleep(4 * LOOK_AGAIN).await;
        assert!(!held.is_finished() && !file("ready").exists());
        std::fs::remove_file(file("ready.reached")).unwrap();
        held.await.unwrap();
        // Once: the next one passes.
        hold(directory.path(), Point::Ready).await;
    }
}
