//! Files on an ext4 that come, move, are replaced and go, and are looked for and read back all the time.
//!
//! Every change is synced, with its directories, before it counts: from then on the file must be as it is remembered, and a
//! deleted one must stay away. Files consist of [blocks](super::block) that say what they are. The host makes the file
//! system; what a former boot left on it is read, for a crash must leave no file half written, and then removed.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::block::{self, SIZE};
use super::device::{Aligned, Device};
use super::error::DiskError;
use super::tally::{Fault, Place, Tally, Verdict};
use crate::page::{Content, Identity, Sequence};
use crate::system;

/// Where the file systems are mounted.
const MOUNTS: &str = "/disks";
/// The directories that files move between.
const DIRECTORIES: [&str; 2] = ["a", "b"];
/// Files at most, and blocks of one: 8 MiB together.
const FILES: u64 = 64;
const BLOCKS: u64 = 32;

/// A file system at work.
#[derive(Debug)]
pub struct Files {
    serial: String,
    root: PathBuf,
    boot: u64,
    rate: u64,
    /// For reading around the page cache; nothing in a test, where the file system need not have it.
    read_flags: i32,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    mounted: bool,
    random: Sequence,
    generation: u64,
    /// What is known of each file.
    files: Vec<Known>,
}

/// What is known of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    Absent,
    Present {
        directory: usize,
        generation: u64,
        blocks: u64,
    },
    /// Something failed half-way: it may be anywhere, or nowhere.
    Unknown,
}

impl Files {
    /// Mounts the disk, and reads and removes what a former boot left there.
    ///
    /// # Errors
    /// Where there is no ext4, or it cannot be emptied.
    pub fn mount(device: &Device, boot: u64, rate: u64, tally: &Tally) -> Result<Self, DiskError> {
        let failed = |what| DiskError::system(&device.serial, what);
        let root = Path::new(MOUNTS).join(&device.serial);
        fs::create_dir_all(&root).map_err(failed("its mount point"))?;
        let text = |path: &Path| CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other);
        let [source, target] = [&device.path, &root].map(|path| text(path));
        source
            .and_then(|source| system::mount_with(&source, target?.as_c_str(), c"ext4", 0, c""))
            .map_err(failed("mounting its ext4"))?;
        Self::begin(&device.serial, root, boot, rate, libc::O_DIRECT, tally).map_err(failed("its files"))
    }

    fn begin(
        serial: &str,
        root: PathBuf,
        boot: u64,
        rate: u64,
        read_flags: i32,
        tally: &Tally,
    ) -> io::Result<Self> {
        let state = State {
            mounted: true,
            random: Sequence::new(boot),
            generation: 0,
            files: vec![Known::Absent; FILES as usize],
        };
        let files =
            Self { serial: serial.to_owned(), root, boot, rate, read_flags, state: Mutex::new(state) };
        for directory in DIRECTORIES {
            let directory = files.root.join(directory);
            fs::create_dir_all(&directory)?;
            for entry in fs::read_dir(&directory)? {
                let path = entry?.path();
                if let Some(number) = number_in(&path)
                    && let Err(fault) = files.whole(&path, number)
                {
                    tally.found(serial, Place::File(number), &fault, 0);
                }
                fs::remove_file(&path)?;
            }
            sync(&directory)?;
        }
        sync(&files.root)?;
        Ok(files)
    }

    /// Operations per second; 0 is as fast as it goes.
    pub fn rate(&self) -> u64 {
        self.rate
    }

    /// Changes one file and reads another back.
    pub fn step(&self, tally: &Tally) {
        let mut state = self.lock();
        let number = state.random.below(FILES);
        let known = state.files[number as usize];
        state.files[number as usize] = match self.change(&mut state, number, known) {
            Ok(known) => {
                tally.written(1);
                known
            }
            Err(error) => {
                let fault = Fault::Error(error.to_string());
                tally.found(&self.serial, Place::File(number), &fault, state.generation);
                Known::Unknown
            }
        };
        let number = state.random.below(FILES);
        if let Err((fault, expected)) = self.check(number, state.files[number as usize]) {
            tally.found(&self.serial, Place::File(number), &fault, expected);
        }
        tally.checked();
    }

    /// Reads all files back.
    pub fn check_all(&self, tally: &Tally, verdict: &mut Verdict) {
        for number in 0..FILES {
            // One at a time, so that the work goes on meanwhile.
            let state = self.lock();
            if !state.mounted {
                return;
            }
            verdict.files += 1;
            if let Err((fault, expected)) = self.check(number, state.files[number as usize]) {
                tally.found_in(verdict, &self.serial, Place::File(number), &fault, expected);
            }
        }
    }

    /// Leaves the file system clean.
    ///
    /// # Errors
    /// As `umount(2)`.
    pub fn unmount(&self) -> Result<(), DiskError> {
        let mut state = self.lock();
        if state.mounted {
            CString::new(self.root.as_os_str().as_bytes())
                .map_err(io::Error::other)
                .and_then(|root| system::unmount(&root))
                .map_err(DiskError::system(&self.serial, "unmounting its ext4"))?;
            state.mounted = false;
        }
        Ok(())
    }

    fn change(&self, state: &mut State, number: u64, known: Known) -> io::Result<Known> {
        match known {
            Known::Present { directory, generation, blocks } => match state.random.below(4) {
                0 => {
                    fs::remove_file(self.path(directory, number))?;
                    sync(&self.root.join(DIRECTORIES[directory]))?;
                    Ok(Known::Absent)
                }
                1 => {
                    let to = 1 - directory;
                    fs::rename(self.path(directory, number), self.path(to, number))?;
                    for directory in DIRECTORIES {
                        sync(&self.root.join(directory))?;
                    }
                    Ok(Known::Present { directory: to, generation, blocks })
                }
                _ => self.create(state, number, directory),
            },
            Known::Absent => {
                let directory = state.random.below(DIRECTORIES.len() as u64) as usize;
                self.create(state, number, directory)
            }
            Known::Unknown => {
                for (directory, name) in DIRECTORIES.iter().enumerate() {
                    match fs::remove_file(self.path(directory, number)) {
                        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                        _ => sync(&self.root.join(name))?,
                    }
                }
                Ok(Known::Absent)
            }
        }
    }

    /// As an editor saves: a new file, synced, that then takes the name.
    fn create(&self, state: &mut State, number: u64, directory: usize) -> io::Result<Known> {
        state.generation += 1;
        let (generation, blocks) = (state.generation, 1 + state.random.below(BLOCKS));
        let path = self.path(directory, number);
        let new = path.with_extension("new");
        let file = File::create(&new)?;
        let mut block = [0; SIZE];
        for index in 0..blocks {
            let identity = Identity { number: block_number(number, index), generation, boot: self.boot };
            block::write(&mut block, &self.serial, identity, Content::Text);
            file.write_all_at(&block, index * SIZE as u64)?;
        }
        file.sync_all()?;
        fs::rename(&new, &path)?;
        sync(&self.root.join(DIRECTORIES[directory]))?;
        Ok(Known::Present { directory, generation, blocks })
    }

    /// Whether the file is as known; if not, also gives the generation expected.
    fn check(&self, number: u64, known: Known) -> Result<(), (Fault, u64)> {
        let (there, expected, blocks) = match known {
            Known::Unknown => return Ok(()),
            Known::Absent => (None, 0, 0),
            Known::Present { directory, generation, blocks } => (Some(directory), generation, blocks),
        };
        for directory in (0..DIRECTORIES.len()).filter(|directory| Some(*directory) != there) {
            // A name that was taken away and is back: an older state of its directory.
            if self.path(directory, number).exists() {
                return Err((Fault::Lost { found: 0 }, expected));
            }
        }
        let Some(directory) = there else { return Ok(()) };
        let path = self.path(directory, number);
        let read = || -> io::Result<Result<(), Fault>> {
            let file = match self.open(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    return Ok(Err(Fault::Lost { found: 0 }));
                }
                other => other?,
            };
            if file.metadata()?.len() != blocks * SIZE as u64 {
                return Ok(Err(Fault::Lost { found: 0 }));
            }
            let mut block = Aligned([0; SIZE]);
            for index in 0..blocks {
                file.read_exact_at(&mut block.0, index * SIZE as u64)?;
                let (number, allowed) = (block_number(number, index), expected..=expected);
                if let Err(fault) = block::check(&block.0, &self.serial, number, self.boot, allowed) {
                    return Ok(Err(fault));
                }
            }
            Ok(Ok(()))
        };
        read().unwrap_or_else(|error| Err(Fault::Error(error.to_string()))).map_err(|fault| (fault, expected))
    }

    /// Whether a file of a former boot is one write from beginning to end.
    fn whole(&self, path: &Path, number: u64) -> Result<(), Fault> {
        let bytes = fs::read(path).map_err(|error| Fault::Error(error.to_string()))?;
        if bytes.is_empty() || !bytes.len().is_multiple_of(SIZE) {
            return Err(Fault::Torn);
        }
        let mut first = None;
        for (index, block) in (0..).zip(bytes.chunks_exact(SIZE)) {
            let (found, serial) = block::identify(block).ok_or(Fault::Torn)?;
            if found.number != block_number(number, index) || serial != self.serial {
                return Err(Fault::Misplaced { serial, number: found.number });
            }
            let version = (found.boot, found.generation);
            if *first.get_or_insert(version) != version {
                return Err(Fault::Torn);
            }
        }
        Ok(())
    }

    fn open(&self, path: &Path) -> io::Result<File> {
        OpenOptions::new().read(true).custom_flags(self.read_flags).open(path)
    }

    fn path(&self, directory: usize, number: u64) -> PathBuf {
        self.root.join(DIRECTORIES[directory]).join(format!("file-{number}"))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A poisoned lock means that a thread panicked, and a panic ends the guest.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The number of a file by its name; none for one that had not got its name yet.
fn number_in(path: &Path) -> Option<u64> {
    path.file_name()?.to_str()?.strip_prefix("file-")?.parse().ok()
}

/// The number in a file's block: no two files have one in common.
fn block_number(file: u64, index: u64) -> u64 {
    (file << 32) | index
}

fn sync(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn begin(root: &Path, boot: u64, tally: &Tally) -> Files {
        Files::begin("d", root.to_owned(), boot, 0, 0, tally).unwrap()
    }

    fn worked(root: &Path) -> (Files, Tally) {
        let tally = Tally::new(|_| {});
        let files = begin(root, 5, &tally);
        for _ in 0..400 {
            files.step(&tally);
        }
        (files, tally)
    }

    fn verdict(files: &Files) -> Verdict {
        let mut verdict = Verdict::default();
        files.check_all(&Tally::new(|_| {}), &mut verdict);
        verdict
    }

    /// The number and path of some file that is there.
    fn some_file(files: &Files) -> (u64, PathBuf) {
        let state = files.lock();
        let found = (0..FILES).find_map(|number| match state.files[number as usize] {
            Known::Present { directory, .. } => Some((number, files.path(directory, number))),
            _ => None,
        });
        found.unwrap()
    }

    #[test]
    fn files_come_and_go_and_are_found() {
        let directory = tempfile::tempdir().unwrap();
        let (files, tally) = worked(directory.path());
        let status = tally.status();
        assert_eq!((status.writes, status.checked, status.faults.total()), (400, 400, 0));
        let verdict = verdict(&files);
        assert_eq!((verdict.files, verdict.faults.total()), (FILES, 0));
        let state = files.lock();
        let absent = state.files.iter().filter(|known| **known == Known::Absent).count();
        assert!((1..FILES as usize).contains(&absent), "{absent}");
    }

    #[test]
    fn changes_that_came_undone_are_lost() {
        let directory = tempfile::tempdir().unwrap();
        let (files, _) = worked(directory.path());
        let (number, path) = some_file(&files);
        let old = fs::read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        assert_eq!(verdict(&files).faults.lost, 1, "a file is gone");
        fs::write(&path, &old[..SIZE / 2]).unwrap();
        assert_eq!(verdict(&files).faults.lost, 1, "a file is shorter");
        fs::write(&path, &old).unwrap();
        assert_eq!(verdict(&files).faults.total(), 0);
        let moved = Path::new(&path).parent().unwrap().parent().unwrap();
        for directory in DIRECTORIES {
            let twin = moved.join(directory).join(format!("file-{number}"));
            if twin != path {
                fs::write(twin, &old).unwrap();
            }
        }
        assert_eq!(verdict(&files).faults.lost, 1, "a file is back where it was before");
    }

    #[test]
    fn a_file_with_a_wrong_byte_is_torn() {
        let directory = tempfile::tempdir().unwrap();
        let (files, _) = worked(directory.path());
        let file = OpenOptions::new().write(true).open(some_file(&files).1).unwrap();
        file.write_all_at(&[0xff], 1000).unwrap();
        assert_eq!(verdict(&files).faults.torn, 1);
    }

    #[test]
    fn what_a_former_boot_left_must_be_whole_and_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        let (files, _) = worked(directory.path());
        // A new file that had not got its name may be anything.
        fs::write(files.path(0, 1).with_extension("new"), "half").unwrap();
        let tally = Tally::new(|_| {});
        let files = begin(directory.path(), 6, &tally);
        assert_eq!(tally.status().faults.total(), 0);
        assert_eq!(fs::read_dir(directory.path().join("a")).unwrap().count(), 0);
        for _ in 0..100 {
            files.step(&tally);
        }
        let path = some_file(&files).1;
        fs::write(&path, vec![0; SIZE]).unwrap();
        let tally = Tally::new(|_| {});
        begin(directory.path(), 7, &tally);
        assert_eq!(tally.status().faults.torn, 1);
    }
}
