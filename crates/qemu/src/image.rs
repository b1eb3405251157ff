//! What an image file is, by its first bytes.
//!
//! To be trusted only for images that no guest has written as raw ones: a guest can put any header on its raw disk.
//! The format of a disk that is in use is what its QEMU opened it as.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    os::unix::{ffi::OsStringExt, fs::FileExt},
    path::{Path, PathBuf},
};

/// How much of a file is looked at for its format. VDI's mark is at 64.
const HEAD: usize = 4096;
/// Most bytes of a backing file's name in a qcow2 image.
const LONGEST_NAME: u32 = 1023;
/// Most header extensions that are looked at. There are a handful.
const MOST_EXTENSIONS: usize = 64;
/// The extension that names the backing file's format.
const BACKING_FORMAT: u32 = 0xe279_2aca;

/// Marks of image formats: QEMU's driver name, where the mark is, and what it is. Those of `qemu-img --help` that have one.
const MARKS: &[(&str, usize, &[u8])] = &[
    ("qcow2", 0, b"QFI\xfb"),
    ("vmdk", 0, b"KDMV"),
    ("vmdk", 0, b"COWD"),
    ("vmdk", 0, b"# Disk DescriptorFile"),
    ("vhdx", 0, b"vhdxfile"),
    ("vpc", 0, b"conectix"),
    ("vdi", 64, &[0x7f, 0x10, 0xda, 0xbe]),
    ("qed", 0, b"QED\0"),
    ("parallels", 0, b"WithoutFreeSpace"),
    ("parallels", 0, b"WithouFreSpacExt"),
    ("luks", 0, b"LUKS\xba\xbe"),
    ("bochs", 0, b"Bochs Virtual HD Image"),
    ("cloop", 0, b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop"),
];

/// An image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Image {
    /// A plain file or block device: what is in it is what the guest sees.
    Raw {
        /// Bytes.
        size: u64,
    },
    /// QEMU's own format.
    Qcow2(Qcow2),
    /// Another one.
    Other {
        /// QEMU's name of the format: `vmdk`, `vdi`, `qcow`, ….
        format: &'static str,
    },
}

impl Image {
    /// QEMU's name of the format.
    #[must_use]
    pub fn format(&self) -> &'static str {
        match self {
            Image::Raw { .. } => "raw",
            Image::Qcow2(_) => "qcow2",
            Image::Other { format } => format,
        }
    }

    /// Bytes that a guest sees. None: not known.
    #[must_use]
    pub fn virtual_size(&self) -> Option<u64> {
        match self {
            Image::Raw { size } => Some(*size),
            Image::Qcow2(header) => Some(header.virtual_size),
            Image::Other { .. } => None,
        }
    }
}

/// What a qcow2 image says of itself (QEMU's `docs/interop/qcow2.txt`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Qcow2 {
    /// Bytes that a guest sees.
    pub virtual_size: u64,
    /// Bytes per cluster: a power of two from 512 to 2 MiB.
    pub cluster_size: u64,
    /// The backing file, as the image names it: relative to the image, or a `json:` description.
    pub backing: Option<PathBuf>,
    /// The backing file's format, where the image says it.
    pub backing_format: Option<String>,
    /// Whether the content is encrypted.
    pub encrypted: bool,
    /// Whether the content is in another file.
    pub external_data: bool,
    /// Whether QEMU has found it corrupt.
    pub corrupt: bool,
    /// Internal snapshots. A copy of what the guest sees does not have them.
    pub snapshots: u32,
}

/// Why it is not known what an image is.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The image.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// It begins like a qcow2 image but is none.
    #[error("{} is a broken qcow2 image: {what}", path.display())]
    Qcow2 {
        /// The image.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
    },
}

/// Looks what an image file or block device is: raw if it has no other format's mark. Takes no lock.
///
/// # Errors
/// If it cannot be read, or is a qcow2 image with a header that makes no sense.
pub fn probe_format(path: &Path) -> Result<Image, ImageError> {
    let failed = |source| ImageError::Read { path: path.to_owned(), source };
    let mut file = File::open(path).map_err(failed)?;
    let mut head = Vec::with_capacity(HEAD);
    file.by_ref().take(HEAD as u64).read_to_end(&mut head).map_err(failed)?;
    // Also where a block device ends, whose metadata say 0.
    let size = file.seek(SeekFrom::End(0)).map_err(failed)?;
    let found = MARKS.iter().find(|(_, at, mark)| head.get(*at..).is_some_and(|rest| rest.starts_with(mark)));
    match found {
        // Version 1 is another format of the same mark.
        Some(("qcow2", ..)) if be32(&head, 4) == Some(1) => Ok(Image::Other { format: "qcow" }),
        Some(("qcow2", ..)) => {
            let header = qcow2(&head, |buffer, at| file.read_exact_at(buffer, at));
            header.map(Image::Qcow2).map_err(|what| ImageError::Qcow2 { path: path.to_owned(), what })
        }
        Some(&(format, ..)) => Ok(Image::Other { format }),
        None if has_trailer(&file, size).map_err(failed)? => Ok(Image::Other { format: "vpc" }),
        None => Ok(Image::Raw { size }),
    }
}

/// Whether the last sector is that of a VHD image of fixed size, which has no mark at its beginning.
fn has_trailer(file: &File, size: u64) -> io::Result<bool> {
    let mut mark = [0; 8];
    match size.checked_sub(512) {
        Some(at) => file.read_exact_at(&mut mark, at).map(|()| &mark == b"conectix"),
        None => Ok(false),
    }
}

fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// Reads the header, which begins with `head`; `read` reads the file from an offset.
fn qcow2(head: &[u8], read: impl Fn(&mut [u8], u64) -> io::Result<()>) -> Result<Qcow2, &'static str> {
    const SHORT: &str = "it ends within its header";
    let word = |at| be32(head, at).ok_or(SHORT);
    let long = |at| be64(head, at).ok_or(SHORT);
    let version = word(4)?;
    if !matches!(version, 2 | 3) {
        return Err("its version is neither 2 nor 3");
    }
    let bits = word(20)?;
    if !(9..=21).contains(&bits) {
        return Err("its clusters are smaller than 512 bytes or larger than 2 MiB");
    }
    let cluster_size = 1 << bits;
    let (features, header_length) = if version == 2 { (0, 72) } else { (long(72)?, word(100)?) };
    if header_length < 72 || u64::from(header_length) > cluster_size {
        return Err("the length of its header is impossible");
    }
    let (name_at, name_len) = (long(8)?, word(16)?);
    let backing = if name_at == 0 || name_len == 0 {
        None
    } else {
        let fits = name_at.checked_add(name_len.into()).is_some_and(|end| end <= cluster_size);
        if name_len > LONGEST_NAME || !fits {
            return Err("the name of its backing file is too long");
        }
        let mut name = vec![0; name_len as usize];
        read(&mut name, name_at).map_err(|_| SHORT)?;
        Some(PathBuf::from(std::ffi::OsString::from_vec(name)))
    };
    // Extensions lie between the header and the name.
    let end = if name_at == 0 { cluster_size } else { name_at };
    let backing_format = if backing.is_some() { backing_format(head, header_length, end)? } else { None };
    Ok(Qcow2 {
        virtual_size: long(24)?,
        cluster_size,
        backing,
        backing_format,
        encrypted: word(32)? != 0,
        external_data: features & 1 << 2 != 0,
        corrupt: features & 1 << 1 != 0,
        snapshots: word(60)?,
    })
}

/// Looks for the backing file's format among the extensions that begin at `from`, as far as they are in `head`.
fn backing_format(head: &[u8], from: u32, end: u64) -> Result<Option<String>, &'static str> {
    let mut at = from as usize;
    for _ in 0..MOST_EXTENSIONS {
        let (Some(kind), Some(len)) = (be32(head, at), be32(head, at + 4)) else { return Ok(None) };
        let len = len as usize;
        let data = at + 8;
        if kind == 0 {
            return Ok(None);
        }
        if (data as u64).saturating_add(len as u64) > end {
            return Err("an extension of its header is too long");
        }
        if kind == BACKING_FORMAT {
            let name = head.get(data..data + len).ok_or("an extension of its header is too long")?;
            return Ok(Some(String::from_utf8_lossy(name).into_owned()));
        }
        // Padded to whole multiples of 8.
        at = data + len.next_multiple_of(8);
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(edit: impl FnOnce(&mut Vec<u8>)) -> Result<Image, ImageError> {
        let mut bytes = vec![0; 512];
        bytes[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        bytes[20..24].copy_from_slice(&16u32.to_be_bytes());
        bytes[24..32].copy_from_slice(&(5u64 << 30).to_be_bytes());
        bytes[100..104].copy_from_slice(&104u32.to_be_bytes());
        edit(&mut bytes);
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        probe_format(file.path())
    }

    fn name_backing(bytes: &mut [u8]) {
        bytes[104..108].copy_from_slice(&BACKING_FORMAT.to_be_bytes());
        bytes[108..112].copy_from_slice(&3u32.to_be_bytes());
        bytes[112..115].copy_from_slice(b"raw");
        bytes[8..16].copy_from_slice(&128u64.to_be_bytes());
        bytes[16..20].copy_from_slice(&4u32.to_be_bytes());
        bytes[128..132].copy_from_slice(b"base");
    }

    #[test]
    fn what_a_header_says() {
        let Image::Qcow2(found) = header(|bytes| name_backing(bytes)).unwrap() else { panic!() };
        assert_eq!((found.virtual_size, found.cluster_size), (5 << 30, 65536));
        assert_eq!(found.backing.as_deref(), Some(Path::new("base")));
        assert_eq!(found.backing_format.as_deref(), Some("raw"));
        assert!(!found.encrypted && !found.external_data && !found.corrupt);
        let Image::Qcow2(found) = header(|bytes| bytes[79] = 6).unwrap() else { panic!() };
        assert!(found.external_data && found.corrupt && found.backing.is_none());
    }

    #[test]
    fn headers_that_make_no_sense_are_refused() {
        let edits: [fn(&mut Vec<u8>); 7] = [
            |bytes| bytes[7] = 4,
            |bytes| bytes[23] = 22,
            |bytes| bytes[23] = 8,
            |bytes| bytes[100] = 1,
            |bytes| bytes.truncate(80),
            |bytes| {
                name_backing(bytes);
                bytes[16] = 1;
            },
            |bytes| {
                name_backing(bytes);
                bytes[108..112].copy_from_slice(&[0xff; 4]);
            },
        ];
        for (number, edit) in edits.into_iter().enumerate() {
            let found = header(edit);
            assert!(matches!(found, Err(ImageError::Qcow2 { .. })), "{number}: {found:?}");
        }
    }

    #[test]
    fn other_formats_are_not_taken_for_raw() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let probe = |bytes: &[u8]| {
            std::fs::write(file.path(), bytes).unwrap();
            probe_format(file.path()).unwrap()
        };
        assert_eq!(probe(b""), Image::Raw { size: 0 });
        assert_eq!(probe(&[0x5a; 1000]), Image::Raw { size: 1000 });
        assert_eq!(probe(b"KDMVxxxx").format(), "vmdk");
        assert_eq!(probe(b"QFI\xfb\0\0\0\x01").format(), "qcow");
        let fixed = [&[0; 1024], b"conectix".as_slice(), &[0; 504]].concat();
        assert_eq!(probe(&fixed).format(), "vpc");
        let mut vdi = vec![0; 512];
        vdi[64..68].copy_from_slice(&0xbeda_107f_u32.to_le_bytes());
        assert_eq!(probe(&vdi).format(), "vdi");
    }

    proptest! {
        #[test]
        fn no_header_makes_it_stumble(bytes in proptest::collection::vec(any::<u8>(), 0..300), bits in 9u8..=21) {
            let mut bytes = bytes;
            for (at, byte) in [(0, b'Q'), (1, b'F'), (2, b'I'), (3, 0xfb), (7, 3), (23, bits)] {
                if let Some(place) = bytes.get_mut(at) {
                    *place = byte;
                }
            }
            drop(qcow2(&bytes, |_, _| Ok(())));
        }
    }
}
