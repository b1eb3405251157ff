//! Where on this host files of a machine that is to come may be, and be made.

use std::path::{Path, PathBuf};

use rustix::fs::Access;

use finding::Finding;
use host::Host;

/// Whether a path, with every link in it followed, lies where peers may use disks.
pub(crate) fn allowed(host: &Host, path: &Path) -> bool {
    let Ok(real) = std::fs::canonicalize(path) else { return false };
    let inside = |directory: &PathBuf| {
        std::fs::canonicalize(directory).is_ok_and(|directory| real.starts_with(directory))
    };
    host.allow.disk_dirs.iter().any(inside)
}

pub(crate) fn outside(host: &Host, path: &Path) -> Finding {
    // Of an image that is yet to be made, its directory may lead elsewhere.
    let real = std::fs::canonicalize(path).or_else(|e| {
        let (directory, name) = path.parent().zip(path.file_name()).ok_or(e)?;
        std::fs::canonicalize(directory).map(|directory| directory.join(name))
    });
    let leads = match real {
        Ok(real) if real != path => format!(" leads to {}, which", real.display()),
        _ => String::new(),
    };
    Finding::new(
        "path-not-allowed",
        format!("{}{leads} is in none of the directories that {} allows", path.display(), host.name),
        format!("add its directory to [allow] disk_dirs in the configuration of {}", host.name),
    )
}

/// Whether an image can be made.
pub(crate) fn creatable(host: &Host, path: &Path) -> Result<(), Finding> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    if !directory.is_dir() {
        return Err(Finding::new(
            "directory-missing",
            format!("{} has no directory {} for the VM's disk", host.name, directory.display()),
            "make the directory there",
        ));
    }
    if !allowed(host, directory) {
        return Err(outside(host, path));
    }
    writable(host, directory, Access::WRITE_OK | Access::EXEC_OK)
}

/// Whether the agent may do that with an image, or with a directory that it makes one in.
pub(crate) fn writable(host: &Host, path: &Path, how: Access) -> Result<(), Finding> {
    rustix::fs::access(path, how).map_err(|e| {
        Finding::new(
            "disk-permission",
            format!("the agent of {} cannot write {}: {e}", host.name, path.display()),
            "let it write there",
        )
    })
}
