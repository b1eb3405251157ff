//! Disks of a machine that is to come: which are shared, which are to be mirrored, and whether there is a place for those.

use std::collections::BTreeMap;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::Access;

use super::allowed::{allowed, creatable, outside, writable};
use super::{Request, kernel_use, mib, others, read_probe};
use crate::images::{Planned, SECTOR};
use finding::{Finding, chain};
use host::Host;
use host::drives;
use host::identity;
use host::lifecycle::for_where;
use ownership::VmName;
use protocol::wire;

/// `disk_mode` on the wire.
const MIRROR: u32 = 1;
const SHARED: u32 = 2;
impl Request {
    /// Says of every disk whether it is mirrored, and finds every reason for which one cannot come.
    pub(super) fn examine_disks(&self, host: &Host, findings: &mut Vec<Finding>) -> Vec<Planned> {
        let mut planned = Vec::new();
        let mut room: BTreeMap<u64, (PathBuf, u64)> = BTreeMap::new();
        for (number, disk) in (0..).zip(&self.disks) {
            match self.examine_disk(host, number, disk) {
                Ok(None) => {}
                Ok(Some(plan)) => {
                    if planned.iter().any(|other: &Planned| other.path == plan.path) {
                        findings.push(Finding::new(
                            "protocol",
                            format!("disk {} twice", plan.path.display()),
                            "see whether both agents are of the same version",
                        ));
                        continue;
                    }
                    if let Some((file_system, directory, missing)) = self.room_for(&plan, disk) {
                        let taken = &mut room.entry(file_system).or_insert((directory, 0)).1;
                        *taken = taken.saturating_add(missing);
                    }
                    planned.push(plan);
                }
                Err(finding) => findings.push(finding),
            }
        }
        for (directory, needed) in room.into_values() {
            let Ok(file_system) = rustix::fs::statvfs(&directory) else { continue };
            let free = file_system.f_bavail.saturating_mul(file_system.f_frsize);
            if needed > free {
                findings.push(Finding::new(
                    "disk-room",
                    format!(
                        "the VM's disks need {} more; on {} there are {} free in {}",
                        mib(needed),
                        host.name,
                        mib(free),
                        directory.display()
                    ),
                    if self.whole_room {
                        "make room there, or take it as it is needed with --disk-room thin"
                    } else {
                        "make room there"
                    },
                ));
            }
        }
        planned
    }

    /// Which file system a disk's image is on, by its number and a directory in it, and the bytes that the image lacks there of what
    /// it is to take.
    fn room_for(&self, plan: &Planned, disk: &wire::Disk) -> Option<(u64, PathBuf, u64)> {
        let path = std::fs::canonicalize(&plan.path).unwrap_or_else(|_| plan.path.clone());
        let directory = path.parent().unwrap_or(Path::new("/")).to_owned();
        let file_system = std::fs::metadata(&directory).ok()?.dev();
        // Of an image that an earlier attempt has left a part is there already, and a block device has all of its room.
        let there = std::fs::metadata(&path).map_or(0, |image| image.blocks() * 512);
        let needed = if self.whole_room { plan.size } else { disk.allocated.min(plan.size) };
        (!disk.is_device).then(|| (file_system, directory, needed.saturating_sub(there)))
    }

    /// None for a disk that is shared.
    fn examine_disk(&self, host: &Host, number: u32, disk: &wire::Disk) -> Result<Option<Planned>, Finding> {
        let path = Path::new(&disk.path);
        let there = std::fs::symlink_metadata(path).ok();
        if there.is_some() && !path.exists() {
            return Err(Finding::new(
                "disk-missing",
                format!("{} on {} is a link that leads nowhere", path.display(), host.name),
                "remove it there, or make what it leads to",
            ));
        }
        if there.is_some() && !allowed(host, path) {
            return Err(outside(host, path));
        }
        if disk.mode == SHARED {
            return self.said_to_be_shared(host, path, disk).map(|()| None);
        }
        let shared = path.exists() && self.is_shared(path, disk);
        if shared && disk.mode == MIRROR {
            return Err(Finding::new(
                "disk-shared",
                format!("{} is the same storage on {} as at the source", path.display(), host.name),
                "leave --disks away: shared storage is recognised, and never copied onto itself",
            ));
        }
        if shared {
            return Ok(None);
        }
        if !disk.not_mirrorable.is_empty() {
            return Err(Finding::new(
                "disk-not-shared",
                format!(
                    "{} on {} is not the same storage as at the source, and cannot be mirrored: {}",
                    path.display(),
                    host.name,
                    disk.not_mirrorable
                ),
                "put the disk on storage that both hosts share, under the same path",
            ));
        }
        if self.qemu_stream {
            return Err(Finding::new(
                "disk-not-shared",
                format!("{} on {} is not the same storage as at the source", path.display(), host.name),
                "put the disk on storage that both hosts share: --engine qemu moves no disks",
            ));
        }
        if !wire::FORMATS.contains(&disk.format.as_str()) || disk.size == 0 {
            return Err(Finding::new(
                "protocol",
                format!("disk {} of format {:?} and {} bytes", path.display(), disk.format, disk.size),
                "see whether both agents are of the same version",
            ));
        }
        let backing = self.backing(host, disk)?;
        let plan = Planned {
            number,
            path: path.to_owned(),
            format: disk.format.clone(),
            size: disk.size,
            cluster_size: (disk.cluster_size > 0).then_some(disk.cluster_size),
            backing,
            exists: there.is_some(),
        };
        match there {
            None if disk.is_device => Err(missing(host, path)),
            None => creatable(host, path).map(|()| Some(plan)),
            Some(_) => self.usable(host, disk, path).map(|()| Some(plan)),
        }
    }

    /// Somebody's word that the image here is the one that the source has counts where nothing tells otherwise.
    fn said_to_be_shared(&self, host: &Host, path: &Path, disk: &wire::Disk) -> Result<(), Finding> {
        if !path.exists() {
            return Err(missing(host, path));
        }
        if host.left.is_left_by(&self.name, path) {
            return Err(Finding::new(
                "disk-not-shared",
                format!("{} on {} is what a migration of this VM has left there", path.display(), host.name),
                "leave --disks away: such an image is brought up to date",
            ));
        }
        if !disk.probe.is_empty() && !self.is_shared(path, disk) {
            return Err(Finding::new(
                "disk-not-shared",
                format!(
                    "{} on {} is not the same storage as at the source: what the source puts beside it is not there",
                    path.display(),
                    host.name
                ),
                "put the disk on storage that both hosts share, under the same path, or leave --disks away",
            ));
        }
        Ok(())
    }

    /// Whether the image here is the one that the source has.
    fn is_shared(&self, path: &Path, disk: &wire::Disk) -> bool {
        // Where nothing but a number is known of it, that says something only where one kernel has both.
        let same = || !disk.device.is_empty() && identity::of(path).is_some_and(|here| here == disk.device);
        let is_device = || std::fs::metadata(path).is_ok_and(|here| here.file_type().is_block_device());
        let leads_there = || std::fs::canonicalize(path).is_ok_and(|real| real == Path::new(&disk.real));
        match disk.is_device {
            true => is_device() && same(),
            false => same() || leads_there() && sees(path, &disk.probe, &disk.nonce),
        }
    }

    /// The image that a disk is based on, which only shared storage can have.
    fn backing(&self, host: &Host, disk: &wire::Disk) -> Result<Option<(PathBuf, String)>, Finding> {
        if disk.backing.is_empty() {
            return Ok(None);
        }
        let path = Path::new(&disk.backing);
        if !path.exists() {
            return Err(Finding::new(
                "backing-missing",
                format!("{} is based on {}, which {} does not have", disk.path, path.display(), host.name),
                "put the base on storage that both hosts share, or have the VM use an image without a base",
            ));
        }
        if !allowed(host, path) {
            return Err(outside(host, path));
        }
        if !sees(path, &disk.backing_probe, &disk.nonce) {
            return Err(Finding::new(
                "backing-not-shared",
                format!(
                    "{} is based on {}, and what {} has there is not the same storage",
                    disk.path,
                    path.display(),
                    host.name
                ),
                "put the base on storage that both hosts share",
            ));
        }
        Ok(Some((path.to_owned(), disk.backing_format.clone())))
    }

    /// Whether what is there can be overwritten.
    fn usable(&self, host: &Host, disk: &wire::Disk, path: &Path) -> Result<(), Finding> {
        let shown = path.display();
        let finding = |kind: &str, message: String, hint: &str| Err(Finding::new(kind, message, hint));
        let remnant = host.left.is_left_by(&self.name, path);
        if !disk.is_device && disk.probe.is_empty() {
            return finding(
                "disk-sharing-unknown",
                format!("whether {shown} on {} is the storage that the source has cannot be told", host.name),
                "let the source's agent make files beside the image; if it is the same storage, say --disks shared",
            );
        }
        if disk.mode != MIRROR && !remnant {
            if disk.is_device && !identity::is_comparable(&disk.device) {
                return finding(
                    "disk-sharing-unknown",
                    format!(
                        "whether {shown} on {} is the device that the source has cannot be told: the kernel knows no name of it",
                        host.name
                    ),
                    "if it is the same storage, say --disks shared; if it is not, --disks mirror overwrites it",
                );
            }
            if host.left.kept_of(path).is_some_and(|(vm, _)| vm == self.name) {
                return finding(
                    "disk-exists",
                    format!(
                        "{shown} on {} is kept locked for VM {}, and it is not on record any more that nothing has changed in it since it left",
                        host.name, self.name
                    ),
                    "overwrite it with --disks mirror, or remove it there",
                );
            }
            return finding(
                "disk-exists",
                format!("{} already has {shown}, which is not the storage that the source has", host.name),
                "remove it there, or overwrite it with --disks mirror",
            );
        }
        if let Some(user) = others::user(host, &self.name, path) {
            return finding(
                "disk-in-use",
                format!("{shown} on {} is VM {user}'s, which is there or comes in", host.name),
                "end that one, or move the image away",
            );
        }
        let Ok(file) = std::fs::metadata(path) else {
            return Err(missing(host, path));
        };
        if file.file_type().is_block_device() != disk.is_device {
            let what = if disk.is_device { "no block device" } else { "a block device" };
            return finding(
                "disk-kind",
                format!("{shown} on {} is {what}, other than at the source", host.name),
                "have the same kind of storage there",
            );
        }
        if !disk.is_device && !file.is_file() {
            let message = format!("{shown} on {} is no file", host.name);
            return finding("disk-kind", message, "remove it there");
        }
        writable(host, path, Access::READ_OK | Access::WRITE_OK)?;
        let found = match qemu::probe_format(path) {
            Ok(found) => found,
            Err(e) => {
                let message = format!("{shown} on {} cannot be read: {}", host.name, chain(&e));
                return finding("disk-unreadable", message, "let the agent use it");
            }
        };
        if found.format() != disk.format {
            return finding(
                "disk-format",
                format!(
                    "{shown} on {} is of format {}, at the source it is {}",
                    host.name,
                    found.format(),
                    disk.format
                ),
                "remove it there",
            );
        }
        if let qemu::Image::Qcow2(header) = &found {
            same_base(host, disk, path, header)?;
        }
        let size = found.virtual_size().unwrap_or_default();
        let raw_file = disk.format == "raw" && !disk.is_device;
        // QEMU shows a guest whole sectors. One of our own is made to fit, if it is raw.
        let fits = if raw_file { size.next_multiple_of(SECTOR) == disk.size } else { size == disk.size };
        let fits = fits || raw_file && remnant;
        if !fits {
            let kind = if size < disk.size { "disk-smaller" } else { "disk-larger" };
            return finding(
                kind,
                format!("{shown} on {} has {size} bytes, at the source it has {}", host.name, disk.size),
                "make it the same size, or remove it there",
            );
        }
        if let Some(user) = kernel_use::of(path) {
            return finding(
                "disk-in-use",
                format!("{shown} on {} is in use there: {user}", host.name),
                "unmount or detach it there",
            );
        }
        if let Some((vm, to)) = host.left.kept_of(path).filter(|(vm, _)| *vm != self.name) {
            return Err(kept(host, path, &vm, to.as_deref()));
        }
        match host.fence.others_use(path) {
            Ok(false) => Ok(()),
            Ok(true) => finding(
                "disk-in-use",
                format!("{shown} on {} is in use by another program", host.name),
                "end that program, or move the image away",
            ),
            Err(e) => finding(
                "disk-unreadable",
                format!("whether {shown} on {} is in use cannot be told: {e}", host.name),
                "let the agent use it",
            ),
        }
    }
}

/// Another machine has left it here.
fn kept(host: &Host, path: &Path, vm: &VmName, to: Option<&str>) -> Finding {
    Finding::new(
        "disk-kept",
        format!(
            "{} on {} is an image of VM {vm}, which has left{}, and is kept locked",
            path.display(),
            host.name,
            for_where(to)
        ),
        format!("if VM {vm} is not to come back to it, say `vmirror forget-images {vm}` there"),
    )
}

/// Whether an image that is there is based on what the source's is, and holds its own content: else what the guest would see is not what
/// is compared.
fn same_base(host: &Host, disk: &wire::Disk, path: &Path, header: &qemu::Qcow2) -> Result<(), Finding> {
    let directory = std::fs::canonicalize(path).ok();
    let directory = directory.as_deref().and_then(Path::parent).unwrap_or(Path::new("/"));
    let base = header.backing.as_ref().map(|backing| directory.join(backing));
    let wanted = Some(Path::new(&disk.backing)).filter(|_| !disk.backing.is_empty());
    let same = match (&base, wanted) {
        (None, None) => true,
        (Some(base), Some(wanted)) => drives::same_file(base, wanted),
        _ => false,
    };
    let odd = if header.encrypted {
        "encrypted"
    } else if header.external_data {
        "without its data, which is in another file"
    } else if header.corrupt {
        "marked as corrupt"
    } else if same {
        return Ok(());
    } else {
        "based on another image than at the source"
    };
    Err(Finding::new(
        "disk-format",
        format!("{} on {} is {odd}", path.display(), host.name),
        "remove it there",
    ))
}

/// Whether this host sees the probe that the source has put beside an image.
fn sees(image: &Path, probe: &str, nonce: &[u8]) -> bool {
    // Only a probe beside the image says anything about the image.
    let beside =
        Path::new(probe).parent() == std::fs::canonicalize(image).ok().as_deref().and_then(Path::parent);
    !probe.is_empty() && beside && read_probe(Path::new(probe)).is_ok_and(|found| found[..] == *nonce)
}

fn missing(host: &Host, path: &Path) -> Finding {
    Finding::new(
        "disk-missing",
        format!("{} does not exist on {}", path.display(), host.name),
        "make it there, or put the disk on storage that both hosts share, under the same path",
    )
}
