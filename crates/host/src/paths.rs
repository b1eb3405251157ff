//! Where the sockets and small files of a machine are, and whether their paths are short enough.

use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use qemu::User;

use crate::host::Host;
use crate::vm::Record;
use ownership::VmName;

/// Longest path of a unix socket, in bytes: `sun_path` of `sockaddr_un` holds 108 with its final zero.
pub const LONGEST_SOCKET_PATH: usize = 107;

/// What the path of a machine's socket may have behind `run_dir/NAME`: its QMP, a storage daemon's two, and in its own directory that
/// for its device state, those that its disks are mirrored to, and those of its command line where it has come here.
const SOCKETS: [&str; 7] =
    [".qmp", ".storage/qmp", ".storage/nbd", ".d/qmp", ".d/device", ".d/disk63", ".d/socket999"];
/// The name of the socket for devices' state, in a machine's own directory.
const DEVICE_SOCKET: &str = "device";

/// A name with which a machine's sockets could not be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the name {name} is too long for run_dir {}: a VM's sockets fit there up to {most} letters",
    run_dir.display()
)]
pub struct NameTooLong {
    /// The name.
    pub name: VmName,
    /// Where its sockets would be.
    pub run_dir: PathBuf,
    /// How many letters would fit.
    pub most: usize,
}

/// Most letters that the name of a machine may have, so that all its sockets fit below a directory.
#[must_use]
pub fn longest_name(run_dir: &Path) -> usize {
    let behind = SOCKETS.iter().map(|socket| socket.len()).max().unwrap_or(0);
    LONGEST_SOCKET_PATH.saturating_sub(run_dir.as_os_str().len() + 1 + behind).min(VmName::LONGEST)
}

/// Whether all sockets of a machine, also those of later migrations, can be made.
///
/// # Errors
/// [`NameTooLong`] if one of them cannot.
pub fn fits(host: &Host, name: &VmName) -> Result<(), NameTooLong> {
    let most = longest_name(&host.run_dir);
    if name.as_ref().len() <= most {
        return Ok(());
    }
    Err(NameTooLong { name: name.clone(), run_dir: host.run_dir.clone(), most })
}

/// Paths that this agent makes for a machine.
#[derive(Debug)]
pub struct Paths {
    /// The socket of its QEMU's monitor.
    pub qmp: PathBuf,
    /// The file in which QEMU writes its process id.
    pub pid: PathBuf,
    /// The socket for its devices' state.
    pub device: PathBuf,
    /// A directory for a storage daemon.
    pub storage: PathBuf,
    /// A directory for the sockets at which its QEMU and the agent meet, and for all sockets of a machine that has come here.
    pub own: PathBuf,
}

impl Paths {
    /// Those of a machine of this name.
    #[must_use]
    pub fn of(host: &Host, name: &VmName) -> Paths {
        let file = |kind| host.run_dir.join(format!("{name}.{kind}"));
        Paths {
            qmp: file("qmp"),
            pid: file("pid"),
            device: file("d").join(DEVICE_SOCKET),
            storage: file("storage"),
            own: file("d"),
        }
    }

    /// Those of sockets and files.
    #[must_use]
    pub fn all(self) -> Vec<PathBuf> {
        vec![self.qmp, self.pid, self.device]
    }
}

/// Makes, or finds, a machine's own directory: the one place where its QEMU, which may run as another user, and the agent meet at
/// sockets of either. Nobody else may enter it.
///
/// # Errors
/// If the directory cannot be made, or be given to the user that QEMU runs as.
pub fn meet(host: &Host, record: &Record) -> std::io::Result<()> {
    let own = Paths::of(host, &record.name).own;
    match std::fs::DirBuilder::new().mode(0o700).create(&own) {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => return Err(e),
        _ => {}
    }
    let Some(process) = &record.process else { return Ok(()) };
    let user = User::of_process(process.pid)?;
    if user.uid() == std::fs::symlink_metadata(&own)?.uid() {
        return Ok(());
    }
    user.give(&own)?;
    // It is beside those of other machines.
    let passed = std::fs::Permissions::from_mode(0o711);
    if user.is_ours() { Ok(()) } else { std::fs::set_permissions(&host.run_dir, passed) }
}

/// Removes a machine's own directory, if there is nothing in it.
pub fn part(host: &Host, name: &VmName) {
    let _ = std::fs::remove_dir(Paths::of(host, name).own);
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn the_longest_name_that_fits_can_have_every_socket_and_one_letter_more_cannot() {
        let place = tempfile::tempdir().unwrap();
        let run_dir = place.path().join("d".repeat(69 - place.path().as_os_str().len()));
        std::fs::create_dir(&run_dir).unwrap();
        let most = longest_name(&run_dir);
        assert_eq!(most, 107 - 70 - 1 - ".storage/qmp".len());
        let bind = |letters: usize, socket: &str| {
            let path = PathBuf::from(format!("{}/{}{socket}", run_dir.display(), "n".repeat(letters)));
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            UnixListener::bind(path)
        };
        for socket in SOCKETS {
            bind(most, socket).unwrap();
        }
        assert!(bind(most + 1, ".storage/qmp").is_err());
        assert_eq!(longest_name(Path::new("/run/vmirror")), VmName::LONGEST);
        assert_eq!(longest_name(&run_dir.join("d".repeat(40))), 0);
    }
}
