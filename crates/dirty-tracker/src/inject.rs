//! Has another process make a userfaultfd for us, or close one.
//!
//! The descriptor must be made *inside* the process, since it governs the address space of its maker.
//! [`sequence`] says how that is done without a trace; here it is prepared, started and answered for.

pub(crate) mod ptrace;
mod registers;
mod sequence;

use crate::maps::{MapsError, mappings};
use crate::userfaultfd;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType, recvmsg,
    socketpair,
};
use rustix::process::{WaitId, WaitIdOptions, waitid};
use sequence::{Plan, Report, Step, Then};
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// How long the whole injection may take before the caller is told that it hangs: five times what it waits for
/// the thread to stop. It is never broken off.
const REPORT_TIMEOUT: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };
/// `__WALL`, by `waitid`'s flags: also children that do not announce their end by SIGCHLD, as ours.
const WAIT_ALL: WaitIdOptions = WaitIdOptions::from_bits_retain(libc::__WALL.cast_unsigned());

/// Where the userfaultfd comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DescriptorSource {
    /// The process is made to call `userfaultfd(UFFD_USER_MODE_ONLY)`, which needs no privileges
    /// inside it. Right for tracking.
    ///
    /// A process confined by a seccomp filter that *kills* on this call is only safe if we hold
    /// `CAP_SYS_ADMIN`, with which the filter is put aside for the moment. (QEMU's `-sandbox on` does
    /// not mind the call.)
    Injected,
    /// The process holds a descriptor of `/dev/userfaultfd`, handed to it beforehand (QMP `add-fd`), and is
    /// made to ask that for a full userfaultfd, one that also catches faults of the kernel.
    Device {
        /// The number of that descriptor inside the process. It is left open.
        fd_in_process: i32,
    },
}

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
    /// Its main thread did not stop.
    #[error("the main thread of process {pid} did not stop within 1 s (is it waiting for dead storage?)")]
    DidNotStop {
        /// The process.
        pid: u32,
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

/// Whose a descriptor is that was made inside another process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Keep {
    /// Ours alone: what it governs is free as soon as we close it, or end.
    Ours,
    /// The process's too: what it governs stays as it is when we end.
    Both,
}

/// A userfaultfd of another process.
#[derive(Debug)]
pub(crate) struct Obtained {
    /// Our descriptor of it.
    pub(crate) descriptor: OwnedFd,
    /// Its number inside the process; free again there unless it was to be kept.
    pub(crate) number: i32,
    /// For how long the main thread of the process was held.
    pub(crate) hold: Duration,
}

/// Has process `pid`, which `pidfd` stands for, make a userfaultfd: for tracking where it is to be ours alone, for
/// being asked for missing pages where it is to be both's.
pub(crate) fn descriptor(
    pid: u32,
    pidfd: BorrowedFd<'_>,
    source: DescriptorSource,
    keep: Keep,
) -> Result<Obtained, InjectError> {
    let flags = (libc::O_CLOEXEC | libc::O_NONBLOCK).cast_unsigned();
    let (call, arguments) = match (source, keep) {
        (DescriptorSource::Injected, Keep::Ours) => {
            let flags = flags | userfaultfd::USER_MODE_ONLY.cast_unsigned();
            (libc::SYS_userfaultfd, [flags.into(), 0, 0])
        }
        // To be asked for what is missing, faults of the kernel have to wait as well.
        (DescriptorSource::Injected, Keep::Both) => (libc::SYS_userfaultfd, [flags.into(), 0, 0]),
        (DescriptorSource::Device { fd_in_process }, _) => {
            let device = u64::from(fd_in_process.cast_unsigned());
            (libc::SYS_ioctl, [device, userfaultfd::IOC_NEW, flags.into()])
        }
    };
    let then = if keep == Keep::Both { Then::Share } else { Then::Take };
    match inject(pid, pidfd, Call { call, arguments, then }, source)? {
        (report, Some(descriptor)) => {
            Ok(Obtained { descriptor, number: report.number, hold: Duration::from_nanos(report.held) })
        }
        (_, None) => Err(InjectError::NoReport { pid }),
    }
}

/// Has process `pid` close one of its descriptors.
pub(crate) fn close(pid: u32, pidfd: BorrowedFd<'_>, number: i32) -> Result<(), InjectError> {
    let arguments = [u64::from(number.cast_unsigned()), 0, 0];
    let call = Call { call: libc::SYS_close, arguments, then: Then::Nothing };
    inject(pid, pidfd, call, DescriptorSource::Injected).map(drop)
}

/// A call to be made inside a process.
#[derive(Clone, Copy)]
struct Call {
    call: i64,
    arguments: [u64; 3],
    then: Then,
}

/// Has process `pid`, which `pidfd` stands for, make a call.
fn inject(
    pid: u32,
    pidfd: BorrowedFd<'_>,
    call: Call,
    source: DescriptorSource,
) -> Result<(Report, Option<OwnedFd>), InjectError> {
    let number = i32::try_from(pid).map_err(|_| InjectError::Gone { pid })?;
    if let Some(tracer) = tracer(pid) {
        return Err(InjectError::AlreadyTraced { pid, tracer });
    }
    let instruction = find_instruction(pid)?;
    let mut attempts = 0;
    loop {
        let outcome = attempt(pid, number, pidfd, instruction, call, source);
        // Whether we may trace it at all is settled by now: its memory was open to us, by the same rule. So it
        // had a tracer a moment ago, and none now to name.
        let tracer_left =
            matches!(&outcome, Err(InjectError::NotPermitted { .. } | InjectError::Yama { .. }));
        if !tracer_left || attempts >= 2 {
            return outcome;
        }
        attempts += 1;
    }
}

/// One run of the sequence.
fn attempt(
    pid: u32,
    number: i32,
    pidfd: BorrowedFd<'_>,
    instruction: u64,
    call: Call,
    source: DescriptorSource,
) -> Result<(Report, Option<OwnedFd>), InjectError> {
    let Call { call, arguments, then } = call;
    let start = |error: Errno| InjectError::Start(error.into());
    let (ours, childs) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).map_err(start)?;
    let plan = Plan {
        pid: number,
        pidfd: pidfd.as_raw_fd(),
        report_to: childs.as_raw_fd(),
        instruction,
        call,
        arguments,
        then,
    };
    let child = fork(&plan).map_err(InjectError::Start)?;
    drop(childs);
    let received = receive(ours.as_fd()).map_err(start)?;
    reap(child, received.is_some());
    let (report, descriptor) = received.ok_or(InjectError::NoReport { pid })?;
    match report.step {
        Step::Done => Ok((report, descriptor)),
        _ => Err(explain(pid, source, report)),
    }
}

/// The tracer of a process, if it has one.
fn tracer(pid: u32) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("TracerPid:"))?;
    line.trim().parse().ok().filter(|&tracer| tracer != 0)
}

/// Finds a `syscall` instruction: in the vdso, which the kernel gives to every process, or else (`vdso=0`) in
/// the process's own code.
fn find_instruction(pid: u32) -> Result<u64, InjectError> {
    /// The most to look through of one mapping: 16 MiB. A C library is smaller and full of them.
    const MOST: u64 = 16 << 20;
    let mut code = mappings(pid).map_err(|source| match source {
        MapsError::Gone { pid } => InjectError::Gone { pid },
        source => InjectError::Maps { pid, source },
    })?;
    code.retain(|mapping| mapping.executable && mapping.path.as_os_str() != "[vsyscall]");
    code.sort_by_key(|mapping| mapping.path.as_os_str() != "[vdso]");
    let memory = File::open(format!("/proc/{pid}/mem")).map_err(|source| refusal(pid, source))?;
    let mut bytes = Vec::new();
    for mapping in code {
        let length = mapping.range.end.saturating_sub(mapping.range.start).min(MOST);
        bytes.resize(usize::try_from(length).unwrap_or(0), 0);
        if let Err(source) = memory.read_exact_at(&mut bytes, mapping.range.start) {
            if mapping.path.as_os_str() == "[vdso]" {
                return Err(InjectError::Memory { pid, source });
            }
            continue;
        }
        let found = bytes.windows(registers::INSTRUCTION.len()).position(|at| at == registers::INSTRUCTION);
        if let Some(offset) = found {
            return Ok(mapping.range.start.saturating_add(offset as u64));
        }
    }
    Err(InjectError::NoSystemCalls { pid })
}

/// Starts the sequence in a child process with every signal blocked; returns its pidfd.
///
/// The child shares neither memory nor thread group with us, so that it outlives us, and does not announce its
/// end, so that no SIGCHLD handler of the program mistakes it for one of its own.
fn fork(plan: &Plan) -> io::Result<OwnedFd> {
    let mut pidfd: i32 = -1;
    let everything = u64::MAX;
    let mut before = 0_u64;
    // SAFETY: all three calls read and write only the local values they are given, which outlive them. The
    // first blocks all signals of this thread and the last puts them back, so no handler of this program runs in the
    // child. `clone` without CLONE_VM gives the child a copy of our memory and this stack; the child
    // runs `sequence::run`, which is async-signal-safe throughout and never returns.
    let (child, error) = unsafe {
        libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const everything, &raw mut before, 8);
        let child =
            libc::syscall(libc::SYS_clone, libc::CLONE_PIDFD, 0_usize, &raw mut pidfd, 0_usize, 0_usize);
        if child == 0 {
            sequence::run(plan);
        }
        let error = io::Error::last_os_error();
        libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const before, 0_usize, 8);
        (child, error)
    };
    if child < 0 {
        return Err(error);
    }
    // SAFETY: the kernel has just made this descriptor, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(pidfd) })
}

/// The child's report and the descriptor that came with it; nothing if it ended or hangs without one.
fn receive(socket: BorrowedFd<'_>) -> Result<Option<(Report, Option<OwnedFd>)>, Errno> {
    let mut ready = [PollFd::new(&socket, PollFlags::IN)];
    loop {
        match poll(&mut ready, Some(&REPORT_TIMEOUT)) {
            Ok(0) => return Ok(None),
            Ok(_) => break,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    let mut bytes = [0; Report::BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(
        socket,
        &mut [io::IoSliceMut::new(&mut bytes)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT,
    )?;
    let descriptor = ancillary
        .drain()
        .find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut descriptors) => Some(descriptors.next()),
            _ => None,
        })
        .flatten();
    let report = bytes.get(..received.bytes).and_then(Report::decode);
    Ok(report.map(|report| (report, descriptor)))
}

/// Collects the ended child: at once where it has `reported`, as that is the last thing it does; else whenever it
/// ends, which is then not for us to wait for.
fn reap(child: OwnedFd, reported: bool) {
    let wait = move || {
        while let Err(Errno::INTR) = waitid(WaitId::PidFd(child.as_fd()), WaitIdOptions::EXITED | WAIT_ALL) {}
    };
    if reported {
        wait();
    } else {
        std::thread::spawn(wait);
    }
}

/// Puts a failed report into words.
fn explain(pid: u32, source: DescriptorSource, report: Report) -> InjectError {
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
        (Step::Stop, libc::ETIMEDOUT | libc::EAGAIN) => InjectError::DidNotStop { pid },
        (Step::Fetch, _) => InjectError::Fetch { pid, source: error },
        (step, _) => InjectError::Step { pid, step: format!("{step:?}").to_lowercase(), source: error },
    }
}

/// Why the kernel would not let us hold or read the process, and what to allow.
fn refusal(pid: u32, source: io::Error) -> InjectError {
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
