//! The source's controller: describes the machine, mirrors it, hands it over, gives everything back.
//!
//! `controller` is the flat list of phases. The longer ones stand beside it: `synchronize`, the `switch`-over, the
//! `hand_over`. So does what they need: the `peer` at the other end of the link, the memory's `rounds`, the `disks`, the
//! `estimate` that says when to switch over, the operator's `orders`, the `account` that is given of it all, the copies of `earlier` migrations, and
//! the `settlement` of a hand-over whose end was not heard of.

mod account;
mod boot_files;
mod controller;
pub(crate) mod devices;
pub(crate) mod disks;
mod earlier;
mod estimate;
mod forwarding;
mod hand_over;
mod health;
mod heard;
mod network;
mod orders;
mod peer;
mod post_copy;
mod relay;
mod rounds;
mod settlement;
mod stop;
mod switch;
mod synchronize;
mod throttle;

use std::sync::Arc;
use std::time::{Duration, Instant};

use qemu::{Qmp, QmpError};
use uuid::Uuid;

pub(crate) use forwarding::unforward;
pub use post_copy::supply;
pub use settlement::{Settled, release, settle, supplied};
pub(crate) use settlement::{abandon, abandon_all, whose, withdraw};

use crate::linked::LinkedHost;
use crate::machine::{self, Machine};
use controller::Controller;
use finding::{Failure, Finding, Stage, chain};
use host::Vm;
use host::firewall;
use host::guest_ram;
use host::supervised;
use peer::Destination;
use protocol::wire;
use session::options::{Goal, Options};
use session::report::DiskMode;
use session::{PlannedDisk, Readiness, Session};

/// How long QEMU may take to go back to running.
const RESUME: Duration = Duration::from_secs(10);
/// Between looks at a QEMU that is going back.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// Begins a migration, or a standing mirror. The session goes on whether or not its handle is kept.
#[must_use]
pub fn start(host: Arc<LinkedHost>, vm: Vm, to: String, goal: Goal, options: Options) -> Session {
    Controller::start(host, vm, to, goal, options)
}

/// Finds every reason why a migration would fail, as far as can be told without moving memory. The destination sets
/// everything aside as for a migration, and gives it back at once.
///
/// # Errors
/// [`Failure`] when the destination cannot even be asked.
pub async fn check(
    host: Arc<LinkedHost>,
    mut vm: Vm,
    to: &str,
    options: &Options,
) -> Result<Readiness, Failure> {
    // The journal is the truth; the caller's copy may be older than what has happened since.
    if let Some(record) = host.journal.get(&vm.record.name) {
        vm.record = record;
    }
    let refused = |finding| Failure { stage: Stage::Refused, finding, more: Vec::new() };
    let connected = Destination::connect(&host, to).await;
    let (machine, mut findings) = Machine::describe(&host, &vm, options).await;
    let mut destination = connected.map_err(refused)?;
    let mut disks = Vec::new();
    if let Some(machine) = machine {
        let mut request = peer::reserve_request(
            &host,
            Uuid::new_v4(),
            &vm,
            &machine,
            options,
            1,
            &[0; mirror::hash::SECRET_LENGTH],
            true,
        );
        match firewall::describe(&host, &vm.record.name).await {
            Ok(document) => request.nft = document,
            Err(finding) => findings.push(finding),
        }
        let session = Uuid::from_slice(&request.session).unwrap_or_default();
        if options.forward && !machine.taps.is_empty() {
            request.forward = Some(forwarding::request(&host));
            if findings.is_empty()
                && let Err(finding) =
                    forwarding::begin(&host, &vm, &destination, session, &machine.taps).await
            {
                findings.push(finding);
            }
        }
        if machine.ram.is_empty() {
            // The destination cannot be asked about a machine without RAM; what was found says why there is none.
        } else {
            let reserved = destination.reserve(request, &vm.qmp).await;
            host.forwards.undo(session).await;
            match reserved {
                Ok(reserved) => disks = planned(&machine, &reserved),
                Err(stop::Stop::Refused(more)) => findings.extend(more),
                Err(other) => return Err(other.into_failure(Stage::Refused)),
            }
        }
    }
    // Both sides look at the command line, and say the same of it.
    let mut told: Vec<Finding> = Vec::new();
    for finding in findings {
        if !told.contains(&finding) {
            told.push(finding);
        }
    }
    if !told.is_empty() {
        disks.clear();
    }
    let mut warnings = guest_ram::exposed(&vm.record, &vm.spec);
    let supervision = supervised::of(&vm.record, &vm.spec, machine::leaves(options));
    warnings.extend(supervision.filter(|found| !found.refused).map(|found| found.finding));
    Ok(Readiness { destination: destination.name().to_owned(), findings: told, disks, warnings })
}

/// What becomes of the disks of a machine, by what the destination has said.
fn planned(machine: &Machine, reserved: &wire::Reserved) -> Vec<PlannedDisk> {
    let disks = (0..).zip(&machine.disks).map(|(number, disk): (u32, _)| {
        let mirrored = reserved.mirrored.iter().position(|mirrored| *mirrored == number);
        let exists = |place| u32::try_from(place).is_ok_and(|place| reserved.existing.contains(&place));
        PlannedDisk {
            name: disk.image.display().to_string(),
            size: disk.size,
            mode: if mirrored.is_some() { DiskMode::Mirrored } else { DiskMode::Shared },
            exists: mirrored.is_none_or(exists),
        }
    });
    disks.collect()
}

/// Brings a machine that a switch-over has paused back to running. Nothing else may have been told to run it.
pub(crate) async fn resume_here(qmp: &Qmp) -> Result<(), QmpError> {
    end_migration(qmp, Instant::now() + RESUME).await?;
    run_here(qmp).await
}

/// The same of one that was only stopped: a migration that there may be is not ours.
pub(crate) async fn run_here(qmp: &Qmp) -> Result<(), QmpError> {
    let deadline = Instant::now() + RESUME;
    loop {
        if qmp.status().await?.running {
            return Ok(());
        }
        match qmp.cont().await {
            // QEMU refuses while the last of its migration is being taken down.
            Err(e) if Instant::now() < deadline => {
                tracing::debug!(error = chain(&e), "QEMU is not yet ready to resume");
                tokio::time::sleep(LOOK_AGAIN).await;
            }
            Err(e) => return Err(e),
            Ok(()) if Instant::now() < deadline => tokio::time::sleep(LOOK_AGAIN).await,
            // It was told, and stopped again: a full disk, a panic. That is the guest's state, not the migration's.
            Ok(()) => return Ok(()),
        }
    }
}

/// Ends a migration of ours that may be under way.
async fn end_migration(qmp: &Qmp, deadline: Instant) -> Result<(), QmpError> {
    let migration = qmp.query_migrate().await?.status;
    if migration.is_none_or(|status| switch::is_over(&status)) {
        return Ok(());
    }
    // Whatever it says, `cont` decides.
    let _ = qmp.migrate_cancel().await;
    while qmp.query_migrate().await?.status.is_some_and(|status| !switch::is_over(&status)) {
        if Instant::now() > deadline {
            tracing::error!("QEMU does not end its migration");
            break;
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
    Ok(())
}

/// Ends a migration of ours of a guest that somebody else has stopped meanwhile, and leaves it so.
pub(crate) async fn leave_stopped(qmp: &Qmp) -> Result<(), QmpError> {
    end_migration(qmp, Instant::now() + RESUME).await
}

/// Turns off what an agent of an earlier version has turned on, which has not put on record what was there before.
pub(crate) async fn reset_capabilities(qmp: &Qmp) {
    let all = switch::CAPABILITIES.into_iter().chain([relay::THROTTLES]);
    let off: Vec<_> = all.map(|name| (name, false)).collect();
    if let Err(e) = qmp.set_capabilities(&off).await {
        tracing::warn!(error = chain(&e), "QEMU keeps its migration capabilities");
    }
}
