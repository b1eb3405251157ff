//! Packs the guest: an initramfs of the init program and the kernel modules it may need.
//!
//! The same input gives the same bytes: no times, no owners, a fixed order.

mod cpio;
mod modules;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

pub use cpio::{Archive, TooLarge};
pub use modules::{Dependencies, ModuleError, Modules};

/// Where the modules and [`DEPENDENCIES`] lie in the guest.
pub const MODULES: &str = "/modules";
/// The file in [`MODULES`] that says which module needs which.
pub const DEPENDENCIES: &str = "dependencies";

/// Modules the init loads where the machine has the device, or where it is asked for what needs them.
const WANTED: [&str; 9] = [
    "virtio_pci",
    "virtio_net",
    "virtio_blk",
    "virtio_scsi",
    "virtio_console",
    "virtio_balloon",
    "virtio_rng",
    "pvpanic_mmio",
    "overlay",
];

/// An image that could not be built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The unpacked kernel package lacks something, or has more than one of it.
    #[error("{at}: expected exactly one {what}")]
    Kernel {
        /// Where it was looked for.
        at: PathBuf,
        /// What was looked for.
        what: &'static str,
    },
    /// A file could not be read or written.
    #[error("{path}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A kernel module is missing or not one.
    #[error("kernel modules")]
    Module(#[from] ModuleError),
    /// A file does not fit the archive's format.
    #[error("initramfs")]
    Archive(#[from] TooLarge),
}

/// Builds `vmlinuz` and `initramfs.cpio` in `output`, from an unpacked kernel package and the init program.
///
/// # Errors
/// Where the package is not as expected, or files cannot be read or written.
pub fn build(kernel_package: &Path, init: &Path, output: &Path) -> Result<(), ImageError> {
    let kernel = only(&kernel_package.join("boot"), "vmlinuz-*", |name| name.starts_with("vmlinuz-"))?;
    let release = only(&kernel_package.join("lib/modules"), "kernel release", |_| true)?;
    let initramfs = archive(&Modules::find(&release)?, &read(init)?)?;
    fs::create_dir_all(output).map_err(|source| ImageError::File { path: output.to_owned(), source })?;
    replace(&output.join("vmlinuz"), &read(&kernel)?)?;
    replace(&output.join("initramfs.cpio"), &initramfs)
}

fn archive(modules: &Modules, init: &[u8]) -> Result<Vec<u8>, ImageError> {
    let mut archive = Archive::new();
    for directory in ["dev", "proc", "sys", &MODULES[1..]] {
        archive.directory(directory)?;
    }
    // The kernel opens it for init before anything is mounted.
    archive.character_device("dev/console", 5, 1)?;
    archive.file("init", 0o755, init)?;
    let mut dependencies = Dependencies::default();
    for (name, needs, path) in modules.closure(&WANTED)? {
        archive.file(&format!("{}/{name}.ko", &MODULES[1..]), 0o644, &modules::read_module(&path)?)?;
        dependencies.insert(name, needs);
    }
    archive.file(&format!("{}/{DEPENDENCIES}", &MODULES[1..]), 0o644, dependencies.to_string().as_bytes())?;
    Ok(archive.finish()?)
}

fn only(directory: &Path, what: &'static str, fits: impl Fn(&str) -> bool) -> Result<PathBuf, ImageError> {
    let failed = |source| ImageError::File { path: directory.to_owned(), source };
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if entry.file_name().to_str().is_some_and(&fits) {
            found.push(entry.path());
        }
    }
    match <[PathBuf; 1]>::try_from(found) {
        Ok([path]) => Ok(path),
        Err(_) => Err(ImageError::Kernel { at: directory.to_owned(), what }),
    }
}

fn read(path: &Path) -> Result<Vec<u8>, ImageError> {
    fs::read(path).map_err(|source| ImageError::File { path: path.to_owned(), source })
}

/// Writes a file whole or not at all: a guest may be booting from the old one.
fn replace(path: &Path, bytes: &[u8]) -> Result<(), ImageError> {
    let new = path.with_extension(format!("new-{}", std::process::id()));
    fs::write(&new, bytes)
        .and_then(|()| fs::rename(&new, path))
        .map_err(|source| ImageError::File { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_package_with_two_kernels_is_refused() {
        let package = tempfile::tempdir().unwrap();
        let boot = package.path().join("boot");
        fs::create_dir(&boot).unwrap();
        fs::write(boot.join("vmlinuz-1"), "").unwrap();
        fs::write(boot.join("vmlinuz-2"), "").unwrap();
        let error = build(package.path(), Path::new("/nonexistent"), package.path()).unwrap_err();
        assert!(matches!(error, ImageError::Kernel { what: "vmlinuz-*", .. }), "{error}");
    }

    #[test]
    fn files_are_replaced_whole() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("initramfs.cpio");
        replace(&path, b"old").unwrap();
        replace(&path, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
