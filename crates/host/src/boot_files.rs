//! Files that a machine boots from directly: kernel, initrd and device tree.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use qemu::{FilePurpose, Spec};

/// Most bytes of a file: the largest initrds have half of it.
pub const MOST: u64 = 1 << 30;

/// Those that a machine's command line names.
#[must_use]
pub fn named(spec: &Spec) -> Vec<PathBuf> {
    spec.files().into_iter().filter(|file| is_boot_file(file.purpose)).map(|file| file.path).collect()
}

fn is_boot_file(purpose: FilePurpose) -> bool {
    matches!(purpose, FilePurpose::Kernel | FilePurpose::Initrd | FilePurpose::DeviceTree)
}

/// The content of one.
///
/// # Errors
/// Also if it is no file, or larger than any such is.
pub fn read(path: &Path) -> io::Result<Vec<u8>> {
    let file = File::open(path)?;
    if !file.metadata()?.is_file() || file.metadata()?.len() > MOST {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut content = Vec::new();
    file.take(MOST).read_to_end(&mut content)?;
    Ok(content)
}
