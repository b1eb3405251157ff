//! What is in the drives of a machine now. It must be what its command line says, of which the destination makes another; and each
//! image must still be the file that QEMU has open, or another one would be moved.

use std::collections::HashSet;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use qemu::qmp::Drive;
use qemu::spec::{Disk, FilePurpose, Protocol};
use qemu::{QmpError, Spec};

use crate::vm::Vm;
use finding::Finding;

/// Which file, or which block device, something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Identity {
    File(u64, u64),
    Device(u64),
}

impl Identity {
    fn of(path: &Path) -> Option<Identity> {
        let file = std::fs::metadata(path).ok()?;
        Some(match file.file_type().is_block_device() {
            true => Identity::Device(file.rdev()),
            false => Identity::File(file.dev(), file.ino()),
        })
    }
}

/// Whether two paths lead to the same file or block device.
pub fn same_file(a: &Path, b: &Path) -> bool {
    a == b || Identity::of(a).is_some_and(|a| Some(a) == Identity::of(b))
}

/// The drives of a machine that have a medium. Their paths are absolute.
///
/// # Errors
/// If QEMU does not answer.
pub async fn of(vm: &Vm) -> Result<Vec<Drive>, QmpError> {
    let mut drives = vm.qmp.drives().await?;
    // QEMU tells names as it was given them.
    if let Some(directory) = directory(vm) {
        for drive in drives.iter_mut().filter(|drive| drive.protocol == Protocol::File) {
            drive.path = directory.join(&drive.path);
            drive.backing = drive.backing.take().map(|backing| directory.join(backing));
        }
    }
    Ok(drives)
}

/// The files and block devices that a machine has open around the page cache. Their paths are absolute.
///
/// # Errors
/// If QEMU does not answer.
pub async fn direct_files(vm: &Vm) -> Result<Vec<PathBuf>, QmpError> {
    let direct = vm.qmp.block_nodes().await?.into_iter().filter(|node| node.direct);
    let directory = directory(vm);
    let absolute = |path: PathBuf| directory.as_ref().map_or(path.clone(), |directory| directory.join(path));
    Ok(direct.filter_map(|node| node.path).map(absolute).collect())
}

/// The working directory of a machine's QEMU, to which the names that it tells are relative.
fn directory(vm: &Vm) -> Option<PathBuf> {
    let process = vm.record.process.as_ref()?;
    std::fs::read_link(format!("/proc/{}/cwd", process.pid)).ok()
}

/// Where the drives of a machine have other images than its command line says.
pub fn differ_from(spec: &Spec, drives: &[Drive]) -> Vec<Finding> {
    let disks = spec.disks();
    let images: Vec<&Disk> = disks.iter().filter(|disk| disk.host_path().is_some()).collect();
    let flash = spec.files().into_iter().filter(|file| file.purpose == FilePurpose::Flash);
    let known: Vec<PathBuf> = images
        .iter()
        .filter(|disk| !disk.is_backing)
        .map(|disk| disk.path.clone())
        .chain(flash.map(|file| file.path))
        .collect();
    let here = |drive: &&Drive| drive.protocol == Protocol::File;
    let has = |path: &Path| drives.iter().filter(here).any(|drive| same_file(&drive.path, path));
    let new =
        drives.iter().filter(here).filter(|drive| !known.iter().any(|path| same_file(path, &drive.path)));
    let new = new.map(|drive| {
        let name = drive.qdev.as_deref().filter(|_| drive.device.is_empty()).unwrap_or(&drive.device);
        let message = format!(
            "drive {name} has {} in it, which is not on the VM's command line: the destination would start without it",
            drive.path.display()
        );
        Finding::new("drive-changed", message, "put in what the VM was started with, or start the VM with this")
    });
    let attached = images.iter().filter(|disk| disk.is_attached && !disk.is_backing);
    let gone = attached.filter(|disk| !has(&disk.path)).map(|disk| {
        let message = format!(
            "{} is on the VM's command line and in none of its drives any more: the destination would start with it",
            disk.path.display()
        );
        Finding::new("drive-changed", message, "put it in again, or start the VM without it")
    });
    new.chain(gone).collect()
}

/// Images that are other files by now than those that QEMU has open.
pub fn replaced(pid: u32, drives: &[Drive]) -> Vec<Finding> {
    let Ok(open) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { return Vec::new() };
    let open: HashSet<Identity> = open.flatten().filter_map(|file| Identity::of(&file.path())).collect();
    let local = drives.iter().filter(|drive| drive.protocol == Protocol::File);
    // One that is not there any more is told of where it is looked at.
    let other = local.filter(|drive| Identity::of(&drive.path).is_some_and(|found| !open.contains(&found)));
    let told = other.map(|drive| {
        let message = format!(
            "{} is another file than the one that QEMU has open: it was moved away or replaced while the VM ran",
            drive.path.display()
        );
        Finding::new("disk-replaced", message, "move the VM's image back to where it was")
    });
    told.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drive(device: &str, path: &Path) -> Drive {
        Drive {
            device: device.to_owned(),
            qdev: None,
            node: String::new(),
            path: path.to_owned(),
            protocol: Protocol::File,
            format: "raw".to_owned(),
            virtual_size: 512,
            cluster_size: None,
            backing: None,
            backing_format: None,
            read_only: false,
        }
    }

    #[test]
    fn what_is_in_a_drive_must_be_what_the_command_line_says() {
        let spec = Spec::parse(&[
            "q",
            "-drive",
            "file=/a,id=d",
            "-cdrom",
            "/cd1",
            "-blockdev",
            "driver=file,filename=/spare,node-name=spare",
            "-drive",
            "if=pflash,file=/flash",
        ])
        .unwrap();
        let [a, cd1, cd2, flash] = ["/a", "/cd1", "/cd2", "/flash"].map(Path::new);
        let said = |drives: &[Drive]| -> Vec<String> {
            differ_from(&spec, drives).into_iter().map(|finding| finding.message).collect()
        };
        let flash = drive("pflash0", flash);
        assert!(said(&[drive("d", a), drive("cd", cd1), flash.clone()]).is_empty());
        let ejected = said(&[drive("d", a), flash.clone()]);
        assert!(ejected.len() == 1 && ejected[0].starts_with("/cd1 is on"), "{ejected:?}");
        let changed = said(&[drive("d", a), drive("cd", cd2), flash]);
        assert!(changed.len() == 2 && changed[0].starts_with("drive cd has /cd2"), "{changed:?}");
    }

    #[test]
    fn a_file_that_has_taken_the_place_of_an_open_one_is_noticed() {
        let place = tempfile::tempdir().unwrap();
        let (image, other) = (place.path().join("image"), place.path().join("other"));
        let _open = std::fs::File::create(&image).unwrap();
        std::fs::File::create(&other).unwrap();
        let found = || replaced(std::process::id(), &[drive("d", &image)]);
        assert!(found().is_empty());
        std::fs::rename(&other, &image).unwrap();
        assert_eq!(found()[0].kind, "disk-replaced");
        std::fs::remove_file(&image).unwrap();
        assert!(found().is_empty());
    }
}
