//! Whether the kernel uses an image: a file system in it is mounted, it is part of a volume, or a loop device is made of it. Whoever
//! overwrites it then destroys what is at work.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use rustix::io::Errno;

use host::drives::same_file;

/// Where the kernel lists block devices.
const DEVICES: &str = "/sys/block";

/// Who uses it, in words.
pub(super) fn of(image: &Path) -> Option<String> {
    let is_device = std::fs::metadata(image).is_ok_and(|image| image.file_type().is_block_device());
    if is_device { holder(image) } else { loop_device(image) }
}

/// A block device that somebody has claimed can be claimed by nobody else.
fn holder(device: &Path) -> Option<String> {
    let claimed: Result<File, _> = OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(device);
    let busy = |e: std::io::Error| {
        e.kind() == ErrorKind::ResourceBusy || e.raw_os_error() == Some(Errno::BUSY.raw_os_error())
    };
    claimed.is_err_and(busy).then(|| "it is mounted, or part of a volume".to_owned())
}

fn loop_device(image: &Path) -> Option<String> {
    let devices = std::fs::read_dir(DEVICES).ok()?.flatten();
    let mut loops = devices.filter(|device| device.file_name().as_encoded_bytes().starts_with(b"loop"));
    let user = loops.find(|device| {
        let backing = std::fs::read_to_string(device.path().join("loop/backing_file"));
        backing.is_ok_and(|backing| same_file(Path::new(backing.trim_end()), image))
    })?;
    Some(format!("/dev/{} is made of it", user.file_name().display()))
}
