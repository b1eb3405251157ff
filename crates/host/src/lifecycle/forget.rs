//! A machine ended and forgotten: nothing of what was made for it on this host is left.

use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use qemu::{Kill, Process, Qmp, Spec};
use uuid::Uuid;

use super::in_use;
use super::ran::{self, Ran};
use super::taps::remove_taps;
use crate::deadlines::{KILL_GRACE, QUIT_GRACE};
use crate::firewall;
use crate::guest_ram;
use crate::hooks::{self, Hook};
use crate::host::Host;
use crate::left_images::{Left, LeftImages};
use crate::paths::Paths;
use crate::places;
use crate::vm::{MadeImage, Origin, Record};
use crate::which_file::WhichFile;
use finding::{Finding, chain};
use network::interfaces;
use ownership::{self, Effect, Event, Mark, OnRecord as _};
use ownership::{Ownership, VmName};

/// An image that takes no more than this, in bytes, has nothing of a disk in it: a new qcow2 image takes 196 KiB.
const UNWRITTEN: u64 = 256 << 10;
/// `f_type` of tmpfs (linux/magic.h).
const TMPFS_MAGIC: i64 = 0x0102_1994;

/// What came of an attempt to end a machine and forget it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use = "where something of it may run on, nobody may be told that it is gone"]
pub enum Forgotten {
    /// Nothing is left of it here.
    Done,
    /// It is not what the caller's record says, and was left alone.
    Changed,
    /// A process of it does not end, or nobody can tell whether it has. Its record, its files and its interfaces are kept.
    Lingers(Finding),
}

impl Forgotten {
    /// Whether nothing is left of it.
    #[must_use]
    pub fn is_done(&self) -> bool {
        *self == Forgotten::Done
    }

    /// For whom nothing depends on it: whoever looks after the machine next finds it on record.
    pub fn kept_on_record(self) {}
}

/// Ends whatever is left of a machine on this host, and removes what was made for it. The record goes last, so that a
/// crash in between is found and finished by the next start. `qmp` is the connection to its QEMU, where there is one:
/// QEMU serves one client, so another could not say `quit`.
///
/// Nothing is done when the machine is not any more what the caller's record says: a copy that has become a machine in
/// the meantime, or another machine of the same name. Nothing but the attempt to end it where it is not certain that it has ended.
pub async fn forget(host: &Host, record: &Record, qmp: Option<&Qmp>) -> Forgotten {
    let _deciding = host.journal.decide(&record.name).await;
    let Some(now) = host.journal.get(&record.name).filter(|now| now.claim() == record.claim()) else {
        tracing::info!(vm = %record.name, "is not what it was, and is left alone");
        return Forgotten::Changed;
    };
    let mark = now.standing().mark();
    match forget_decided(host, &now, qmp, mark).await {
        Ok(()) => Forgotten::Done,
        Err(lingers) => Forgotten::Lingers(lingers),
    }
}

/// Whether the machine's QEMU has certainly ended, and what is left of it has been removed for that. One that is ending is waited for.
pub async fn ended(host: &Host, record: &Record) -> bool {
    let Some(process) = &record.process else { return false };
    if !process.is_ending() || !process.wait_for_end(KILL_GRACE).await {
        return false;
    }
    happens(host, &record.name, |now| now.claim() == record.claim(), Event::Ended).await
}

/// The migration is over for the task that served it: what it has left is worth nothing, unless it is complete.
pub async fn session_over(host: &Host, name: &VmName, session: Uuid) {
    happens(host, name, |now| now.arrived_by == Some(session), Event::SessionOver { session }).await;
}

/// Discards a machine if that is what follows from an event. Returns whether it was.
async fn happens(host: &Host, name: &VmName, is_meant: impl Fn(&Record) -> bool, event: Event) -> bool {
    let _deciding = host.journal.decide(name).await;
    let Some(now) = host.journal.get(name).filter(is_meant) else { return false };
    match ownership::on(Some(&now.standing()), event).effects.first() {
        // What lingers is found so by who looks after it next.
        Some(Effect::Discard(mark)) => forget_decided(host, &now, None, *mark).await.is_ok(),
        _ => false,
    }
}

/// [`forget`], for who has [decided](crate::Journal) already, and what is to be remembered.
///
/// # Errors
/// Why a process of it may run on, and everything of it is kept; or why its record cannot be removed, and nobody may be told that it is
/// gone.
pub async fn forget_decided(
    host: &Host,
    record: &Record,
    qmp: Option<&Qmp>,
    mark: Option<Mark>,
) -> Result<(), Finding> {
    if let Err(kept) = may_go(host, record, qmp).await {
        tracing::error!(vm = %record.name, kind = kept.kind, "{}", kept.message);
        return Err(kept);
    }
    if let Ownership::HandedOver { to, .. } = &record.ownership {
        // Before its QEMU ends: whoever waits for that starts it once more.
        let _ = host.fence.keep(&record.name, to, &record.left_behind).await;
    }
    let ended = end(record, qmp).await;
    host.lingering.note(&record.name, &ended);
    if let Err(lingers) = ended {
        tracing::error!(vm = %record.name, kind = lingers.kind, "{}", lingers.message);
        return Err(lingers);
    }
    host.guest_addresses.forget(&record.name);
    for directory in &record.made.cgroups {
        if let Err(error) = cgroup::make::remove(directory).await {
            tracing::error!(vm = %record.name, cgroup = %directory.display(), %error, "cannot be removed");
        }
    }
    places::take_back(record);
    let Paths { storage, own, .. } = Paths::of(host, &record.name);
    for directory in [storage, own] {
        let _ = std::fs::remove_dir_all(directory);
    }
    leave_images(&host.left, record);
    if let Some(session) = record.arrived_by {
        if let (Some(supplied), Some(mut whole)) =
            (host.post_copy_memory.supplied(session), host.journal.get(&record.name))
        {
            // It had everything, though nobody was there to be told.
            let has_all = |now: &mut Record| (now.post_copy, now.supplied) = (None, Some(supplied));
            if let Err(e) = host.journal.amend(&mut whole, has_all) {
                tracing::error!(vm = %record.name, error = chain(&e), "the journal cannot be written");
            }
        }
        host.post_copy_memory.end(session);
    }
    let goes = matches!(record.ownership, Ownership::Incoming { .. } | Ownership::HandedOver { .. });
    if goes
        && !record.made.hooked_down
        && let Err(finding) = hooks::run(host, Hook::Down, record, record.made.rehearsal).await
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
    if record.origin != Origin::Arrived && matches!(record.ownership, Ownership::HandedOver { .. }) {
        files.extend(dead_sockets(record));
    }
    for file in &files {
        match std::fs::remove_file(file) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                tracing::error!(file = %file.display(), error = %e, "cannot be removed");
            }
            _ => {}
        }
    }
    host.logs.ended(&record.name, record.made.rehearsal);
    remove_taps(record, goes).await;
    interfaces::remove_all(&host.forwards.interfaces_of(record)).await;
    let left = match &record.ownership {
        // Once more, if something of it has changed until its QEMU was gone, or could not be put on record.
        Ownership::HandedOver { to, .. } => host.fence.keep(&record.name, to, &record.left_behind).await,
        // Its disks may still be on record as what was left by another.
        Ownership::Owner => host.left.settle(),
        Ownership::Incoming { .. } => Ok(()),
    };
    if let Err(error) = left {
        // As long as the record stands it says so.
        let unmarked = Err(Finding::new(
            "journal",
            format!("what {} leaves here cannot be put on record: {error}", record.name),
            "see to the disk of state_dir; it is tried again",
        ));
        host.lingering.note(&record.name, &unmarked);
        return unmarked;
    }
    if !matches!(record.ownership, Ownership::HandedOver { .. }) {
        // What goes leaves what was kept before it came.
        host.fence.take_again(&record.name).await;
    }
    let removed = host.journal.remove(&record.name, mark).map_err(|e| {
        tracing::error!(vm = %record.name, error = chain(&e), "its record cannot be removed");
        Finding::new(
            "journal",
            format!("nothing is left of {} here but its record: {}", record.name, chain(&e)),
            "see to the disk of state_dir; it is tried again",
        )
    });
    host.lingering.note(&record.name, &removed);
    removed
}

/// Whether a machine may be ended and its remains be removed, going by more than its record, which may be older than what is here.
async fn may_go(host: &Host, record: &Record, qmp: Option<&Qmp>) -> Result<(), Finding> {
    let incoming = matches!(record.ownership, Ownership::Incoming { .. });
    let kept = match incoming {
        true => match ran::has_run(record, qmp).await {
            Ran::Has(status) => Some(ran::runs_here(record, &status)),
            Ran::Never | Ran::Idle(_) | Ran::Unheard(_) => None,
        },
        false => None,
    };
    let kept = match kept {
        Some(kept) => Some(kept),
        None => {
            let (looks, of) = (host.clone(), record.clone());
            tokio::task::spawn_blocking(move || in_use::by_another(&looks, &of)).await.unwrap_or_default()
        }
    };
    let may = kept.map_or(Ok(()), Err);
    host.lingering.note(&record.name, &may);
    may
}

/// Whether a file is a socket, or has nothing in it.
fn is_worthless(file: &Path) -> bool {
    std::fs::symlink_metadata(file)
        .is_ok_and(|file| file.file_type().is_socket() || file.is_file() && file.len() == 0)
}

/// What becomes of images that were mirrored to and are not the machine's: another attempt goes on from them. One that was made and
/// has nothing in it is worth nothing.
fn leave_images(left: &LeftImages, record: &Record) {
    // Those of a machine that is this host's are its disks, whatever its record says.
    let Ownership::Incoming { session, ready, .. } = record.ownership else { return };
    let leave = |path: &Path, why| match ready {
        true => left.leave_complete(&record.name, path, why, session),
        false => left.leave(&record.name, path, why),
    };
    for MadeImage { path, fresh, made_as, file: made } in &record.made.images {
        if let Some(made_as) = made_as {
            let _ = std::fs::remove_file(made_as);
        }
        let Ok(file) = std::fs::metadata(path) else { continue };
        if *fresh && (made.is_none() || WhichFile::of(path) != *made) {
            // The crash came before it had this name; or what has it now has taken its place.
            tracing::warn!(vm = %record.name, image = %path.display(), "is not the file that was made here, and is left alone");
            continue;
        }
        match (fresh, file.is_file() && file.blocks() * 512 > UNWRITTEN) {
            (true, false) => drop(std::fs::remove_file(path)),
            // One that is not on record is refused when it is in the way, and overwritten by nobody.
            (true, true) => drop(leave(path, Left::Unfinished)),
            (false, _) if record.made.images_written => {
                drop(leave(path, Left::Behind));
            }
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
    let files = Spec::parse(&record.argv).map(|spec| guest_ram::files(&spec)).unwrap_or_default();
    files.into_iter().filter(in_memory).collect()
}

/// Sockets that the QEMU of a machine that has left has listened on, and that it has not taken away when it ended: where both hosts see
/// their paths, they are in the way of the machine's where it is now.
fn dead_sockets(record: &Record) -> Vec<PathBuf> {
    let is_dead = |path: &PathBuf| {
        let refuses = || UnixStream::connect(path).is_err_and(|e| e.kind() == ErrorKind::ConnectionRefused);
        std::fs::symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket()) && refuses()
    };
    let made = Spec::parse(&record.argv).map(|spec| spec.files_made()).unwrap_or_default();
    made.into_iter().filter(is_dead).collect()
}

/// Throws away every copy that never was complete: an agent that goes down cannot keep it up to date.
pub async fn forget_incomplete(host: &Host) {
    for record in host.journal.all() {
        if matches!(record.ownership, Ownership::Incoming { ready: false, .. }) {
            // What may be more than a copy is looked at again by the next agent.
            if matches!(ran::has_run(&record, None).await, Ran::Never | Ran::Idle(_)) {
                forget(host, &record, None).await.kept_on_record();
            }
        }
    }
}

/// Ends the processes of a machine.
async fn end(record: &Record, qmp: Option<&Qmp>) -> Result<(), Finding> {
    if let Some(process) = &record.process {
        end_qemu(record, process, qmp).await?;
    }
    if let Some(daemon) = &record.made.storage_daemon {
        killed(record, "the storage daemon", daemon).await?;
    }
    Ok(())
}

/// Ends a QEMU: politely, then not.
async fn end_qemu(record: &Record, process: &Process, qmp: Option<&Qmp>) -> Result<(), Finding> {
    if process.look().is_gone() {
        return Ok(());
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
    if matches!(told, Ok(Ok(true))) && process.wait_for_end(QUIT_GRACE).await {
        return Ok(());
    }
    killed(record, "QEMU", process).await
}

/// Kills a process, and waits until it has certainly ended.
async fn killed(record: &Record, what: &str, process: &Process) -> Result<(), Finding> {
    let kill = process.kill();
    if process.wait_for_end(KILL_GRACE).await {
        return Ok(());
    }
    let (name, pid) = (&record.name, process.pid);
    Err(match kill {
        Kill::NotSent(error) => Finding::new(
            "process-unclear",
            format!("{what} of {name} (process {pid}) cannot be ended: {}", chain(&error)),
            "put that right; the agent keeps everything of the VM until it is certain that the process has ended",
        ),
        Kill::Sent | Kill::Gone => Finding::new(
            "process-lingers",
            format!("{what} of {name} (process {pid}) was killed and has not ended"),
            format!(
                "see what it waits for, mostly dead storage: `cat /proc/{pid}/stack`; the agent keeps everything of the VM until it has ended"
            ),
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A copy that came to nothing, for which this image was to be made.
    fn copy(path: &Path, made_as: Option<&Path>, file: Option<WhichFile>) -> Record {
        let (session, from) = (Uuid::new_v4(), "host-a".to_owned());
        let standing = ownership::Standing {
            ownership: Ownership::Incoming { session, from, ready: false },
            ..ownership::Standing::own()
        };
        let mut record = Record::new("web1".parse().unwrap(), standing, Origin::Arrived);
        let made_as = made_as.map(Path::to_owned);
        record.made.images = vec![MadeImage { path: path.to_owned(), fresh: true, made_as, file }];
        record
    }

    #[test]
    fn a_file_that_somebody_else_has_made_where_an_image_was_to_be_is_left_alone() {
        let place = tempfile::tempdir().unwrap();
        let left = LeftImages::open(place.path());
        let (path, made_as) = (place.path().join("disk"), place.path().join(".made"));
        let large = vec![1; 2 * UNWRITTEN as usize];
        for content in [&b"somebody's"[..], &large] {
            // The crash came before there was anything, and before what was made was on record.
            std::fs::write(&path, content).unwrap();
            leave_images(&left, &copy(&path, Some(&made_as), None));
            std::fs::write(&made_as, content).unwrap();
            leave_images(&left, &copy(&path, Some(&made_as), None));
            assert!(!made_as.exists());
            // What was made had no name yet, or has none any more.
            std::fs::write(&made_as, content).unwrap();
            let made = WhichFile::of(&made_as);
            leave_images(&left, &copy(&path, Some(&made_as), made));
            assert!(std::fs::read(&path).unwrap() == content && !made_as.exists());
            assert_eq!(left.left_by(&path), None);
            std::fs::remove_file(&path).unwrap();
        }
    }

    #[test]
    fn an_image_that_was_made_here_goes_with_nothing_in_it_and_is_gone_on_from_otherwise() {
        let place = tempfile::tempdir().unwrap();
        let left = LeftImages::open(place.path());
        let path = place.path().join("disk");
        std::fs::write(&path, b"little").unwrap();
        leave_images(&left, &copy(&path, None, WhichFile::of(&path)));
        assert!(!path.exists());
        std::fs::write(&path, vec![1; 2 * UNWRITTEN as usize]).unwrap();
        let record = copy(&path, None, WhichFile::of(&path));
        leave_images(&left, &record);
        assert_eq!(left.left_by(&path), Some(record.name));
    }

    #[test]
    fn the_disks_of_a_complete_copy_are_there_until_its_source_is_heard_to_have_the_machine() {
        let place = tempfile::tempdir().unwrap();
        let left = LeftImages::open(place.path());
        let [complete, not] = ["complete", "not"].map(|name| place.path().join(name));
        for (path, is_ready) in [(&complete, true), (&not, false)] {
            std::fs::write(path, vec![1; 2 * UNWRITTEN as usize]).unwrap();
            let mut record = copy(path, None, WhichFile::of(path));
            if let Ownership::Incoming { ready, .. } = &mut record.ownership {
                *ready = is_ready;
            }
            leave_images(&left, &record);
            left.expire_now();
            assert_eq!(path.exists(), is_ready, "{path:?}");
            assert_eq!(left.complete_of(&record.name), Vec::from_iter(is_ready.then(|| path.clone())));
            if let Ownership::Incoming { session, .. } = record.ownership {
                left.source_has_it(Uuid::new_v4());
                left.expire_now();
                assert_eq!(path.exists(), is_ready, "{path:?}: said of another");
                left.source_has_it(session);
                // Nor does the next agent take it for what it is not.
                LeftImages::open(place.path()).expire_now();
                assert!(!path.exists());
            }
        }
    }
}
