//! Device state at the source: how the guest is paused, and QEMU made to write it.
//!
//! Where all RAM is in shared, named files QEMU migrates, and leaves that out of its stream (`x-ignore-shared`). Other RAM it would send
//! whole. There the guest is stopped, and QEMU saves its devices alone; what it keeps in RAM blocks of its own, such as video memory, is read
//! from its memory and put beside them ([`mirror::device::saved`]). While QEMU migrates it keeps others from its guest; while it only stands,
//! anybody with a monitor may let it run, plug something in or migrate it. Before the devices are saved, and once more before the machine is
//! handed over, it is made sure that nobody has let it run, migrated it or changed its RAM.

use std::fs::File;
use std::io::Read as _;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use mirror::device::source::DeviceSource;
use mirror::device::{MAX_HELD, MAX_PART, saved};
use qemu::qmp::MigrationState;
use qemu::{Event, LocateError, LocatedBlock, Process, Qmp, RamTable};
use tokio::sync::broadcast::{self, error::TryRecvError};
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

use super::peer::Sender;
use super::stop::Stop;
use super::switch;
use finding::{Finding, chain, kind};
use host::handed_over;
use movable::blockers;
use protocol::deadlines::{QEMU_ENDING, UNTIL_PAUSED};
use protocol::wire::Request;

/// Most that devices themselves take of what a destination holds back.
const DEVICES: usize = 16 << 20;

/// What has to be known of a machine whose RAM is not in shared, named files.
pub(super) struct Alone {
    pub(super) process: Process,
    /// The versioned machine type.
    pub(super) machine: String,
    /// Names of the RAM blocks that are mirrored.
    pub(super) mirrored: Vec<String>,
}

/// Device state, from when it is made ready until it is saved.
#[expect(clippy::large_enum_variant, reason = "a migration has one of them, in its pause")]
pub(super) enum Devices {
    Migration(ByMigration),
    Alone(ByThemselves),
}

/// By a migration, which is carried as it comes.
pub(super) struct ByMigration {
    events: broadcast::Receiver<Event>,
    /// Where QEMU is to send it, until it does.
    socket: Option<DeviceSource>,
    pump: Option<AbortOnDropHandle<Result<u64, Stop>>>,
}

/// By themselves, of a guest that only stands.
pub(super) struct ByThemselves {
    events: broadcast::Receiver<Event>,
    memory: Arc<File>,
    /// RAM blocks of the machine's own: video memory, firmware, ACPI tables.
    own: Vec<LocatedBlock>,
    /// What the destination has of them.
    sent: Vec<saved::Block>,
    /// QEMU's table of all RAM blocks, and how it says that migration stands, when that was made ready.
    table: RamTable,
    migration: MigrationState,
    process: Process,
    session: Uuid,
    bytes: u64,
}

impl Devices {
    /// Devices that a migration by QEMU saves, to this socket.
    pub(super) fn by_migration(qmp: &Qmp, socket: &Path) -> Result<Devices, Stop> {
        // An agent that was killed here has left its socket; this one has the name to itself, so nobody listens there.
        let _ = std::fs::remove_file(socket);
        let socket = DeviceSource::listen(socket)
            .map_err(|e| Stop::because("device-state", &e, "see to the source agent's run_dir"))?;
        Ok(Devices::Migration(ByMigration { events: qmp.events(), socket: Some(socket), pump: None }))
    }

    /// Devices that are saved by themselves. What the machine has of RAM of its own is sent now, which may take long.
    pub(super) async fn by_themselves(
        qmp: &Qmp,
        alone: &Alone,
        session: Uuid,
        destination: &Sender,
    ) -> Result<Devices, Stop> {
        let mut devices = ByThemselves::find(qmp, alone, session).await?;
        devices.sent = devices.read().await?;
        let beginning = saved::beginning(&alone.machine, &devices.sent);
        devices.send(destination, &beginning).await?;
        Ok(Devices::Alone(devices))
    }

    /// Pauses the guest. `told` is whether QEMU may have been told to. Returns when it was paused.
    pub(super) async fn pause(
        &mut self,
        qmp: &Qmp,
        destination: Sender,
        told: &mut bool,
    ) -> Result<Instant, Stop> {
        let paused = async {
            match self {
                Devices::Migration(devices) => devices.pause(qmp, destination, told).await,
                Devices::Alone(devices) => devices.pause(qmp, told).await,
            }
        };
        timeout(UNTIL_PAUSED, paused).await.map_err(|_| switch::never_paused())?
    }

    /// Has QEMU write its devices' state. Returns how many bytes it is, with the machine's own RAM.
    pub(super) async fn save(&mut self, qmp: &Qmp, destination: &Sender) -> Result<u64, Stop> {
        match self {
            Devices::Migration(devices) => devices.save(qmp).await,
            Devices::Alone(devices) => devices.save(qmp, destination).await,
        }
    }

    /// That nobody else has touched the guest since it was paused, and that its QEMU was there when its memory was read for the last time:
    /// memory of a process that has been killed may be gone already, and looks as if it had never been touched. Where QEMU migrates it sees
    /// to the one itself, and its memory is in files.
    pub(super) async fn is_untouched(&mut self, qmp: &Qmp) -> Result<(), Stop> {
        match self {
            Devices::Migration(_) => Ok(()),
            Devices::Alone(devices) => devices.is_untouched(qmp).await,
        }
    }

    /// That nobody else has touched the guest. A QEMU that has ended since can let it run no more, and is needed no more if the copy is
    /// `complete`.
    pub(super) async fn may_leave(&mut self, qmp: &Qmp, complete: bool) -> Result<(), Stop> {
        match self {
            Devices::Migration(_) => Ok(()),
            Devices::Alone(devices) => devices.may_leave(qmp, complete).await,
        }
    }

    /// Whether devices are saved by themselves.
    pub(super) fn are_alone(&self) -> bool {
        matches!(self, Devices::Alone(_))
    }
}

impl ByMigration {
    async fn pause(&mut self, qmp: &Qmp, destination: Sender, told: &mut bool) -> Result<Instant, Stop> {
        let Some(socket) = self.socket.take() else { return Err(switch::never_paused()) };
        let asked = Instant::now();
        switch::begin(qmp, &socket.uri(), told).await?;
        self.pump = Some(AbortOnDropHandle::new(tokio::spawn(pump(socket, destination))));
        switch::paused(&mut self.events, asked).await
    }

    async fn save(&mut self, qmp: &Qmp) -> Result<u64, Stop> {
        qmp.migrate_continue().await.map_err(Stop::qemu)?;
        let Some(pump) = self.pump.as_mut() else { return Err(switch::never_paused()) };
        let bytes =
            pump.await.unwrap_or_else(|e| Err(Stop::because("device-state", &e, "see the source's log")))?;
        switch::saved(&mut self.events).await?;
        Ok(bytes)
    }
}

impl ByThemselves {
    async fn find(qmp: &Qmp, alone: &Alone, session: Uuid) -> Result<ByThemselves, Stop> {
        let events = qmp.events();
        let failed = |e: &dyn std::error::Error| {
            Stop::because("own-ram", e, "see the VM's log, and report its command line")
        };
        let unknown =
            |e: &LocateError| Stop::because("own-ram", e, "see the VM's log, and report its command line");
        let table = RamTable::of(qmp).await.map_err(|e| unknown(&e))?;
        let blocks = table.clone().located(&alone.process).await.map_err(|e| unknown(&e))?;
        let own = own(&blocks, &alone.mirrored);
        let memory = File::open(format!("/proc/{}/mem", alone.process.pid)).map_err(|e| failed(&e))?;
        let migration = qmp.query_migrate().await.map_err(Stop::qemu)?;
        Ok(ByThemselves {
            events,
            memory: Arc::new(memory),
            own,
            sent: Vec::new(),
            table,
            migration,
            process: alone.process.clone(),
            session,
            bytes: 0,
        })
    }

    async fn pause(&mut self, qmp: &Qmp, told: &mut bool) -> Result<Instant, Stop> {
        // A migration by QEMU would see to that by itself.
        let now = qmp.query_migrate().await.map_err(Stop::qemu)?;
        if let Some(reason) = now.blocked.first() {
            return Err(Stop::Failed(blockers::not_migratable(reason)));
        }
        self.is_not_migrated(now)?;
        handed_over::mark(qmp, self.session).await.map_err(Stop::qemu)?;
        // What was let run before was so by a scan of ours.
        loop {
            match self.events.try_recv() {
                Ok(event) => gone(&event)?,
                Err(TryRecvError::Lagged(_)) => {}
                Err(TryRecvError::Empty | TryRecvError::Closed) => break,
            }
        }
        let asked = Instant::now();
        *told = true;
        if !qmp.quiesce().await.map_err(Stop::qemu)? {
            // Somebody else has stopped it, or it has stopped itself: it is left so.
            *told = false;
            let status = qmp.status().await.map_err(Stop::qemu)?.status;
            return Err(switch::was_paused(&status));
        }
        loop {
            match self.events.try_recv() {
                // QEMU tells of it before it answers.
                Ok(event) if event.name == "STOP" && event.ours => {
                    return Ok(switch::instant_of(&event, asked));
                }
                Ok(event) => gone(&event)?,
                Err(TryRecvError::Lagged(_)) => {}
                Err(TryRecvError::Empty | TryRecvError::Closed) => return Ok(asked),
            }
        }
    }

    async fn is_untouched(&mut self, qmp: &Qmp) -> Result<(), Stop> {
        let status = qmp.status().await.map_err(Stop::qemu);
        let migration = qmp.query_migrate().await.map_err(Stop::qemu);
        // What QEMU has said before it answered, or ended.
        self.was_left_alone()?;
        if status?.running {
            return Err(touched("has been let run"));
        }
        self.is_not_migrated(migration?)
    }

    async fn may_leave(&mut self, qmp: &Qmp, complete: bool) -> Result<(), Stop> {
        let untouched = self.is_untouched(qmp).await;
        // QEMU itself has not been let run while it was heard, and nobody can any more.
        match untouched {
            Err(Stop::Failed(finding))
                if complete && !is_told(&finding) && self.process.wait_for_end(QEMU_ENDING).await =>
            {
                tracing::warn!(why = finding.message, "QEMU has ended after its guest's copy was complete");
                Ok(())
            }
            other => other,
        }
    }

    /// That no event says otherwise.
    fn was_left_alone(&mut self) -> Result<(), Stop> {
        loop {
            match self.events.try_recv() {
                Ok(event) if event.name == "RESUME" => return Err(touched("has been let run")),
                // Its copy is of before that. QEMU resets a guest that only stands.
                Ok(event) if event.name == "RESET" => return Err(touched("has been reset")),
                Ok(event) => gone(&event)?,
                Err(TryRecvError::Lagged(_)) => return Err(touched("has said too much to be listened to")),
                Err(TryRecvError::Empty | TryRecvError::Closed) => return Ok(()),
            }
        }
    }

    /// That no other program migrates the machine, or has since it was looked at first.
    fn is_not_migrated(&self, now: MigrationState) -> Result<(), Stop> {
        let before = &self.migration;
        if (&now.status, now.total_ms, &now.ram) == (&before.status, before.total_ms, &before.ram) {
            return Ok(());
        }
        let message = "another program has migrated the VM, or does, while it was to be handed over";
        let hint = "see where it runs, and that it runs once; migrate it again when that is over";
        Err(Stop::Failed(Finding::new(kind::MIGRATES_ALREADY, message, hint)))
    }

    async fn save(&mut self, qmp: &Qmp, destination: &Sender) -> Result<u64, Stop> {
        let failed =
            |e: &dyn std::error::Error| Stop::because("device-state", e, "see the VM's log on the source");
        self.is_untouched(qmp).await?;
        // What was plugged in since, or has grown, is in no copy.
        let table = RamTable::of(qmp).await.map_err(|e| failed(&e))?;
        if table != self.table {
            return Err(touched("has other RAM than when its switch-over began"));
        }
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
        let rest = saved::rest(&self.sent, &self.read().await?);
        for part in [&rest[..], state, &saved::end()] {
            self.send(destination, part).await?;
        }
        Ok(self.bytes)
    }

    /// What is in the machine's own blocks now.
    async fn read(&self) -> Result<Vec<saved::Block>, Stop> {
        let (memory, own) = (Arc::clone(&self.memory), self.own.clone());
        let read = move |block: LocatedBlock| {
            let mut content = vec![0; usize::try_from(block.used).unwrap_or(0)];
            memory.read_exact_at(&mut content, block.address).map_err(|e| {
                let message = format!("RAM block {} cannot be read: {}", block.name, chain(&e));
                Stop::Failed(Finding::new("own-ram", message, "see the VM's log"))
            })?;
            Ok(saved::Block { name: block.name, content })
        };
        let reading = tokio::task::spawn_blocking(move || own.into_iter().map(read).collect());
        reading.await.map_err(|e| Stop::because("agent", &e, "see the source agent's log"))?
    }

    async fn send(&mut self, destination: &Sender, bytes: &[u8]) -> Result<(), Stop> {
        self.bytes += bytes.len() as u64;
        for part in bytes.chunks(MAX_PART) {
            destination.send(Request::DeviceState(part.to_vec())).await?;
        }
        Ok(())
    }
}

/// Why the devices of a machine could not be saved alone, found while there is time: QEMU does not say where its RAM is, or has too much of
/// its own.
///
/// # Errors
/// The finding.
pub(crate) async fn may_save_alone(
    qmp: &Qmp,
    process: &Process,
    machine: &str,
    mirrored: &[String],
) -> Result<(), Finding> {
    if !is_known(machine) {
        return Err(Finding::new(
            "private-ram",
            format!(
                "RAM that is no shared file with a name is not mirrored of a machine of type {machine}, whose state QEMU does not save alone"
            ),
            "start it with RAM in a memory-backend-file with share=on",
        ));
    }
    let unknown = |e: LocateError| {
        Finding::new("ram-not-mirrorable", chain(&e), "see the VM's log, and report its command line")
    };
    let table = RamTable::of(qmp).await.map_err(unknown)?;
    let located = table.located(process).await.map_err(unknown)?;
    let bytes: u64 = own(&located, mirrored).iter().map(|block| block.used).sum();
    // What the destination holds back in the pause is what has changed of it, at most all, and the devices.
    let most = (MAX_HELD - DEVICES) as u64;
    if bytes > most {
        return Err(Finding::new(
            "own-ram",
            format!("the VM has {} MiB of video memory and firmware, more than {}", bytes >> 20, most >> 20),
            "start it with less video memory",
        ));
    }
    if !qmp
        .has_command(qemu::SAVE_DEVICES)
        .await
        .map_err(|e| Finding::new("qemu", chain(&e), "see the VM's log"))?
    {
        return Err(Finding::new(
            "private-ram",
            format!("this QEMU does not have {}, by which its devices are saved alone", qemu::SAVE_DEVICES),
            "start it with RAM in a memory-backend-file with share=on",
        ));
    }
    Ok(())
}

/// Whether all state of a machine of that type is its devices' and RAM: others save more than RAM in parts (`spapr/htab`, `s390-stattrib`),
/// or have their size of pages in the stream. Machines of before 2.4 have no sections' ends in theirs.
fn is_known(machine: &str) -> bool {
    let version = |text: &str| {
        let (major, minor) = text.split('+').next()?.split_once('.')?;
        Some((major.parse::<u32>().ok()?, minor.parse::<u32>().ok()?))
    };
    let pc = ["pc-i440fx-", "pc-q35-", "pc-"].iter().find_map(|family| machine.strip_prefix(family));
    match pc.map(version) {
        Some(Some(version)) => version >= (2, 4),
        Some(None) => true,
        None => machine == "microvm" || machine == "isapc" || machine.starts_with("microvm-"),
    }
}

/// Those that no mirror carries.
fn own(blocks: &[LocatedBlock], mirrored: &[String]) -> Vec<LocatedBlock> {
    let is_mirrored = |block: &&LocatedBlock| mirrored.iter().any(|id| block.is_of(id));
    blocks.iter().filter(|block| !is_mirrored(block)).cloned().collect()
}

/// What ends a hand-over: the guest has switched itself off in the moment in which it was stopped, or a device is gone. What is plugged in
/// instead of that may have memory at another place.
fn gone(event: &Event) -> Result<(), Stop> {
    match event.name.as_str() {
        // Of a guest that only stands QEMU says no more of it: with `-no-shutdown` its status stays `paused`.
        "SHUTDOWN" => Err(switch::has_shut_down()),
        "DEVICE_DELETED" => Err(touched("has lost a device")),
        _ => Ok(()),
    }
}

/// Whether QEMU itself has told of it.
fn is_told(finding: &Finding) -> bool {
    [kind::TOUCHED, kind::MIGRATES_ALREADY, switch::VM_ENDED].contains(&&*finding.kind)
}

/// Somebody else has done something to a machine that was paused to be handed over.
fn touched(what: &str) -> Stop {
    let message = format!("the VM {what} while it was to be handed over");
    Stop::Failed(Finding::new(kind::TOUCHED, message, "see who else has its monitor, and migrate it again"))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_switches_itself_off_or_loses_a_device_is_not_handed_over() {
        let after = |name: &str| {
            let (timestamp, received) = (std::time::SystemTime::now(), Instant::now());
            let data = serde_json::Value::Null;
            let event = Event { name: name.into(), timestamp, received, data, ours: false };
            match gone(&event) {
                Err(Stop::Failed(finding)) => Some((finding.kind.clone(), is_told(&finding))),
                Ok(()) => None,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(after("SHUTDOWN"), Some((switch::VM_ENDED.into(), true)));
        assert_eq!(after("DEVICE_DELETED"), Some((kind::TOUCHED.into(), true)));
        assert_eq!((after("STOP"), after("BALLOON_CHANGE")), (None, None));
    }

    #[test]
    fn only_of_machines_whose_state_is_devices_and_ram_devices_are_saved_alone() {
        for known in
            ["pc-i440fx-7.2", "pc-q35-10.0", "pc-i440fx-2.4", "pc-q35-9.0+pve1", "microvm", "pc-i440fx-jammy"]
        {
            assert!(is_known(known), "{known}");
        }
        for unknown in ["pc-i440fx-2.3", "pc-1.3", "pseries-7.2", "virt-8.0", "s390-ccw-virtio-7.2"] {
            assert!(!is_known(unknown), "{unknown}");
        }
    }
}
