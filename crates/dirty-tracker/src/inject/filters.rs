//! Seccomp filters that a process is under.

use std::fmt;
use std::io;

/// Of how many of a process's seccomp filters is it known that they do not kill it for what it is made to call:
/// `userfaultfd`, `ioctl` of /dev/userfaultfd, and `close`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KnownFilters {
    /// So many, the others being unknown.
    Are(u32),
    /// All that it is under.
    All,
}

impl KnownFilters {
    /// Whether a process under so many is under none that is not known.
    pub(super) fn covers(self, filters: u32) -> bool {
        match self {
            Self::Are(known) => filters <= known,
            Self::All => true,
        }
    }
}

impl fmt::Display for KnownFilters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Are(0) => f.write_str("none is"),
            Self::Are(1) => f.write_str("1 is"),
            Self::Are(known) => write!(f, "{known} are"),
            Self::All => f.write_str("all are"),
        }
    }
}

/// How many seccomp filters the main thread of a process is under. Strict mode, which knows four calls, counts as
/// one that nobody knows, and so do filters that the kernel does not count.
///
/// # Errors
/// If /proc does not tell.
pub fn seccomp_filters(pid: u32) -> io::Result<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    Ok(of_status(&status))
}

fn of_status(status: &str) -> u32 {
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.trim().parse::<u32>().ok()
    };
    match field("Seccomp") {
        // A kernel without seccomp has no such line.
        None | Some(0) => 0,
        Some(2) => field("Seccomp_filters").unwrap_or(u32::MAX),
        Some(_) => u32::MAX,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_that_are_not_counted_are_not_taken_for_none() {
        assert_eq!(of_status("Name:\tq\nThreads:\t1\n"), 0);
        assert_eq!(of_status("Seccomp:\t0\nSeccomp_filters:\t0\n"), 0);
        assert_eq!(of_status("Seccomp:\t2\nSeccomp_filters:\t3\n"), 3);
        assert_eq!(of_status("Seccomp:\t2\n"), u32::MAX);
        assert_eq!(of_status("Seccomp:\t1\nSeccomp_filters:\t0\n"), u32::MAX);
        assert!(KnownFilters::Are(1).covers(1) && !KnownFilters::Are(1).covers(2));
        assert!(KnownFilters::All.covers(u32::MAX));
    }
}
