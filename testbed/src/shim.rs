//! Faults of an agent's clock and of the disk below its state directory, which can be had of no kernel without harm to others on
//! the machine: a small library that is loaded into the agent stands before the calls of the C library.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::TestbedError;
use crate::tool::run;

const SOURCE: &str = include_str!("shim.c");

/// What is wrong with the disk below an agent's state directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadDisk {
    /// Nothing.
    Sound,
    /// Whatever is to be made durable fails with `EIO`; it is on the disk all the same.
    FailsToSync,
    /// Reads fail with `EIO`.
    FailsToRead,
    /// Whatever is to be made durable waits until the disk is another.
    HangsToSync,
}

/// The faults of one host's agents. All of them that were started with [`Shim::environment`] follow it at once.
#[derive(Debug)]
pub struct Shim {
    words: File,
    environment: Vec<(String, String)>,
}

impl Shim {
    /// Without any fault, for agents with that state directory; its files are in `directory`.
    ///
    /// # Errors
    /// Where there is no C compiler, or no room.
    pub fn new(directory: &Path, state_dir: &Path) -> Result<Self, TestbedError> {
        let library = directory.join("shim.so");
        let source = directory.join("shim.c");
        std::fs::write(&source, SOURCE).map_err(TestbedError::file(&source))?;
        let [from, to] = [&source, &library].map(|path| path.to_string_lossy());
        run("cc", &["-shared", "-fPIC", "-O1", "-o", &to, &from])?;
        let words = directory.join("shim.words");
        let file = File::options().read(true).write(true).create(true).truncate(false).open(&words);
        let file = file.map_err(TestbedError::file(&words))?;
        file.write_all_at(&[0; 16], 0).map_err(TestbedError::file(&words))?;
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let environment = vec![
            ("LD_PRELOAD".to_owned(), text(&library)),
            ("VMIRROR_TESTBED_SHIM".to_owned(), text(&words)),
            ("VMIRROR_TESTBED_STATE".to_owned(), text(state_dir)),
        ];
        Ok(Self { words: file, environment })
    }

    /// What an agent is started with.
    pub fn environment(&self) -> &[(String, String)] {
        &self.environment
    }

    /// Sets the agent's clock ahead of the machine's by that many seconds, or back.
    ///
    /// # Errors
    /// Where it cannot be told.
    pub fn set_clock(&self, seconds: i64) -> Result<(), TestbedError> {
        self.word(0, seconds)
    }

    /// Lets the disk of the state directory be like that.
    ///
    /// # Errors
    /// Where it cannot be told.
    pub fn set_disk(&self, disk: BadDisk) -> Result<(), TestbedError> {
        let what = match disk {
            BadDisk::Sound => 0,
            BadDisk::FailsToSync => 1,
            BadDisk::FailsToRead => 2,
            BadDisk::HangsToSync => 4,
        };
        self.word(8, what)
    }

    fn word(&self, at: u64, value: i64) -> Result<(), TestbedError> {
        self.words.write_all_at(&value.to_ne_bytes(), at).map_err(TestbedError::file("shim.words"))
    }
}
