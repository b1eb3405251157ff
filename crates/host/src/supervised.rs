//! What may start a machine's QEMU again once it has ended here: a service manager that restarts it, a container's restart policy, a
//! loop in a script. It takes a machine that has left for one that has failed, and starts it once more.

mod parents;
mod units;

use std::path::Path;

use qemu::Spec;
use qemu::spec::Disk;

use crate::identity::{self, LocksReach};
use crate::vm::Record;
use finding::Finding;
use ownership::journal::blocking;

/// Where the host's files are seen.
const ROOT: &str = "/";

/// What stands behind a process.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Supervisor {
    /// In words that begin a sentence's end: "unit web1.service, by its Restart=always".
    what: String,
    /// It is known to start again what has ended; else it may.
    certain: bool,
    /// What to do about it.
    remedy: String,
}

/// What is to be said of a machine's supervisor, and whether it stands in the way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Supervision {
    /// What is to be said.
    pub finding: Finding,
    /// A second copy of it would run: nothing here keeps it from that.
    pub refused: bool,
}

/// How a machine is to leave.
#[derive(Debug, Clone, Copy)]
pub struct Leaves {
    /// All its disks are mirrored: what stays of them here is kept locked.
    pub mirrored: bool,
    /// The operator has said that it is not started again, or that this does no harm.
    pub accepted: bool,
}

/// Finds what may start a machine again when it has left.
pub fn of(record: &Record, spec: &Spec, leaves: Leaves) -> Option<Supervision> {
    let process = record.process.as_ref()?;
    // A service manager may be asked, and take its time.
    let found = || find(Path::new(ROOT), process.pid, &record.argv, std::process::id());
    let supervisor = blocking(found)?;
    Some(said(&supervisor, record.name.as_ref(), is_fenced(spec, leaves.mirrored), leaves.accepted))
}

/// The same as a warning, for a machine that is not to leave yet.
#[must_use]
pub fn warning(record: &Record, spec: &Spec) -> Option<Finding> {
    of(record, spec, Leaves { mirrored: false, accepted: true }).map(|supervision| supervision.finding)
}

fn said(supervisor: &Supervisor, name: &str, fenced: bool, accepted: bool) -> Supervision {
    let Supervisor { what, certain, remedy } = supervisor;
    let refused = *certain && !fenced && !accepted;
    let may = if *certain { "is" } else { "may be" };
    let then = match (fenced, refused) {
        (true, _) => "Its images stay locked here when it has left, so that a second copy fails at that",
        (false, true) => {
            "It has no disk here whose lock would keep a second copy from running. When it is not started again any more, or that does \
             no harm, say --accept-supervisor"
        }
        (false, false) => {
            "It has no disk here whose lock would keep a second copy from running: see to it before the VM leaves"
        }
    };
    let message = format!("VM {name} {may} started again by {what} when it has left");
    Supervision { finding: Finding::new("supervised", message, format!("{remedy}. {then}")), refused }
}

/// Whether the machine has a disk that another copy of it could not open: its QEMU has locks on it, which it has not where it was told so
/// (`locking=off`), nor where the file system knows none. Where the disk is shared these locks are the destination's by then: those of a
/// block device do not reach this host, nor do those of many file systems. Where it is mirrored its own are kept.
fn is_fenced(spec: &Spec, mirrored: bool) -> bool {
    let reach = |path: &Path| {
        let is_file = std::fs::metadata(path).is_ok_and(|file| file.is_file());
        is_file && identity::locks_reach(path) == LocksReach::All
    };
    spec.disks().into_iter().filter(Disk::is_written).any(|disk| {
        let Some(path) = disk.host_path() else { return false };
        (mirrored || reach(path)) && qemu::in_use(path).unwrap_or(false)
    })
}

fn find(root: &Path, pid: u32, argv: &[String], own: u32) -> Option<Supervisor> {
    managed(root, argv).or_else(|| units::of(root, pid, own)).or_else(|| parents::of(root, pid, own))
}

/// Managers of machines that show in a command line.
fn managed(root: &Path, argv: &[String]) -> Option<Supervisor> {
    let names = |place: &str| argv.iter().any(|word| word.contains(place));
    if names("/run/qemu-server/") {
        let id = argv.iter().skip_while(|word| *word != "-id").nth(1).cloned().unwrap_or_default();
        let resources = std::fs::read_to_string(root.join("etc/pve/ha/resources.cfg")).unwrap_or_default();
        let certain = !id.is_empty() && resources.lines().any(|line| line.trim() == format!("vm: {id}"));
        let what = if certain { "Proxmox VE's HA manager" } else { "Proxmox VE" };
        let shown = if id.is_empty() { "ID" } else { &id };
        return Some(Supervisor {
            what: what.to_owned(),
            certain,
            remedy: format!(
                "take it out of HA with `ha-manager remove vm:{shown}`, and say `qm set {shown} --onboot 0`"
            ),
        });
    }
    if names("/var/lib/libvirt/qemu/") || names("/run/libvirt/qemu/") {
        return Some(Supervisor {
            what: "libvirt, or what manages libvirt,".to_owned(),
            certain: false,
            remedy: "libvirt takes it for shut off when it has left: say `virsh autostart --disable`, and see that no cluster manager starts it"
                .to_owned(),
        });
    }
    None
}

#[cfg(test)]
mod tests;
