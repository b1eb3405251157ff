//! Processes in namespaces of their own.

use std::convert::Infallible;
use std::ffi::CStr;
use std::fs;
use std::io;

use super::check;

/// A child process.
#[derive(Debug)]
pub struct Child {
    pid: libc::pid_t,
}

/// Starts a process as the first one of new namespaces: of processes, mounts, System V IPC and host names.
///
/// `enter` runs in it, with a copy of everything the caller has, and is to become another program. What it gives back is why it
/// could not.
///
/// # Errors
/// As `clone(2)`, and where the caller has other threads: the copy would lack them, and with them whatever they hold locked.
pub fn start(enter: impl FnOnce() -> io::Result<Infallible>) -> io::Result<Child> {
    if fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::other("a process with several threads cannot be copied"));
    }
    let flags =
        libc::CLONE_NEWPID | libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS | libc::SIGCHLD;
    // SAFETY: without CLONE_VM and with no stack given this is fork(2), and there is no other thread that the copy could lack.
    let pid = unsafe { libc::syscall(libc::SYS_clone, libc::c_long::from(flags), 0, 0, 0, 0) };
    if pid == 0 {
        // Whatever happens, the copy must not go on as its original.
        let Err(error) = enter();
        eprintln!("cannot enter the namespaces: {error}");
        std::process::exit(1);
    }
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Child { pid: pid as libc::pid_t })
}

impl Child {
    /// Whether it has ended.
    ///
    /// # Errors
    /// As `waitpid(2)`.
    pub fn has_ended(&self) -> io::Result<bool> {
        self.wait(libc::WNOHANG)
    }

    /// Waits until it ends.
    ///
    /// # Errors
    /// As `waitpid(2)`.
    pub fn wait_for_end(&self) -> io::Result<()> {
        self.wait(0).map(drop)
    }

    fn wait(&self, options: libc::c_int) -> io::Result<bool> {
        // SAFETY: a null pointer means that the status is not wanted.
        let pid = unsafe { libc::waitpid(self.pid, std::ptr::null_mut(), options) };
        check(pid).map(|()| pid != 0)
    }
}

/// Gives the calling process a view of the control groups that begins at its own.
///
/// # Errors
/// As `unshare(2)`.
pub fn hide_other_groups() -> io::Result<()> {
    // SAFETY: no pointers, and no memory is unshared.
    check(unsafe { libc::unshare(libc::CLONE_NEWCGROUP) })
}

/// Makes a character device that anybody may read and write.
///
/// # Errors
/// As `mknod(2)`.
pub fn make_device(at: &CStr, major: u32, minor: u32) -> io::Result<()> {
    let device = libc::makedev(major, minor);
    // SAFETY: the path is a terminated string that outlives the call.
    check(unsafe { libc::mknod(at.as_ptr(), libc::S_IFCHR, device) })?;
    // By itself, as mknod's permissions are cut by the process's mask.
    // SAFETY: as above.
    check(unsafe { libc::chmod(at.as_ptr(), 0o666) })
}

/// Makes a mounted directory the root of everything, as switch_root(8) does: the first file system of a machine cannot be
/// pivoted away from.
///
/// # Errors
/// As `mount(2)` and `chroot(2)`.
pub fn switch_root(to: &CStr) -> io::Result<()> {
    // SAFETY: the path is a terminated string that outlives the call.
    check(unsafe { libc::chdir(to.as_ptr()) })?;
    super::mount_with(c".", c"/", c"", libc::MS_MOVE, c"")?;
    // SAFETY: as above.
    check(unsafe { libc::chroot(c".".as_ptr()) })?;
    // SAFETY: as above.
    check(unsafe { libc::chdir(c"/".as_ptr()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_with_threads_is_not_copied() {
        let (tell, told) = std::sync::mpsc::channel::<()>();
        let other = std::thread::spawn(move || told.recv());
        let error = start(|| Err(io::Error::other("not reached"))).unwrap_err();
        assert!(error.to_string().contains("several threads"), "{error}");
        drop(tell);
        let _ = other.join().unwrap();
    }
}
