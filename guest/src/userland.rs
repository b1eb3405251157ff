//! A Debian userland, booted from the first disk beside the guest's own program: a machine whose memory is that of a server,
//! full of programs that run and of files that were read, or one whose disk is.
//!
//! Its init is the first process of namespaces of its own, as in a container: see
//! <https://systemd.io/CONTAINER_INTERFACE>. So it boots as on a machine, and the guest's own init stays in charge of the real
//! one. They share the network: the userland's services listen on the guest's addresses.
//!
//! What it writes [goes](Changes) where the guest was told: to memory, and any number of guests can share the disk, or to the disk.

use std::convert::Infallible;
use std::ffi::CStr;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::fs::symlink;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::system::container::{self, Child};
use crate::system::{mount, mount_with};

/// Where goes what the userland writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Changes {
    /// To memory: the disk is mounted read-only, and something else over it.
    InMemory,
    /// To the disk.
    OnDisk,
}

impl Changes {
    /// By its name on the kernel command line.
    pub fn named(name: &str) -> Option<Self> {
        [Self::InMemory, Self::OnDisk].into_iter().find(|changes| changes.name() == name)
    }

    /// Its name on the kernel command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::InMemory => "on",
            Self::OnDisk => "writable",
        }
    }
}

/// The disk.
const DISK: &CStr = c"/dev/vda";
/// Where the disk, what is written over it, and both together are mounted.
const LOWER: &CStr = c"/userland/disk";
const CHANGES: &CStr = c"/userland/changes";
const ROOT: &CStr = c"/userland/root";
const OVERLAY: &CStr =
    c"lowerdir=/userland/disk,upperdir=/userland/changes/upper,workdir=/userland/changes/work";
/// Directories to make before anything is mounted, and on what is mounted.
const MOUNT_POINTS: [&str; 4] = ["/userland/disk", "/userland/changes", "/userland/root", "/userland/cgroup"];
const LAYERS: [&str; 2] = ["/userland/changes/upper", "/userland/changes/work"];
/// The control groups, and that of the userland.
const CGROUPS: &CStr = c"/userland/cgroup";
const CGROUP: &str = "/userland/cgroup/debian";
/// What is warmed.
const FILES: &str = "/userland/disk/usr";

/// Its first program.
const INIT: &str = "/lib/systemd/systemd";
/// The abstract socket to which it says that it has booted: sd_notify(3).
const NOTIFY: &str = "vmirror-userland";
/// What it says.
const BOOTED: &str = "READY=1";
/// How long it may take: five seconds on an emulated CPU, which may have to share a real one with many others.
pub const BOOT: Duration = Duration::from_secs(180);
/// How often it is looked at meanwhile.
const POLL: Duration = Duration::from_secs(1);
/// How much is read at once, in bytes.
const READ: usize = 256 << 10;

/// A userland that could not be booted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UserlandError {
    /// Something that the kernel was asked for.
    #[error("userland: {what}: {source}")]
    System {
        /// What it was.
        what: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Its init ended.
    #[error("userland: {INIT} ended after {after:?}")]
    Ended {
        /// After that time.
        after: Duration,
    },
    /// It did not say that it has booted. To go on with half a boot would be to measure the other half.
    #[error("userland: not booted in {BOOT:?}; the last it said: {last:?}")]
    NotBooted {
        /// What it said last.
        last: String,
    },
}

fn failed(what: impl Into<String>) -> impl FnOnce(io::Error) -> UserlandError {
    let what = what.into();
    move |source| UserlandError::System { what, source }
}

/// A userland that was started.
#[derive(Debug)]
pub struct Userland {
    init: Child,
    notify: UnixDatagram,
    started: Instant,
}

impl Userland {
    /// Mounts the first disk and starts the init on it. The caller must have no other threads yet.
    ///
    /// # Errors
    /// Where there is no such disk, or the kernel lacks something.
    pub fn start(changes: Changes) -> Result<Self, UserlandError> {
        for directory in MOUNT_POINTS {
            fs::create_dir_all(directory).map_err(failed(directory))?;
        }
        match changes {
            Changes::InMemory => mount_layers()?,
            Changes::OnDisk => {
                mount_with(DISK, ROOT, c"ext4", 0, c"").map_err(failed("mounting the disk"))?;
            }
        }
        mount(c"cgroup2", CGROUPS).map_err(failed("control groups"))?;
        fs::write("/userland/cgroup/cgroup.subtree_control", "+cpu +memory +pids")
            .map_err(failed("controllers"))?;
        fs::create_dir(CGROUP).map_err(failed(CGROUP))?;
        let notify = SocketAddr::from_abstract_name(NOTIFY)
            .and_then(|address| UnixDatagram::bind_addr(&address))
            .map_err(failed(NOTIFY))?;
        notify.set_read_timeout(Some(POLL)).map_err(failed(NOTIFY))?;
        let init = container::start(enter).map_err(failed("namespaces"))?;
        Ok(Self { init, notify, started: Instant::now() })
    }

    /// Waits until it has booted: until all that is started at boot has been started. Gives back how long that took.
    ///
    /// # Errors
    /// Where it ends, or takes too long.
    pub fn wait_booted(&self) -> Result<Duration, UserlandError> {
        let mut last = String::new();
        let mut message = [0; 4096];
        while self.started.elapsed() < BOOT {
            match self.notify.recv(&mut message) {
                Ok(length) => last = String::from_utf8_lossy(&message[..length]).into_owned(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(failed(NOTIFY)(error)),
            }
            if has_booted(&last) {
                return Ok(self.started.elapsed());
            }
            if self.init.has_ended().map_err(failed(INIT))? {
                return Err(self.ended());
            }
        }
        Err(UserlandError::NotBooted { last })
    }

    /// Waits for its end, which must not come.
    pub fn watch(&self) -> UserlandError {
        match self.init.wait_for_end() {
            Ok(()) => self.ended(),
            Err(error) => failed(INIT)(error),
        }
    }

    fn ended(&self) -> UserlandError {
        UserlandError::Ended { after: self.started.elapsed() }
    }
}

/// Mounts the disk read-only, and over it a file system in memory that takes what is written.
fn mount_layers() -> Result<(), UserlandError> {
    mount_with(DISK, LOWER, c"ext4", libc::MS_RDONLY, c"").map_err(failed("mounting the disk"))?;
    mount(c"tmpfs", CHANGES).map_err(failed("tmpfs"))?;
    for directory in LAYERS {
        fs::create_dir(directory).map_err(failed(directory))?;
    }
    mount_with(c"overlay", ROOT, c"overlay", 0, OVERLAY).map_err(failed("overlay"))
}

/// Whether a message, of lines as in sd_notify(3), says that the boot is over.
fn has_booted(message: &str) -> bool {
    message.lines().any(|line| line == BOOTED)
}

/// Makes the namespaces what an init expects to find, and becomes it.
fn enter() -> io::Result<Infallible> {
    // A group of its own, so that it neither sees nor moves the processes of the real init.
    fs::write(Path::new(CGROUP).join("cgroup.procs"), "0")?;
    container::hide_other_groups()?;
    container::switch_root(ROOT)?;
    mount(c"proc", c"/proc")?;
    // Read-only: devices are not the userland's.
    mount_with(c"sysfs", c"/sys", c"sysfs", libc::MS_RDONLY, c"")?;
    mount(c"cgroup2", c"/sys/fs/cgroup")?;
    mount(c"tmpfs", c"/run")?;
    mount_with(c"tmpfs", c"/dev", c"tmpfs", libc::MS_NOSUID, c"mode=755")?;
    let devices =
        [(c"/dev/null", 3), (c"/dev/zero", 5), (c"/dev/full", 7), (c"/dev/random", 8), (c"/dev/urandom", 9)];
    for (device, minor) in devices {
        container::make_device(device, 1, minor)?;
    }
    container::make_device(c"/dev/tty", 5, 0)?;
    fs::create_dir("/dev/pts")?;
    // Group 5 is Debian's for terminals.
    mount_with(c"devpts", c"/dev/pts", c"devpts", 0, c"newinstance,ptmxmode=0666,mode=620,gid=5")?;
    symlink("pts/ptmx", "/dev/ptmx")?;
    // No console: it is the real init's, and tests read it. What the userland has to say is in its journal.
    let null = Stdio::null;
    Err(Command::new(INIT)
        .args(["--show-status=no", "--log-target=journal"])
        .env_clear()
        .env("container", "vmirror-guest")
        .env("NOTIFY_SOCKET", format!("@{NOTIFY}"))
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin")
        .stdin(null())
        .stdout(null())
        .stderr(null())
        .exec())
}

/// Reads the files of a userland whose disk is mounted read-only into the page cache, all of them or until that many bytes of memory are left free. Gives back
/// how many were read.
///
/// # Errors
/// Where a file cannot be read.
pub fn warm(reserve_bytes: u64) -> Result<u64, UserlandError> {
    let free = || {
        let text = fs::read_to_string("/proc/meminfo").map_err(failed("/proc/meminfo"))?;
        Ok(free_bytes(&text).unwrap_or_default())
    };
    read_files(Path::new(FILES), || Ok(free()? > reserve_bytes))
}

/// Reads files below a directory for as long as there is room, which is asked about once for every few of them: the question
/// takes longer than reading a small one.
fn read_files(
    directory: &Path,
    has_room: impl Fn() -> Result<bool, UserlandError>,
) -> Result<u64, UserlandError> {
    let mut buffer = vec![0; READ];
    let (mut total, mut asked_at) = (0, None);
    let mut open = vec![directory.to_owned()];
    while let Some(path) = open.pop() {
        let kind = fs::symlink_metadata(&path).map_err(failed(path.to_string_lossy()))?.file_type();
        if kind.is_dir() {
            open.extend(entries(&path).map_err(failed(path.to_string_lossy()))?);
        } else if kind.is_file() {
            let mut file = File::open(&path).map_err(failed(path.to_string_lossy()))?;
            loop {
                if asked_at.is_none_or(|at| total >= at + READ as u64) {
                    if !has_room()? {
                        return Ok(total);
                    }
                    asked_at = Some(total);
                }
                match file.read(&mut buffer).map_err(failed(path.to_string_lossy()))? {
                    0 => break,
                    length => total += length as u64,
                }
            }
        }
    }
    Ok(total)
}

/// What is in a directory, by name: two guests read the same, even where there is no room for all.
fn entries(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let paths = fs::read_dir(directory)?.map(|entry| entry.map(|entry| entry.path()));
    let mut paths: Vec<PathBuf> = paths.collect::<io::Result<_>>()?;
    paths.sort();
    Ok(paths)
}

/// `MemFree` of `/proc/meminfo`, in bytes: what holds neither a program nor a file.
fn free_bytes(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemFree:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[test]
    fn only_the_end_of_the_boot_counts_as_booted() {
        assert!(has_booted("READY=1\nSTATUS=Startup finished in 18.2s."));
        assert!(!has_booted("STATUS=Starting READY=1"));
        assert!(!has_booted("READY=10\n"));
    }

    #[test]
    fn free_memory_is_what_holds_nothing() {
        let meminfo = "MemTotal:        1003292 kB\nMemFree:          700 kB\nMemAvailable:     900000 kB\n";
        assert_eq!(free_bytes(meminfo), Some(700 << 10));
        assert_eq!(free_bytes("MemTotal: 1 kB\n"), None);
    }

    #[test]
    fn files_are_read_once_and_until_there_is_no_room() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        fs::create_dir(path("below")).unwrap();
        fs::write(path("below/large"), vec![1; READ + 1]).unwrap();
        fs::write(path("small"), "12").unwrap();
        // Neither a link into nowhere nor one in a circle is followed.
        symlink("/nonexistent", path("nowhere")).unwrap();
        symlink(".", path("circle")).unwrap();
        assert_eq!(read_files(directory.path(), || Ok(true)).unwrap(), READ as u64 + 3);
        let room = Cell::new(true);
        let read = read_files(directory.path(), || Ok(room.replace(false))).unwrap();
        assert_eq!(read, READ as u64 + 2);
        let error = read_files(&path("missing"), || Ok(true)).unwrap_err();
        assert!(error.to_string().contains("missing"), "{error}");
    }
}
