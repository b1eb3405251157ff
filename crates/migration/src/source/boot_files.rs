//! Files that a machine boots from directly: described for a destination, and shipped where that does not have them.

use std::path::{Path, PathBuf};

use mirror::hash::Secret;
use qemu::Spec;

use host::boot_files::{named, read};
use protocol::wire;

/// Bytes in one message.
const PART: usize = 256 << 10;

/// The files of a machine that can be shipped, with their size and content at the source. Those that cannot be read are left out: the
/// destination says that they are missing, if they are.
pub(super) fn of(spec: &Spec, secret: &Secret) -> Vec<wire::BootFile> {
    let described = |path: PathBuf| {
        let content = read(&path).ok()?;
        Some(wire::BootFile {
            path: path.to_str()?.to_owned(),
            size: content.len() as u64,
            hash: secret.hash(&content).bits().to_le_bytes().to_vec(),
        })
    };
    named(spec).into_iter().filter_map(described).collect()
}

/// The content of a file, in the parts in which it is sent.
pub(super) fn parts(path: &Path) -> std::io::Result<Vec<Vec<u8>>> {
    Ok(read(path)?.chunks(PART).map(<[u8]>::to_vec).collect())
}
