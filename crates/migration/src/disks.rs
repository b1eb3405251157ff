//! The disks of a machine, as its source describes them.

use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use qemu::qmp::Drive;
use uuid::Uuid;

use finding::{Finding, chain};
use host::Vm;
use host::drives;
use host::identity;
use host::images;
use protocol::wire;
use session::options::{Disks, Engine, Options};
use session::report;

/// A disk, and the file that the source has put beside its image, to see whether the destination sees it too.
#[derive(Debug)]
pub(crate) struct Disk {
    pub(crate) image: PathBuf,
    /// Bytes, as the guest sees them; of a disk that cannot be mirrored those of its image.
    pub(crate) size: u64,
    /// What QEMU knows of it, if the mirror can take it.
    pub(crate) drive: Option<Drive>,
    /// Why not.
    not_mirrorable: String,
    /// The guest's reads and writes bypass the page cache.
    pub(crate) direct: bool,
    allocated: u64,
    is_device: bool,
    device: String,
    probe: Probe,
    backing_probe: Option<Probe>,
    mode: Disks,
}

impl Disk {
    /// For the report, as long as nothing was copied.
    pub(crate) fn reported(&self) -> report::Disk {
        report::Disk {
            name: self.image.display().to_string(),
            size: self.size,
            raw_bytes: 0,
            wire_bytes: 0,
            mode: report::DiskMode::Shared,
        }
    }

    /// For the wire.
    pub(crate) fn wire(&self) -> wire::Disk {
        let path = |path: &Path| path.display().to_string();
        let probe = |probe: &Probe| probe.file.as_deref().map(path).unwrap_or_default();
        let drive = self.drive.as_ref();
        wire::Disk {
            path: path(&self.image),
            probe: probe(&self.probe),
            nonce: self.probe.nonce.as_bytes().to_vec(),
            mode: match self.mode {
                Disks::Auto => 0,
                Disks::Mirror => 1,
                Disks::Shared => 2,
            },
            size: drive.map_or(0, |_| self.size),
            format: drive.map(|drive| drive.format.clone()).unwrap_or_default(),
            cluster_size: drive.and_then(|drive| drive.cluster_size).unwrap_or_default(),
            allocated: self.allocated,
            is_device: self.is_device,
            device: self.device.clone(),
            not_mirrorable: self.not_mirrorable.clone(),
            backing: drive.and_then(|drive| drive.backing.as_deref()).map(path).unwrap_or_default(),
            backing_format: drive.and_then(|drive| drive.backing_format.clone()).unwrap_or_default(),
            backing_probe: self.backing_probe.as_ref().map(probe).unwrap_or_default(),
            real: std::fs::canonicalize(&self.image).as_deref().map(path).unwrap_or_default(),
        }
    }
}

/// Describes the disks of a machine, and finds every reason for which they cannot leave this host.
pub(crate) async fn describe(vm: &Vm, options: &Options) -> (Vec<Disk>, Vec<Finding>) {
    let images = images::of(&vm.spec);
    if images.is_empty() {
        return (Vec::new(), Vec::new());
    }
    let drives = match drives::of(vm).await {
        Ok(drives) => drives,
        Err(e) => {
            let finding =
                Finding::new("qemu-gone", chain(&e), "see what became of the VM with `vmirror show`");
            return (Vec::new(), vec![finding]);
        }
    };
    let direct_files: Vec<PathBuf> = match drives::direct_files(vm).await {
        Ok(files) => files,
        Err(e) => {
            let finding =
                Finding::new("qemu-gone", chain(&e), "see what became of the VM with `vmirror show`");
            return (Vec::new(), vec![finding]);
        }
    };
    let mut disks = Vec::new();
    let mut findings = drives::differ_from(&vm.spec, &drives);
    if let Some(process) = &vm.record.process {
        findings.extend(drives::replaced(process.pid, &drives));
    }
    let paths: Vec<PathBuf> = images.iter().filter(|image| !image.1).map(|image| image.0.clone()).collect();
    for (image, base) in images {
        let metadata = std::fs::metadata(&image);
        if let Err(e) = &metadata {
            findings.push(Finding::new(
                "disk-missing",
                format!("disk {} cannot be seen at the source: {e}", image.display()),
                "run the agent where the VM's disks are; one that was moved away while the VM ran, move back",
            ));
            continue;
        }
        let is_device = metadata.as_ref().is_ok_and(|metadata| metadata.file_type().is_block_device());
        let same = |drive: &&Drive| drives::same_file(&drive.path, &image);
        let drive = drives.iter().find(same).cloned();
        let users = paths.iter().filter(|path| drives::same_file(path, &image)).count();
        let not_mirrorable = not_mirrorable(drive.as_ref(), base, users, options)
            .or_else(|| lost(drive.as_ref()?, &image, metadata.as_ref().ok()?.len(), is_device))
            .unwrap_or_default();
        let mut disk = Disk {
            size: drive
                .as_ref()
                .map_or(metadata.as_ref().map_or(0, |file| file.len()), |drive| drive.virtual_size),
            drive: drive.filter(|_| not_mirrorable.is_empty()),
            not_mirrorable,
            direct: direct_files.iter().any(|file| drives::same_file(file, &image)),
            allocated: metadata.as_ref().map_or(0, |file| file.blocks() * 512),
            is_device,
            device: if is_device { identity::of(&image).unwrap_or_default() } else { String::new() },
            probe: Probe::none(),
            backing_probe: None,
            mode: options.disks,
            image,
        };
        if !is_device {
            // Where no probe can be put, the file's identity may tell. Where that does not, an image that is there is refused, and never
            // overwritten.
            disk.probe.place(&disk.image);
            if disk.probe.file.is_none() {
                disk.device = identity::of(&disk.image).unwrap_or_default();
            }
            if let Some(backing) = disk.drive.as_ref().and_then(|drive| drive.backing.as_deref()) {
                let mut probe = Probe { file: None, nonce: disk.probe.nonce };
                probe.place(backing);
                disk.backing_probe = Some(probe);
            }
        }
        disks.push(disk);
    }
    (disks, findings)
}

/// Why the mirror cannot take a disk.
fn not_mirrorable(drive: Option<&Drive>, base: bool, users: usize, options: &Options) -> Option<String> {
    let Some(drive) = drive else {
        let why = match base {
            true => "it is the base of another disk, and only shared storage can have such",
            false => "no drive of the VM has it",
        };
        return Some(why.to_owned());
    };
    if users > 1 {
        return Some(format!("{users} of the VM's drives use it"));
    }
    if options.engine == Engine::Qemu {
        return Some("--engine qemu moves no disks".to_owned());
    }
    if !wire::FORMATS.contains(&drive.format.as_str()) {
        return Some(format!("images of format {} cannot be made at the destination", drive.format));
    }
    None
}

/// What of an image would be lost, or be another at the destination: the copy is of what the guest sees.
fn lost(drive: &Drive, image: &Path, length: u64, is_device: bool) -> Option<String> {
    if drive.format == "raw" {
        // QEMU rounds up to sectors. Anything else is a part of the file, by `offset` or `size`.
        let whole = is_device || length.next_multiple_of(512) == drive.virtual_size;
        return (!whole).then(|| "the guest sees only a part of it".to_owned());
    }
    match qemu::probe_format(image) {
        Ok(qemu::Image::Qcow2(header)) if header.encrypted => {
            Some("it is encrypted, and its copy would not be".to_owned())
        }
        Ok(qemu::Image::Qcow2(header)) if header.external_data => {
            Some("its data are in another file".to_owned())
        }
        Ok(qemu::Image::Qcow2(header)) if header.snapshots > 0 => {
            Some("it has snapshots in it, which would be lost".to_owned())
        }
        Ok(_) => None,
        Err(e) => Some(chain(&e)),
    }
}

/// A file that is put beside an image. Removed when dropped.
#[derive(Debug)]
struct Probe {
    file: Option<PathBuf>,
    nonce: Uuid,
}

/// What the name of a probe file begins with.
const PROBE: &str = ".vmirror-probe-";
/// After which nobody can still be looking for a probe file.
const PROBE_LIFE: Duration = Duration::from_secs(600);

impl Probe {
    fn none() -> Probe {
        Probe { file: None, nonce: Uuid::new_v4() }
    }

    fn place(&mut self, image: &Path) {
        if let Err(e) = self.try_place(image) {
            tracing::warn!(image = %image.display(), error = %e, "no probe can be put beside an image");
        }
    }

    fn try_place(&mut self, image: &Path) -> std::io::Result<()> {
        let directory = std::fs::canonicalize(image)?;
        let directory = directory.parent().unwrap_or(Path::new("/"));
        sweep(directory);
        let file = directory.join(format!("{PROBE}{}", Uuid::new_v4()));
        let mut open = std::fs::OpenOptions::new();
        let mut opened = open.write(true).create_new(true).open(&file)?;
        // The other host's agent may be another user there, and what is in it is a number that says nothing.
        opened.set_permissions(PermissionsExt::from_mode(0o644))?;
        self.file = Some(file);
        std::io::Write::write_all(&mut opened, self.nonce.as_bytes())?;
        opened.sync_all()
    }
}

/// Removes probes that an agent which was killed has left. None is needed for longer than a reservation takes.
fn sweep(directory: &Path) {
    let Ok(files) = std::fs::read_dir(directory) else { return };
    for file in files.flatten() {
        let is_probe = file.file_name().as_encoded_bytes().starts_with(PROBE.as_bytes());
        let age = file.metadata().and_then(|file| file.modified()).map(|at| at.elapsed().unwrap_or_default());
        if is_probe && age.is_ok_and(|age| age > PROBE_LIFE) {
            let _ = std::fs::remove_file(file.path());
        }
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        if let Some(file) = &self.file {
            let _ = std::fs::remove_file(file);
        }
    }
}
