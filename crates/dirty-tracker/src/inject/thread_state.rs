//! What a thread does that does not stop.

use std::fmt;

/// What a thread was seen to do, as far as /proc tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ThreadState {
    /// Its state's letter (proc(5)), if it is there.
    state: Option<char>,
    /// The function of the kernel that it sleeps in.
    sleeps_in: Option<String>,
    /// The number of the system call that it is in.
    call: Option<i64>,
}

/// System calls in which a thread may wait for storage or memory, by their numbers.
const CALLS: [(i64, &str); 22] = [
    (libc::SYS_read, "read"),
    (libc::SYS_write, "write"),
    (libc::SYS_open, "open"),
    (libc::SYS_close, "close"),
    (libc::SYS_mmap, "mmap"),
    (libc::SYS_munmap, "munmap"),
    (libc::SYS_ioctl, "ioctl"),
    (libc::SYS_pread64, "pread64"),
    (libc::SYS_pwrite64, "pwrite64"),
    (libc::SYS_preadv, "preadv"),
    (libc::SYS_pwritev, "pwritev"),
    (libc::SYS_madvise, "madvise"),
    (libc::SYS_clone, "clone"),
    (libc::SYS_vfork, "vfork"),
    (libc::SYS_execve, "execve"),
    (libc::SYS_fsync, "fsync"),
    (libc::SYS_fdatasync, "fdatasync"),
    (libc::SYS_fallocate, "fallocate"),
    (libc::SYS_openat, "openat"),
    (libc::SYS_io_submit, "io_submit"),
    (libc::SYS_io_uring_enter, "io_uring_enter"),
    (libc::SYS_newfstatat, "newfstatat"),
];

impl ThreadState {
    /// What this thread of a process does now.
    pub(super) fn of(pid: u32, thread: u32) -> Self {
        let read = |name: &str| {
            std::fs::read_to_string(format!("/proc/{pid}/task/{thread}/{name}")).unwrap_or_default()
        };
        Self::read_from(&read("stat"), &read("wchan"), &read("syscall"))
    }

    fn read_from(stat: &str, wchan: &str, syscall: &str) -> Self {
        // The state follows the name, which may itself contain anything, in parentheses.
        let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
        // "0" while it runs, and for whoever may not know.
        let sleeps_in = Some(wchan.trim()).filter(|name| !name.is_empty() && *name != "0");
        // "running", or -1 outside of any.
        let call = syscall.split(' ').next().and_then(|number| number.trim().parse().ok());
        Self { state, sleeps_in: sleeps_in.map(str::to_owned), call: call.filter(|&number| number >= 0) }
    }
}

impl fmt::Display for ThreadState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.state {
            None => return f.write_str("not to be seen"),
            Some('D') => {
                f.write_str("in uninterruptible sleep (D), as for storage or swap that does not answer")?
            }
            Some('R') => f.write_str("runnable (R), and gets no CPU or stays in the kernel")?,
            Some('S') => f.write_str("asleep (S)")?,
            Some('T' | 't') => f.write_str("stopped (T)")?,
            Some('Z' | 'X') => f.write_str("dead")?,
            Some(other) => write!(f, "in state {other}")?,
        }
        if let Some(number) = self.call {
            match CALLS.iter().find(|(known, _)| *known == number) {
                Some((_, name)) => write!(f, ", in system call {name}")?,
                None => write!(f, ", in system call {number}")?,
            }
        }
        if let Some(function) = &self.sleeps_in {
            write!(f, ", in the kernel's {function}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_waits_for_storage_is_described_as_such() {
        let state = ThreadState::read_from("7 (q ) S (x) D 1 7 7", "folio_wait_bit_common", "75 0x9 0x0");
        assert_eq!(
            state.to_string(),
            "in uninterruptible sleep (D), as for storage or swap that does not answer, in system call fdatasync, in \
             the kernel's folio_wait_bit_common"
        );
    }

    #[test]
    fn what_proc_does_not_tell_is_not_made_up() {
        assert_eq!(ThreadState::read_from("", "", "").to_string(), "not to be seen");
        let state = ThreadState::read_from("7 (q) R 1", "0", "running");
        assert_eq!(state.to_string(), "runnable (R), and gets no CPU or stays in the kernel");
        assert_eq!(ThreadState::read_from("7 (q) S 1", "0\n", "-1 0x7 0x8").to_string(), "asleep (S)");
        assert_eq!(
            ThreadState::read_from("7 (q) S 1", "", "271 0").to_string(),
            "asleep (S), in system call 271"
        );
    }
}
