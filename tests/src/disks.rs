//! Hosts with storage of their own.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use testbed::{AgentOptions, Host};

/// Content that cannot be compressed, and of which no two blocks are alike.
#[must_use]
pub fn noise(bytes: u64) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let words = (0..bytes / 8).flat_map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.collect()
}

/// Writes noise of that many bytes into an image.
///
/// # Panics
/// If it cannot be written.
pub fn write_noise(image: &Path, offset: u64, bytes: u64) {
    File::options().write(true).open(image).unwrap().write_all_at(&noise(bytes), offset).unwrap();
}

/// An image of a host with storage of its own, as it is seen from outside.
#[must_use]
pub fn image(host: &Host, name: &str) -> PathBuf {
    host.disk_dir().join(name)
}

/// How the agent of a host with storage of its own is started.
#[must_use]
pub fn local() -> AgentOptions {
    AgentOptions { local: true, ..AgentOptions::default() }
}
