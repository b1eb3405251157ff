//! A child that does not belong to its starter's terminal session, and does nothing before its starter has it on record.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;

use rustix::fs::Mode;
use rustix::io::FdFlags;
use rustix::process::Signal;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::{Child, Command};
use tokio::task::spawn_blocking;

use crate::User;
use crate::descriptors::with_former_descriptor_limit;

/// Starts a command in a session of its own, so that no signal of a terminal and no end of a session reaches it. Its process waits
/// before it becomes the program: `known` is told its id, and if that fails, or its starter ends by whatever before it is done, the
/// process ends too. Its parent is the process of the caller. The program has the descriptors, under the numbers that they have here,
/// and the limit of open files that this process was started with; it runs as `user`, where there is one. What it makes, no other user may read or write.
/// What `known` says comes inside of what the system says.
pub(crate) async fn spawn<T, E>(
    mut command: std::process::Command,
    descriptors: Vec<OwnedFd>,
    user: Option<&User>,
    known: impl FnOnce(u32) -> Result<T, E>,
) -> io::Result<Result<(Child, T), E>> {
    with_former_descriptor_limit(&mut command);
    let (ours, theirs) = UnixStream::pair()?;
    let in_child = ours.as_raw_fd();
    let become_the_user = user.map(User::to_become);
    // SAFETY: the closure runs in the child between fork and exec, where only async-signal-safe calls are allowed. These are
    // plain system calls; nothing is allocated and no lock is taken. The descriptor that is closed is the child's copy of the
    // starter's end, which nothing in the child uses; those that are kept open belong to the closure.
    unsafe {
        command.pre_exec(move || {
            // With it open here, the starter's end would never be seen.
            rustix::io::close(in_child);
            // What it makes, its sockets, logs and images, is nobody else's.
            rustix::process::umask(Mode::from_raw_mode(0o077));
            rustix::process::setsid()?;
            for descriptor in &descriptors {
                rustix::io::fcntl_setfd(descriptor, FdFlags::empty())?;
            }
            if let Some(become_the_user) = &become_the_user {
                become_the_user()?;
            }
            // Another child that waits like this one may have the starter's end open too.
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
            let pid = rustix::process::getpid().as_raw_nonzero().get();
            rustix::io::write(&theirs, &pid.to_ne_bytes())?;
            match rustix::io::retry_on_intr(|| rustix::io::read(&theirs, &mut [0])) {
                Ok(1) => Ok(rustix::process::set_parent_process_death_signal(None)?),
                Ok(_) => Err(io::ErrorKind::Interrupted.into()),
                Err(error) => Err(error.into()),
            }
        });
    }
    ours.set_nonblocking(true)?;
    let mut ours = tokio::net::UnixStream::from_std(ours)?;
    // Returns when the child has become the program, or could not. The child's end is closed here with the command.
    let spawning = spawn_blocking(move || Command::from(command).spawn());
    let mut pid = [0; 4];
    let read = ours.read_exact(&mut pid).await;
    let known = match read.map(|_| known(u32::from_ne_bytes(pid))) {
        Ok(Ok(known)) => Some(known),
        Ok(Err(error)) => return Ok(Err(error)),
        Err(_) => None,
    };
    if known.is_some() {
        ours.write_all(&[1]).await?;
    }
    let child = spawning.await.map_err(io::Error::other)??;
    let known = known.ok_or_else(|| io::Error::other("the new process did not say which it is"))?;
    Ok(Ok((child, known)))
}
