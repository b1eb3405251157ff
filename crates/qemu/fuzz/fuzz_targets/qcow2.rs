//! The first bytes of an image, which a guest or a peer may have written.

#![no_main]

use fuzzing as _;

use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsRawFd as _;
use std::path::PathBuf;

use qemu::{Image, probe_format};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let path = memory_file(data);
    let Ok(image) = probe_format(&path.1) else { return };
    match image {
        Image::Raw { size } => assert_eq!(size, data.len() as u64),
        Image::Qcow2(header) => {
            assert!(header.cluster_size.is_power_of_two() && (512..=2 << 20).contains(&header.cluster_size));
            assert!(header.backing.is_none_or(|name| name.as_os_str().len() <= 1023));
        }
        _ => {}
    }
});

/// A file without a name, and a path that leads to it.
fn memory_file(content: &[u8]) -> (File, PathBuf) {
    let file = rustix::fs::memfd_create("image", rustix::fs::MemfdFlags::CLOEXEC);
    let mut file = File::from(file.expect("memory for a file"));
    file.write_all(content).expect("memory for a file");
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    (file, path)
}
