//! A child that does not belong to its starter's terminal session.

use std::os::unix::process::CommandExt;

/// Makes the command start in a session of its own, so that no signal of a terminal and no end of a session reaches it.
pub(crate) fn detach(command: &mut std::process::Command) {
    // SAFETY: the closure runs in the child between fork and exec, where only async-signal-safe calls are allowed.
    // setsid(2) is a plain system call; nothing is allocated and no lock is taken.
    unsafe {
        command.pre_exec(|| rustix::process::setsid().map(drop).map_err(std::io::Error::from));
    }
}
