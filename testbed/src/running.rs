//! A guest that runs, and what it says on its serial console.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use guest::status::{PREFIX, READY, Status};

use crate::TestbedError;
use crate::tool::tail;

/// How often something that is waited for is looked at.
pub(crate) const POLL: Duration = Duration::from_millis(20);

/// A guest started by hand. QEMU is killed when this is dropped.
#[derive(Debug)]
pub struct RunningGuest {
    child: Child,
    console: Console,
}

impl RunningGuest {
    /// Starts `qemu` by that command, with its serial console in the file `serial`.
    pub(crate) fn start(mut command: Command, qemu: &Path, serial: &Path) -> Result<Self, TestbedError> {
        let failed = |source| TestbedError::Start { program: qemu.display().to_string(), source };
        let child = command.stdin(Stdio::null()).spawn().map_err(failed)?;
        Ok(Self { child, console: Console::new(serial) })
    }

    /// QEMU's process.
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// What the guest says on its serial line.
    pub fn console(&self) -> &Console {
        &self.console
    }

    /// Waits until the guest's memory is filled and its ports answer.
    ///
    /// # Errors
    /// [`TestbedError::Ended`] where QEMU ends, [`TestbedError::Timeout`]; both with the end of the console.
    pub fn wait_ready(&mut self, within: Duration) -> Result<(), TestbedError> {
        let start = Instant::now();
        while !self.console.is_ready() {
            if let Some(status) = self.exit_status() {
                return Err(TestbedError::Ended {
                    what: "QEMU".into(),
                    status: status.to_string(),
                    last: tail(self.console.path()),
                });
            }
            if start.elapsed() > within {
                return Err(self.console.timeout("the guest to be ready", start.elapsed()));
            }
            thread::sleep(POLL);
        }
        Ok(())
    }

    /// QEMU's exit status, if it has ended.
    pub fn exit_status(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }
}

impl Drop for RunningGuest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The serial console of a test guest, as logged to a file, whoever started the guest.
#[derive(Clone, Debug)]
pub struct Console {
    path: PathBuf,
}

impl Console {
    /// The console logged to that file, which need not exist yet.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// The log file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All that was said so far.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.path).unwrap_or_default()).into_owned()
    }

    /// Whether the guest has ever been ready.
    pub fn is_ready(&self) -> bool {
        self.text().contains(&format!("{PREFIX}{READY}"))
    }

    /// The latest status, if there is one.
    pub fn status(&self) -> Option<Status> {
        Status::latest_in(&self.text())
    }

    /// Waits for a status that fits.
    ///
    /// # Errors
    /// [`TestbedError::Timeout`], with the end of the console.
    pub fn wait_for(
        &self,
        what: &str,
        within: Duration,
        fits: impl Fn(&Status) -> bool,
    ) -> Result<Status, TestbedError> {
        let start = Instant::now();
        loop {
            match self.status() {
                Some(status) if fits(&status) => return Ok(status),
                _ if start.elapsed() > within => return Err(self.timeout(what, start.elapsed())),
                _ => thread::sleep(POLL),
            }
        }
    }

    fn timeout(&self, what: &str, waited: Duration) -> TestbedError {
        TestbedError::Timeout { what: what.to_owned(), waited, last: tail(&self.path) }
    }
}
