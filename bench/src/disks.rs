//! The guests' disks: raw images that each host has of its own, made anew for every cell.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use guest::page::{self, Content, Identity};
use testbed::guest_spec::{Io, Pattern, TestDisk, Work};
use testbed::{Host, TestbedError, disk};

use crate::cell::{Disk, DiskContent, PAGE};
use crate::error::BenchError;
use crate::run::Run;

/// The serial number by which a guest knows its disk.
const SERIAL: &str = "data";
/// Where the guest writes, from the beginning of its disk, in MiB; how many writes are under way at once, and how many blocks
/// it reads back per second.
const WRITTEN_MIB: u64 = 256;
const DEPTH: u32 = 4;
const CHECK_RATE: u64 = 100;
/// A stretch of content, and one of nothing after it, in MiB.
const STRETCH_MIB: u64 = 64;
const MIB: usize = 1 << 20;

/// The disk as a guest has it whose image that is.
pub fn attached(disk: Disk, image: PathBuf) -> TestDisk {
    let work = Work::Blocks {
        pattern: Pattern::Random,
        io: Io::Direct,
        rate: 0,
        depth: DEPTH,
        check_rate: CHECK_RATE,
    };
    let roles = if disk.written { vec![work.within(WRITTEN_MIB)] } else { Vec::new() };
    TestDisk { roles, ..TestDisk::new(image, disk::Format::Raw, SERIAL) }
}

/// Where the image of a guest lies that a host has of its own.
pub fn image(host: &Host, guest: &str) -> PathBuf {
    host.disk_dir().join(format!("{guest}.raw"))
}

/// Whether there is room for the images of both guests on both hosts.
pub fn has_room(disk: Disk) -> Result<(), String> {
    let directory = std::env::temp_dir();
    // Half of each holds something, there are four, and a file system that is all but full is a slow one.
    let needed = (disk.mib << 20) * 5 / 2;
    let free = match rustix::fs::statvfs(&directory) {
        Ok(system) => system.f_bavail * system.f_frsize,
        Err(error) => return Err(format!("{}: {error}", directory.display())),
    };
    if free < needed {
        let [needed, free] = [needed, free].map(readable::bytes);
        return Err(format!("images need {needed} in {}, where {free} are free", directory.display()));
    }
    Ok(())
}

/// Makes an image with everything that a cell's disks hold.
pub fn fill(image: &Path, disk: Disk, run: &Run) -> Result<(), BenchError> {
    make(image, disk)?;
    let file = File::options().write(true).open(image).map_err(BenchError::file(image))?;
    let mut content = Filler::of(disk.content)?;
    let mut bytes = vec![0; MIB];
    for mib in (0..disk.mib).filter(|mib| (mib / STRETCH_MIB).is_multiple_of(2)) {
        run.check()?;
        content.next(&mut bytes, mib);
        file.write_all_at(&bytes, mib << 20).map_err(BenchError::file(image))?;
    }
    file.sync_all().map_err(BenchError::file(image))
}

/// Makes an image of that size with nothing in it, in place of what was there.
pub fn make(image: &Path, disk: Disk) -> Result<(), BenchError> {
    disk::create(image, disk::Format::Raw, disk.mib << 20).map_err(BenchError::Testbed)
}

/// Takes what a guest that has left has left on a host, and has everything written that was not yet: nobody is to pay for what
/// was done before.
pub fn clear(host: &Host, guest: &str) -> Result<(), BenchError> {
    let image = image(host, guest);
    match fs::remove_file(&image) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        removed => removed.map_err(BenchError::file(&image))?,
    }
    rustix::fs::sync();
    Ok(())
}

/// Brings forth what a disk holds.
enum Filler {
    Mix,
    /// The pages of a file system that hold something, and how far they are used.
    Pages {
        pages: Vec<u8>,
        next: usize,
    },
}

impl Filler {
    fn of(content: DiskContent) -> Result<Self, BenchError> {
        if content == DiskContent::Mix {
            return Ok(Self::Mix);
        }
        let image = testbed::programs::userland()?;
        let mut file = File::open(&image).map_err(BenchError::file(&image))?;
        let (mut pages, mut part) = (Vec::new(), vec![0; MIB]);
        loop {
            match file.read(&mut part).map_err(BenchError::file(&image))? {
                0 => break,
                length => {
                    let whole = part[..length].chunks_exact(PAGE as usize);
                    whole
                        .filter(|page| page.iter().any(|byte| *byte != 0))
                        .for_each(|page| pages.extend(page));
                }
            }
        }
        if pages.len() < MIB {
            let message = format!("{} holds too little", image.display());
            return Err(BenchError::Testbed(TestbedError::Tool {
                command: "make setup-userland".into(),
                message,
            }));
        }
        Ok(Self::Pages { pages, next: 0 })
    }

    /// The next MiB.
    fn next(&mut self, bytes: &mut [u8], mib: u64) {
        match self {
            Self::Mix => {
                let content = if mib.is_multiple_of(2) { Content::Noise } else { Content::Text };
                let numbers = mib * (MIB as u64 / PAGE)..;
                for (number, bytes) in numbers.zip(bytes.chunks_exact_mut(PAGE as usize)) {
                    page::write(bytes, Identity { number, generation: 1, boot: 1 }, content);
                }
            }
            Self::Pages { pages, next } => {
                if *next + bytes.len() > pages.len() {
                    *next = 0;
                }
                bytes.copy_from_slice(&pages[*next..*next + bytes.len()]);
                *next += bytes.len();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_of_a_disk_holds_something_and_the_rest_takes_no_room() {
        let image = std::env::temp_dir().join(format!("vmirror-bench-disk-{}", std::process::id()));
        let small = Disk { mib: 2 * STRETCH_MIB, content: DiskContent::Mix, written: false };
        fill(&image, small, &Run::new().unwrap()).unwrap();
        let (size, room) = (fs::metadata(&image).unwrap().len(), disk::allocated(&image).unwrap());
        fs::remove_file(&image).unwrap();
        assert_eq!(size, small.mib << 20);
        assert!((STRETCH_MIB << 20..(STRETCH_MIB + 1) << 20).contains(&room), "{room}");
    }

    #[test]
    fn only_a_disk_that_is_written_has_work() {
        let disk = Disk { mib: 1024, content: DiskContent::Mix, written: false };
        assert!(attached(disk, "/i".into()).roles.is_empty());
        assert_eq!(attached(Disk { written: true, ..disk }, "/i".into()).roles.len(), 1);
        assert!(has_room(disk).is_ok() || has_room(Disk { mib: 1 << 40, ..disk }).is_err());
        assert!(has_room(Disk { mib: 1 << 40, ..disk }).unwrap_err().contains("are free"));
    }
}
