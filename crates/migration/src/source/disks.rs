//! The disks at the source: QEMU's copy jobs into the mirror, their end at the pause, and the way back.

mod clear;

use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mirror::hash::Secret;
use mirror::storage::Lane;
use mirror::storage::image::{Image, RawImage, Room, ServedImage};
use mirror::storage::layout::{BlockIndex, DiskLayout};
use mirror::storage::source::{DiskFlow, DiskProof, SourceDisk, StorageSource};
use nbd::client::Client;
use qemu::qmp::{MirrorEnd, MirrorJob, NbdNode, Sync};
use qemu::{NotRecorded, Process, Qmp, Serve, ServedBacking, StorageDaemon};

pub(crate) use clear::{Uncleared, clear, clear_after, has_jobs};

use super::peer::{Destination, violation};
use super::stop::Stop;
use crate::disks::Disk;
use finding::{Finding, chain};
use protocol::deadlines::HOLDS;
use protocol::wire::{self, Reply};
use session::progress::DiskProgress;

/// What everything that is put into QEMU's block graph is called by.
const NAME: &str = movable::blockers::OUR_NODES;
/// The name of a storage daemon's NBD socket.
const NBD: &str = "nbd";
/// A switch-over begins with at most so many blocks of which it is not certain what the destination has: 2 ms to read and compare.
const UNCERTAIN: u64 = 64;
/// Of a guest that writes faster than that is reached, after so long, with as many as take this share of the longest pause allowed.
const UNSETTLED: Duration = Duration::from_secs(2);
const SHARE: f64 = 0.25;
/// What waits to be sent when a pause begins takes this share of the downtime that was asked for, and may be so many bytes at least.
const DRAINED: f64 = 0.05;
const LEAST_WAITING: usize = 256 << 10;
/// While the guest runs, so many blocks at most are settled before everything else has its turn: 64 MiB.
const SLICE: u64 = 1024;
/// The kind of failure of a machine that is this host's and does not run.
pub(super) const NOT_RESUMED: &str = "not-resumed";

/// Where everything is put that a machine's disks need on this host.
#[derive(Debug, Clone)]
pub(super) struct Places {
    /// Where QEMU and this agent meet: sockets and nothing else.
    pub(super) directory: PathBuf,
    /// What is the agent's alone.
    pub(super) private: PathBuf,
    /// The machine's name.
    pub(super) machine: String,
    /// QEMU's own program, for the storage daemon beside it.
    pub(super) binary: PathBuf,
}

impl Places {
    /// Where QEMU serves what can only be read through it.
    pub(super) fn read(&self) -> PathBuf {
        self.directory.join("read")
    }

    /// A directory for a storage daemon.
    fn storage(&self) -> PathBuf {
        self.private.join(format!("{}.storage", self.machine))
    }
}

/// A disk that is mirrored.
#[derive(Debug)]
struct Mirrored {
    path: PathBuf,
    format: String,
    node: String,
    size: u64,
    direct: bool,
    read_only: bool,
    sync: Sync,
    name: String,
    /// Bytes that QEMU's copy job had still to go over, when it was last asked.
    left: u64,
}

/// The mirrored disks of one machine.
#[derive(Debug)]
pub(super) struct Disks {
    storage: Arc<StorageSource>,
    mirrored: Vec<Mirrored>,
    places: Places,
    copied: bool,
    /// Since when more is uncertain than a pause should begin with, although it is being settled.
    unsettled: Option<Instant>,
}

fn broken(what: &Path, error: &dyn std::error::Error) -> Stop {
    Stop::Failed(Finding::new(
        "disk",
        format!("{}: {}", what.display(), chain(error)),
        "see the logs of both agents",
    ))
}

impl Disks {
    /// Begins to serve the disks that the destination wants to have mirrored. None where there are none. Nothing is copied before
    /// [`begin`](Self::begin).
    pub(super) async fn prepare(
        qmp: &Qmp,
        disks: &[Disk],
        reserved: &wire::Reserved,
        secret: Secret,
        streams: u16,
        places: Places,
    ) -> Result<Option<(Disks, Vec<Lane>)>, Stop> {
        let mut mirrored = Vec::new();
        let mut sizes = Vec::new();
        for (place, number) in reserved.mirrored.iter().enumerate() {
            let disk = usize::try_from(*number).ok().and_then(|number| disks.get(number));
            let Some((disk, drive)) = disk.and_then(|disk| disk.drive.as_ref().map(|drive| (disk, drive)))
            else {
                return Err(violation("wants a disk that there is not"));
            };
            sizes.push(disk.size);
            mirrored.push(Mirrored {
                path: disk.image.clone(),
                format: drive.format.clone(),
                node: drive.node.clone(),
                size: disk.size,
                direct: disk.direct,
                read_only: drive.read_only,
                sync: if drive.backing.is_some() { Sync::Top } else { Sync::Full },
                name: format!("{NAME}{place}"),
                left: if drive.read_only { 0 } else { disk.size },
            });
        }
        if mirrored.is_empty() {
            return Ok(None);
        }
        let layout = DiskLayout::new(sizes, streams)
            .map_err(|e| Stop::because("disk", &e, "detach some of the VM's disks"))?;
        // What an agent that was killed has left.
        clear(qmp, &places.read()).await.map_err(Uncleared::stop)?;
        let served = mirrored.iter().any(|disk| disk.format != "raw");
        if served {
            let socket = places.read();
            let _ = std::fs::remove_file(&socket);
            qmp.start_nbd_server(&socket).await.map_err(|e| {
                Stop::because(
                    "nbd-server",
                    &e,
                    "end QEMU's own NBD server (nbd-server-stop): images other than raw are read through it",
                )
            })?;
        }
        let opened = open(qmp, &mirrored, &places).await;
        let sources = match opened {
            Ok(images) => {
                images.into_iter().enumerate().map(|(disk, image)| source_disk(&places, disk, image))
            }
            // What is in the graph by now is taken out on the way back.
            Err(stop) => return Err(stop),
        };
        let zero: Vec<bool> =
            (0..).zip(&mirrored).map(|(disk, _): (u32, _)| !reserved.known.contains(&disk)).collect();
        let started = StorageSource::start(layout, secret, sources.collect(), &zero);
        let (storage, lanes) =
            started.map_err(|e| Stop::because("disk", &e, "see to the source agent's run_dir"))?;
        let disks = Disks { storage: Arc::new(storage), mirrored, places, copied: false, unsettled: None };
        Ok(Some((disks, lanes)))
    }

    /// The mirror of the disks, for whoever sends.
    pub(super) fn storage(&self) -> Arc<StorageSource> {
        Arc::clone(&self.storage)
    }

    /// Hears what the destination has already, and begins to copy.
    pub(super) async fn begin(
        &mut self,
        qmp: &Qmp,
        destination: &mut Destination,
        known: bool,
    ) -> Result<(), Stop> {
        if known {
            self.hear_contents(destination).await?;
        }
        for (number, disk) in self.mirrored.iter().enumerate() {
            if disk.read_only {
                // Nobody writes it: it is read like whatever could not be sent when it was written.
                self.storage.owe_disk(number);
                continue;
            }
            if disk.sync == Sync::Top {
                self.storage.defer_disk(number);
            }
            let (socket, export) = place(&self.places, number);
            let target = NbdNode { node: &disk.name, socket: &socket, export: &export };
            qmp.add_nbd_node(&target).await.map_err(Stop::qemu)?;
            let job = MirrorJob {
                job: &disk.name,
                device_node: &disk.node,
                target_node: &disk.name,
                filter_node: &format!("{}-filter", disk.name),
                sync: disk.sync,
                speed: None,
            };
            qmp.mirror_disk(&job).await.map_err(|e| broken(&disk.path, &e))?;
        }
        Ok(())
    }

    /// Hears what the images at the destination hold that were there before.
    async fn hear_contents(&self, destination: &mut Destination) -> Result<(), Stop> {
        let mut left = self.storage.layout().block_count();
        loop {
            match destination.receive_within(HOLDS, "say what its images hold").await? {
                Reply::Holds(wire::Holds { last: true, .. }) => return Ok(()),
                Reply::Holds(part) => {
                    // Of each block once.
                    let told = (part.hashes.len() / 16) as u64;
                    let Some(rest) = left.checked_sub(told).filter(|_| told > 0) else {
                        return Err(violation("says more than once what its images hold"));
                    };
                    left = rest;
                    let held = part.decode().is_some_and(|hashes| {
                        usize::try_from(part.disk)
                            .is_ok_and(|disk| self.storage.holds(disk, part.first, &hashes))
                    });
                    if !held {
                        return Err(violation("says what no disk can hold"));
                    }
                }
                other => return Err(violation(&format!("said {other} instead of what its images hold"))),
            }
        }
    }

    /// Whether everything has been copied, so that what the guest writes is all that travels. A job that has met an error, or has ended
    /// by itself, has failed.
    pub(super) async fn is_copied(&mut self, qmp: &Qmp) -> Result<bool, Stop> {
        let jobs = qmp.block_jobs().await.map_err(Stop::qemu)?;
        let mut ready = true;
        for disk in self.mirrored.iter_mut().filter(|disk| !disk.read_only) {
            match jobs.iter().find(|job| job.id == disk.name) {
                Some(job) if !job.met_error() => {
                    ready &= job.ready;
                    // What the guest writes later is copied as it is written.
                    disk.left = if job.ready { 0 } else { job.len.saturating_sub(job.offset) };
                }
                _ => {
                    let message = format!("the copy of disk {} has stopped by an error", disk.path.display());
                    return Err(Stop::Failed(Finding::new(
                        "disk",
                        message,
                        "see the VM's log and those of both agents",
                    )));
                }
            }
        }
        if ready {
            self.storage.copied();
        }
        self.copied |= ready;
        Ok(ready)
    }

    /// Whether that was so when it was last looked at.
    pub(super) fn are_copied(&self) -> bool {
        self.copied
    }

    /// Whether so little is uncertain that it can be made certain while the guest is paused, for `longest` at most. So many blocks
    /// were `settled` just now, which took so long.
    pub(super) fn is_settled(&mut self, settled: u64, took: Duration, longest: Duration) -> bool {
        let uncertain = self.storage.uncertain();
        if uncertain <= UNCERTAIN {
            self.unsettled = None;
            return true;
        }
        let since = *self.unsettled.get_or_insert_with(Instant::now);
        since.elapsed() >= UNSETTLED && settles_within(uncertain, settled, took, longest.mul_f64(SHARE))
    }

    /// How many blocks are uncertain, of a guest that writes so fast that there are always too many for a pause.
    pub(super) fn unsettled(&self) -> Option<u64> {
        self.unsettled.map(|_| self.storage.uncertain())
    }

    /// Whether little enough waits to be sent for a pause to begin, at that many bytes per second. If not, the guest is held back: soon
    /// it is.
    pub(super) fn is_drained(&self, rate: f64, longest: Duration) -> bool {
        let bytes = (rate * longest.as_secs_f64() * DRAINED).min(usize::MAX as f64) as usize;
        let bytes = bytes.max(LEAST_WAITING);
        // What is on its way beside that is what was let in last.
        let drained = self.storage.waiting() <= bytes.saturating_mul(2);
        if !drained {
            self.storage.hold_back(bytes);
        }
        drained
    }

    /// Makes certain some of what can be while the guest runs: little enough for everything else not to wait for it.
    /// Returns how many blocks it was.
    pub(super) async fn settle_some(&self) -> Result<u64, Stop> {
        let storage = Arc::clone(&self.storage);
        let settled = tokio::task::spawn_blocking(move || storage.settle_some(SLICE)).await;
        self.readable(settled.map_err(|e| Stop::because("agent", &e, "see the source agent's log"))?)
    }

    /// Makes certain what can be while the guest runs.
    pub(super) async fn settle(&self) -> Result<(), Stop> {
        let storage = Arc::clone(&self.storage);
        let settled = tokio::task::spawn_blocking(move || storage.settle()).await;
        self.readable(settled.map_err(|e| Stop::because("agent", &e, "see the source agent's log"))?)
    }

    /// Sends again what may be wrong at the destination.
    pub(super) async fn mend(&self) -> Result<(), Stop> {
        let storage = Arc::clone(&self.storage);
        let mended = tokio::task::spawn_blocking(move || storage.mend()).await;
        self.readable(mended.map_err(|e| Stop::because("agent", &e, "see the source agent's log"))?)
    }

    fn readable<T>(&self, result: Result<T, (usize, std::io::Error)>) -> Result<T, Stop> {
        result.map_err(|(disk, error)| match self.mirrored.get(disk) {
            Some(disk) => broken(&disk.path, &error),
            None => Stop::because("disk", &error, "see the source agent's log"),
        })
    }

    /// The guest is paused: ends the copy jobs. With the next barrier the destination has all that came of them; what is not certain of
    /// it is to be settled.
    pub(super) async fn end_jobs(&mut self, qmp: &Qmp) -> Result<(), Stop> {
        // All at the same time: each drains its disk.
        let ends = self.mirrored.iter().filter(|disk| !disk.read_only).map(|disk| async move {
            let why = match qmp.end_mirror(&disk.name, false).await.map_err(Stop::qemu)? {
                MirrorEnd::Synchronised => return Ok(()),
                MirrorEnd::Failed(why) => why,
                MirrorEnd::Cancelled | MirrorEnd::NoJob => "its job ended by itself".to_owned(),
            };
            Err(Stop::Failed(Finding::new(
                "disk",
                format!("the copy of disk {} failed: {why}", disk.path.display()),
                "see the VM's log and those of both agents",
            )))
        });
        futures::future::try_join_all(ends).await?;
        self.storage.copied();
        Ok(())
    }

    /// Takes everything out of QEMU's graph. Whatever was not certain has been settled.
    pub(super) async fn detach(&mut self, qmp: &Qmp) -> Result<(), Stop> {
        clear(qmp, &self.places.read()).await.map_err(Uncleared::stop)
    }

    /// How far it is with each disk.
    pub(super) fn progress(&self) -> Vec<DiskProgress> {
        let uncertain = self.storage.uncertain_bytes();
        self.mirrored
            .iter()
            .zip(self.flows())
            .zip(uncertain)
            .map(|((disk, (path, flow)), uncertain)| DiskProgress {
                name: path.display().to_string(),
                size: disk.size,
                remaining_bytes: disk.left.max(uncertain).min(disk.size),
                raw_bytes: flow.raw_bytes,
                wire_bytes: flow.wire_bytes,
            })
            .collect()
    }

    /// What was read of each disk, and what that took on the link.
    pub(super) fn flows(&self) -> impl Iterator<Item = (&Path, DiskFlow)> {
        self.mirrored
            .iter()
            .enumerate()
            .map(|(disk, mirrored)| (mirrored.path.as_path(), self.storage.flow(disk)))
    }

    /// Compares all of the running disks with the ledger. Returns how many blocks were compared.
    pub(super) async fn audit(&self) -> Result<u64, Stop> {
        let storage = Arc::clone(&self.storage);
        let audited = tokio::task::spawn_blocking(move || storage.audit()).await;
        self.readable(audited.map_err(|e| Stop::because("agent", &e, "see the source agent's log"))?)
    }

    /// Compares all of the frozen disks with the ledger: QEMU has let go of them, so they are read from the images themselves.
    /// `record` puts the process on record that this may take.
    pub(super) async fn prove(
        &self,
        record: impl FnOnce(&Process) -> Result<(), NotRecorded>,
    ) -> Result<DiskProof, Stop> {
        let needs_daemon = self.mirrored.iter().any(|disk| disk.format != "raw");
        let daemon = match needs_daemon {
            true => Some(
                self.serve_frozen(record)
                    .await
                    .map_err(|e| Stop::because("storage-daemon", &e, "see the source agent's log"))?,
            ),
            false => None,
        };
        let proved = async {
            let mut images: Vec<Box<dyn Image>> = Vec::new();
            for disk in &self.mirrored {
                images.push(match disk.format.as_str() {
                    "raw" => Box::new(
                        RawImage::readable(&disk.path, disk.direct).map_err(|e| broken(&disk.path, &e))?,
                    ),
                    _ => Box::new(ServedImage::new(
                        Client::connect(&self.places.storage().join(NBD), &disk.name)
                            .map_err(|e| broken(&disk.path, &e))?,
                        Room::Thin,
                    )),
                });
            }
            let storage = Arc::clone(&self.storage);
            let proved = tokio::task::spawn_blocking(move || storage.prove(&images)).await;
            self.readable(proved.map_err(|e| Stop::because("agent", &e, "see the source agent's log"))?)
        };
        let proof = proved.await;
        if let Some(daemon) = daemon
            && let Err(e) = daemon.end().await
        {
            tracing::warn!(error = chain(&e), "after the proof");
        }
        let _ = std::fs::remove_dir_all(self.places.storage());
        proof
    }

    async fn serve_frozen(
        &self,
        record: impl FnOnce(&Process) -> Result<(), NotRecorded>,
    ) -> Result<StorageDaemon, qemu::StorageDaemonError> {
        let directory = self.places.storage();
        let made = std::fs::DirBuilder::new().mode(0o700).recursive(true).create(&directory);
        made.map_err(|source| qemu::StorageDaemonError::File { path: directory.clone(), source })?;
        let daemon = StorageDaemon::start(&self.places.binary, &directory, record).await?;
        let served = async {
            for disk in self.mirrored.iter().filter(|disk| disk.format != "raw") {
                let serve = Serve {
                    path: disk.path.clone(),
                    format: disk.format.clone(),
                    backing: ServedBacking::AsNamed,
                    writable: false,
                    // The machine's QEMU is still there, and has given it up.
                    force_share: true,
                    locked: false,
                    export: disk.name.clone(),
                };
                daemon.serve(&serve).await?;
            }
            Ok(())
        };
        match served.await {
            Ok(()) => Ok(daemon),
            Err(e) => {
                daemon.process().kill();
                Err(e)
            }
        }
    }

    /// The images that are mirrored.
    pub(super) fn paths(&self) -> impl Iterator<Item = &Path> {
        self.mirrored.iter().map(|disk| disk.path.as_path())
    }

    /// Gives everything back. Must not be called while something is in QEMU's graph.
    pub(super) async fn end(self) {
        let (storage, read) = (self.storage, self.places.read());
        let _ = tokio::task::spawn_blocking(move || {
            // Others may hold it for a moment longer; the sockets are to be free for another attempt.
            storage.end_serving();
            drop(storage);
        })
        .await;
        let _ = std::fs::remove_file(read);
    }
}

/// Whether so many blocks can be settled in a time, as fast as others were.
fn settles_within(blocks: u64, settled: u64, took: Duration, time: Duration) -> bool {
    blocks as f64 * took.as_secs_f64() <= settled as f64 * time.as_secs_f64()
}

fn place(places: &Places, disk: usize) -> (PathBuf, String) {
    let name = format!("disk{disk}");
    (places.directory.join(&name), name)
}

fn source_disk(places: &Places, disk: usize, image: Box<dyn Image>) -> SourceDisk {
    let (socket, export) = place(places, disk);
    SourceDisk { socket, export, image }
}

/// Opens the machine's own images to be read, as the guest sees them.
async fn open(qmp: &Qmp, mirrored: &[Mirrored], places: &Places) -> Result<Vec<Box<dyn Image>>, Stop> {
    let mut images: Vec<Box<dyn Image>> = Vec::new();
    for disk in mirrored {
        if disk.format == "raw" {
            let image = RawImage::readable(&disk.path, disk.direct).map_err(|e| broken(&disk.path, &e))?;
            images.push(Box::new(image));
            continue;
        }
        qmp.add_export(&disk.node, &disk.name, false).await.map_err(Stop::qemu)?;
        let (socket, name) = (places.read(), disk.name.clone());
        let connecting = tokio::task::spawn_blocking(move || Client::connect(&socket, &name)).await;
        let client = connecting.map_err(|e| Stop::because("agent", &e, "see the source agent's log"))?;
        images.push(Box::new(ServedImage::new(client.map_err(|e| broken(&disk.path, &e))?, Room::Thin)));
    }
    Ok(images)
}

/// Blocks by their index on the wire.
pub(super) fn blocks(wrong: &wire::WrongBlocks) -> Vec<BlockIndex> {
    wrong.blocks.iter().copied().map(BlockIndex).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_begins_with_what_it_has_time_for() {
        let (second, quarter) = (Duration::from_secs(1), Duration::from_millis(250));
        assert!(settles_within(250, 1000, second, quarter));
        assert!(!settles_within(251, 1000, second, quarter));
        assert!(!settles_within(100, 0, quarter, quarter), "nothing says that it can be settled at all");
    }
}
