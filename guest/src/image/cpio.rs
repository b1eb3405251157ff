//! The archive format of an initramfs: `cpio` "newc", as in the kernel's
//! `Documentation/driver-api/early-userspace/buffer-format.rst`.

const REGULAR: u32 = 0o100_000;
const DIRECTORY: u32 = 0o040_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// An archive being written.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    inodes: u32,
}

/// A file longer than the format can say: 4 GiB.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{name}: {length} bytes do not fit a cpio archive")]
pub struct TooLarge {
    /// The file.
    pub name: String,
    /// Its length in bytes.
    pub length: usize,
}

impl Archive {
    /// An empty archive.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a directory, mode 0755. Its parent must be there already.
    ///
    /// # Errors
    /// Never for a name of sensible length.
    pub fn directory(&mut self, name: &str) -> Result<(), TooLarge> {
        self.entry(name, DIRECTORY | 0o755, (0, 0), &[])
    }

    /// Adds a file.
    ///
    /// # Errors
    /// Where the file is too long for the format.
    pub fn file(&mut self, name: &str, permissions: u32, content: &[u8]) -> Result<(), TooLarge> {
        self.entry(name, REGULAR | permissions, (0, 0), content)
    }

    /// Adds a character device, mode 0600.
    ///
    /// # Errors
    /// Never for a name of sensible length.
    pub fn character_device(&mut self, name: &str, major: u32, minor: u32) -> Result<(), TooLarge> {
        self.entry(name, CHARACTER_DEVICE | 0o600, (major, minor), &[])
    }

    /// The archive's bytes, with its end mark.
    ///
    /// # Errors
    /// Never.
    pub fn finish(mut self) -> Result<Vec<u8>, TooLarge> {
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        Ok(self.bytes)
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) -> Result<(), TooLarge> {
        let size = |length: usize| {
            u32::try_from(length).map_err(|_| TooLarge { name: name.to_owned(), length: content.len() })
        };
        self.inodes += 1;
        let (uid, gid, links, time, checksum) = (0, 0, 1, 0, 0);
        let fields = [
            self.inodes,
            mode,
            uid,
            gid,
            links,
            time,
            size(content.len())?,
            0,
            0,
            device.0,
            device.1,
            size(name.len() + 1)?,
            checksum,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(content);
        self.align();
        Ok(())
    }

    /// Names and contents end at a multiple of four bytes.
    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Reads what the kernel would: name, mode, content.
    fn read(mut archive: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut entries = Vec::new();
        let whole = archive;
        loop {
            assert_eq!(&archive[..6], b"070701");
            let field = |n: usize| {
                u32::from_str_radix(std::str::from_utf8(&archive[6 + 8 * n..14 + 8 * n]).unwrap(), 16)
                    .unwrap()
            };
            let (mode, size, name_size) = (field(1), field(6) as usize, field(11) as usize);
            let name = String::from_utf8(archive[110..110 + name_size - 1].to_vec()).unwrap();
            assert_eq!(archive[110 + name_size - 1], 0);
            let offset = whole.len() - archive.len();
            let start = (offset + 110 + name_size).next_multiple_of(4) - offset;
            let content = archive[start..start + size].to_vec();
            if name == "TRAILER!!!" {
                return entries;
            }
            entries.push((name, mode, content));
            let end = (offset + start + size).next_multiple_of(4) - offset;
            archive = &archive[end..];
        }
    }

    #[test]
    fn directories_files_and_devices_have_their_modes() {
        let mut archive = Archive::new();
        archive.directory("dev").unwrap();
        archive.character_device("dev/console", 5, 1).unwrap();
        archive.file("init", 0o755, b"#!").unwrap();
        let entries = read(&archive.finish().unwrap());
        let expected =
            [("dev", 0o040_755, &b""[..]), ("dev/console", 0o020_600, b""), ("init", 0o100_755, b"#!")];
        let expected = expected.map(|(name, mode, content)| (name.to_owned(), mode, content.to_vec()));
        assert_eq!(entries, expected);
    }

    proptest! {
        #[test]
        fn what_goes_in_comes_out(files in prop::collection::vec(("[a-z]{1,20}", prop::collection::vec(any::<u8>(), 0..50)), 0..6)) {
            let mut archive = Archive::new();
            for (name, content) in &files {
                archive.file(name, 0o600, content).unwrap();
            }
            let bytes = archive.finish().unwrap();
            prop_assert_eq!(bytes.len() % 4, 0);
            let entries: Vec<_> = read(&bytes).into_iter().map(|(name, _, content)| (name, content)).collect();
            prop_assert_eq!(entries, files);
        }
    }
}
