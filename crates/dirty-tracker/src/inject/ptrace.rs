//! The ptrace requests that injection and throttling use, each one a raw system call.
//!
//! For injection they run in a forked child of a program with many threads, where only async-signal-safe calls are
//! allowed: nothing here allocates, locks, or can panic. Errors are plain `errno` numbers for that reason.

use super::registers::Registers;
use std::ptr;

/// An error number of the kernel.
pub(crate) type Errno = i32;

/// `PTRACE_EVENT_STOP`, which glibc's headers have and `libc` has not.
const EVENT_STOP: i32 = 128;
/// `PTRACE_O_TRACESYSGOOD`: system call stops are told from a SIGTRAP by bit 7.
const OPTION_SYSCALL_STOPS_MARKED: usize = 1;
/// `PTRACE_O_SUSPEND_SECCOMP`: the thread's own seccomp filter does not judge what we make it call.
const OPTION_SUSPEND_SECCOMP: usize = 1 << 21;
/// The size of the kernel's signal set.
const SIGNAL_SET_BYTES: usize = 8;

/// Why a traced thread stands still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// It was interrupted, or is in a group stop, or left one.
    Interrupted,
    /// It is about to receive this signal.
    Signal(i32),
    /// It enters or leaves a system call.
    SystemCall,
}

/// Whether a thread's own seccomp filters have a say in what we make it call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Filters {
    /// Not as long as we trace it.
    AreAside,
    /// They judge it, if it has any.
    Judge,
}

/// A traced thread, by number.
#[derive(Clone, Copy)]
pub(crate) struct Thread(pub(crate) i32);

impl Thread {
    fn request(self, request: libc::c_uint, address: usize, data: usize) -> Result<(), Errno> {
        // SAFETY: callers below pass `data` that the request takes as a number, or as the address of
        // a live value of the type that the request reads or writes.
        let result = unsafe { libc::syscall(libc::SYS_ptrace, request as usize, self.0, address, data) };
        if result == -1 { Err(errno()) } else { Ok(()) }
    }

    /// Becomes its tracer without stopping it.
    ///
    /// Tries to put the thread's seccomp filters out of the way, which needs `CAP_SYS_ADMIN`: a filter
    /// that kills on unknown calls would take ours as the thread's crime.
    pub(crate) fn seize(self) -> Result<Filters, Errno> {
        match self.request(libc::PTRACE_SEIZE, 0, OPTION_SYSCALL_STOPS_MARKED | OPTION_SUSPEND_SECCOMP) {
            Ok(()) => Ok(Filters::AreAside),
            Err(_) => {
                self.request(libc::PTRACE_SEIZE, 0, OPTION_SYSCALL_STOPS_MARKED).map(|()| Filters::Judge)
            }
        }
    }

    /// Becomes its tracer, and changes nothing else about it.
    pub(crate) fn seize_only(self) -> Result<(), Errno> {
        self.request(libc::PTRACE_SEIZE, 0, 0)
    }

    /// Asks it to stop, without any signal it could notice.
    pub(crate) fn interrupt(self) -> Result<(), Errno> {
        self.request(libc::PTRACE_INTERRUPT, 0, 0)
    }

    /// Lets it run, delivering `signal` if that is not 0.
    pub(crate) fn resume(self, signal: i32) -> Result<(), Errno> {
        self.request(libc::PTRACE_CONT, 0, signal.cast_unsigned() as usize)
    }

    /// Lets it run until it enters or leaves a system call.
    pub(crate) fn resume_to_system_call(self) -> Result<(), Errno> {
        self.request(libc::PTRACE_SYSCALL, 0, 0)
    }

    /// Lets go of it for good.
    pub(crate) fn detach(self) -> Result<(), Errno> {
        self.detach_with(0)
    }

    /// Lets go of it for good, delivering `signal` if that is not 0.
    pub(crate) fn detach_with(self, signal: i32) -> Result<(), Errno> {
        self.request(libc::PTRACE_DETACH, 0, signal.cast_unsigned() as usize)
    }

    /// Its registers.
    pub(crate) fn registers(self) -> Result<Registers, Errno> {
        // SAFETY: the structure is integers only, for which all zeros is a value.
        let mut registers: Registers = unsafe { std::mem::zeroed() };
        self.request(libc::PTRACE_GETREGS, 0, (&raw mut registers).expose_provenance())?;
        Ok(registers)
    }

    /// Gives it other registers.
    pub(crate) fn set_registers(self, registers: &Registers) -> Result<(), Errno> {
        self.request(libc::PTRACE_SETREGS, 0, ptr::from_ref(registers).expose_provenance())
    }

    /// The signals it blocks.
    pub(crate) fn blocked_signals(self) -> Result<u64, Errno> {
        let mut blocked = 0_u64;
        self.request(libc::PTRACE_GETSIGMASK, SIGNAL_SET_BYTES, (&raw mut blocked).expose_provenance())?;
        Ok(blocked)
    }

    /// Makes it block other signals.
    pub(crate) fn set_blocked_signals(self, blocked: u64) -> Result<(), Errno> {
        self.request(libc::PTRACE_SETSIGMASK, SIGNAL_SET_BYTES, (&raw const blocked).expose_provenance())
    }

    /// Eight bytes of its memory. (The system call stores them; only libc's wrapper returns them.)
    pub(crate) fn peek(self, address: u64) -> Result<u64, Errno> {
        let mut word = 0_u64;
        let Ok(address) = usize::try_from(address) else { return Err(libc::EFAULT) };
        self.request(libc::PTRACE_PEEKDATA, address, (&raw mut word).expose_provenance())?;
        Ok(word)
    }

    /// Where the thread keeps its restartable sequences area, if it has one.
    pub(crate) fn restartable_sequences(self) -> Option<u64> {
        // SAFETY: the structure is integers only, for which all zeros is a value.
        let mut found: libc::ptrace_rseq_configuration = unsafe { std::mem::zeroed() };
        let size = size_of_val(&found);
        self.request(libc::PTRACE_GET_RSEQ_CONFIGURATION, size, (&raw mut found).expose_provenance()).ok()?;
        (found.rseq_abi_pointer != 0).then_some(found.rseq_abi_pointer)
    }

    /// Waits until it stops, at most until `deadline` (nanoseconds of the monotonic clock), and says why.
    ///
    /// ESRCH: it ended. ETIMEDOUT: it did not stop. The caller has SIGCHLD blocked, which the kernel sends to a
    /// tracer at every stop: that is what the waiting is built on, as no form of `wait` has a time limit.
    pub(crate) fn wait(self, deadline: u64) -> Result<Stop, Errno> {
        loop {
            match self.stopped()? {
                Some(stop) => return Ok(stop),
                None => wait_for_child_signal(deadline)?,
            }
        }
    }

    /// Why it stands still, if it does now. ESRCH: it ended.
    pub(crate) fn stopped(self) -> Result<Option<Stop>, Errno> {
        let mut status = 0_i32;
        // SAFETY: the status is ours; the kernel writes it before the call returns.
        let waited = unsafe { libc::syscall(libc::SYS_wait4, self.0, &raw mut status, WAIT_FLAGS, 0_usize) };
        if waited == -1 {
            let error = errno();
            // ECHILD: it is not ours to wait for any more, having been ended by the kernel.
            return Err(if error == libc::ECHILD { libc::ESRCH } else { error });
        }
        if waited == 0 {
            return Ok(None);
        }
        if !libc::WIFSTOPPED(status) {
            return Err(libc::ESRCH);
        }
        let signal = libc::WSTOPSIG(status);
        Ok(Some(if status >> 16 == EVENT_STOP {
            Stop::Interrupted
        } else if signal == libc::SIGTRAP | 0x80 {
            Stop::SystemCall
        } else {
            Stop::Signal(signal)
        }))
    }
}

const WAIT_FLAGS: i32 = libc::WNOHANG | libc::__WALL;

/// Sleeps until a SIGCHLD arrives; ETIMEDOUT after `deadline`.
fn wait_for_child_signal(deadline: u64) -> Result<(), Errno> {
    let now = now();
    if now >= deadline {
        return Err(libc::ETIMEDOUT);
    }
    let left = deadline.wrapping_sub(now);
    let timeout = libc::timespec {
        tv_sec: (left / NANOSECONDS).cast_signed(),
        tv_nsec: (left % NANOSECONDS).cast_signed(),
    };
    let set: u64 = 1 << (libc::SIGCHLD - 1);
    // SAFETY: the set and the timeout are ours and outlive the call; no siginfo is asked for.
    let result = unsafe {
        libc::syscall(
            libc::SYS_rt_sigtimedwait,
            &raw const set,
            0_usize,
            &raw const timeout,
            SIGNAL_SET_BYTES,
        )
    };
    match result {
        -1 => match errno() {
            libc::EAGAIN => Err(libc::ETIMEDOUT),
            libc::EINTR => Ok(()),
            error => Err(error),
        },
        _ => Ok(()),
    }
}

/// Nanoseconds in a second.
const NANOSECONDS: u64 = 1_000_000_000;

/// Nanoseconds of the monotonic clock.
pub(crate) fn now() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the structure is ours and outlives the call, which is async-signal-safe.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec.cast_unsigned().wrapping_mul(NANOSECONDS).wrapping_add(time.tv_nsec.cast_unsigned())
}

/// The error of the system call that just failed on this thread.
pub(crate) fn errno() -> Errno {
    // SAFETY: the location is this thread's own and always valid.
    unsafe { *libc::__errno_location() }
}
