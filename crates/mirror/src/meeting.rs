//! Listening sockets at which another user's process is met.
//!
//! A directory that is another user's is theirs to change at any time: what is done there by a name may be done to something else, also
//! to what a link leads to. So a socket gets its mode and its owner where only we can change names, beside that directory, and is moved
//! in by one step.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Gid, Mode, Uid, chownat, fchmod};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Makes a listening socket of mode 0600 that belongs to whom its directory belongs to. It gets its mode before it has a name, so
/// nobody else can connect in between.
pub(crate) fn listen(path: &Path, backlog: i32) -> io::Result<OwnedFd> {
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    let directory = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    let theirs = std::fs::symlink_metadata(directory)?;
    if theirs.uid() == rustix::process::geteuid().as_raw() {
        rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
        rustix::net::listen(&socket, backlog)?;
        return Ok(socket);
    }
    let (Some(beside), Some(name)) = (directory.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let mut staged = directory.file_name().unwrap_or_default().to_owned();
    staged.push(".");
    staged.push(name);
    let staged = beside.join(staged);
    let _ = std::fs::remove_file(&staged);
    rustix::net::bind(&socket, &SocketAddrUnix::new(&staged)?)?;
    rustix::net::listen(&socket, backlog)?;
    let (uid, gid) = (Uid::from_raw(theirs.uid()), Gid::from_raw(theirs.gid()));
    let moved = chownat(CWD, &staged, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
        .map_err(io::Error::from)
        .and_then(|()| std::fs::rename(&staged, path));
    if let Err(error) = moved {
        let _ = std::fs::remove_file(&staged);
        return Err(error);
    }
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_socket_is_the_users_alone_and_what_is_in_its_place_stays() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("socket");
        let _listener = listen(&socket, 1).unwrap();
        assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(listen(&socket, 1).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        assert!(socket.exists(), "the failed one has not removed what is not its own");
    }
}
