//! Device state at the source: how QEMU is made to write it.
//!
//! Where all RAM is in shared, named files QEMU migrates, and leaves that out of its stream (`x-ignore-shared`). Other RAM it would send
//! whole. There the guest is stopped, and QEMU saves its devices alone; what it keeps in RAM blocks of its own, such as video memory, is read
//! from its memory and put beside them ([`mirror::device::saved`]).

use std::fs::File;
use std::io::Read as _;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::time::Instant;

use mirror::device::source::DeviceSource;
use mirror::device::{MAX_HELD, MAX_PART, saved};
use qemu::{Event, LocatedBlock, Process, Qmp};
use tokio::sync::broadcast;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

use super::peer::{Destination, Sender};
use super::stop::Stop;
use super::switch::{self, UNTIL_PAUSED};
use crate::wire::Request;
use finding::{Finding, chain};

/// How a machine's devices are saved.
pub(super) enum Saving {
    /// QEMU migrates to this socket.
    Migration(PathBuf),
    /// QEMU saves them.
    Alone(Alone),
}

/// What has to be known of a machine whose RAM is not in shared, named files.
pub(super) struct Alone {
    pub(super) process: Process,
    /// The versioned machine type.
    pub(super) machine: String,
    /// Names of the RAM blocks that are mirrored.
    pub(super) mirrored: Vec<String>,
}

/// Device state on its way.
pub(super) enum Devices {
    /// By a migration, which is carried as it comes.
    Migrating { events: broadcast::Receiver<Event>, pump: AbortOnDropHandle<Result<u64, Stop>> },
    /// By themselves.
    Alone { own: OwnBlocks },
}

/// Device state that nothing was done about yet but what can be before the guest is paused.
pub(super) enum Ready {
    Migration(DeviceSource),
    Alone(OwnBlocks),
}

/// RAM blocks of the machine's own: video memory, firmware, ACPI tables.
pub(super) struct OwnBlocks {
    memory: File,
    blocks: Vec<LocatedBlock>,
    /// What the destination has of them.
    sent: Vec<saved::Block>,
    bytes: u64,
}

impl Devices {
    /// Makes ready what is needed for it, while the guest runs.
    pub(super) async fn prepare(
        qmp: &Qmp,
        saving: &Saving,
        destination: &Destination,
    ) -> Result<Ready, Stop> {
        match saving {
            Saving::Migration(socket) => {
                // An agent that was killed here has left its socket; this one has the name to itself, so nobody listens there.
                let _ = std::fs::remove_file(socket);
                let device = DeviceSource::listen(socket)
                    .map_err(|e| Stop::because("device-state", &e, "see to the source agent's run_dir"))?;
                Ok(Ready::Migration(device))
            }
            Saving::Alone(alone) => {
                let mut own = OwnBlocks::find(qmp, alone).await?;
                own.sent = own.read()?;
                let beginning = saved::beginning(&alone.machine, &own.sent);
                own.send(&destination.sender(), &beginning).await?;
                Ok(Ready::Alone(own))
            }
        }
    }

    /// Has QEMU write its devices' state. Returns how many bytes it is, with the machine's own RAM.
    pub(super) async fn save(&mut self, qmp: &Qmp, destination: &Sender) -> Result<u64, Stop> {
        match self {
            Devices::Migrating { events, pump } => {
                qmp.migrate_continue().await.map_err(Stop::qemu)?;
                let bytes = pump
                    .await
                    .unwrap_or_else(|e| Err(Stop::because("device-state", &e, "see the source's log")))?;
                switch::saved(events).await?;
                Ok(bytes)
            }
            Devices::Alone { own } => own.save(qmp, destination).await,
        }
    }
}

impl Ready {
    /// Pauses the guest. `told` is whether QEMU may have been told to. Returns when it was paused.
    pub(super) async fn pause(
        self,
        qmp: &Qmp,
        mut events: broadcast::Receiver<Event>,
        destination: Sender,
        told: &mut bool,
    ) -> Result<(Devices, Instant), Stop> {
        let asked = Instant::now();
        let paused = async {
            match self {
                Ready::Migration(device) => {
                    switch::begin(qmp, &device.uri(), told).await?;
                    let pump = AbortOnDropHandle::new(tokio::spawn(pump(device, destination)));
                    let paused_at = switch::paused(&mut events, asked).await?;
                    Ok((Devices::Migrating { events, pump }, paused_at))
                }
                Ready::Alone(own) => {
                    // A migration by QEMU would refuse by itself.
                    let blocked = qmp.query_migrate().await.map_err(Stop::qemu)?.blocked;
                    if let Some(reason) = blocked.first() {
                        return Err(Stop::Failed(crate::blockers::not_migratable(reason)));
                    }
                    *told = true;
                    qmp.stop().await.map_err(Stop::qemu)?;
                    match switch::stopped(&mut events, asked) {
                        Some(paused_at) => Ok((Devices::Alone { own }, paused_at)),
                        // It is left as it is.
                        None => {
                            *told = false;
                            Err(switch::was_paused("paused"))
                        }
                    }
                }
            }
        };
        timeout(UNTIL_PAUSED, paused).await.map_err(|_| switch::never_paused())?
    }
}

impl OwnBlocks {
    async fn find(qmp: &Qmp, alone: &Alone) -> Result<OwnBlocks, Stop> {
        let hint = "see the VM's log, and report its command line";
        let failed = |e: &dyn std::error::Error| Stop::because("own-ram", e, hint);
        let blocks = qemu::located_blocks(qmp, &alone.process).await.map_err(|e| failed(&e))?;
        let is_mirrored = |block: &LocatedBlock| {
            alone.mirrored.iter().any(|id| block.name.strip_prefix("/objects/").unwrap_or(&block.name) == id)
        };
        let blocks: Vec<LocatedBlock> = blocks.into_iter().filter(|block| !is_mirrored(block)).collect();
        let bytes: u64 = blocks.iter().map(|block| block.used).sum();
        if bytes > MAX_HELD as u64 {
            let message =
                format!("the VM has {bytes} bytes of video memory and firmware, more than {MAX_HELD}");
            return Err(Stop::Failed(Finding::new("own-ram", message, "start it with less video memory")));
        }
        let memory = File::open(format!("/proc/{}/mem", alone.process.pid)).map_err(|e| failed(&e))?;
        Ok(OwnBlocks { memory, blocks, sent: Vec::new(), bytes: 0 })
    }

    fn read(&self) -> Result<Vec<saved::Block>, Stop> {
        let read = |block: &LocatedBlock| {
            let mut content = vec![0; usize::try_from(block.used).unwrap_or(0)];
            self.memory.read_exact_at(&mut content, block.address).map_err(|e| {
                let message = format!("RAM block {} cannot be read: {}", block.name, chain(&e));
                Stop::Failed(Finding::new("own-ram", message, "see the VM's log"))
            })?;
            Ok(saved::Block { name: block.name.clone(), content })
        };
        tokio::task::block_in_place(|| self.blocks.iter().map(read).collect())
    }

    /// Has QEMU save, and sends that with what has changed of the machine's own RAM.
    async fn save(&mut self, qmp: &Qmp, destination: &Sender) -> Result<u64, Stop> {
        let failed =
            |e: &dyn std::error::Error| Stop::because("device-state", e, "see the VM's log on the source");
        let (mut file, to_write) = file_in_memory().map_err(|e| failed(&e))?;
        qmp.save_devices(to_write.into()).await.map_err(Stop::qemu)?;
        let mut state = Vec::new();
        file.read_to_end(&mut state).map_err(|e| failed(&e))?;
        let Some(state) = state.strip_prefix(&saved::HEADER) else {
            let message = "what QEMU has saved of its devices is no migration stream";
            return Err(Stop::Failed(Finding::new(
                "device-state",
                message,
                "see the VM's log on the source",
            )));
        };
        // After it: saving may write to memory.
        let rest = saved::rest(&self.sent, &self.read()?);
        for part in [&rest[..], state, &saved::end()] {
            self.send(destination, part).await?;
        }
        Ok(self.bytes)
    }

    async fn send(&mut self, destination: &Sender, bytes: &[u8]) -> Result<(), Stop> {
        self.bytes += bytes.len() as u64;
        for part in bytes.chunks(MAX_PART) {
            destination.send(Request::DeviceState(part.to_vec())).await?;
        }
        Ok(())
    }
}

/// A file without a name, and once more for writing only: QEMU truncates what it writes to, which a pipe cannot be, and takes no descriptor
/// that can do more than it asks for.
fn file_in_memory() -> std::io::Result<(File, File)> {
    let file = File::from(rustix::fs::memfd_create("device-state", rustix::fs::MemfdFlags::CLOEXEC)?);
    let again = format!("/proc/self/fd/{}", file.as_raw_fd());
    Ok((file, std::fs::OpenOptions::new().write(true).open(again)?))
}

/// Sends on what QEMU writes, to its end. Returns how many bytes it were.
async fn pump(mut device: DeviceSource, destination: Sender) -> Result<u64, Stop> {
    let failed = |e: std::io::Error| Stop::because("device-state", &e, "see the VM's log on the source");
    while let Some(part) = device.next().await.map_err(failed)? {
        destination.send(Request::DeviceState(part)).await?;
    }
    Ok(device.bytes())
}
