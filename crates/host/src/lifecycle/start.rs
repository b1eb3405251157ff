//! A machine started from its user's command line, or taken in while it runs.

use std::path::{Path, PathBuf};

use qemu::spec::Mirrorable;
use qemu::{Qmp, Spec};

use super::error::RunError;
use super::forget::forget;
use crate::guest_ram;
use crate::handed_in;
use crate::host::Host;
use crate::images;
use crate::paths::{Paths, fits};
use crate::room;
use crate::vm::{Made, Origin, Record, Vm};
use ownership::JournalError;
use ownership::Standing;
use ownership::VmName;

/// Starts a machine from the user's own command line, made mirrorable. Relative paths are seen from `directory`. With `stale_disks` even
/// from images that a migration has left.
///
/// # Errors
/// [`RunError`]; nothing is left of the attempt then.
pub async fn run(
    host: &Host,
    name: VmName,
    argv: &[String],
    directory: &Path,
    stale_disks: bool,
) -> Result<Vm, RunError> {
    fits(host, &name)?;
    is_not_forwarded(host, &name)?;
    let mut spec = Spec::parse(argv)?;
    spec.make_paths_absolute(directory);
    let left = |(image, _): (PathBuf, bool)| host.left.left_by(&image).map(|vm| (image, vm));
    if let Some((image, vm)) = images::of(&spec).into_iter().find_map(left).filter(|_| !stale_disks) {
        return Err(RunError::Stale { image, vm });
    }
    // Who only reads an image is not kept out.
    let kept = |image: PathBuf| host.left.kept_of(&image).map(|left| (image, left));
    let kept: Vec<(PathBuf, (VmName, Option<String>))> =
        images::written(&spec).into_iter().filter_map(kept).collect();
    if let Some((image, (vm, to))) = kept.first().filter(|_| !stale_disks) {
        return Err(RunError::Kept { image: image.clone(), vm: vm.clone(), to: to.clone() });
    }
    let paths = Paths::of(host, &name);
    spec.make_mirrorable(&Mirrorable {
        name: name.to_string(),
        host: host.name.clone(),
        ram_dir: host.ram_dir.clone(),
        qmp_socket: paths.qmp.clone(),
        pid_file: Some(paths.pid.clone()),
    })?;
    let memory = spec.memory()?;
    let promising = host.journal.promise().await;
    if let Some(short) = room::shortages(host, &room::demands(&spec)).into_iter().next() {
        return Err(RunError::NoRoom(short));
    }
    let (qmp_socket, log) = (paths.qmp.clone(), host.logs.of(&name));
    let mut files = paths.all();
    files.extend(guest_ram::own(host, &name, &spec));
    let mut record = Record {
        argv: spec.to_argv(),
        qmp_socket,
        memory,
        made: Made { files, ..Made::default() },
        ..Record::new(name, Standing::own(), Origin::Run)
    };
    host.journal.claim(record.clone())?;
    drop(promising);
    let launched = async {
        // The name is ours now, so what is there under the names of its RAM files is a remnant.
        let made = guest_ram::make(host, &record.name, &spec, None)?;
        // The person has said so.
        for (_, (vm, _)) in &kept {
            host.fence.lend(vm).await;
        }
        let process = qemu::launch(&spec, &log, qemu::Launch::default(), Vec::new(), |process| {
            Ok(host.journal.amend(&mut record, |now| now.process = Some(process.clone()))?)
        })
        .await?;
        made.check(&qemu::ram_blocks(&process, &spec, &record.ram)?)?;
        Ok(Qmp::connect(&record.qmp_socket).await?)
    };
    let launched = match launched.await {
        Ok(qmp) => {
            has_its_disks(host, &spec);
            host.guest_addresses.listen(&record, &spec);
            Ok(Vm { record, spec, qmp })
        }
        Err(e) => {
            forget(host, &record, None).await.kept_on_record();
            Err(e)
        }
    };
    // What it does not have after all.
    for (_, (vm, _)) in &kept {
        host.fence.take_again(vm).await;
    }
    launched
}

/// Takes in a QEMU that is already running.
///
/// # Errors
/// [`RunError`]; the QEMU was not changed.
pub async fn adopt(host: &Host, name: VmName, qmp_socket: &Path) -> Result<Vm, RunError> {
    if host.journal.get(&name).is_some() {
        return Err(JournalError::NameTaken(name).into());
    }
    fits(host, &name)?;
    is_not_forwarded(host, &name)?;
    let same_socket = |record: &Record| {
        let real = |path: &Path| std::fs::canonicalize(path).ok();
        real(&record.qmp_socket).is_some_and(|known| real(qmp_socket) == Some(known))
    };
    if let Some(other) = host.journal.all().into_iter().find(same_socket) {
        let pid = other.process.as_ref().map_or(0, |process| process.pid);
        return Err(RunError::AlreadyHere { pid, name: other.name });
    }
    let adopted = qemu::adopt(qmp_socket).await.map_err(Box::new)?;
    let same = |record: &Record| {
        record.process.as_ref().is_some_and(|process| {
            process.pid == adopted.vm.process.pid && process.start_time == adopted.vm.process.start_time
        })
    };
    if let Some(other) = host.journal.all().into_iter().find(same) {
        return Err(RunError::AlreadyHere { pid: adopted.vm.process.pid, name: other.name });
    }
    let handed_in = handed_in::to(&adopted.vm.process, &adopted.vm.spec).await;
    let record = Record {
        process: Some(adopted.vm.process),
        argv: adopted.vm.spec.to_argv(),
        qmp_socket: adopted.vm.qmp_socket,
        memory: adopted.vm.spec.memory()?,
        ram: adopted.ram,
        handed_in,
        ..Record::new(name, Standing::own(), Origin::Adopted)
    };
    host.journal.claim(record.clone())?;
    has_its_disks(host, &adopted.vm.spec);
    host.guest_addresses.listen(&record, &adopted.vm.spec);
    Ok(Vm { record, spec: adopted.vm.spec, qmp: adopted.qmp })
}

/// A name is a machine's for as long as what comes for it is forwarded.
fn is_not_forwarded(host: &Host, name: &VmName) -> Result<(), RunError> {
    match host.forwards.of(name) {
        Some(forward) => Err(RunError::Forwarded { name: name.clone(), to: forward.to }),
        None => Ok(()),
    }
}

/// What an earlier machine has left is this one's now, and nobody else's to overwrite.
fn has_its_disks(host: &Host, spec: &Spec) {
    host.fence.taken(images::written(spec).iter().map(PathBuf::as_path));
}
