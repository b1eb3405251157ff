//! Where the cgroups of this host are mounted, and which version has which controller.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use procfs_core::FromBufRead as _;
use procfs_core::ProcessCGroups;
use procfs_core::process::{MountInfo, MountInfos};

use super::CgroupError;

/// A part of the kernel that limits what a cgroup uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Controller {
    Cpu,
    Memory,
}

impl Controller {
    pub(super) const ALL: [Controller; 2] = [Controller::Cpu, Controller::Memory];

    pub(super) fn name(self) -> &'static str {
        match self {
            Controller::Cpu => "cpu",
            Controller::Memory => "memory",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Version {
    V1,
    V2,
}

/// The tree of cgroups that a controller is at work in, as far as it is mounted here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Hierarchy {
    pub(super) version: Version,
    /// The cgroup at its top, as /proc names it.
    root: PathBuf,
    /// The directory of that.
    pub(super) mount: PathBuf,
}

impl Hierarchy {
    /// The one in which a controller is at work; none where it is in none, or that is not mounted.
    pub(super) fn of(controller: Controller, proc: &Path) -> Result<Option<Hierarchy>, CgroupError> {
        let path = proc.join("self/mountinfo");
        let text = read(&path)?;
        let mounts = MountInfos::from_buf_read(text.as_bytes());
        let mounts = mounts.map_err(|_| CgroupError::Form { path, text: text.clone() })?;
        let version = |mount: &MountInfo| match mount.fs_type.as_str() {
            "cgroup" => mount.super_options.contains_key(controller.name()).then_some(Version::V1),
            "cgroup2" => {
                let controllers = fs::read_to_string(mount.mount_point.join("cgroup.controllers"));
                let is_there = |list: &String| lists(list, controller);
                controllers.ok().filter(is_there).map(|_| Version::V2)
            }
            _ => None,
        };
        let seen = mounts.iter().filter_map(|mount| {
            let version = version(mount)?;
            Some(Hierarchy { version, root: PathBuf::from(&mount.root), mount: mount.mount_point.clone() })
        });
        // A part of it may be mounted elsewhere as well.
        Ok(seen.min_by_key(|hierarchy| hierarchy.root.as_os_str().len()))
    }

    /// The directory of the cgroup that a thread is in; none where that is not mounted, or the thread has ended.
    pub(super) fn directory_of(
        &self,
        controller: Controller,
        thread: &Path,
    ) -> Result<Option<PathBuf>, CgroupError> {
        let path = thread.join("cgroup");
        let text = match read(&path) {
            Err(CgroupError::Read { source, .. }) if is_gone(&source) => return Ok(None),
            text => text?,
        };
        let cgroups = ProcessCGroups::from_buf_read(text.as_bytes());
        let cgroups = cgroups.map_err(|_| CgroupError::Form { path, text: text.clone() })?;
        let own = cgroups.into_iter().find(|cgroup| match self.version {
            Version::V1 => cgroup.controllers.iter().any(|name| name == controller.name()),
            Version::V2 => cgroup.hierarchy == 0,
        });
        let below =
            own.and_then(|own| Path::new(&own.pathname).strip_prefix(&self.root).ok().map(Path::to_owned));
        Ok(below.map(|below| self.mount.join(below)))
    }
}

/// Whether a list of controllers, as the kernel writes them, has one.
pub(super) fn lists(list: &str, controller: Controller) -> bool {
    list.split_whitespace().any(|name| name == controller.name())
}

pub(super) fn read(path: &Path) -> Result<String, CgroupError> {
    fs::read_to_string(path).map_err(|source| CgroupError::Read { path: path.to_owned(), source })
}

/// Whether an error says that a thread or a cgroup has ended in the meantime.
pub(super) fn is_gone(error: &io::Error) -> bool {
    let code = error.raw_os_error();
    error.kind() == io::ErrorKind::NotFound || [libc::ESRCH, libc::ENODEV].map(Some).contains(&code)
}
