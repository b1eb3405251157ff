//! Which storage something is, in words that two hosts can compare: a block device by the name that its maker gave it, a file on a
//! network file system by its server and place. What has no such name can be compared only by who runs on the same kernel.

use std::fs::{self, Metadata};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use uuid::Uuid;

/// Where a device's own name is found, of a disk, of a device of the device mapper.
const NAMES: [&str; 4] = ["wwid", "device/wwid", "dm/uuid", "uuid"];
/// Names that emulators give to the disks of every machine they make.
const EVERYBODYS: [&str; 3] = ["QEMU", "VBOX", "VMware"];
/// Devices on top of devices on top of devices: a bound, as the kernel has none.
const LAYERS: usize = 8;
/// File systems whose files are the same for all hosts that mount them from the same place.
const NETWORK: [&str; 12] = [
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "ceph",
    "fuse.ceph",
    "glusterfs",
    "fuse.glusterfs",
    "lustre",
    "gpfs",
    "beegfs",
    "fuse.moosefs",
];
/// File systems that one host has at a time, and containers on it with one kernel.
const ON_ONE_HOST: [&str; 13] = [
    "ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "jfs", "tmpfs", "overlay", "vfat",
    "exfat",
];
/// Servers that are another one for each host.
const LOCAL: [&str; 4] = ["localhost", "127.", "[::1]", "//localhost"];

/// Which file or block device it is.
pub fn of(path: &Path) -> Option<String> {
    let file = fs::metadata(path).ok()?;
    if file.file_type().is_block_device() {
        return Some(device(&file));
    }
    on_network(path, &file).or_else(|| Some(format!("{}/{}/{}", this_kernel(), file.dev(), file.ino())))
}

/// Whether what is told of the storage of another host says anything here.
pub fn is_comparable(identity: &str) -> bool {
    let number = identity.split_once('/').filter(|(kernel, _)| Uuid::parse_str(kernel).is_ok());
    number.is_none_or(|(kernel, _)| kernel == this_kernel())
}

/// What is the same for all who run on one kernel, and for nobody else.
fn this_kernel() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

fn device(device: &Metadata) -> String {
    let number = device.rdev();
    let place =
        PathBuf::from(format!("/sys/dev/block/{}:{}", rustix::fs::major(number), rustix::fs::minor(number)));
    given_name(&place, LAYERS).unwrap_or_else(|| {
        // The number of a loop device, or of a volume, is used again; how often one was made is not.
        let made = read(&place.join("diskseq")).unwrap_or_default();
        format!("{}/{number:x}/{made}", this_kernel())
    })
}

fn read(file: &Path) -> Option<String> {
    let text = fs::read_to_string(file).ok()?;
    Some(text.trim().to_owned()).filter(|text| !text.is_empty())
}

/// The name that a device has wherever it is seen. One that is made of others, as a volume is, has one only if they have: two hosts
/// that were installed from one template have volumes of the same name.
fn given_name(place: &Path, layers: usize) -> Option<String> {
    let name = NAMES.iter().find_map(|name| read(&place.join(name)))?;
    if EVERYBODYS.iter().any(|common| name.contains(common)) {
        return None;
    }
    let mut below = Vec::new();
    for lower in fs::read_dir(place.join("slaves")).ok().into_iter().flatten().flatten() {
        // Of a partition, the disk's.
        let lower = fs::canonicalize(lower.path()).ok()?;
        let whole = if lower.join("partition").exists() { lower.parent()? } else { &lower };
        below.push(given_name(whole, layers.checked_sub(1)?)?);
    }
    below.sort();
    Some(below.iter().fold(name, |name, lower| format!("{name} on {lower}")))
}

/// A file on a network file system: its server, its place there, and which file it is.
fn on_network(path: &Path, file: &Metadata) -> Option<String> {
    let real = fs::canonicalize(path).ok()?;
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    Some(format!("{} {} {}", place_on_network(&real, &mounts)?, file.ino(), file.len()))
}

/// Where a path is on a network file system, by the lines of proc(5) about mounts.
fn place_on_network(real: &Path, mounts: &str) -> Option<String> {
    let mount = mount_of(real, mounts)?;
    let shared = NETWORK.contains(&mount.kind) && !LOCAL.iter().any(|local| mount.source.starts_with(local));
    let within = real.strip_prefix(&mount.point).ok()?;
    shared.then(|| format!("{} {} {}", mount.kind, mount.source, mount.root.join(within).display()))
}

/// How far locks on a file reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LocksReach {
    /// Everybody who can have the file open: it is this host's alone, or its file system carries locks between hosts.
    All,
    /// Nobody on another host, as far as is known.
    ThisHost,
}

/// How far locks on a file reach, by the file system that it is on.
pub(crate) fn locks_reach(path: &Path) -> LocksReach {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    fs::canonicalize(path).map_or(LocksReach::ThisHost, |real| reach(&real, &mounts))
}

fn reach(real: &Path, mounts: &str) -> LocksReach {
    let Some(mount) = mount_of(real, mounts) else { return LocksReach::ThisHost };
    let has = |option: &str| mount.options.split(',').any(|given| given == option);
    let carries = match mount.kind {
        kind if ON_ONE_HOST.contains(&kind) => true,
        "nfs" | "nfs4" => {
            let local = mount.options.split(',').find_map(|given| given.strip_prefix("local_lock="));
            !has("nolock") && local.is_none_or(|local| local == "none")
        }
        "ceph" => true,
        "gfs2" => !has("localflocks"),
        "lustre" => has("flock"),
        _ => false,
    };
    if carries { LocksReach::All } else { LocksReach::ThisHost }
}

/// Of those mounted at the same place the last one is seen.
fn mount_of<'a>(real: &Path, mounts: &'a str) -> Option<Mount<'a>> {
    let lines = mounts.lines().filter_map(Mount::of);
    lines.filter(|mount| real.starts_with(&mount.point)).max_by_key(|mount| mount.point.components().count())
}

struct Mount<'a> {
    root: PathBuf,
    point: PathBuf,
    kind: &'a str,
    source: &'a str,
    /// Of the file system, not of where it is mounted.
    options: &'a str,
}

impl Mount<'_> {
    fn of(line: &str) -> Option<Mount<'_>> {
        let (before, after) = line.split_once(" - ")?;
        let mut before = before.split(' ').skip(3);
        let (root, point) = (unescape(before.next()?), unescape(before.next()?));
        let mut after = after.split(' ');
        let (kind, source) = (after.next()?, after.next()?);
        Some(Mount { root, point, kind, source, options: after.next().unwrap_or_default() })
    }
}

/// Spaces and the like are written in octal.
fn unescape(text: &str) -> PathBuf {
    let escapes = [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")];
    PathBuf::from(escapes.iter().fold(text.to_owned(), |text, (from, to)| text.replace(from, to)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_a_network_file_system_has_a_place_that_other_hosts_know() {
        let mounts = "\
25 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw
40 25 0:50 / /srv/my\\040vms rw,relatime shared:2 - nfs4 filer:/vol/vms rw,vers=4.2
41 40 0:51 /deep /srv/my\\040vms/sub rw - nfs4 filer:/vol/other rw
42 25 0:52 / /mnt/own rw - nfs4 localhost:/vol rw
43 25 0:53 / /mnt/tmp rw - tmpfs tmpfs rw
";
        let place = |path: &str| place_on_network(Path::new(path), mounts);
        assert_eq!(place("/srv/my vms/a.img").unwrap(), "nfs4 filer:/vol/vms /a.img");
        assert_eq!(place("/srv/my vms/sub/a.img").unwrap(), "nfs4 filer:/vol/other /deep/a.img");
        for local in ["/var/a.img", "/mnt/own/a.img", "/mnt/tmp/a.img", "/srv/my vms2/a.img"] {
            assert_eq!(place(local), None, "{local}");
        }
    }

    #[test]
    fn locks_reach_another_host_only_where_the_file_system_is_known_to_carry_them() {
        let on = |kind: &str, options: &str| {
            let mounts = format!(
                "25 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw\n40 25 0:50 / /srv/my\\040vms rw,nolock - {kind} filer:/vol {options}\n"
            );
            reach(Path::new("/srv/my vms/a.img"), &mounts)
        };
        for (kind, options) in [
            ("nfs4", "rw,vers=4.2,local_lock=none,addr=10.0.0.1"),
            ("nfs", "rw,vers=3,addr=10.0.0.1"),
            ("ceph", "rw"),
            ("gfs2", "rw,lockproto=lock_dlm"),
            ("lustre", "rw,flock,lazystatfs"),
            ("xfs", "rw"),
            ("tmpfs", "rw,size=1g"),
        ] {
            assert_eq!(on(kind, options), LocksReach::All, "{kind} {options}");
        }
        for (kind, options) in [
            ("nfs", "rw,vers=3,nolock,local_lock=all"),
            ("nfs", "rw,vers=3,nolock"),
            ("nfs4", "rw,local_lock=flock"),
            ("nfs", "rw,local_lock=posix"),
            ("nfs4", "rw,local_lock=all"),
            ("gfs2", "rw,localflocks"),
            ("lustre", "rw,localflock"),
            ("lustre", "rw"),
            ("ocfs2", "rw"),
            ("cifs", "rw"),
            ("9p", "rw,trans=virtio"),
            ("virtiofs", "rw"),
            ("fuse.glusterfs", "rw"),
            ("of-tomorrow", "rw"),
        ] {
            assert_eq!(on(kind, options), LocksReach::ThisHost, "{kind} {options}");
        }
        assert_eq!(reach(Path::new("/a.img"), ""), LocksReach::ThisHost, "nothing is known");
    }

    fn device(root: &Path, name: &str, files: &[(&str, &str)], on: &[&str]) -> PathBuf {
        let place = root.join(name);
        for (file, text) in files {
            let file = place.join(file);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        }
        fs::create_dir_all(place.join("slaves")).unwrap();
        for lower in on {
            std::os::unix::fs::symlink(root.join(lower), place.join("slaves").join(lower.replace('/', "-")))
                .unwrap();
        }
        place
    }

    #[test]
    fn a_device_is_known_everywhere_only_if_all_that_it_is_made_of_is() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        device(root, "san", &[("device/wwid", "naa.5000\n")], &[]);
        device(root, "vda", &[], &[]);
        device(root, "vda/vda1", &[("partition", "1")], &[]);
        device(root, "san/san1", &[("partition", "1")], &[]);
        let [shared, local, common] =
            [("shared", "san/san1"), ("local", "vda/vda1"), ("common", "")].map(|(name, on)| {
                if on.is_empty() {
                    device(root, name, &[("device/wwid", "t10.ATA QEMU HARDDISK QM00001")], &[])
                } else {
                    device(root, name, &[("dm/uuid", "LVM-x")], &[on])
                }
            });
        assert_eq!(given_name(&shared, LAYERS).unwrap(), "LVM-x on naa.5000");
        assert_eq!(given_name(&local, LAYERS), None);
        assert_eq!(given_name(&common, LAYERS), None);
    }

    #[test]
    fn numbers_say_something_on_one_kernel_only() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let identity = of(file.path()).unwrap();
        assert!(is_comparable(&identity) && is_comparable("naa.5000"));
        let (kernel, rest) = identity.split_once('/').unwrap();
        assert!(Uuid::parse_str(kernel).is_ok());
        assert!(!is_comparable(&format!("{}/{rest}", Uuid::nil())));
    }
}
