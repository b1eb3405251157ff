//! A guest's memory seen from outside, as a file: finding its pages, and spoiling them.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use guest::page::{self, Identity};

/// Finds a page of the guest's filled area: its offset in the file, and which it is.
///
/// Reads without mapping, so that holes stay holes.
///
/// # Errors
/// Where the file cannot be read.
pub fn find_page(ram: &Path, wanted: impl Fn(Identity) -> bool) -> io::Result<Option<(u64, Identity)>> {
    let file = File::open(ram)?;
    let mut buffer = vec![0; 1 << 20];
    let mut offset = 0;
    loop {
        let length = file.read_at(&mut buffer, offset)?;
        if length == 0 {
            return Ok(None);
        }
        for (index, page) in buffer[..length].chunks_exact(page::SIZE).enumerate() {
            // The magic number first: the checksum of every page would take a while.
            if page.starts_with(&page::MAGIC.to_le_bytes())
                && let Some(identity) = page::identify(page).filter(|identity| wanted(*identity))
            {
                return Ok(Some((offset + (index * page::SIZE) as u64, identity)));
            }
        }
        offset += length as u64;
    }
}

/// Flips the bits of `mask` in one byte of the file, at that offset, under the guest's feet.
///
/// # Errors
/// Where the file cannot be read or written.
pub fn flip(ram: &Path, offset: u64, mask: u8) -> io::Result<()> {
    let file = File::options().read(true).write(true).open(ram)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset)?;
    file.write_all_at(&[byte[0] ^ mask], offset)
}

#[cfg(test)]
mod tests {
    use super::*;
    use guest::page::Content;

    #[test]
    fn a_page_is_found_and_spoiled() {
        let ram = tempfile::NamedTempFile::new().unwrap();
        let mut bytes = vec![0; 3 << 20];
        let identity = Identity { number: 9, generation: 1, boot: 5 };
        let at = (1 << 20) + 3 * page::SIZE;
        page::write(&mut bytes[at..at + page::SIZE], identity, Content::Text);
        std::fs::write(ram.path(), &bytes).unwrap();
        assert_eq!(find_page(ram.path(), |page| page.number == 9).unwrap(), Some((at as u64, identity)));
        assert_eq!(find_page(ram.path(), |page| page.number == 8).unwrap(), None);
        flip(ram.path(), at as u64 + 100, 1).unwrap();
        assert_eq!(find_page(ram.path(), |_| true).unwrap(), None);
    }
}
