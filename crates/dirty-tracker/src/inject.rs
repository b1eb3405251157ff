//! Has another process make a userfaultfd for us, or close one.
//!
//! The descriptor must be made *inside* the process, since it governs the address space of its maker.
//! [`sequence`] says how that is done without a trace; here it is prepared, started and answered for.

mod error;
mod filters;
pub(crate) mod ptrace;
mod registers;
mod sequence;
mod thread_state;

use crate::maps::{MapsError, mappings};
use crate::userfaultfd;
pub use error::InjectError;
use error::{explain, refusal, tracer};
pub use filters::{KnownFilters, seccomp_filters};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType, recvmsg,
    socketpair,
};
use rustix::process::{WaitId, WaitIdOptions, waitid};
use sequence::{Call, Plan, Report, Step, Then};
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};
pub use thread_state::ThreadState;

/// How long is gone on trying to make the main thread of a process stop: 10 s. Nothing is changed before it has, and a
/// thread that waits for swap or a busy disk stops when it has what it waits for.
pub const ATTACH_PATIENCE: Duration = Duration::from_secs(10);
/// How long the thread is left alone between two attempts.
const BETWEEN_ATTEMPTS: Duration = Duration::from_millis(20);
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
    Injected,
    /// The process holds a descriptor of `/dev/userfaultfd`, handed to it beforehand (QMP `add-fd`), and is
    /// made to ask that for a full userfaultfd, one that also catches faults of the kernel.
    Device {
        /// The number of that descriptor inside the process. It is left open.
        fd_in_process: i32,
    },
}

/// How a process may be made to make a userfaultfd.
///
/// A seccomp filter of the process judges the calls that it is made to make as its own, and one that kills on them would
/// end it. With `CAP_SYS_ADMIN` (and where we are under no filter ourselves) filters are put aside for the moment; else
/// a process that is under more filters than are `known` to let the calls pass is left alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Injection {
    /// Where the userfaultfd comes from.
    pub source: DescriptorSource,
    /// Which of its filters are known.
    pub known: KnownFilters,
}

impl From<DescriptorSource> for Injection {
    /// Of a process that may be under no filter of which nothing is known.
    fn from(source: DescriptorSource) -> Self {
        Self { source, known: KnownFilters::Are(0) }
    }
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
    injection: Injection,
    keep: Keep,
) -> Result<Obtained, InjectError> {
    let source = injection.source;
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
    match inject(pid, pidfd, Some(Call { call, arguments, then }), injection)? {
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
    // It is made by the process when it had been made to open it: its filters have let that pass.
    let injection = Injection { source: DescriptorSource::Injected, known: KnownFilters::All };
    inject(pid, pidfd, Some(call), injection).map(drop)
}

/// Whether process `pid`, which `pidfd` stands for, could be held and made to make calls, as far as that can be told
/// without holding it: its thread does not even stop.
pub(crate) fn try_out(pid: u32, pidfd: BorrowedFd<'_>, known: KnownFilters) -> Result<(), InjectError> {
    let injection = Injection { source: DescriptorSource::Injected, known };
    inject(pid, pidfd, None, injection).map(drop)
}

/// Has process `pid`, which `pidfd` stands for, make a call; without one, only finds out whether it may be made to.
fn inject(
    pid: u32,
    pidfd: BorrowedFd<'_>,
    call: Option<Call>,
    injection: Injection,
) -> Result<(Report, Option<OwnedFd>), InjectError> {
    let number = i32::try_from(pid).map_err(|_| InjectError::Gone { pid })?;
    if let Some(tracer) = tracer(pid) {
        return Err(InjectError::AlreadyTraced { pid, tracer });
    }
    let target = Target { pid, number, pidfd, instruction: find_instruction(pid)?, injection };
    let begin = Instant::now();
    let mut tracers_met = 0;
    loop {
        match attempt(target, call) {
            // Whether we may trace it at all is settled by now: its memory was open to us, by the same rule. So it
            // had a tracer a moment ago, and none now to name.
            Err(InjectError::NotPermitted { .. } | InjectError::Yama { .. }) if tracers_met < 2 => {
                tracers_met += 1;
            }
            // Nothing of it has been touched.
            Err(InjectError::DidNotStop { .. }) if begin.elapsed() < ATTACH_PATIENCE => {
                std::thread::sleep(BETWEEN_ATTEMPTS);
            }
            Err(InjectError::DidNotStop { pid, thread, .. }) => {
                return Err(InjectError::DidNotStop { pid, waited: begin.elapsed(), thread });
            }
            outcome => return outcome,
        }
    }
}

/// The process that is to make a call.
#[derive(Clone, Copy)]
struct Target<'a> {
    pid: u32,
    /// The same as the kernel takes it.
    number: i32,
    pidfd: BorrowedFd<'a>,
    /// Where it has a `syscall` instruction.
    instruction: u64,
    injection: Injection,
}

/// One run of the sequence.
fn attempt(target: Target<'_>, call: Option<Call>) -> Result<(Report, Option<OwnedFd>), InjectError> {
    let Target { pid, number, pidfd, instruction, injection } = target;
    let filters = seccomp_filters(pid).map_err(|source| refusal(pid, source))?;
    let start = |error: Errno| InjectError::Start(error.into());
    let (ours, childs) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).map_err(start)?;
    let plan = Plan {
        pid: number,
        pidfd: pidfd.as_raw_fd(),
        report_to: childs.as_raw_fd(),
        instruction,
        spare_filters: injection.known.covers(filters),
        call,
    };
    let begin = Instant::now();
    let child = fork(&plan).map_err(InjectError::Start)?;
    drop(childs);
    let received = receive(ours.as_fd()).map_err(start)?;
    reap(child, received.is_some());
    let (report, descriptor) = received.ok_or(InjectError::NoReport { pid })?;
    match report.step {
        Step::Done => Ok((report, descriptor)),
        Step::Filters => Err(InjectError::Confined { pid, filters, known: injection.known }),
        Step::Stop if matches!(report.errno, libc::ETIMEDOUT | libc::EAGAIN) => {
            Err(InjectError::DidNotStop { pid, waited: begin.elapsed(), thread: ThreadState::of(pid, pid) })
        }
        _ => Err(explain(pid, injection.source, report)),
    }
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
