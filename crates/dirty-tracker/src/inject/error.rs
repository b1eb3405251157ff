//! Why a process could not be made to make a call, in words.

use super::DescriptorSource;
use super::filters::KnownFilters;
use super::sequence::{Report, Step};
use super::thread_state::ThreadState;
use crate::maps::MapsError;
use std::io;
use std::time::Duration;

/// Why a process could not be made to make a userfaultfd. It goes on as if nothing had happened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InjectError {
    /// It ended before or meanwhile.
    #[error("process {pid} has ended")]
    Gone {
        /// The process.
        pid: u32,
    },
    /// A process can have one tracer only.
    #[error("process {pid} is already traced by process {tracer}; end that debugger or tracer first")]
    AlreadyTraced {
        /// The process.
        pid: u32,
        /// Who traces it.
        tracer: u32,
    },
    /// The Yama security module is in the way.
    #[error(
        "kernel.yama.ptrace_scope={scope} forbids holding process {pid}: give this program CAP_SYS_PTRACE{}",
        if *.scope < 3 { " or set kernel.yama.ptrace_scope=0" } else { ", after a reboot without scope 3" }
    )]
    Yama {
        /// The process.
        pid: u32,
        /// The setting found.
        scope: u8,
    },
    /// The kernel's own rules are in the way.
    #[error(
        "not permitted to hold process {pid}: run this program as the same user and group as the process, which \
         must not be marked undumpable, or give it CAP_SYS_PTRACE"
    )]
    NotPermitted {
        /// The process.
        pid: u32,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Its mappings could not be read.
    #[error("cannot look for code to use in process {pid}")]
    Maps {
        /// The process.
        pid: u32,
        /// Why not.
        #[source]
        source: MapsError,
    },
    /// Its memory could not be read.
    #[error("cannot read the memory of process {pid}")]
    Memory {
        /// The process.
        pid: u32,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Nothing in it makes 64-bit system calls.
    #[error("process {pid} does not run 64-bit code that makes system calls, or replaced itself just now")]
    NoSystemCalls {
        /// The process.
        pid: u32,
    },
    /// Its main thread did not stop, however often it was asked to.
    #[error("the main thread of process {pid} did not stop within {} s: it is {thread}", .waited.as_secs())]
    DidNotStop {
        /// The process.
        pid: u32,
        /// For how long it was tried.
        waited: Duration,
        /// What it did then.
        thread: ThreadState,
    },
    /// It is under seccomp filters that may end it for the call, and that we may not put aside.
    #[error(
        "process {pid} is under {filters} seccomp filter(s), of which {known} known to let userfaultfd() pass: one \
         that kills would end the process. They are put aside for the moment by a program with CAP_SYS_ADMIN that is \
         under no filter itself"
    )]
    Confined {
        /// The process.
        pid: u32,
        /// How many.
        filters: u32,
        /// How many of them are known.
        known: KnownFilters,
    },
    /// The call was made, and refused.
    #[error("process {pid} was refused a userfaultfd; a seccomp filter of its own would be a reason")]
    Refused {
        /// The process.
        pid: u32,
        /// What the kernel answered to it.
        #[source]
        source: io::Error,
    },
    /// The descriptor given is not one of the device.
    #[error("descriptor {descriptor} of process {pid} is not an open /dev/userfaultfd")]
    NotTheDevice {
        /// The process.
        pid: u32,
        /// The descriptor's number inside it.
        descriptor: i32,
        /// What the kernel answered.
        #[source]
        source: io::Error,
    },
    /// The descriptor could not be brought over.
    #[error("cannot fetch the userfaultfd from process {pid}")]
    Fetch {
        /// The process.
        pid: u32,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Something that should not be able to fail did.
    #[error("holding process {pid} failed at step {step}")]
    Step {
        /// The process.
        pid: u32,
        /// Which one.
        step: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// No child process or socket could be made for it.
    #[error("cannot start the process that injects")]
    Start(#[source] io::Error),
    /// The child process was killed, or the process it works on is frozen.
    #[error("the process that injects did not report; is process {pid} frozen?")]
    NoReport {
        /// The process.
        pid: u32,
    },
}

/// Puts a failed report into words.
pub(super) fn explain(pid: u32, source: DescriptorSource, report: Report) -> InjectError {
    let error = io::Error::from_raw_os_error(report.errno);
    match (report.step, report.errno) {
        (Step::Seize, libc::EPERM | libc::EACCES) => refusal(pid, error),
        (Step::Call, libc::ENOTTY | libc::EBADF | libc::EINVAL) => match source {
            DescriptorSource::Device { fd_in_process } => {
                InjectError::NotTheDevice { pid, descriptor: fd_in_process, source: error }
            }
            DescriptorSource::Injected => InjectError::Refused { pid, source: error },
        },
        (Step::Call, _) => InjectError::Refused { pid, source: error },
        (_, libc::ESRCH) => InjectError::Gone { pid },
        (Step::Check, libc::ENOEXEC | libc::EIO | libc::EFAULT) => InjectError::NoSystemCalls { pid },
        (Step::Fetch, _) => InjectError::Fetch { pid, source: error },
        (step, _) => InjectError::Step { pid, step: format!("{step:?}").to_lowercase(), source: error },
    }
}

/// Why the kernel would not let us hold or read the process, and what to allow.
pub(super) fn refusal(pid: u32, source: io::Error) -> InjectError {
    match source.raw_os_error() {
        Some(libc::ENOENT | libc::ESRCH) => return InjectError::Gone { pid },
        Some(libc::EPERM | libc::EACCES) => {}
        _ => return InjectError::Memory { pid, source },
    }
    if let Some(tracer) = tracer(pid) {
        return InjectError::AlreadyTraced { pid, tracer };
    }
    if has_ended(pid) {
        return InjectError::Gone { pid };
    }
    let scope = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope")
        .ok()
        .and_then(|scope| scope.trim().parse().ok());
    match scope {
        Some(scope @ 1..) => InjectError::Yama { pid, scope },
        _ => InjectError::NotPermitted { pid, source },
    }
}

/// Whether the process (its main thread, that is) is a zombie, which may be neither traced nor read.
fn has_ended(pid: u32) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return true };
    // The state follows the name, which may itself contain anything, in parentheses.
    stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with(['Z', 'X']))
}

/// The tracer of a process, if it has one.
pub(super) fn tracer(pid: u32) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("TracerPid:"))?;
    line.trim().parse().ok().filter(|&tracer| tracer != 0)
}
