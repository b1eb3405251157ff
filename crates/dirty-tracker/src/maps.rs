//! What a process has mapped: `/proc/PID/maps`.

use std::ffi::OsString;
use std::ops::Range;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// One line of `/proc/PID/maps`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// The addresses it covers, in the process's address space.
    pub range: Range<u64>,
    /// Where in the file the mapping starts, in bytes.
    pub offset: u64,
    /// The device of the file's filesystem, as `st_dev` gives it; 0 for memory without a file.
    pub device: u64,
    /// The inode of the file; 0 for memory without a file.
    pub inode: u64,
    /// The path of the file as the process opened it, a name like `[stack]`, or empty.
    pub path: PathBuf,
    /// The file has no name any more. (A file whose name really ends in ` (deleted)` looks the same.)
    pub deleted: bool,
    /// Writes reach the file and everyone else who maps it.
    pub shared: bool,
    /// The process may write to it.
    pub writable: bool,
    /// The process may run code in it.
    pub executable: bool,
}

impl Mapping {
    /// Whether this maps the file with that device and inode number (`st_dev` and `st_ino`).
    #[must_use]
    pub fn is_of_file(&self, device: u64, inode: u64) -> bool {
        self.inode != 0 && self.device == device && self.inode == inode
    }
}

/// Why the mappings of a process could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MapsError {
    /// There is no such process (any more).
    #[error("process {pid} does not exist")]
    Gone {
        /// The process asked for.
        pid: u32,
    },
    /// The kernel would not let us read them.
    #[error("cannot read the mappings of process {pid}")]
    Read {
        /// The process asked for.
        pid: u32,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// A line in a form this crate does not know.
    #[error("cannot understand this line of /proc/{pid}/maps: {line:?}")]
    Line {
        /// The process asked for.
        pid: u32,
        /// The line.
        line: String,
    },
}

/// Everything the process has mapped, in the order of addresses.
///
/// # Errors
/// If the process is gone or may not be looked at (`/proc/PID/maps` is open to processes of the same
/// user and to holders of `CAP_SYS_PTRACE`).
pub fn mappings(pid: u32) -> Result<Vec<Mapping>, MapsError> {
    let text = std::fs::read(format!("/proc/{pid}/maps")).map_err(|source| match source.raw_os_error() {
        Some(libc::ENOENT | libc::ESRCH) => MapsError::Gone { pid },
        _ => MapsError::Read { pid, source },
    })?;
    let found: Vec<Mapping> = text
        .split(|&byte| byte == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| {
            parse_line(line)
                .ok_or_else(|| MapsError::Line { pid, line: String::from_utf8_lossy(line).into_owned() })
        })
        .collect::<Result<_, _>>()?;
    // A process that is on its way out (or a zombie) shows an empty file instead of an error.
    if found.is_empty() { Err(MapsError::Gone { pid }) } else { Ok(found) }
}

/// Understands one line, such as
/// `7f0a3c000000-7f0a7c000000 rw-s 00000000 00:19 1234    /dev/shm/ram (deleted)`.
fn parse_line(line: &[u8]) -> Option<Mapping> {
    let (range, rest) = field(line)?;
    let (permissions, rest) = field(rest)?;
    let (offset, rest) = field(rest)?;
    let (device, rest) = field(rest)?;
    let (inode, rest) = field(rest)?;
    let (start, end) = range.split_once('-')?;
    let (major, minor) = device.split_once(':')?;
    let [_, write, execute, share] = permissions.as_bytes() else { return None };
    let raw_path = rest.trim_ascii_start();
    let (raw_path, deleted) = match raw_path.strip_suffix(b" (deleted)") {
        Some(name) => (name, true),
        None => (raw_path, false),
    };
    let hexadecimal = |digits| u64::from_str_radix(digits, 16).ok();
    let half = |digits| u32::from_str_radix(digits, 16).ok();
    Some(Mapping {
        range: hexadecimal(start)?..hexadecimal(end)?,
        offset: hexadecimal(offset)?,
        device: libc::makedev(half(major)?, half(minor)?),
        inode: inode.parse().ok()?,
        path: PathBuf::from(OsString::from_vec(unescape(raw_path))),
        deleted,
        shared: *share == b's',
        writable: *write == b'w',
        executable: *execute == b'x',
    })
}

/// The next word of a line and what follows it; words are separated by single spaces.
fn field(line: &[u8]) -> Option<(&str, &[u8])> {
    let end = line.iter().position(|&byte| byte == b' ').unwrap_or(line.len());
    let word = std::str::from_utf8(&line[..end]).ok().filter(|word| !word.is_empty())?;
    Some((word, line.get(end + 1..).unwrap_or_default()))
}

/// The kernel writes a newline in a path as `\012` and leaves every other byte alone.
fn unescape(path: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(path.len());
    let mut rest = path;
    while let Some((&byte, tail)) = rest.split_first() {
        if let Some(after) = rest.strip_prefix(b"\\012") {
            plain.push(b'\n');
            rest = after;
        } else {
            plain.push(byte);
            rest = tail;
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::path::Path;

    #[test]
    fn a_deleted_shared_file_is_understood() {
        let line = b"7f0a3c000000-7f0a7c000000 rw-s 00001000 00:19 1234                       /dev/shm/a b (deleted)";
        let mapping = parse_line(line).unwrap();
        assert_eq!(mapping.range, 0x7f0a_3c00_0000..0x7f0a_7c00_0000);
        assert_eq!((mapping.offset, mapping.inode), (0x1000, 1234));
        assert_eq!(mapping.device, libc::makedev(0, 0x19));
        assert_eq!(mapping.path, Path::new("/dev/shm/a b"));
        assert!(mapping.deleted && mapping.shared && mapping.writable && !mapping.executable);
        assert!(mapping.is_of_file(libc::makedev(0, 0x19), 1234));
    }

    #[test]
    fn anonymous_memory_is_of_no_file() {
        let mapping = parse_line(b"7f0a3c000000-7f0a7c000000 r-xp 00000000 00:00 0 ").unwrap();
        assert_eq!(mapping.path, Path::new(""));
        assert!(!mapping.shared && !mapping.writable && mapping.executable && !mapping.deleted);
        assert!(!mapping.is_of_file(0, 0));
    }

    #[test]
    fn our_own_memory_is_found() {
        let local = 0_u8;
        let address = std::ptr::from_ref(&local).addr() as u64;
        let found = mappings(std::process::id()).unwrap();
        assert!(found.iter().any(|mapping| mapping.range.contains(&address) && mapping.writable));
        assert!(found.iter().any(|mapping| mapping.path == Path::new("[vdso]") && mapping.executable));
    }

    #[test]
    fn a_process_that_does_not_exist_is_gone() {
        // One past the highest number the kernel hands out.
        assert!(matches!(mappings(4_194_305), Err(MapsError::Gone { pid: 4_194_305 })));
    }

    proptest! {
        #[test]
        fn any_line_is_parsed_or_refused_without_panic(line: Vec<u8>) {
            let _ = parse_line(&line);
        }

        #[test]
        fn what_the_kernel_writes_is_read_back(
            start in 0_u64..1 << 47, pages in 1_u64..1 << 20, offset: u32, inode: u64,
            shared: bool, writable: bool, major in 0_u32..0xfff, minor in 0_u32..0xf_ffff,
            path in "(/[a-z \n\\\\]{0,20}[a-z])?",
        ) {
            let range = start..start + pages * 4096;
            let line = format!(
                "{:08x}-{:08x} r{}-{} {offset:08x} {major:02x}:{minor:02x} {inode} {:10}{}",
                range.start, range.end, if writable { 'w' } else { '-' }, if shared { 's' } else { 'p' },
                "", path.replace('\n', "\\012"),
            );
            let mapping = parse_line(line.as_bytes()).unwrap();
            prop_assert_eq!(mapping, Mapping {
                range, offset: offset.into(), device: libc::makedev(major, minor), inode,
                path: path.into(), deleted: false, shared, writable, executable: false,
            });
        }
    }
}
