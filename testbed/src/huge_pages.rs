//! Huge pages for tests: more of them in the host's pool for a while, and file systems that give them out.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use crate::TestbedError;
use crate::tool::run;

/// Bytes in a huge page.
pub const HUGE_PAGE: u64 = 2 << 20;

const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// Huge pages of 2 MiB beyond those that the host had, and directories on hugetlbfs. All is as before when this is dropped.
#[derive(Debug)]
pub struct HugePages {
    /// Nobody else who asks for this lock changes the pool meanwhile: two would undo each other's changes.
    _lock: File,
    before: u64,
    directories: Vec<PathBuf>,
}

impl HugePages {
    /// Adds that many pages to the host's pool; waits for others that have done so.
    ///
    /// # Errors
    /// Where this process may not, the kernel has no such pages, or memory is too fragmented: a test that needs them
    /// cannot be run then, and must not pass.
    pub fn add(pages: u64) -> Result<HugePages, TestbedError> {
        let file = number_file("nr_hugepages");
        let lock = File::open(&file).map_err(TestbedError::file(&file))?;
        flock(&lock, FlockOperation::LockExclusive).map_err(|e| TestbedError::file(&file)(e.into()))?;
        let before = number("nr_hugepages")?;
        // From here on it is put back, whatever happens.
        let pool = HugePages { _lock: lock, before, directories: Vec::new() };
        fs::write(&file, (before + pages).to_string()).map_err(TestbedError::file(&file))?;
        let there = number("nr_hugepages")?;
        if there < before + pages {
            let what =
                format!("of {pages} huge pages the kernel could make {}", there.saturating_sub(before));
            return Err(TestbedError::file(&file)(std::io::Error::other(what)));
        }
        Ok(pool)
    }

    /// A new directory on hugetlbfs; where `limit` is given, with no more than so many pages.
    ///
    /// # Errors
    /// Where it cannot be mounted.
    pub fn directory(&mut self, limit: Option<u64>) -> Result<PathBuf, TestbedError> {
        let name = format!("{}huge-{}-{}", crate::name::PREFIX, std::process::id(), self.directories.len());
        let directory = std::env::temp_dir().join(name);
        fs::create_dir(&directory).map_err(TestbedError::file(&directory))?;
        self.directories.push(directory.clone());
        let size = limit.map(|pages| format!(",size={}", pages * HUGE_PAGE)).unwrap_or_default();
        let options = format!("pagesize=2M{size}");
        run("mount", &["-t", "hugetlbfs", "-o", &options, "vmirror-test", &directory.to_string_lossy()])?;
        Ok(directory)
    }

    /// Pages of the pool that nobody has and nobody has reserved.
    ///
    /// # Errors
    /// Where the kernel does not say.
    pub fn free(&self) -> Result<u64, TestbedError> {
        Ok(number("free_hugepages")?.saturating_sub(number("resv_hugepages")?))
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        for directory in &self.directories {
            let unmounted = run("umount", &["--lazy", &directory.to_string_lossy()]);
            if let Err(error) =
                unmounted.and_then(|_| fs::remove_dir(directory).map_err(TestbedError::file(directory)))
            {
                eprintln!("testbed: {error}");
            }
        }
        if let Err(error) = fs::write(number_file("nr_hugepages"), self.before.to_string()) {
            eprintln!("testbed: the pool of huge pages is not as it was, {} pages: {error}", self.before);
        }
    }
}

fn number_file(name: &str) -> PathBuf {
    Path::new(POOL).join(name)
}

fn number(name: &str) -> Result<u64, TestbedError> {
    let file = number_file(name);
    let text = fs::read_to_string(&file).map_err(TestbedError::file(&file))?;
    text.trim().parse().map_err(|_| TestbedError::Answer(text))
}
