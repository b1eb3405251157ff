//! Runs programs as on a kernel that lacks what dirty tracking needs, or what diverts frames: for tests of what is said and done then.
//!
//! A system call filter makes `ioctl(PAGEMAP_SCAN)` (Linux 6.7) fail with ENOTTY, and `userfaultfd` with ENOSYS, as they do where the
//! kernel has none; another one makes `bpf` fail with EPERM, as it does without `CAP_BPF`. Children inherit it.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

/// `_IOWR('f', 16, struct pm_scan_arg)`, that structure having 96 bytes (linux/fs.h).
pub const PAGEMAP_SCAN: u64 = (3 << 30) | (96 << 16) | ((b'f' as u64) << 8) | 16;
/// `_IO(0xAA, 0)` on /dev/userfaultfd (linux/userfaultfd.h).
pub const USERFAULTFD_IOC_NEW: u64 = 0xaa00;

/// Puts the command, once started, under the filter.
///
/// # Errors
/// Where the filter cannot be built for this machine.
pub fn apply(command: &mut Command) -> Result<(), BackendError> {
    install_in(command, filters()?)
}

/// Puts the command, once started, where no BPF program can be loaded.
///
/// # Errors
/// As [`apply`].
pub fn without_bpf(command: &mut Command) -> Result<(), BackendError> {
    install_in(command, [filter((libc::SYS_bpf, Vec::new()), libc::EPERM)?])
}

fn install_in<const N: usize>(command: &mut Command, filters: [BpfProgram; N]) -> Result<(), BackendError> {
    let install = move || {
        for filter in &filters {
            seccompiler::apply_filter(filter).map_err(io::Error::other)?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure only makes the two system calls that install a filter already built;
    // it allocates nothing unless one of them fails.
    unsafe { command.pre_exec(install) };
    Ok(())
}

/// One filter per error number, as a filter has only one answer.
fn filters() -> Result<[BpfProgram; 2], BackendError> {
    let request = |number: u64| {
        let is = SeccompCondition::new(1, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, number)?;
        SeccompRule::new(vec![is])
    };
    let ioctl = (libc::SYS_ioctl, vec![request(PAGEMAP_SCAN)?, request(USERFAULTFD_IOC_NEW)?]);
    // No conditions: whatever its arguments.
    let userfaultfd = (libc::SYS_userfaultfd, Vec::new());
    Ok([filter(ioctl, libc::ENOTTY)?, filter(userfaultfd, libc::ENOSYS)?])
}

fn filter(rule: (i64, Vec<SeccompRule>), error: i32) -> Result<BpfProgram, BackendError> {
    let refuse = SeccompAction::Errno(error.cast_unsigned());
    let rules = BTreeMap::from([rule]);
    SeccompFilter::new(rules, SeccompAction::Allow, refuse, TargetArch::try_from(std::env::consts::ARCH)?)?
        .try_into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Set in the child that the test starts under the filter: this test program again, running only `probe`.
    const PROBE: &str = "VMIRROR_TEST_OLD_KERNEL_PROBE";

    fn pagemap_scan() -> io::Error {
        let pagemap = std::fs::File::open("/proc/self/pagemap").unwrap();
        let mut argument = [0u64; 12];
        argument[0] = 96;
        // SAFETY: the argument has the size that the request encodes, and lives through the call.
        let result = unsafe {
            libc::ioctl(
                std::os::fd::AsRawFd::as_raw_fd(&pagemap),
                PAGEMAP_SCAN as libc::Ioctl,
                argument.as_mut_ptr(),
            )
        };
        assert_eq!(result, -1, "an empty scan is invalid");
        io::Error::last_os_error()
    }

    fn userfaultfd() -> io::Result<()> {
        // SAFETY: the call takes flags only; the descriptor it may give is closed below.
        let result = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | 1) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was made just now and nobody else has it.
        drop(unsafe { <std::os::fd::OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(result as i32) });
        Ok(())
    }

    /// Does nothing by itself: `under_the_filter_the_calls_are_unknown` runs it in a process of its own.
    #[test]
    fn probe() {
        if std::env::var_os(PROBE).is_some() {
            assert_eq!(pagemap_scan().raw_os_error(), Some(libc::ENOTTY));
            assert_eq!(userfaultfd().unwrap_err().raw_os_error(), Some(libc::ENOSYS));
            std::fs::read_to_string("/proc/self/status").unwrap();
        }
    }

    #[test]
    fn under_the_filter_the_calls_are_unknown() {
        // Without it the outcome is another, or the filter would prove nothing.
        if userfaultfd().is_err() {
            eprintln!("SKIPPED in part: this machine refuses userfaultfd anyway");
        }
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "old_kernel::tests::probe"]).env(PROBE, "1");
        apply(&mut command).unwrap();
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("1 passed"), "{text}");
    }
}
