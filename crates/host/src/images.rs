//! The images that a machine uses, by its command line.

use std::path::{Path, PathBuf};

use qemu::Spec;
use qemu::spec::FilePurpose;

/// The images that a machine uses: of its disks, and of firmware in flash. Whether each is the base of another.
pub fn of(spec: &Spec) -> Vec<(PathBuf, bool)> {
    // Other protocols reach storage that is no file of this host: both hosts reach the same.
    let disks = spec.disks().into_iter().filter_map(|disk| {
        let path = disk.host_path().map(Path::to_owned)?;
        Some((path, disk.is_backing))
    });
    // What cannot be written is firmware of the host, which its packages bring.
    let flash = spec.files().into_iter().filter(|file| file.purpose == FilePurpose::Flash && file.writable);
    disks.chain(flash.map(|file| (file.path, false))).collect()
}

/// Those of them that are the machine's to write: nobody else's any more. One that is only read, as also with `snapshot=on`, or the base of
/// another, may be others' as well.
pub fn written(spec: &Spec) -> Vec<PathBuf> {
    let shared: Vec<PathBuf> = spec
        .disks()
        .into_iter()
        .filter(|disk| !disk.is_written())
        .filter_map(|disk| disk.host_path().map(Path::to_owned))
        .collect();
    of(spec).into_iter().map(|(path, _)| path).filter(|path| !shared.contains(path)).collect()
}
