//! Removes what testbeds of killed processes left behind.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::process::{Pid, Signal, kill_process, test_kill_process};

use crate::inventory;
use crate::name;
use crate::namespace;
use crate::tool::run;

/// Directories in which testbeds have things.
const RAM: &str = "/dev/shm";

/// Removes the processes, namespaces, mounts and directories of testbeds whose creating process is gone.
///
/// Everything else, and everything of a process that still lives, is left alone. Done by every new testbed.
pub fn sweep() {
    let dead = |name: &str| name::creator(name).and_then(Pid::from_raw).is_some_and(|pid| !alive(pid));
    for (pid, mark) in inventory::marked() {
        if dead(&mark) {
            kill(pid);
        }
    }
    for name in names(Path::new(namespace::DIRECTORY)).filter(|name| dead(name)) {
        namespace::processes_in(&name).into_iter().for_each(kill);
        // Another testbed may be sweeping the same: whoever is late has nothing left to do.
        let _ = run("ip", &["netns", "delete", &name]);
    }
    for directory in [PathBuf::from(RAM), std::env::temp_dir()] {
        for name in names(&directory).filter(|name| dead(name)) {
            let directory = directory.join(name);
            // A host's disks, and the state of its agent, may be file systems of their own.
            for host in names(&directory) {
                for mounted in ["disks", "state"] {
                    unmount(&directory.join(&host).join(mounted));
                }
            }
            remove(&directory);
        }
    }
}

/// Takes a directory away, and the file system mounted on it if there is one.
pub(crate) fn remove(directory: &Path) {
    unmount(directory);
    let _ = fs::remove_dir_all(directory);
}

/// Takes away the file system that is mounted on a directory, if there is one.
pub(crate) fn unmount(directory: &Path) {
    let _ = rustix::mount::unmount(directory, rustix::mount::UnmountFlags::DETACH);
}

/// Whether a process is there: one that belongs to somebody else is.
pub(crate) fn alive(pid: Pid) -> bool {
    test_kill_process(pid) != Err(rustix::io::Errno::SRCH)
}

fn kill(pid: i32) {
    if let Some(pid) = Pid::from_raw(pid) {
        let _ = kill_process(pid, Signal::KILL);
    }
}

fn names(directory: &Path) -> impl Iterator<Item = String> {
    fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
}
