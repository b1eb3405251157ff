//! A disk of a test guest, on which it works as `guest::disk` says.

use std::path::PathBuf;

use guest::disk::{Plan, Role};

use super::escape;
use crate::disk::Format;

/// The PCI slot of the first of them: behind all that QEMU places itself, so that disks without a serial number stay the first.
const FIRST_SLOT: usize = 0x10;

/// A virtio disk: change the fields that matter, leave the rest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TestDisk {
    /// The image file, or the block device.
    pub image: PathBuf,
    /// Its format.
    pub format: Format,
    /// The serial number by which the guest knows it, of 1 to 20 letters and digits. Also in the names of the parts in QEMU: the
    /// node `disk-SERIAL` on `file-SERIAL`, the device `dev-SERIAL`.
    pub serial: String,
    /// Whether the host's page cache takes part.
    pub cache: Cache,
    /// How QEMU does its I/O.
    pub aio: Aio,
    /// Whether the guest may only read it; it then has no roles.
    pub read_only: bool,
    /// How QEMU is told of it.
    pub syntax: Syntax,
    /// What the guest does with it.
    pub roles: Vec<Role>,
}

/// Whether the host's page cache takes part. Either way the guest sees a disk with a volatile cache, which it flushes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cache {
    /// No: `cache=none`.
    None,
    /// Yes: `cache=writeback`.
    Writeback,
}

/// How QEMU does its I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aio {
    /// By threads.
    Threads,
    /// By the kernel; only without the host's page cache.
    Native,
    /// By `io_uring`.
    IoUring,
}

/// How a disk stands on QEMU's command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Syntax {
    /// `-blockdev` for each node.
    Blockdev,
    /// One `-drive if=none`.
    Drive,
}

impl TestDisk {
    /// A disk of that image and serial number, for nothing yet, around the host's page cache.
    pub fn new(image: impl Into<PathBuf>, format: Format, serial: &str) -> Self {
        Self {
            image: image.into(),
            format,
            serial: serial.to_owned(),
            cache: Cache::None,
            aio: Aio::Threads,
            read_only: false,
            syntax: Syntax::Blockdev,
            roles: Vec::new(),
        }
    }

    /// The arguments for QEMU, for the disk that has that place among the others.
    pub(super) fn arguments(&self, place: usize) -> Vec<String> {
        let Self { serial, .. } = self;
        let (image, format, aio) = (escape(&self.image), self.format.name(), self.aio.name());
        let switch = |on| if on { "on" } else { "off" };
        let (direct, read_only) = (switch(self.cache == Cache::None), switch(self.read_only));
        let slot = FIRST_SLOT + place;
        let device =
            format!("virtio-blk-pci,id=dev-{serial},drive=disk-{serial},serial={serial},addr={slot:#x}");
        let words = match self.syntax {
            Syntax::Blockdev => vec![
                "-blockdev".into(),
                format!(
                    "driver=file,node-name=file-{serial},filename={image},read-only={read_only},cache.direct={direct},aio={aio}"
                ),
                "-blockdev".into(),
                format!(
                    "driver={format},node-name=disk-{serial},file=file-{serial},read-only={read_only},cache.direct={direct}"
                ),
            ],
            Syntax::Drive => vec![
                "-drive".into(),
                format!(
                    "file={image},if=none,id=disk-{serial},format={format},readonly={read_only},cache={},aio={aio}",
                    self.cache.name()
                ),
            ],
        };
        [words, vec!["-device".into(), device]].concat()
    }

    /// The value of the kernel parameter `vmirror.disk`; none where the guest has nothing to do with it.
    pub(super) fn parameter(&self) -> Option<String> {
        let plan = || Plan { serial: self.serial.clone(), roles: self.roles.clone() };
        (!self.roles.is_empty()).then(|| plan().to_string())
    }
}

impl Cache {
    fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Writeback => "writeback",
        }
    }
}

impl Aio {
    fn name(self) -> &'static str {
        match self {
            Self::Threads => "threads",
            Self::Native => "native",
            Self::IoUring => "io_uring",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use guest::disk::Work;

    #[test]
    fn a_disk_is_two_nodes_and_a_device() {
        let disk = TestDisk {
            aio: Aio::Native,
            roles: vec![Work::BLOCKS.within(4), Work::Journal { rate: 5 }.in_the_rest()],
            ..TestDisk::new("/d,1", Format::Qcow2, "d1")
        };
        assert_eq!(
            disk.arguments(2).join(" "),
            "-blockdev driver=file,node-name=file-d1,filename=/d,,1,read-only=off,cache.direct=on,aio=native \
             -blockdev driver=qcow2,node-name=disk-d1,file=file-d1,read-only=off,cache.direct=on \
             -device virtio-blk-pci,id=dev-d1,drive=disk-d1,serial=d1,addr=0x12"
        );
        assert_eq!(Plan::parse(&disk.parameter().unwrap()).unwrap().roles, disk.roles);
    }

    #[test]
    fn a_disk_is_a_drive_where_wanted() {
        let disk = TestDisk {
            cache: Cache::Writeback,
            aio: Aio::IoUring,
            read_only: true,
            syntax: Syntax::Drive,
            ..TestDisk::new("/d", Format::Raw, "d1")
        };
        assert_eq!(
            disk.arguments(0).join(" "),
            "-drive file=/d,if=none,id=disk-d1,format=raw,readonly=on,cache=writeback,aio=io_uring \
             -device virtio-blk-pci,id=dev-d1,drive=disk-d1,serial=d1,addr=0x10"
        );
        assert_eq!(disk.parameter(), None);
    }
}
