//! Hosts with storage of their own.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

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

/// A block device `device` in a host's directory of disks, backed by a file. Given back when dropped.
#[derive(Debug)]
pub struct BlockDevice(PathBuf);

impl BlockDevice {
    /// With this content.
    ///
    /// # Panics
    /// If it cannot be made.
    #[must_use]
    pub fn new(host: &Host, content: &[u8]) -> BlockDevice {
        let file = host.directory().join("device");
        fs::write(&file, content).unwrap();
        BlockDevice::over(host, &file)
    }

    /// All zero, with no more room than the directory of disks has when it is written.
    ///
    /// # Panics
    /// If it cannot be made.
    #[must_use]
    pub fn thin(host: &Host, bytes: u64) -> BlockDevice {
        let file = image(host, "device.thin");
        File::create_new(&file).unwrap().set_len(bytes).unwrap();
        BlockDevice::over(host, &file)
    }

    /// Of this file.
    ///
    /// # Panics
    /// If it cannot be made.
    #[must_use]
    pub fn over(host: &Host, file: &Path) -> BlockDevice {
        let made = Command::new("losetup").args(["--find", "--show"]).arg(file).output().unwrap();
        assert!(made.status.success(), "{made:?}");
        let device = BlockDevice(PathBuf::from(String::from_utf8(made.stdout).unwrap().trim()));
        let number = fs::metadata(&device.0).unwrap().rdev();
        let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
        let mut node = Command::new("mknod");
        node.arg(image(host, "device")).args(["b", &major.to_string(), &minor.to_string()]);
        assert!(node.status().unwrap().success());
        device
    }

    /// Mounts the file system that it holds, until the value is dropped.
    ///
    /// # Panics
    /// If it cannot be mounted.
    #[must_use]
    pub fn mount(&self, at: &Path) -> Mounted {
        fs::create_dir(at).unwrap();
        assert!(Command::new("mount").arg(&self.0).arg(at).status().unwrap().success());
        Mounted(at.to_owned())
    }

    /// What it holds.
    ///
    /// # Panics
    /// If it cannot be read.
    #[must_use]
    pub fn content(&self) -> Vec<u8> {
        fs::read(&self.0).unwrap()
    }

    /// Lets every write to it fail from now on, or none any more, whoever has it open.
    ///
    /// # Panics
    /// If it cannot be changed.
    pub fn fail_writes(&self, fail: bool) {
        let mut command = Command::new("blockdev");
        command.arg(if fail { "--setro" } else { "--setrw" }).arg(&self.0);
        assert!(command.status().unwrap().success());
    }
}

/// A file system that is mounted. Unmounted when dropped.
#[derive(Debug)]
pub struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

impl Drop for BlockDevice {
    fn drop(&mut self) {
        // Whoever gets this number next is to be able to write to it.
        let _ = Command::new("blockdev").arg("--setrw").arg(&self.0).status();
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}
