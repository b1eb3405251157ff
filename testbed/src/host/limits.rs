//! What a host has little of, what it shares, and the loss of its power.

use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread;
use std::time::Instant;

use rustix::process::Signal;

use super::{Host, KILL_TIMEOUT};
use crate::fault::{self, Paused};
use crate::running::POLL;
use crate::tool::{run, tail};
use crate::wire::{BRIDGE, LINK, UPLINK};
use crate::{TestbedError, inventory};

impl Host {
    /// Limits (or widens) the room for guest RAM, in bytes: for "no room" tests.
    ///
    /// # Errors
    /// [`TestbedError::NotRoot`] in a rootless testbed, or where more than that is in use.
    pub fn limit_ram(&self, bytes: u64) -> Result<(), TestbedError> {
        self.namespace().ok_or(TestbedError::NotRoot)?;
        let ram = self.ram_dir.to_string_lossy();
        run("mount", &["-o", &format!("remount,size={bytes}"), &ram])?;
        Ok(())
    }

    /// Gives the host's own disks a file system of that many bytes, which is empty at first. Again: makes it smaller or larger. An
    /// agent that runs already does not see the first time.
    ///
    /// # Errors
    /// Where it cannot be mounted, or more than that is in use.
    pub fn limit_disks(&self, bytes: u64) -> Result<(), TestbedError> {
        let (disks, size) = (self.disk_dir(), format!("size={bytes}"));
        let device =
            |path: &Path| fs::metadata(path).map(|file| file.dev()).map_err(TestbedError::file(path));
        let disks = disks.to_string_lossy();
        if device(&self.directory)? == device(&self.disk_dir())? {
            run("mount", &["-t", "tmpfs", "-o", &size, &self.mark, &disks])?;
        } else {
            run("mount", &["-o", &format!("remount,{size}"), &disks])?;
        }
        Ok(())
    }

    /// Gives the agent's state directory, which is empty, a file system of that many bytes. For an agent that is started after this.
    ///
    /// # Errors
    /// Where it cannot be mounted.
    pub fn limit_state(&self, bytes: u64) -> Result<(), TestbedError> {
        let state = self.state_dir();
        run("mount", &["-t", "tmpfs", "-o", &format!("size={bytes}"), &self.mark, &state.to_string_lossy()])?;
        Ok(())
    }

    /// Takes all room there is on the file system of the agent's state directory, and gives it back.
    ///
    /// # Errors
    /// Where the file that takes it cannot be made, or removed.
    pub fn fill_state(&self, full: bool) -> Result<(), TestbedError> {
        let ballast = self.state_dir().join("ballast");
        if !full {
            return fs::remove_file(&ballast).map_err(TestbedError::file(&ballast));
        }
        let mut file = fs::File::create(&ballast).map_err(TestbedError::file(&ballast))?;
        let mut block: &[u8] = &[0; 4096];
        while !block.is_empty() {
            // The last bytes one by one.
            match file.write(block) {
                Ok(_) => {}
                Err(e) if e.kind() == std::io::ErrorKind::StorageFull => block = &block[..block.len() / 2],
                Err(e) => return Err(TestbedError::file(&ballast)(e)),
            }
        }
        Ok(())
    }

    /// The host loses its power and starts again: nothing runs on it, its run and RAM directories are empty, the interfaces that it
    /// does not start with are gone, and what is on its disks is as it was. Its agent does not run.
    ///
    /// # Errors
    /// [`TestbedError::NotRoot`] in a rootless testbed, where a process does not die, or a directory cannot be emptied.
    pub fn reboot(&self) -> Result<(), TestbedError> {
        let namespace = self.namespace().ok_or(TestbedError::NotRoot)?;
        // All at once: nobody is to see another one end.
        let processes = self.processes();
        processes.iter().for_each(|pid| fault::signal(*pid, Signal::STOP));
        let stopped: Vec<Paused> = processes.iter().map(|pid| fault::pause(*pid)).collect();
        processes.into_iter().for_each(fault::kill);
        drop(stopped);
        self.kill_agent()?;
        let start = Instant::now();
        while !self.processes().is_empty() {
            if start.elapsed() > KILL_TIMEOUT {
                let (what, waited) = (format!("the processes of {} to end", self.name), start.elapsed());
                return Err(TestbedError::Timeout { what, waited, last: tail(&self.agent_log()) });
            }
            self.processes().into_iter().for_each(fault::kill);
            thread::sleep(POLL);
        }
        for directory in [self.run_dir(), self.ram_dir.clone()] {
            for entry in fs::read_dir(&directory).map_err(TestbedError::file(&directory))?.flatten() {
                let path = entry.path();
                let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
                let removed = if is_directory { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
                removed.map_err(TestbedError::file(&path))?;
            }
        }
        for link in inventory::links(&namespace.ip(&["-j", "-d", "link"])?).into_keys() {
            if ![BRIDGE, UPLINK, LINK, "lo"].contains(&link.as_str()) {
                namespace.ip(&["link", "delete", &link])?;
            }
        }
        Ok(())
    }

    /// Makes the host's own disks read-only, for an agent that is started after this.
    ///
    /// # Errors
    /// Where they cannot be mounted so.
    pub fn freeze_disks(&self) -> Result<(), TestbedError> {
        let disks = self.disk_dir();
        let disks = disks.to_string_lossy();
        run("mount", &["--bind", &disks, &disks])?;
        run("mount", &["-o", "remount,bind,ro", &disks])?;
        Ok(())
    }

    /// Lets an agent that is started after this see another host's own disks in the place of its own.
    ///
    /// # Errors
    /// Where they cannot be mounted there.
    pub fn share_disks_of(&self, other: &Host) -> Result<(), TestbedError> {
        let [theirs, own] = [other, self].map(Host::disk_dir);
        run("mount", &["--bind", &theirs.to_string_lossy(), &own.to_string_lossy()])?;
        Ok(())
    }
}
