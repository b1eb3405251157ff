//! A rehearsal: every reason why a migration would fail, and what would become of the disks.

use std::sync::Arc;

use uuid::Uuid;

use super::peer::Destination;
use super::{forwarding, request, stop};
use crate::linked::LinkedHost;
use crate::machine::{self, Machine};
use finding::{Failure, Finding, Stage};
use host::Vm;
use host::firewall;
use host::guest_ram;
use host::supervised;
use protocol::wire;
use session::options::Options;
use session::report::DiskMode;
use session::{PlannedDisk, Readiness};

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
        let mut request = request::reserve(
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
