//! The limits that hold for a machine's process and for nobody else.
//!
//! From the cgroup that has all threads of the process in it, up to the last one with nothing but these: what holds for more than the
//! process belongs to the host (the slice of all machines, the agent's own service), and the destination has its own. A part of the
//! threads may be limited further (`libvirt` does so with vCPUs); such limits are not the process's.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::hierarchy::{Controller, Hierarchy, Version, is_gone, read};
use super::{CgroupError, CpuWeight, DEFAULT_SHARES, DEFAULT_WEIGHT, Limits, PROC, Quota, SHARES, WEIGHTS};

/// The kernel says that memory is unlimited with the most that it can count, which depends on the size of its pages.
const UNLIMITED: u64 = 1 << 62;

/// The limits of a machine.
pub fn limits(pid: u32, made: &[PathBuf]) -> Result<Limits, CgroupError> {
    limits_of(Path::new(PROC), pid, made)
}

/// The limits of a process. What is above the cgroups that were made for it is the host's, even if there is nobody else in it.
pub(super) fn limits_of(proc: &Path, pid: u32, made: &[PathBuf]) -> Result<Limits, CgroupError> {
    let process = proc.join(pid.to_string());
    let mut limits = Limits::default();
    for controller in Controller::ALL {
        let Some(hierarchy) = Hierarchy::of(controller, proc)? else {
            tracing::debug!(pid, controller = controller.name(), "has no cgroups here");
            continue;
        };
        let Some(cgroup) = cgroup_of(&process, &hierarchy, controller)? else {
            tracing::debug!(pid, controller = controller.name(), "its cgroup is not mounted here");
            continue;
        };
        for directory in cgroup.ancestors() {
            if directory == hierarchy.mount || !holds_only(directory, hierarchy.version, proc, &process)? {
                break;
            }
            limits = limits.below(limits_at(directory, hierarchy.version, controller)?);
            if made.iter().any(|made| made == directory) {
                break;
            }
        }
    }
    Ok(limits)
}

/// The lowest cgroup that has all threads of a process in it or below it.
fn cgroup_of(
    process: &Path,
    hierarchy: &Hierarchy,
    controller: Controller,
) -> Result<Option<PathBuf>, CgroupError> {
    let mut common: Option<PathBuf> = None;
    for thread in entries(&process.join("task"))? {
        let Some(directory) = hierarchy.directory_of(controller, &thread)? else { continue };
        common = match common {
            Some(common) => common.ancestors().find(|above| directory.starts_with(above)).map(Path::to_owned),
            None => Some(directory),
        };
    }
    Ok(common)
}

/// Whether all threads in a cgroup and below it are of one process.
fn holds_only(directory: &Path, version: Version, proc: &Path, process: &Path) -> Result<bool, CgroupError> {
    let list = match version {
        Version::V1 => "tasks",
        Version::V2 => "cgroup.threads",
    };
    let Some(threads) = read_optional(&directory.join(list))? else { return Ok(true) };
    // One of another namespace of process ids is 0. One that is nowhere has ended.
    let is_other = |id: &str| id == "0" || !process.join("task").join(id).exists() && proc.join(id).exists();
    if threads.split_whitespace().any(is_other) {
        return Ok(false);
    }
    for below in entries(directory)?.into_iter().filter(|entry| entry.is_dir()) {
        if !holds_only(&below, version, proc, process)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The limits that are set at one cgroup.
fn limits_at(directory: &Path, version: Version, controller: Controller) -> Result<Limits, CgroupError> {
    let number = |file: &str| parsed(directory, file, |text| text.parse::<u64>().ok());
    let unless = |default: u64, range: std::ops::RangeInclusive<u64>| {
        move |value: &u64| *value != default && range.contains(value)
    };
    let mut limits = Limits::default();
    match (version, controller) {
        (Version::V2, Controller::Cpu) => {
            limits.quota = parsed(directory, "cpu.max", quota)?.flatten();
            let weight = number("cpu.weight")?.filter(unless(DEFAULT_WEIGHT, WEIGHTS));
            limits.weight = weight.map(CpuWeight::V2);
        }
        (Version::V1, Controller::Cpu) => {
            let time = parsed(directory, "cpu.cfs_quota_us", |text| text.parse::<i64>().ok())?;
            let time = time.and_then(|time| u64::try_from(time).ok());
            let period = number("cpu.cfs_period_us")?;
            limits.quota = time.zip(period).map(|(time, period)| Quota { time, period });
            let shares = number("cpu.shares")?.filter(unless(DEFAULT_SHARES, SHARES));
            limits.weight = shares.map(CpuWeight::V1);
        }
        (Version::V2, Controller::Memory) => {
            limits.memory_max = parsed(directory, "memory.max", bytes)?.flatten();
            limits.memory_high = parsed(directory, "memory.high", bytes)?.flatten();
        }
        (Version::V1, Controller::Memory) => {
            limits.memory_max = number("memory.limit_in_bytes")?.filter(|bytes| *bytes < UNLIMITED);
        }
    }
    Ok(limits)
}

/// `cpu.max`: time or `max`, and period.
fn quota(text: &str) -> Option<Option<Quota>> {
    let (time, period) = text.split_once(' ')?;
    let period = period.parse().ok()?;
    Some(bytes(time)?.map(|time| Quota { time, period }))
}

/// A number, or `max` for no limit.
fn bytes(text: &str) -> Option<Option<u64>> {
    if text == "max" { Some(None) } else { text.parse().ok().map(Some) }
}

/// What a file of a cgroup says; none where there is no such file: its controller is not at work there.
fn parsed<T>(
    directory: &Path,
    file: &str,
    parse: impl FnOnce(&str) -> Option<T>,
) -> Result<Option<T>, CgroupError> {
    let path = directory.join(file);
    let Some(text) = read_optional(&path)? else { return Ok(None) };
    match parse(text.trim()) {
        Some(value) => Ok(Some(value)),
        None => Err(CgroupError::Form { path, text }),
    }
}

fn read_optional(path: &Path) -> Result<Option<String>, CgroupError> {
    match read(path) {
        Ok(text) => Ok(Some(text)),
        Err(CgroupError::Read { source, .. }) if is_gone(&source) => Ok(None),
        Err(e) => Err(e),
    }
}

/// What is in a directory; nothing where it has gone.
fn entries(directory: &Path) -> Result<Vec<PathBuf>, CgroupError> {
    let list = || fs::read_dir(directory)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>();
    match list() {
        Err(e) if is_gone(&e) => Ok(Vec::new()),
        entries => entries.map_err(|source| CgroupError::Read { path: directory.to_owned(), source }),
    }
}
