//! Disk images on the host: making them, and looking at what a guest left in them.
//!
//! Other formats than raw are left to QEMU's storage daemon, which comes with QEMU.

use std::fs::{self, File};
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use guest::disk::block;
use guest::disk::journal::Replay;
use guest::page::Identity;
use serde_json::json;
use twox_hash::XxHash3_128;

use crate::TestbedError;
use crate::monitor::Monitor;
use crate::tool::run;

const DAEMON: &str = "qemu-storage-daemon";
/// Bytes read at once.
const READ: usize = 1 << 20;

/// The format of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The guest's bytes and nothing else.
    Raw,
    /// QEMU's own.
    Qcow2,
    /// An older one of QEMU's.
    Qed,
}

impl Format {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Qed => "qed",
        }
    }
}

/// Makes an image of that many bytes, all zero and none allocated, in place of what was there.
///
/// # Errors
/// Where it cannot be written, or for other formats than raw where there is no storage daemon.
pub fn create(image: &Path, format: Format, bytes: u64) -> Result<(), TestbedError> {
    let file = File::create(image).map_err(TestbedError::file(image))?;
    match format {
        Format::Raw => file.set_len(bytes).map_err(TestbedError::file(image)),
        Format::Qcow2 | Format::Qed => {
            make(image, json!({ "driver": format.name(), "file": "image", "size": bytes }))
        }
    }
}

/// Makes a qcow2 image of that many bytes that holds nothing, on top of a raw one.
///
/// # Errors
/// Where it cannot be written, or there is no storage daemon.
pub fn create_overlay(image: &Path, base: &Path, bytes: u64) -> Result<(), TestbedError> {
    File::create(image).map_err(TestbedError::file(image))?;
    let options = json!({
        "driver": "qcow2", "file": "image", "size": bytes, "backing-file": base, "backing-fmt": "raw",
    });
    make(image, options)
}

fn make(image: &Path, options: serde_json::Value) -> Result<(), TestbedError> {
    let mut daemon = StorageDaemon::start()?;
    daemon.add("image", image, Access::Write)?;
    daemon.monitor.run_job("blockdev-create", json!({ "job-id": "job", "options": options }))
}

/// Makes a raw image of that many bytes with an empty ext4 in it.
///
/// # Errors
/// Where it cannot be written, or `mkfs.ext4` says why not.
pub fn create_ext4(image: &Path, bytes: u64) -> Result<(), TestbedError> {
    create(image, Format::Raw, bytes)?;
    // All of it made now, or the guest's kernel would go on making it in the background.
    let eager = "lazy_itable_init=0,lazy_journal_init=0";
    run("mkfs.ext4", &["-q", "-F", "-E", eager, &image.to_string_lossy()])?;
    Ok(())
}

/// Checks the ext4 in an image that nobody uses, and changes nothing.
///
/// # Errors
/// Where it is not clean, with what `e2fsck` says; where the image cannot be read.
pub fn check_ext4(image: &Path, format: Format) -> Result<(), TestbedError> {
    let content = Content::of(image, format)?;
    let path = content.path().to_string_lossy().into_owned();
    // Its journal, and the mark of a file system that is mounted, would have to be undone first: neither is clean.
    let header = run("dumpe2fs", &["-h", &path])?;
    if header.lines().any(|line| line.starts_with("Filesystem features:") && line.contains("needs_recovery"))
    {
        let message = "the journal of the file system needs recovery: it was not unmounted".to_owned();
        return Err(TestbedError::Tool { command: format!("dumpe2fs -h {path}"), message });
    }
    run("e2fsck", &["-f", "-n", &path])?;
    Ok(())
}

/// Copies a raw image that nobody writes, in place of what was there. What is zero takes up no room in the copy.
///
/// # Errors
/// Where it cannot be read, or the copy not be written.
pub fn copy_sparse(image: &Path, to: &Path) -> Result<(), TestbedError> {
    run("cp", &["--sparse=always", &image.to_string_lossy(), &to.to_string_lossy()])?;
    Ok(())
}

/// Bytes that the image takes up in its file system.
///
/// # Errors
/// Where there is no such file.
pub fn allocated(image: &Path) -> Result<u64, TestbedError> {
    Ok(fs::metadata(image).map_err(TestbedError::file(image))?.blocks() * 512)
}

/// A hash (XXH3, 128 bits) of what a guest sees, whatever the format. Nobody may be using the image, unless it is raw.
///
/// # Errors
/// Where it cannot be read.
pub fn hash(image: &Path, format: Format) -> Result<u128, TestbedError> {
    let content = Content::of(image, format)?;
    let hash = || -> io::Result<u128> {
        let (mut file, mut hasher) = (File::open(content.path())?, XxHash3_128::new());
        let mut buffer = vec![0; READ];
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(hasher.finish_128()),
                length => hasher.write(&buffer[..length]),
            }
        }
    };
    hash().map_err(TestbedError::file(image))
}

/// Copies what a guest sees to a raw image, in place of what was there; zeros are allocated as well. Nobody may be using the
/// image.
///
/// # Errors
/// Where it cannot be read, or the copy not be written.
pub fn copy_raw(image: &Path, format: Format, to: &Path) -> Result<(), TestbedError> {
    let mut daemon = StorageDaemon::start()?;
    daemon.add("image", image, Access::Read)?;
    let source =
        json!({ "driver": format.name(), "node-name": "content", "file": "image", "read-only": true });
    daemon.monitor.execute("blockdev-add", source)?;
    let nodes = daemon.monitor.execute("query-named-block-nodes", json!({ "flat": true }))?;
    let bytes = nodes.as_array().into_iter().flatten().find(|node| node["node-name"] == "content");
    let bytes = bytes.and_then(|node| node["image"]["virtual-size"].as_u64()).ok_or_else(|| {
        TestbedError::Tool { command: DAEMON.to_owned(), message: "does not tell the image's size".into() }
    })?;
    create(to, Format::Raw, bytes)?;
    daemon.add("copy", to, Access::Write)?;
    let job = json!({
        "job-id": "job", "device": "content", "target": "copy", "sync": "full", "auto-dismiss": false,
    });
    daemon.monitor.run_job("blockdev-backup", job)
}

/// Reads a journal of `guest::disk` that the guest left in an image, in the region of that many bytes.
///
/// # Errors
/// Where it cannot be read.
pub fn journal(
    image: &Path,
    format: Format,
    serial: &str,
    region: Range<u64>,
) -> Result<Replay, TestbedError> {
    let content = Content::of(image, format)?;
    File::open(content.path())
        .and_then(|file| Replay::read(&file, region, serial))
        .map_err(TestbedError::file(image))
}

/// Finds a block of `guest::disk` in a raw image: its offset, and which it is.
///
/// # Errors
/// Where it cannot be read.
pub fn find_block(
    image: &Path,
    wanted: impl Fn(Identity) -> bool,
) -> Result<Option<(u64, Identity)>, TestbedError> {
    let bytes = fs::read(image).map_err(TestbedError::file(image))?;
    let blocks = (0..).step_by(block::SIZE).zip(bytes.chunks_exact(block::SIZE));
    // The magic number first: the checksum of every block would take a while.
    let ours = blocks.filter(|(_, bytes)| bytes.starts_with(&block::MAGIC.to_le_bytes()));
    let mut found = ours.filter_map(|(offset, bytes)| Some((offset, block::identify(bytes)?.0)));
    Ok(found.find(|(_, identity)| wanted(*identity)))
}

/// What a guest sees of an image, as a file.
enum Content {
    /// The image itself.
    Image(PathBuf),
    /// A copy, to be removed.
    Copy(PathBuf),
}

impl Content {
    fn of(image: &Path, format: Format) -> Result<Self, TestbedError> {
        if format == Format::Raw {
            return Ok(Self::Image(image.to_owned()));
        }
        let name = image.file_name().unwrap_or_default().to_string_lossy();
        // Two tests of one process may look at the same image.
        let thread = std::thread::current().id();
        let copy = Self::Copy(image.with_file_name(format!("{name}.{}-{thread:?}.raw", std::process::id())));
        copy_raw(image, format, copy.path())?;
        Ok(copy)
    }

    fn path(&self) -> &Path {
        match self {
            Self::Image(path) | Self::Copy(path) => path,
        }
    }
}

impl Drop for Content {
    fn drop(&mut self) {
        if let Self::Copy(path) = self {
            let _ = fs::remove_file(path);
        }
    }
}

/// QEMU's storage daemon. It is ended when this is dropped.
struct StorageDaemon {
    process: Child,
    monitor: Monitor,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    Read,
    Write,
}

impl StorageDaemon {
    fn start() -> Result<Self, TestbedError> {
        let failed = |source| TestbedError::Start { program: DAEMON.to_owned(), source };
        let mut process = Command::new(DAEMON)
            .args(["--chardev", "stdio,id=monitor", "--monitor", "monitor"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let pipes = process.stdout.take().zip(process.stdin.take());
        let (reader, writer) = pipes.ok_or_else(|| failed(io::ErrorKind::BrokenPipe.into()))?;
        Ok(Self { process, monitor: Monitor::over(reader, writer)? })
    }

    /// Opens a file as the node of that name.
    fn add(&mut self, node: &str, file: &Path, access: Access) -> Result<(), TestbedError> {
        let node = json!({
            "driver": "file",
            "node-name": node,
            "filename": file,
            "read-only": access == Access::Read,
        });
        self.monitor.execute("blockdev-add", node).map(drop)
    }
}

impl Drop for StorageDaemon {
    fn drop(&mut self) {
        // In its own time, so that what it wrote is written; unless it no longer listens.
        if self.monitor.execute("quit", json!({})).is_err() {
            let _ = self.process.kill();
        }
        let _ = self.process.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ram::flip;
    use guest::page;

    #[test]
    fn images_of_either_format_are_empty_and_alike_to_a_guest() {
        let directory = tempfile::tempdir().unwrap();
        let [raw, qcow2, copy] = ["raw", "qcow2", "copy"].map(|name| directory.path().join(name));
        create(&raw, Format::Raw, 8 << 20).unwrap();
        create(&qcow2, Format::Qcow2, 8 << 20).unwrap();
        assert_eq!(allocated(&raw).unwrap(), 0);
        assert!(allocated(&qcow2).unwrap() < 1 << 20);
        let empty = hash(&raw, Format::Raw).unwrap();
        assert_eq!(hash(&qcow2, Format::Qcow2).unwrap(), empty);
        copy_raw(&qcow2, Format::Qcow2, &copy).unwrap();
        assert_eq!(hash(&copy, Format::Raw).unwrap(), empty);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 3, "no copy is left behind");
        flip(&raw, 4 << 20, 1).unwrap();
        assert_ne!(hash(&raw, Format::Raw).unwrap(), empty);
        assert!(allocated(&raw).unwrap() > 0);
    }

    #[test]
    fn a_clean_ext4_is_told_from_a_damaged_one() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("ext4");
        create_ext4(&image, 32 << 20).unwrap();
        check_ext4(&image, Format::Raw).unwrap();
        // The block bitmap's checksum is in the first group's descriptor, behind the superblock.
        flip(&image, 4096 + 0x18, 0xff).unwrap();
        let error = check_ext4(&image, Format::Raw).unwrap_err();
        assert!(matches!(&error, TestbedError::Tool { .. }), "{error}");
    }

    #[test]
    fn an_image_that_is_none_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("raw");
        create(&image, Format::Raw, 1 << 20).unwrap();
        let error = hash(&image, Format::Qcow2).unwrap_err();
        assert!(error.to_string().contains("qcow2"), "{error}");
        assert!(matches!(hash(&directory.path().join("none"), Format::Raw), Err(TestbedError::File { .. })));
    }

    #[test]
    fn a_block_is_found() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("raw");
        let mut bytes = vec![0; 4 * block::SIZE];
        let identity = Identity { number: 2, generation: 1, boot: 5 };
        block::write(&mut bytes[2 * block::SIZE..3 * block::SIZE], "d", identity, page::Content::Text);
        fs::write(&image, bytes).unwrap();
        assert_eq!(find_block(&image, |_| true).unwrap(), Some((8192, identity)));
        assert_eq!(find_block(&image, |block| block.number == 1).unwrap(), None);
    }
}
