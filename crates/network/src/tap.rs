//! Queues of taps: one of our own that frames are diverted to, and that of a QEMU.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::major;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use super::frames::{HEADER, LONGEST};

const TUN: &str = "/dev/net/tun";

/// A tap of our own, which is gone when this is dropped: what is sent out of it, we read. Frames come whole, as on a cable: large ones
/// that a card would have cut are cut, and checksums that it would have made are made.
#[derive(Debug)]
pub struct OwnTap {
    file: File,
    name: String,
}

impl OwnTap {
    /// Makes one of a name that is free. It is down.
    ///
    /// # Errors
    /// EPERM without `CAP_NET_ADMIN`; where there is no `/dev/net/tun`.
    pub fn make() -> io::Result<OwnTap> {
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(TUN)?;
        let mut request =
            ioctl::Request::new("vmirror%d", libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR);
        ioctl::set_interface(&file, &mut request)?;
        Ok(OwnTap { file, name: request.name() })
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The next frame, from its virtio header on; none if there is none now.
    ///
    /// # Errors
    /// Those of `read(2)`.
    pub fn next(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        match (&self.file).read(buffer) {
            Ok(length) => Ok(Some(length)),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(e) => Err(e),
        }
    }
}

impl AsFd for OwnTap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Where a QEMU has a queue of a tap. Unlike the queue itself this keeps nobody else from the tap: it is free as soon as that QEMU has
/// ended.
#[derive(Debug)]
pub struct QueuePlace {
    process: OwnedFd,
    number: i32,
    interface: String,
}

impl QueuePlace {
    /// Those of the queues of an interface that a process has open.
    ///
    /// # Errors
    /// Where the process cannot be looked into.
    pub fn all(pid: u32, interface: &str) -> io::Result<Vec<QueuePlace>> {
        let mut places = Vec::new();
        let tap = std::fs::metadata(TUN).map(|tun| tun.rdev()).ok();
        let macvtap = macvtap_major();
        for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
            // The file itself, whatever its name was.
            let Ok(file) = std::fs::metadata(entry.path()) else { continue };
            let is_queue = file.file_type().is_char_device()
                && (Some(file.rdev()) == tap || Some(major(file.rdev())) == macvtap);
            let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
            let Some(number) = number.filter(|_| is_queue) else { continue };
            match interface_behind(pid, number) {
                Ok(name) if name == interface => {
                    places.push(QueuePlace { process: process(pid)?, number, interface: name });
                }
                Err(e) if e.kind() == io::ErrorKind::PermissionDenied => return Err(e),
                // Another's, or not any interface's.
                _ => {}
            }
        }
        Ok(places)
    }

    /// The queue. The tap is taken for as long as this is held, whatever becomes of the QEMU.
    ///
    /// # Errors
    /// Where the QEMU has ended, or has something else there by now.
    pub fn open(&self) -> io::Result<QemuQueue> {
        let file = File::from(pidfd_getfd(&self.process, self.number, PidfdGetfdFlags::empty())?);
        let interface = ioctl::interface(&file)?;
        if interface.name() != self.interface {
            return Err(io::ErrorKind::NotFound.into());
        }
        let header = if interface.has_header() { ioctl::header_length(&file)? } else { 0 };
        Ok(QemuQueue { file, header })
    }
}

/// A queue of a tap that a QEMU has open. What is written to it, the guest has sent; what is read from it, the guest does not get.
#[derive(Debug)]
pub struct QemuQueue {
    file: File,
    /// Bytes that precede a frame.
    header: usize,
}

impl QemuQueue {
    /// The queues of an interface that a process has open.
    ///
    /// # Errors
    /// Where the process cannot be looked into.
    pub fn all(pid: u32, interface: &str) -> io::Result<Vec<QemuQueue>> {
        QueuePlace::all(pid, interface)?.iter().map(QueuePlace::open).collect()
    }

    /// Whether nothing is in it that QEMU has not taken.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        let mut polled = [PollFd::new(&self.file, PollFlags::IN)];
        poll(&mut polled, Some(&Timespec::default())).is_ok_and(|ready| ready == 0)
    }

    /// Takes all that is in it, each frame from a virtio header on. Only of a QEMU that takes nothing any more.
    #[must_use]
    pub fn drain(&self) -> Vec<Vec<u8>> {
        let mut buffer = vec![0; LONGEST + self.header];
        let mut frames = Vec::new();
        while !self.is_empty() {
            let Ok(length) = (&self.file).read(&mut buffer) else { break };
            let Some(frame) = buffer[..length].get(self.header..) else { continue };
            // A longer header says in addition how many buffers of the guest's it takes, which nobody knows here.
            let mut header = [0; HEADER];
            let known = self.header.min(HEADER);
            header[..known].copy_from_slice(&buffer[..known]);
            frames.push([&header, frame].concat());
        }
        frames
    }

    /// Sends a frame into the network, as if the guest had.
    ///
    /// # Errors
    /// Those of `write(2)`; EIO while the interface is down.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        // All zero: it asks nothing of a card.
        let whole = [&vec![0; self.header][..], frame].concat();
        (&self.file).write(&whole).map(drop)
    }
}

/// The name of the interface that a descriptor of a process is a queue of.
///
/// # Errors
/// EBADF where the process has no such descriptor, ENOTTY where it is of something else, EPERM where the process cannot be looked into.
pub fn interface_behind(pid: u32, number: i32) -> io::Result<String> {
    Ok(ioctl::interface(&descriptor_of(pid, number)?)?.name())
}

/// The major number of the queues of macvtaps, where the kernel has such.
fn macvtap_major() -> Option<u32> {
    let devices = std::fs::read_to_string("/proc/devices").ok()?;
    devices.lines().find_map(|line| line.trim().strip_suffix(" macvtap")?.parse().ok())
}

fn descriptor_of(pid: u32, number: i32) -> io::Result<File> {
    Ok(File::from(pidfd_getfd(process(pid)?, number, PidfdGetfdFlags::empty())?))
}

fn process(pid: u32) -> io::Result<OwnedFd> {
    let process = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(pidfd_open(process, PidfdFlags::empty())?)
}

/// The requests of `/dev/net/tun` (linux/if_tun.h), which have no netlink form.
mod ioctl {
    use super::{AsRawFd, File, io};

    /// `struct ifreq`: a name and flags, 40 bytes in all.
    #[repr(C)]
    pub(super) struct Request {
        name: [u8; libc::IFNAMSIZ],
        flags: u16,
        rest: [u8; 22],
    }

    impl Request {
        pub(super) fn new(name: &str, flags: libc::c_int) -> Request {
            let mut request = Request { name: [0; libc::IFNAMSIZ], flags: flags as u16, rest: [0; 22] };
            let length = name.len().min(libc::IFNAMSIZ - 1);
            request.name[..length].copy_from_slice(&name.as_bytes()[..length]);
            request
        }

        pub(super) fn name(&self) -> String {
            let end = self.name.iter().position(|byte| *byte == 0).unwrap_or(self.name.len());
            String::from_utf8_lossy(&self.name[..end]).into_owned()
        }

        pub(super) fn has_header(&self) -> bool {
            self.flags & libc::IFF_VNET_HDR as u16 != 0
        }
    }

    pub(super) fn set_interface(file: &File, request: &mut Request) -> io::Result<()> {
        // SAFETY: TUNSETIFF reads and writes one `struct ifreq`, which the request is laid out as and outlives the call.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, std::ptr::from_mut(request)) })
    }

    pub(super) fn interface(file: &File) -> io::Result<Request> {
        let mut request = Request::new("", 0);
        // SAFETY: TUNGETIFF writes one `struct ifreq`, which the request is laid out as and outlives the call.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNGETIFF, &raw mut request) })?;
        Ok(request)
    }

    pub(super) fn header_length(file: &File) -> io::Result<usize> {
        let mut length: libc::c_int = 0;
        // SAFETY: TUNGETVNETHDRSZ writes one `int`, which outlives the call.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNGETVNETHDRSZ, &raw mut length) })?;
        usize::try_from(length).map_err(|_| io::ErrorKind::InvalidData.into())
    }

    fn check(result: libc::c_int) -> io::Result<()> {
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_is_found_behind_a_descriptor() {
        let this = std::process::id();
        let null = File::open("/dev/null").unwrap();
        let of_something_else = interface_behind(this, null.as_raw_fd()).unwrap_err();
        assert_eq!(of_something_else.raw_os_error(), Some(libc::ENOTTY));
        assert_eq!(interface_behind(this, 9999).unwrap_err().raw_os_error(), Some(libc::EBADF));
        let tap = match OwnTap::make() {
            Ok(tap) => tap,
            Err(e) => return eprintln!("SKIPPED in part: no tap can be made here: {e}"),
        };
        assert_eq!(interface_behind(this, tap.file.as_raw_fd()).unwrap(), tap.name());
        assert_eq!(QemuQueue::all(this, tap.name()).unwrap().len(), 1);
        // What is known of it is there for as long as the tap.
        let places = QueuePlace::all(this, tap.name()).unwrap();
        assert!(places[0].open().unwrap().is_empty());
        let name = tap.name().to_owned();
        drop(tap);
        assert!(!std::path::Path::new("/sys/class/net").join(name).exists(), "it is held");
        assert!(places[0].open().is_err());
    }
}
