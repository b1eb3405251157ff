//! The cgroups of a machine that is to come: one directory in each hierarchy that its limits need.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::hierarchy::{Controller, Hierarchy, Version, lists, read};
use super::{CgroupError, CgroupParent, Limits, PROC};

/// How long the threads of a process that has ended may take to leave its cgroup.
pub const LEAVE: Duration = Duration::from_secs(5);
/// How long to wait between attempts.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// What is to be made.
#[derive(Debug)]
pub struct Plan {
    limits: Limits,
    parent: CgroupParent,
    parts: Vec<Part>,
}

/// A controller, and where it is set.
#[derive(Debug)]
struct Part {
    controller: Controller,
    hierarchy: Hierarchy,
    directory: PathBuf,
}

impl Plan {
    /// Finds the place of each limit, and changes nothing.
    pub fn new(limits: Limits, parent: &CgroupParent, name: &str) -> Result<Plan, CgroupError> {
        Plan::in_proc(Path::new(PROC), limits, parent, name)
    }

    pub(super) fn in_proc(
        proc: &Path,
        limits: Limits,
        parent: &CgroupParent,
        name: &str,
    ) -> Result<Plan, CgroupError> {
        let mut parts = Vec::new();
        for controller in Controller::ALL.into_iter().filter(|controller| limits.need(*controller)) {
            let missing = CgroupError::NoController { controller: controller.name() };
            let hierarchy = Hierarchy::of(controller, proc)?.ok_or(missing)?;
            if let (Version::V1, Controller::Memory, Some(high)) =
                (hierarchy.version, controller, limits.memory_high)
            {
                return Err(CgroupError::NoHigh(high));
            }
            let directory = hierarchy.mount.join(parent).join(format!("vmirror-{name}"));
            parts.push(Part { controller, hierarchy, directory });
        }
        Ok(Plan { limits, parent: parent.clone(), parts })
    }

    /// The cgroups that it is about.
    pub fn directories(&self) -> Vec<PathBuf> {
        let mut directories: Vec<PathBuf> = self.parts.iter().map(|part| part.directory.clone()).collect();
        // Version 2 has one for everything.
        directories.dedup();
        directories
    }

    /// Makes them. One of the same name can only be a remnant.
    pub fn make(&self) -> Result<(), CgroupError> {
        for part in &self.parts {
            part.make_way(&self.parent)?;
        }
        for path in self.directories() {
            match fs::remove_dir(&path) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(CgroupError::Make { path, source });
                }
                _ => fs::create_dir(&path).map_err(|source| CgroupError::Make { path, source })?,
            }
        }
        self.parts.iter().try_for_each(|part| part.set(&self.limits))
    }
}

impl Part {
    /// Makes the parent, where it is not there, and has the controller at work in what is below it.
    fn make_way(&self, parent: &CgroupParent) -> Result<(), CgroupError> {
        let mut directory = self.hierarchy.mount.clone();
        self.enable(&directory)?;
        for name in parent.as_ref() {
            directory.push(name);
            match fs::create_dir(&directory) {
                Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(CgroupError::Make { path: directory, source });
                }
                _ => self.enable(&directory)?,
            }
        }
        Ok(())
    }

    fn enable(&self, directory: &Path) -> Result<(), CgroupError> {
        let list = directory.join("cgroup.subtree_control");
        if self.hierarchy.version == Version::V1 || lists(&read(&list)?, self.controller) {
            return Ok(());
        }
        write(&list, format!("+{}", self.controller.name()))
    }

    fn set(&self, limits: &Limits) -> Result<(), CgroupError> {
        let set = |file: &str, value: Option<String>| {
            value.map_or(Ok(()), |value| write(&self.directory.join(file), value))
        };
        let number = |value: Option<u64>| value.map(|value| value.to_string());
        match (self.hierarchy.version, self.controller) {
            (Version::V2, Controller::Cpu) => {
                set("cpu.max", limits.quota.map(|quota| format!("{} {}", quota.time, quota.period)))?;
                set("cpu.weight", number(limits.weight.map(|weight| weight.weight())))
            }
            (Version::V1, Controller::Cpu) => {
                set("cpu.cfs_period_us", number(limits.quota.map(|quota| quota.period)))?;
                set("cpu.cfs_quota_us", number(limits.quota.map(|quota| quota.time)))?;
                set("cpu.shares", number(limits.weight.map(|weight| weight.shares())))
            }
            (Version::V2, Controller::Memory) => {
                set("memory.max", number(limits.memory_max))?;
                set("memory.high", number(limits.memory_high))
            }
            (Version::V1, Controller::Memory) => set("memory.limit_in_bytes", number(limits.memory_max)),
        }
    }
}

/// Puts a process into cgroups, with all threads that it has.
pub fn enter(directories: &[PathBuf], pid: u32) -> Result<(), CgroupError> {
    directories.iter().try_for_each(|directory| write(&directory.join("cgroup.procs"), pid.to_string()))
}

/// Removes a cgroup whose process has ended.
pub async fn remove(directory: &Path) -> io::Result<()> {
    let end = tokio::time::Instant::now() + LEAVE;
    loop {
        match fs::remove_dir(directory) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) if e.kind() == io::ErrorKind::ResourceBusy && tokio::time::Instant::now() < end => {
                tokio::time::sleep(LOOK_AGAIN).await;
            }
            done => return done,
        }
    }
}

fn write(path: &Path, value: String) -> Result<(), CgroupError> {
    fs::write(path, &value).map_err(|source| CgroupError::Write { path: path.to_owned(), value, source })
}
