//! What is said of a machine for which everything is to be set aside.

use prost::Message;

use super::{BootFile, CgroupLimits, Forward, Tap};

/// A machine, and what it needs.
#[derive(Clone, PartialEq, Message)]
pub struct Reserve {
    /// The migration's identity, 16 bytes.
    #[prost(bytes = "vec", tag = "1")]
    pub session: Vec<u8>,
    /// Name of the machine.
    #[prost(string, tag = "2")]
    pub name: String,
    /// How often it has changed owner.
    #[prost(uint64, tag = "3")]
    pub generation: u64,
    /// QEMU's command line, paths absolute.
    #[prost(string, repeated, tag = "4")]
    pub argv: Vec<String>,
    /// Versioned machine type.
    #[prost(string, tag = "5")]
    pub machine: String,
    /// The source's QEMU.
    #[prost(string, tag = "6")]
    pub qemu_version: String,
    /// Features that the guest's CPUs have, by name; only where they have no CPUID.
    #[prost(string, repeated, tag = "7")]
    pub cpu_features: Vec<String>,
    /// RAM blocks in the layout's order.
    #[prost(message, repeated, tag = "8")]
    pub ram: Vec<RamBlock>,
    /// Disks.
    #[prost(message, repeated, tag = "9")]
    pub disks: Vec<Disk>,
    /// Tap interfaces.
    #[prost(message, repeated, tag = "10")]
    pub taps: Vec<Tap>,
    /// Macvtaps. Not among the taps: who does not know them would make taps of them.
    #[prost(message, repeated, tag = "31")]
    pub macvtaps: Vec<Tap>,
    /// Number of data streams.
    #[prost(uint32, tag = "11")]
    pub streams: u32,
    /// Key material of the content hashes.
    #[prost(bytes = "vec", tag = "12")]
    pub secret: Vec<u8>,
    /// Files that the machine boots from directly.
    #[prost(message, repeated, tag = "23")]
    pub boot_files: Vec<BootFile>,
    /// The machine's own table in the source's firewall, as `nft --json` lists it; empty for none.
    #[prost(string, tag = "24")]
    pub nft: String,
    /// Networks whose connections end with the move are no reason against it.
    #[prost(bool, tag = "25")]
    pub accept_disconnect: bool,
    /// Limits of CPU and memory that its process has; none where it has none.
    #[prost(message, optional, tag = "26")]
    pub limits: Option<CgroupLimits>,
    /// Images that are made get all the room that they can need, at once.
    #[prost(bool, tag = "22")]
    pub whole_room: bool,
    /// Its taps stay in the source's network.
    #[prost(message, optional, tag = "30")]
    pub forward: Option<Forward>,
    /// Only find out, and give everything back at once.
    #[prost(bool, tag = "13")]
    pub rehearsal: bool,
    /// Whether the source goes on waiting for as long as it is told that its reservation is worked on.
    #[prost(bool, tag = "40")]
    pub patient: bool,
    /// CPUID feature words of the guest's CPUs.
    #[prost(message, repeated, tag = "14")]
    pub cpuid: Vec<CpuidWord>,
    /// The machine may be handed over before its memory is complete.
    #[prost(bool, tag = "21")]
    pub post_copy: bool,
    /// Port of the source's own link, by which it can be asked whose the machine is; 0 where it does not say.
    #[prost(uint32, tag = "32")]
    pub link_port: u32,
    /// Earlier migrations of the machine by this source whose copies are worthless, 16 bytes each: a complete copy of any other gives way to
    /// nothing here. A source that does not say which has all give way.
    #[prost(bytes = "vec", optional, tag = "33")]
    pub abandoned: Option<Vec<u8>>,
    /// The first data stream carries QEMU's own stream, with guest RAM and all, and nothing else.
    #[prost(bool, tag = "20")]
    pub qemu_stream: bool,
    /// Device state was saved without a migration by QEMU, for its RAM is private, and brings the machine's own RAM blocks along: QEMU there
    /// is to take RAM by it.
    #[prost(bool, tag = "41")]
    pub saved_devices: bool,
}

/// A word of CPUID.
#[derive(Clone, PartialEq, Message)]
pub struct CpuidWord {
    /// EAX when the instruction is executed.
    #[prost(uint32, tag = "1")]
    pub leaf: u32,
    /// ECX, where the leaf has sub-leaves.
    #[prost(uint32, optional, tag = "2")]
    pub subleaf: Option<u32>,
    /// Name of the register with the answer.
    #[prost(string, tag = "3")]
    pub register: String,
    /// A bit for each feature.
    #[prost(fixed32, tag = "4")]
    pub features: u32,
}

/// A RAM block.
#[derive(Clone, PartialEq, Message)]
pub struct RamBlock {
    /// Its backend's id.
    #[prost(string, tag = "1")]
    pub id: String,
    /// Bytes.
    #[prost(uint64, tag = "2")]
    pub size: u64,
    /// Bytes in a page of the file that backs it, where that is on hugetlbfs; 0 elsewhere.
    #[prost(uint64, tag = "3")]
    pub huge_page: u64,
}

/// Formats of images that can be made at a destination.
pub const FORMATS: [&str; 2] = ["raw", "qcow2"];

/// A disk.
#[derive(Clone, PartialEq, Message)]
pub struct Disk {
    /// Path of the image or device.
    #[prost(string, tag = "1")]
    pub path: String,
    /// A file beside it that the source has just made; the destination sees it where the storage is shared.
    #[prost(string, tag = "2")]
    pub probe: String,
    /// The probe's content.
    #[prost(bytes = "vec", tag = "3")]
    pub nonce: Vec<u8>,
    /// What is to become of it: 0, found out by the probe; 1, it is mirrored; 2, it is shared.
    #[prost(uint32, tag = "4")]
    pub mode: u32,
    /// Bytes, as the guest sees them; 0 where the source cannot mirror it.
    #[prost(uint64, tag = "5")]
    pub size: u64,
    /// The image's format: `raw`, `qcow2`.
    #[prost(string, tag = "6")]
    pub format: String,
    /// Bytes in a cluster, of formats that have such.
    #[prost(uint64, tag = "7")]
    pub cluster_size: u64,
    /// Bytes that it takes at the source.
    #[prost(uint64, tag = "8")]
    pub allocated: u64,
    /// It is a block device.
    #[prost(bool, tag = "9")]
    pub is_device: bool,
    /// Which block device it is, where that can be told, so that two hosts see whether it is the same. Of a file that no probe can be
    /// put beside, which file: that says something only on hosts of one kernel.
    #[prost(string, tag = "10")]
    pub device: String,
    /// Where the source cannot mirror it, why.
    #[prost(string, tag = "11")]
    pub not_mirrorable: String,
    /// The image that it is based on; empty for none.
    #[prost(string, tag = "12")]
    pub backing: String,
    /// The format of that.
    #[prost(string, tag = "13")]
    pub backing_format: String,
    /// A probe beside that image.
    #[prost(string, tag = "14")]
    pub backing_probe: String,
    /// Where `path` leads to at the source, with every link in it followed.
    #[prost(string, tag = "15")]
    pub real: String,
}
