//! A machine ended and forgotten: nothing of what was made for it on this host is left.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use qemu::{Process, Qmp, Spec};

use super::taps::remove_taps;
use super::{Paths, ram_files};
use crate::cgroup;
use crate::destination::forwarded;
use crate::failure::chain;
use crate::firewall;
use crate::hooks::Hook;
use crate::host::Host;
use crate::occasion;
use crate::remnants::Left;
use crate::tap;
use crate::vm::{MadeImage, Origin, Ownership, QUIT_GRACE, Record};

/// An image that takes no more than this, in bytes, has nothing of a disk in it: a new qcow2 image takes 196 KiB.
const UNWRITTEN: u64 = 256 << 10;
/// `f_type` of tmpfs (linux/magic.h).
const TMPFS_MAGIC: i64 = 0x0102_1994;
/// How long a process that was killed may take to be gone.
const KILL_GRACE: Duration = Duration::from_secs(5);

/// Ends whatever is left of a machine on this host, and removes what was made for it. The record goes last, so that a
/// crash in between is found and finished by the next start. `qmp` is the connection to its QEMU, where there is one:
/// QEMU serves one client, so another could not say `quit`.
///
/// Nothing is done when the machine is not any more what the caller's record says: a copy that has become a machine in
/// the meantime, or another machine of the same name. Returns whether it was done.
pub async fn forget(host: &Host, record: &Record, qmp: Option<&Qmp>) -> bool {
    let _deciding = host.journal.decide(&record.name).await;
    let Some(now) = host.journal.get(&record.name).filter(|now| same_claim(now, record)) else {
        tracing::info!(vm = %record.name, "is not what it was, and is left alone");
        return false;
    };
    forget_decided(host, &now, qmp).await;
    true
}

/// Whether two records are of the same machine on the same side of the same hand-over.
pub(super) fn same_claim(a: &Record, b: &Record) -> bool {
    let side = |record: &Record| std::mem::discriminant(&record.ownership);
    a.arrived_by == b.arrived_by && a.generation == b.generation && side(a) == side(b)
}

/// [`forget`], for who has [decided](crate::Journal) already.
pub(crate) async fn forget_decided(host: &Host, record: &Record, qmp: Option<&Qmp>) {
    host.neighbourhood.forget(&record.name);
    if let Some(process) = &record.process {
        end(record, process, qmp).await;
    }
    if let Some(daemon) = &record.made.storage_daemon {
        daemon.kill();
        daemon.wait_for_end(KILL_GRACE).await;
    }
    for directory in &record.made.cgroups {
        if let Err(error) = cgroup::make::remove(directory).await {
            tracing::error!(vm = %record.name, cgroup = %directory.display(), %error, "cannot be removed");
        }
    }
    let _ = std::fs::remove_dir_all(Paths::of(host, &record.name).storage);
    leave_images(host, record);
    if let Some(session) = record.arrived_by {
        let supplied = host.post_copies.get(session).and_then(|tail| tail.supplied());
        if let (Some(supplied), Some(mut whole)) = (supplied, host.journal.get(&record.name)) {
            // It had everything, though nobody was there to be told.
            (whole.post_copy, whole.supplied) = (None, Some(supplied));
            if let Err(e) = host.journal.update(&whole) {
                tracing::error!(vm = %record.name, error = chain(&e), "the journal cannot be written");
            }
        }
        host.post_copies.remove(session);
    }
    let goes = matches!(record.ownership, Ownership::Incoming { .. } | Ownership::HandedOver { .. });
    if goes
        && !record.made.hooked_down
        && let Err(finding) = occasion::run(host, Hook::Down, record, record.made.rehearsal).await
    {
        tracing::error!(vm = %record.name, kind = finding.kind, hint = finding.hint, "{}", finding.message);
    }
    if matches!(record.ownership, Ownership::HandedOver { .. }) || goes && record.made.nft {
        firewall::remove(host, &record.name).await;
    }
    let mut files = record.made.files.clone();
    if matches!(record.ownership, Ownership::Incoming { .. }) {
        files.extend(record.made.shipped.iter().cloned());
        files.extend(record.made.by_qemu.iter().filter(|file| is_worthless(file)).cloned());
    }
    if record.origin == Origin::Adopted && matches!(record.ownership, Ownership::HandedOver { .. }) {
        files.extend(stale_ram(record));
    }
    for file in &files {
        match std::fs::remove_file(file) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                tracing::error!(file = %file.display(), error = %e, "cannot be removed");
            }
            _ => {}
        }
    }
    remove_taps(record, goes).await;
    tap::remove_all(&forwarded::interfaces(host, record)).await;
    if let Err(e) = host.journal.remove(&record.name) {
        tracing::error!(error = chain(&e), "a record cannot be removed");
    }
}

/// Whether a file is a socket, or has nothing in it.
fn is_worthless(file: &Path) -> bool {
    std::fs::symlink_metadata(file)
        .is_ok_and(|file| file.file_type().is_socket() || file.is_file() && file.len() == 0)
}

/// What becomes of images that were mirrored to and are not the machine's: another attempt goes on from them. One that was made and
/// has nothing in it is worth nothing.
fn leave_images(host: &Host, record: &Record) {
    // Those of a machine that is this host's are its disks, whatever its record says.
    if !matches!(record.ownership, Ownership::Incoming { .. }) {
        return;
    }
    for MadeImage { path, fresh } in &record.made.images {
        let Ok(file) = std::fs::metadata(path) else { continue };
        match (fresh, file.is_file() && file.blocks() * 512 > UNWRITTEN) {
            (true, false) => drop(std::fs::remove_file(path)),
            (true, true) => host.remnants.keep(&record.name, path, Left::Unfinished),
            (false, _) if record.made.images_written => host.remnants.keep(&record.name, path, Left::Behind),
            (false, _) => {}
        }
    }
}

/// The RAM files of an adopted machine that has left: stale copies that take memory. A file on a disk is another
/// matter, and its owner's.
fn stale_ram(record: &Record) -> Vec<PathBuf> {
    let in_memory = |file: &PathBuf| {
        rustix::fs::statfs(file).is_ok_and(|fs| fs.f_type == TMPFS_MAGIC)
            || qemu::huge_page_size(file).is_some()
    };
    let files = Spec::parse(&record.argv).map(|spec| ram_files(&spec)).unwrap_or_default();
    files.into_iter().filter(in_memory).collect()
}

/// Throws away every copy that never was complete: an agent that goes down cannot keep it up to date.
pub async fn forget_incomplete(host: &Host) {
    for record in host.journal.all() {
        if matches!(record.ownership, Ownership::Incoming { ready: false, .. }) {
            forget(host, &record, None).await;
        }
    }
}

/// Ends a QEMU: politely, then not.
async fn end(record: &Record, process: &Process, qmp: Option<&Qmp>) {
    if !process.exists() {
        return;
    }
    let polite = async {
        let qmp = match qmp {
            Some(qmp) => qmp.clone(),
            None => Qmp::connect(&record.qmp_socket).await?,
        };
        // A socket's path says little: another QEMU may listen there by now, and must not be told to quit.
        if qmp.peer() == Some(process.pid) { qmp.quit().await.map(|()| true) } else { Ok(false) }
    };
    let told = tokio::time::timeout(QUIT_GRACE, polite).await;
    if !matches!(told, Ok(Ok(true))) || !process.wait_for_end(QUIT_GRACE).await {
        process.kill();
        if !process.wait_for_end(KILL_GRACE).await {
            tracing::error!(pid = process.pid, "QEMU does not end");
        }
    }
}
