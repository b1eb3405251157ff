//! The sequence itself: what the forked child does to the other process, from the first ptrace
//! request to the last.
//!
//! # On leaving no trace
//! The child is a process and session of its own with every signal blocked, so whatever happens to the agent
//! meanwhile, SIGKILL included, it goes on to the end: registers and signal mask restored, the process's copy
//! of the new descriptor closed. Only a SIGKILL aimed at the child itself, in the 0.1 ms it holds
//! other registers, could do harm (systemd's `KillMode=control-group` sends one to all, so a unit should
//! prefer `KillMode=process` or `mixed`, which VMs that outlive the agent need anyway).
//!
//! No byte of the process's memory is changed at any time: it executes a `syscall` instruction it has already.
//! And it is stopped at the entry and exit of the call (PTRACE_SYSCALL) instead of being single-stepped: the
//! SIGTRAP of a step would, where the process ignores or blocks SIGTRAP, reset that to the default.
//!
//! # On interrupted system calls
//! A thread stopped in `ppoll` shows a result of -ERESTARTNOHAND and the number of the call in `orig_rax`. The
//! kernel makes a new call of this only on its way out of *signal handling*. So registers are put back while
//! the thread stands in such a stop (after another PTRACE_INTERRUPT), never in the stop at the
//! exit of our call, from where the thread would see the bare -514.
//!
//! Everything here runs between fork and exit of a program with many threads: no allocation, no lock,
//! no panic.

use super::ptrace::{Errno, Filters, Stop, Thread, errno, now};
use super::registers::{self, INSTRUCTION};
use std::os::fd::RawFd;

/// How long one attempt waits for the thread to stop before anything has been changed: 1 s. Only a thread in
/// uninterruptible sleep, on dead storage say, takes longer than microseconds.
const STOP_TIMEOUT: u64 = 1_000_000_000;
/// How often to look again if the thread was met inside a restartable sequence, of a few instructions.
const SEQUENCE_ATTEMPTS: u32 = 1000;
/// Once registers are changed there is only one way out, and no time limit.
const NO_DEADLINE: u64 = u64::MAX;

/// Signals the kernel forces on a thread for what it just did. Were they blocked, it would reset their handlers.
const SYNCHRONOUS: [i32; 6] =
    [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP, libc::SIGSYS];

/// What to do, all made before the fork.
#[derive(Clone, Copy)]
pub(super) struct Plan {
    /// The process, and its main thread.
    pub(super) pid: i32,
    /// A pidfd of the process.
    pub(super) pidfd: RawFd,
    /// The socket to report to.
    pub(super) report_to: RawFd,
    /// Where in the process there is a `syscall` instruction.
    pub(super) instruction: u64,
    /// Its seccomp filters need not be put aside, if we may not.
    pub(super) spare_filters: bool,
    /// The call to have made. None: only to see whether one could be.
    pub(super) call: Option<Call>,
}

/// A call to be made inside a process.
#[derive(Clone, Copy)]
pub(super) struct Call {
    /// Its number.
    pub(super) call: i64,
    /// Its arguments.
    pub(super) arguments: [u64; 3],
    /// What to do with what it returns.
    pub(super) then: Then,
}

/// What becomes of the result of the call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Then {
    /// It is a descriptor: bring it over, and have the process close its own.
    Take,
    /// It is a descriptor: bring it over, and leave the process its own.
    Share,
    /// Zero is success; there is nothing to bring over.
    Nothing,
}

/// How far the sequence came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Step {
    /// Becoming the tracer.
    Seize,
    /// Putting the thread's seccomp filters aside.
    Filters,
    /// Making the thread stop.
    Stop,
    /// Checking that the thread can make the call.
    Check,
    /// Driving the thread through a call.
    Drive,
    /// The call that makes the descriptor.
    Call,
    /// Bringing the descriptor over.
    Fetch,
    /// Closing the process's copy.
    Close,
    /// Nothing left to do.
    Done,
}

impl Step {
    const ALL: [Self; 9] = [
        Self::Seize,
        Self::Filters,
        Self::Stop,
        Self::Check,
        Self::Drive,
        Self::Call,
        Self::Fetch,
        Self::Close,
        Self::Done,
    ];
}

/// What the child sends back, with the descriptor beside it if there is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Report {
    /// The step that failed, or `Done`.
    pub(super) step: Step,
    /// Why it failed.
    pub(super) errno: Errno,
    /// For how long the thread was held, in nanoseconds.
    pub(super) held: u64,
    /// What the call returned: the number of the descriptor inside the process.
    pub(super) number: RawFd,
}

impl Report {
    /// Its size on the socket.
    pub(super) const BYTES: usize = 20;

    fn encode(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        let (step, rest) = bytes.split_at_mut(4);
        let (error, rest) = rest.split_at_mut(4);
        let (held, number) = rest.split_at_mut(8);
        step.copy_from_slice(&(self.step as u32).to_ne_bytes());
        error.copy_from_slice(&self.errno.to_ne_bytes());
        held.copy_from_slice(&self.held.to_ne_bytes());
        number.copy_from_slice(&self.number.to_ne_bytes());
        bytes
    }

    /// The report in these bytes, if it is one.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let (step, rest) = bytes.split_first_chunk::<4>()?;
        let (error, rest) = rest.split_first_chunk::<4>()?;
        let (held, rest) = rest.split_first_chunk::<8>()?;
        let (number, rest) = rest.split_first_chunk::<4>()?;
        let step = *Step::ALL.get(usize::try_from(u32::from_ne_bytes(*step)).ok()?)?;
        rest.is_empty().then_some(Self {
            step,
            errno: Errno::from_ne_bytes(*error),
            held: u64::from_ne_bytes(*held),
            number: RawFd::from_ne_bytes(*number),
        })
    }
}

/// What the sequence has made.
#[derive(Clone, Copy, Default)]
struct Made {
    /// What the call returned.
    number: RawFd,
    /// The descriptor brought over.
    descriptor: Option<RawFd>,
}

/// A step that failed, and why.
type Failure = (Step, Errno);

/// Runs the whole sequence in the forked child, and ends it.
pub(super) fn run(plan: &Plan) -> ! {
    leave_the_agent(plan);
    let mut held = 0;
    let outcome = hold(plan, &mut held);
    let (step, errno, made) = match outcome {
        Ok(made) => (Step::Done, 0, made),
        Err((step, errno)) => (step, errno, Made::default()),
    };
    send(plan.report_to, Report { step, errno, held, number: made.number }.encode(), made.descriptor);
    // SAFETY: ends this process without running anything of the program it was forked from.
    unsafe { libc::_exit(0) }
}

/// Cuts what ties the child to the agent: session, open files, signal settings.
fn leave_the_agent(plan: &Plan) {
    let (low, high) = if plan.pidfd < plan.report_to {
        (plan.pidfd.cast_unsigned(), plan.report_to.cast_unsigned())
    } else {
        (plan.report_to.cast_unsigned(), plan.pidfd.cast_unsigned())
    };
    close_range(0, low.wrapping_sub(1), low > 0);
    close_range(low.wrapping_add(1), high.wrapping_sub(1), high.wrapping_sub(low) > 1);
    close_range(high.wrapping_add(1), u32::MAX, true);
    // The agent may have asked for no SIGCHLD on stops (SA_NOCLDSTOP), or ignore it: the child waits for them.
    // SAFETY: the structure is plain data for which all zeros means the default action and no flags; it
    // changes this child only, whose memory and settings are its own since the fork.
    unsafe {
        let default: libc::sigaction = std::mem::zeroed();
        libc::sigaction(libc::SIGCHLD, &raw const default, std::ptr::null_mut());
        libc::setsid();
    }
}

fn close_range(first: u32, last: u32, any: bool) {
    if any {
        // SAFETY: closes copies that belong to this child alone; nothing in it uses them any more.
        unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    }
}

/// Holds the thread, has the call made, fetches the descriptor, and leaves the thread as it was met.
fn hold(plan: &Plan, held: &mut u64) -> Result<Made, Failure> {
    let thread = Thread(plan.pid);
    let filters = thread.seize().map_err(|errno| (Step::Seize, errno))?;
    // The end of this child lets go of it, which has not been stopped.
    if filters == Filters::Judge && !plan.spare_filters {
        return Err((Step::Filters, libc::EPERM));
    }
    let Some(call) = plan.call else { return Ok(Made::default()) };
    let begin = now();
    let outcome = match stop(thread, begin.wrapping_add(STOP_TIMEOUT)) {
        Ok(()) => obtain(thread, plan, call),
        Err(errno) => Err((Step::Stop, errno)),
    };
    // Fails only if the thread is not stopped (it never stopped, or has ended): then the end of this
    // child lets go of it just as well.
    let _ = thread.detach();
    *held = now().wrapping_sub(begin);
    outcome
}

/// Brings the thread to an interrupt stop. Signals that come first are delivered as if we were not there.
fn stop(thread: Thread, deadline: u64) -> Result<(), Errno> {
    let mut attempts = 0;
    loop {
        thread.interrupt()?;
        match thread.wait(deadline)? {
            Stop::Interrupted => match in_restartable_sequence(thread) {
                false => return Ok(()),
                true if attempts >= SEQUENCE_ATTEMPTS => return Err(libc::EAGAIN),
                true => {
                    attempts += 1;
                    thread.resume(0)?;
                }
            },
            // The next interrupt is asked for before the signal is let through, so the thread
            // stops again at the first instruction of its handler at the latest.
            Stop::Signal(signal) => {
                thread.interrupt()?;
                thread.resume(signal)?;
            }
            Stop::SystemCall => thread.resume(0)?,
        }
    }
}

/// Whether the thread stands inside a restartable sequence (rseq(2)).
///
/// If it does, the kernel must see it there when it goes on, to restart the sequence. Sent elsewhere for our
/// calls and then put back, it would finish the sequence as if it had never been preempted.
fn in_restartable_sequence(thread: Thread) -> bool {
    const POINTER_OFFSET: u64 = 8;
    const START_OFFSET: u64 = 8;
    const LENGTH_OFFSET: u64 = 16;
    let Some(area) = thread.restartable_sequences() else { return false };
    let Ok(sequence) = thread.peek(area.wrapping_add(POINTER_OFFSET)) else { return false };
    if sequence == 0 {
        return false;
    }
    let start = thread.peek(sequence.wrapping_add(START_OFFSET));
    let length = thread.peek(sequence.wrapping_add(LENGTH_OFFSET));
    match (start, length, thread.registers()) {
        (Ok(start), Ok(length), Ok(now)) => registers::position(&now).wrapping_sub(start) < length,
        _ => false,
    }
}

/// Has the stopped thread make the call, and fetches the descriptor. Where only we are to have it ([`Then::Take`]) the
/// process closes its own: else the memory would stay registered when the tracker is gone, and the next one be refused.
fn obtain(thread: Thread, plan: &Plan, wanted: Call) -> Result<Made, Failure> {
    let met = thread.registers().map_err(|errno| (Step::Check, errno))?;
    if !registers::runs_64_bit(&met) {
        return Err((Step::Check, libc::ENOEXEC));
    }
    // The process may have replaced itself by another program since its memory was searched.
    let code = thread.peek(plan.instruction).map_err(|errno| (Step::Check, errno))?;
    if code.to_ne_bytes().first_chunk::<2>() != Some(&INSTRUCTION) {
        return Err((Step::Check, libc::ENOEXEC));
    }
    let number = call(thread, plan.instruction, wanted.call, wanted.arguments)?;
    let Ok(number) = RawFd::try_from(number) else { return Err((Step::Call, libc::EBADF)) };
    if number < 0 {
        return Err((Step::Call, number.wrapping_neg()));
    }
    if wanted.then == Then::Nothing {
        return Ok(Made { number, descriptor: None });
    }
    // SAFETY: takes two numbers and flags, and touches no memory.
    let fetched = unsafe { libc::syscall(libc::SYS_pidfd_getfd, plan.pidfd, number, 0) };
    let fetch_error = errno();
    let fetched = RawFd::try_from(fetched).ok().filter(|&descriptor| descriptor >= 0);
    // What could not be fetched is of no use to anybody, and is closed whatever was planned.
    if wanted.then == Then::Share && fetched.is_some() {
        return Ok(Made { number, descriptor: fetched });
    }
    let arguments = [u64::from(number.cast_unsigned()), 0, 0];
    let closed = call(thread, plan.instruction, libc::SYS_close, arguments)?;
    if closed != 0 {
        return Err((Step::Close, Errno::try_from(closed.wrapping_neg()).unwrap_or(libc::EIO)));
    }
    match fetched {
        Some(_) => Ok(Made { number, descriptor: fetched }),
        None => Err((Step::Fetch, fetch_error)),
    }
}

/// Has the thread make one system call; it comes back to an interrupt stop with the registers and
/// signal mask it was met with.
fn call(thread: Thread, instruction: u64, number: i64, arguments: [u64; 3]) -> Result<i64, Failure> {
    loop {
        let met = thread.registers().map_err(|errno| (Step::Drive, errno))?;
        let blocked = thread.blocked_signals().map_err(|errno| (Step::Drive, errno))?;
        let outcome = drive(thread, &registers::calling(&met, instruction, number, arguments));
        let restored = thread.set_registers(&met).and_then(|()| thread.set_blocked_signals(blocked));
        match (outcome, restored) {
            (Ok(Passed::Returned(value)), Ok(())) => return Ok(value),
            // A signal that cannot be blocked (SIGSTOP) came before the call. It is delivered first.
            (Ok(Passed::Signal(signal)), Ok(())) => thread
                .interrupt()
                .and_then(|()| thread.resume(signal))
                .and_then(|()| stop(thread, NO_DEADLINE))
                .map_err(|errno| (Step::Drive, errno))?,
            (Err(errno), _) | (_, Err(errno)) => return Err((Step::Drive, errno)),
        }
    }
}

/// How a thread that was sent to make a call came to stand still.
enum Passed {
    /// The call was made, and returned this.
    Returned(i64),
    /// A signal came before the call.
    Signal(i32),
}

/// Sends the stopped thread through the call that `registers` describe and into an interrupt stop.
fn drive(thread: Thread, registers: &registers::Registers) -> Result<Passed, Errno> {
    let synchronous = SYNCHRONOUS.iter().fold(0_u64, |set, signal| set | 1 << (signal - 1));
    thread.set_blocked_signals(!synchronous)?;
    thread.set_registers(registers)?;
    let mut entered = false;
    loop {
        thread.resume_to_system_call()?;
        match thread.wait(NO_DEADLINE)? {
            Stop::SystemCall if entered => break,
            Stop::SystemCall => entered = true,
            Stop::Signal(signal) => return Ok(Passed::Signal(signal)),
            // The group stop it is in has changed; the thread itself has not.
            Stop::Interrupted => {}
        }
    }
    let value = registers::result(&thread.registers()?);
    thread.interrupt()?;
    thread.resume(0)?;
    loop {
        match thread.wait(NO_DEADLINE)? {
            Stop::Interrupted => return Ok(Passed::Returned(value)),
            // Not to be expected (an interrupt stop comes before any signal is looked at), and if it
            // came nothing of the process's own has run that could have earned it.
            Stop::Signal(_) | Stop::SystemCall => {
                thread.interrupt()?;
                thread.resume(0)?;
            }
        }
    }
}

/// Sends the report, and the descriptor with it. If the agent is gone nobody is there to receive it, and the
/// descriptor goes with this child.
fn send(socket: RawFd, mut bytes: [u8; Report::BYTES], descriptor: Option<RawFd>) {
    /// Room for one header and one descriptor, aligned as headers must be.
    #[repr(C)]
    struct Ancillary {
        header: libc::cmsghdr,
        descriptor: RawFd,
        padding: u32,
    }
    let mut part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: integers and pointers only, for which all zeros is a value.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    let mut ancillary = Ancillary {
        header: libc::cmsghdr {
            cmsg_len: size_of::<libc::cmsghdr>().wrapping_add(size_of::<RawFd>()),
            cmsg_level: libc::SOL_SOCKET,
            cmsg_type: libc::SCM_RIGHTS,
        },
        descriptor: descriptor.unwrap_or(-1),
        padding: 0,
    };
    if descriptor.is_some() {
        message.msg_control = (&raw mut ancillary).cast();
        message.msg_controllen = size_of::<Ancillary>();
    }
    // SAFETY: the message points to `part`, `bytes` and `ancillary`, which live until the call returns.
    unsafe { libc::sendmsg(socket, &raw const message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_come_back_as_sent_and_nothing_else_does() {
        for step in Step::ALL {
            let report = Report { step, errno: libc::EPERM, held: 1 << 40, number: 77 };
            assert_eq!(Report::decode(&report.encode()), Some(report));
        }
        let mut unknown = Report { step: Step::Done, errno: 0, held: 0, number: 0 }.encode();
        unknown[..4].copy_from_slice(&9_u32.to_ne_bytes());
        assert_eq!(Report::decode(&unknown), None);
        assert_eq!(Report::decode(&unknown[..19]), None);
        assert_eq!(Report::decode(&[]), None);
    }
}
