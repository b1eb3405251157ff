//! What holds a disk's content: a file, a block device, or somebody who serves it.

use std::cell::RefCell;
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use rustix::fs::{Advice, FallocateFlags, SeekFrom, fadvise, fallocate, seek};
use rustix::io::Errno;

use crate::hash::is_zero;
use nbd::client::Client;

/// Zeros are looked for in pieces of this size, so that a sparse image stays sparse: what file systems allocate by.
const GRAIN: usize = 4096;
/// Zeros are written in pieces of this size where there is no better way.
const ZEROS: usize = 1 << 20;
/// Alignment of offsets, lengths and memory that every device takes for direct reads and writes.
const ALIGNMENT: usize = 4096;
/// What is shorter is left to the page cache, which makes longer writes of it and needs not wait for the device each time.
const DIRECT: usize = 16 << 10;

/// What holds a disk's content as the guest sees it. Used by several threads at once, never for the same bytes.
pub trait Image: Send + Sync + 'static {
    /// Fills the buffer from this offset on.
    ///
    /// # Errors
    /// Those of the file, device or server.
    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;

    /// Writes.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    fn write(&self, offset: u64, content: &[u8]) -> io::Result<()>;

    /// Makes a range zero.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    fn zero(&self, offset: u64, length: u64) -> io::Result<()>;

    /// Puts everything that was written on stable storage.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    fn sync(&self) -> io::Result<()>;

    /// The next range at or after this offset, and before `end`, that may hold something else than zeros.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    fn next_data(&self, from: u64, end: u64) -> io::Result<Option<Range<u64>>> {
        Ok((from < end).then_some(from..end))
    }
}

/// What becomes of room that holds zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Room {
    /// It is given back: sparse files stay sparse.
    Thin,
    /// It is kept.
    Reserved,
}

/// A raw image: a file or a block device.
#[derive(Debug)]
pub struct RawImage {
    file: File,
    room: Room,
    /// The same, around the page cache. A file system that does not know of that has nothing else than the cache.
    direct: Option<File>,
}

impl RawImage {
    /// Opens an image to be written, around the page cache where much is written at once: what is written of a copy is not read
    /// again soon, and to find pages for it costs more than to write it.
    ///
    /// A block device is claimed: nobody mounts it, or makes a volume of it, as long as this is open.
    ///
    /// # Errors
    /// As `open(2)`; `EBUSY` for a block device that is mounted or part of a volume.
    pub fn writable(path: &Path, room: Room) -> io::Result<RawImage> {
        let open = |flags| OpenOptions::new().read(true).write(true).custom_flags(flags).open(path);
        let is_device = std::fs::metadata(path)?.file_type().is_block_device();
        let file = open(libc::O_CLOEXEC | if is_device { libc::O_EXCL } else { 0 })?;
        Ok(RawImage { file, room, direct: open(libc::O_CLOEXEC | libc::O_DIRECT).ok() })
    }

    /// Opens an image to be read. `direct` where somebody writes to it around the page cache: what is cached may be older.
    ///
    /// # Errors
    /// As `open(2)`.
    pub fn readable(path: &Path, direct: bool) -> io::Result<RawImage> {
        let open = |flags| OpenOptions::new().read(true).custom_flags(flags).open(path);
        let file = open(libc::O_CLOEXEC)?;
        let direct = direct.then(|| open(libc::O_CLOEXEC | libc::O_DIRECT).ok()).flatten();
        Ok(RawImage { file, room: Room::Thin, direct })
    }

    /// The file itself.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Writes what is not to be looked at any more.
    fn write_all(&self, content: &[u8], offset: u64) -> io::Result<()> {
        let aligned = offset.is_multiple_of(ALIGNMENT as u64) && content.len().is_multiple_of(ALIGNMENT);
        match &self.direct {
            Some(file) if aligned && content.len() >= DIRECT => with_aligned(content.len(), |buffer| {
                buffer.copy_from_slice(content);
                match file.write_all_at(buffer, offset) {
                    // Some devices want more.
                    Err(e) if e.kind() == io::ErrorKind::InvalidInput => {
                        self.file.write_all_at(content, offset)
                    }
                    written => written,
                }
            }),
            _ => self.file.write_all_at(content, offset),
        }
    }

    fn write_zeros(&self, mut offset: u64, mut length: u64) -> io::Result<()> {
        let zeros = vec![0; ZEROS.min(usize::try_from(length).unwrap_or(ZEROS))];
        while length > 0 {
            let part = zeros.len().min(usize::try_from(length).unwrap_or(ZEROS));
            self.write_all(&zeros[..part], offset)?;
            offset += part as u64;
            length -= part as u64;
        }
        Ok(())
    }
}

/// Reads around the page cache, whatever the alignment of what is asked for.
fn read_direct(file: &File, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
    let start = offset - offset % ALIGNMENT as u64;
    let skip = (offset - start) as usize;
    let length = (skip + buffer.len()).next_multiple_of(ALIGNMENT);
    with_aligned(length, |aligned| {
        read_to_end(file, start, aligned)?;
        buffer.copy_from_slice(&aligned[skip..skip + buffer.len()]);
        Ok(())
    })
}

/// Lends a buffer of this thread that direct reads and writes take.
fn with_aligned<T>(length: usize, with: impl FnOnce(&mut [u8]) -> T) -> T {
    thread_local!(static ROOM: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) });
    ROOM.with_borrow_mut(|room| {
        if room.len() < length + ALIGNMENT {
            room.resize(length + ALIGNMENT, 0);
        }
        let shift = room.as_ptr().align_offset(ALIGNMENT);
        with(&mut room[shift..shift + length])
    })
}

/// Reads what there is; what lies beyond the file's end is zero, as QEMU has it.
fn read_to_end(file: &File, mut offset: u64, mut buffer: &mut [u8]) -> io::Result<()> {
    while !buffer.is_empty() {
        match file.read_at(buffer, offset) {
            Ok(0) => {
                buffer.fill(0);
                return Ok(());
            }
            Ok(count) => {
                buffer = &mut buffer[count..];
                offset += count as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

impl Image for RawImage {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        match &self.direct {
            Some(file) => match read_direct(file, offset, buffer) {
                // Some devices want more.
                Err(e) if e.kind() == io::ErrorKind::InvalidInput => read_to_end(&self.file, offset, buffer),
                read => read,
            },
            None => read_to_end(&self.file, offset, buffer),
        }
    }

    fn write(&self, offset: u64, content: &[u8]) -> io::Result<()> {
        if self.room == Room::Reserved || !offset.is_multiple_of(GRAIN as u64) {
            return self.write_all(content, offset);
        }
        // Runs of pieces that are all zero, or all not, go in one call each.
        let mut at = 0;
        while at < content.len() {
            let zero = is_zero(&content[at..content.len().min(at + GRAIN)]);
            let mut end = at;
            while end < content.len() && is_zero(&content[end..content.len().min(end + GRAIN)]) == zero {
                end = content.len().min(end + GRAIN);
            }
            if zero {
                self.zero(offset + at as u64, (end - at) as u64)?;
            } else {
                self.write_all(&content[at..end], offset + at as u64)?;
            }
            at = end;
        }
        Ok(())
    }

    fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        let how = match self.room {
            Room::Thin => FallocateFlags::PUNCH_HOLE,
            Room::Reserved => FallocateFlags::ZERO_RANGE,
        };
        match fallocate(&self.file, how | FallocateFlags::KEEP_SIZE, offset, length) {
            Ok(()) => Ok(()),
            Err(Errno::OPNOTSUPP | Errno::NODEV | Errno::INVAL) => self.write_zeros(offset, length),
            Err(e) => Err(e.into()),
        }
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn next_data(&self, from: u64, end: u64) -> io::Result<Option<Range<u64>>> {
        if from >= end {
            return Ok(None);
        }
        let start = match seek(&self.file, SeekFrom::Data(from)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(None),
            // A device, or a file system that cannot say.
            Err(_) => return Ok(Some(from..end)),
        };
        if start >= end {
            return Ok(None);
        }
        let stop = seek(&self.file, SeekFrom::Hole(start)).unwrap_or(end);
        Ok(Some(start..stop.min(end)))
    }
}

/// Has an image that is to be written say what it holds and nothing else. What an earlier writer failed to put on stable storage is
/// still in the system's cache, which takes it for stored; and whoever syncs next, though it be QEMU for its guest, is told of a failure
/// that nobody was told of yet.
///
/// # Errors
/// As `open(2)`.
pub fn forget_earlier_writers(path: &Path) -> io::Result<()> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    if let Err(error) = file.sync_data() {
        tracing::warn!(path = %path.display(), %error, "an earlier writer of this image has lost some of what it wrote");
    }
    // A file system that keeps no cache has nothing to be forgotten.
    let _ = fadvise(&file, 0, None, Advice::DontNeed);
    Ok(())
}

/// An image that somebody serves over NBD: a QEMU storage daemon, or the machine's own QEMU.
#[derive(Debug)]
pub struct ServedImage {
    client: Mutex<Client>,
    room: Room,
}

impl ServedImage {
    /// By this connection.
    #[must_use]
    pub fn new(client: Client, room: Room) -> ServedImage {
        ServedImage { client: Mutex::new(client), room }
    }

    fn with<T>(&self, ask: impl FnOnce(&mut Client) -> Result<T, nbd::client::NbdError>) -> io::Result<T> {
        let mut client = self.client.lock().unwrap_or_else(PoisonError::into_inner);
        ask(&mut client).map_err(io::Error::other)
    }
}

impl Image for ServedImage {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.with(|client| client.read(offset, buffer))
    }

    fn write(&self, offset: u64, content: &[u8]) -> io::Result<()> {
        self.with(|client| client.write(offset, content))
    }

    fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        self.with(|client| client.zero(offset, length, self.room == Room::Thin))
    }

    fn sync(&self) -> io::Result<()> {
        self.with(Client::flush)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    fn image(room: Room) -> (tempfile::NamedTempFile, RawImage) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let image = RawImage::writable(file.path(), room).unwrap();
        (file, image)
    }

    #[test]
    fn zeros_within_what_is_written_stay_holes() {
        let (file, image) = image(Room::Thin);
        let mut content = vec![0; 64 << 10];
        content[8192] = 1;
        content[40_000] = 2;
        image.write(64 << 10, &content).unwrap();
        let mut back = vec![9; 64 << 10];
        image.read(64 << 10, &mut back).unwrap();
        assert_eq!(back, content);
        assert!(file.as_file().metadata().unwrap().blocks() * 512 <= 16 << 10);
        assert_eq!(image.next_data(0, 1 << 20).unwrap().unwrap().start, (64 << 10) + 8192);
        // And zeros that replace data are zeros.
        content[8192] = 0;
        image.write(64 << 10, &content).unwrap();
        image.read(64 << 10, &mut back).unwrap();
        assert_eq!(back, content);
    }

    #[test]
    fn room_that_is_reserved_is_kept() {
        let (file, image) = image(Room::Reserved);
        image.write(0, &[0; 64 << 10]).unwrap();
        image.zero(64 << 10, 64 << 10).unwrap();
        assert!(file.as_file().metadata().unwrap().blocks() * 512 >= 64 << 10);
    }

    #[test]
    fn direct_reads_need_no_alignment_and_end_in_zeros() {
        let (file, image) = image(Room::Thin);
        image.write(5000, b"content").unwrap();
        image.sync().unwrap();
        let reader = RawImage::readable(file.path(), true).unwrap();
        let mut back = [0; 9];
        reader.read(4999, &mut back).unwrap();
        assert_eq!(&back, b"\0content\0");
        let mut beyond = [7; 100];
        reader.read((1 << 20) - 50, &mut beyond).unwrap();
        assert_eq!(beyond, [0; 100]);
    }
}
