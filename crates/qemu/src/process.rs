//! Which process: one that can be found again and is never mistaken for another.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::{
    Spec,
    qmp::{Qmp, QmpError},
};

/// A running QEMU. The process id alone is used again by the system sooner or later; with the start time and the
/// boot it names one process for ever, to whoever has the same ids for the same processes.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Process {
    /// Process id.
    pub pid: u32,
    /// When it was started, in clock ticks since the host's boot (`/proc/PID/stat`, field 22).
    pub start_time: u64,
    /// The host's boot (`/proc/sys/kernel/random/boot_id`).
    pub boot: String,
    /// The PID namespace in which that is its id (the inode of `/proc/self/ns/pid` there); not on record of earlier versions.
    #[serde(default)]
    pub namespace: Option<u64>,
    /// Where its QMP is.
    pub qmp_socket: PathBuf,
}

/// A VM: its process and what it was started with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vm {
    /// The QEMU that runs it.
    pub process: Process,
    /// Its command line.
    pub spec: Spec,
    /// Where its QMP is.
    pub qmp_socket: PathBuf,
}

/// What a look at a process finds. Whoever gives up a machine because its process has ended, or says so to another host,
/// does it on [`Look::Gone`] only.
#[derive(Debug)]
pub enum Look {
    /// It is there and has not ended.
    Runs,
    /// It has certainly ended: there is no such process, or it is another by its start time or the host's boot.
    Gone,
    /// Neither is certain: no descriptors are left, /proc is hidden or closed to us, or the processes that we see are those of another
    /// PID namespace.
    CannotTell(ProcessError),
}

impl Look {
    /// Whether it has certainly ended.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        matches!(self, Look::Gone)
    }

    /// Whether it certainly runs.
    #[must_use]
    pub fn runs(&self) -> bool {
        matches!(self, Look::Runs)
    }
}

/// What became of an attempt to kill a process.
#[derive(Debug)]
pub enum Kill {
    /// The signal was sent; that it has ended is another matter, see [`Process::wait_for_end`].
    Sent,
    /// It had ended before.
    Gone,
    /// The signal could not be sent, or it is not certain to whom.
    NotSent(ProcessError),
}

impl Kill {
    /// Whether the signal was sent.
    #[must_use]
    pub fn was_sent(&self) -> bool {
        matches!(self, Kill::Sent)
    }
}

/// Whether a process is still there, and answers.
#[derive(Debug)]
pub enum Presence {
    /// It runs, and its QMP socket answers.
    Alive,
    /// It runs, but its QMP socket does not answer.
    Silent(QmpError),
    /// It has ended.
    Gone,
    /// It may run or not.
    CannotTell(ProcessError),
}

impl Presence {
    /// Whether it runs and answers.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        matches!(self, Presence::Alive)
    }
}

/// Why a process cannot be looked at, or told to end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProcessError {
    /// It is not there, or not visible from here.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file below /proc.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The kernel's text is of another form than documented in proc(5).
    #[error("{} is not of the expected form: {text:?}", path.display())]
    Form {
        /// The file below /proc.
        path: PathBuf,
        /// Its content.
        text: String,
    },
    /// It is there, and /proc does not show it: it is another user's, and /proc is mounted with `hidepid`.
    #[error("process {pid} is there, but /proc does not show it")]
    Hidden {
        /// The process.
        pid: u32,
    },
    /// It had its id in another PID namespace, so nothing that is seen here says anything about it.
    #[error(
        "process {pid} was in another PID namespace ({recorded}) than this agent is in ({here}), as that of a container that was started anew"
    )]
    OtherNamespace {
        /// The process, by its id there.
        pid: u32,
        /// That namespace.
        recorded: u64,
        /// This one.
        here: u64,
    },
    /// The system refuses to send it a signal.
    #[error("cannot send process {pid} a signal")]
    Signal {
        /// The process.
        pid: u32,
        /// What the system says.
        #[source]
        source: io::Error,
    },
}

impl Process {
    /// The process with this id as it is now.
    ///
    /// # Errors
    /// If there is none.
    pub fn of_pid(pid: u32, qmp_socket: &Path) -> Result<Process, ProcessError> {
        let stat = Stat::read(&stat_path(pid))?;
        Ok(Process {
            pid,
            start_time: stat.start_time,
            boot: boot()?,
            namespace: Some(namespace()?),
            qmp_socket: qmp_socket.to_owned(),
        })
    }

    /// Whether this very process is there and has not ended.
    #[must_use]
    pub fn look(&self) -> Look {
        self.verdict(boot(), self.in_sight(), self.stat())
    }

    fn verdict(
        &self,
        boot: Result<String, ProcessError>,
        in_sight: Result<(), ProcessError>,
        stat: Result<Option<Stat>, ProcessError>,
    ) -> Look {
        match (boot, in_sight, stat) {
            (Ok(boot), ..) if boot != self.boot => Look::Gone,
            (_, Err(error), _) => Look::CannotTell(error),
            (.., Ok(None)) => Look::Gone,
            (.., Ok(Some(stat))) if stat.start_time != self.start_time || stat.has_ended() => Look::Gone,
            (Ok(_), Ok(()), Ok(Some(_))) => Look::Runs,
            // A process of another boot may have the same id and start time by chance.
            (Err(error), _, Ok(Some(_))) | (.., Err(error)) => Look::CannotTell(error),
        }
    }

    /// Whether the ids that are seen here are those among which it has its own.
    fn in_sight(&self) -> Result<(), ProcessError> {
        let Some(recorded) = self.namespace else { return Ok(()) };
        match namespace()? {
            here if here == recorded => Ok(()),
            here => Err(ProcessError::OtherNamespace { pid: self.pid, recorded, here }),
        }
    }

    /// What /proc says of whatever process has its id; none if it is certain that no process has.
    fn stat(&self) -> Result<Option<Stat>, ProcessError> {
        let Some(pid) = self.raw_pid() else { return Ok(None) };
        // A second time: between the first and the signal another process may have come by the id.
        for _ in 0..2 {
            let error = match Stat::read(&stat_path(self.pid)) {
                Ok(stat) => return Ok(Some(stat)),
                Err(error) => error,
            };
            if !error.says_that_none_is_there() {
                return Err(error);
            }
            // /proc says the same of a process that it hides, and where it is not mounted. The kernel does not.
            if rustix::process::test_kill_process(pid) == Err(Errno::SRCH) {
                return Ok(None);
            }
        }
        Err(ProcessError::Hidden { pid: self.pid })
    }

    /// None where no process can have that id.
    fn raw_pid(&self) -> Option<rustix::process::Pid> {
        i32::try_from(self.pid).ok().and_then(rustix::process::Pid::from_raw)
    }

    /// Sends it SIGKILL if it is still this process.
    pub fn kill(&self) -> Kill {
        let Some(pid) = self.raw_pid() else { return Kill::Gone };
        let refused = |errno: Errno| ProcessError::Signal { pid: self.pid, source: errno.into() };
        // The descriptor pins the process, so the look that follows stays true until the signal is sent.
        let process = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty());
        match (self.look(), process) {
            (Look::Gone, _) => Kill::Gone,
            (Look::CannotTell(error), _) => Kill::NotSent(error),
            (Look::Runs, Err(errno)) => Kill::NotSent(refused(errno)),
            (Look::Runs, Ok(process)) => {
                match rustix::process::pidfd_send_signal(&process, rustix::process::Signal::KILL) {
                    Ok(()) => Kill::Sent,
                    Err(Errno::SRCH) => Kill::Gone,
                    Err(errno) => Kill::NotSent(refused(errno)),
                }
            }
        }
    }

    /// Whether it has certainly been killed, or is ending otherwise, so that what is not on its way to it yet never reaches it. Its sockets
    /// stay open until its memory is given back, which takes a while.
    #[must_use]
    pub fn is_ending(&self) -> bool {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid));
        // The look comes last: while this process is there, the status before was its own.
        match (status, self.stat(), self.look()) {
            (.., Look::Gone) => true,
            (Ok(status), Ok(Some(stat)), Look::Runs) => stat.is_exiting() || is_killed(&status),
            _ => false,
        }
    }

    /// Waits until it has certainly ended. Whether it had in time: while that cannot be told, it has not.
    pub async fn wait_for_end(&self, deadline: Duration) -> bool {
        let end = tokio::time::Instant::now() + deadline;
        while !self.look().is_gone() {
            if tokio::time::Instant::now() >= end {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        true
    }
}

/// Looks for a process that was started or adopted earlier: the same process id, start time and boot, and QMP answers.
pub async fn find(process: &Process) -> Presence {
    match process.look() {
        Look::Gone => return Presence::Gone,
        Look::CannotTell(error) => return Presence::CannotTell(error),
        Look::Runs => {}
    }
    match Qmp::connect(&process.qmp_socket).await {
        Ok(_) => Presence::Alive,
        Err(_) if process.look().is_gone() => Presence::Gone,
        Err(error) => Presence::Silent(error),
    }
}

/// CPU time, user and system, that a vCPU's thread ([`crate::qmp::VcpuThread`]) has used so far, in
/// nanoseconds of the scheduler where the kernel keeps them, else in its clock ticks of some 10 ms.
///
/// # Errors
/// If the thread is not there.
pub fn vcpu_cpu_time(process: &Process, thread_id: u32) -> Result<Duration, ProcessError> {
    let task = PathBuf::from(format!("/proc/{}/task/{thread_id}", process.pid));
    // First field of schedstat: time on the CPU (Documentation/scheduler/sched-stats.rst).
    let precise = fs::read_to_string(task.join("schedstat")).ok();
    if let Some(nanoseconds) = precise.and_then(|text| text.split_whitespace().next()?.parse().ok()) {
        return Ok(Duration::from_nanos(nanoseconds));
    }
    let stat = Stat::read(&task.join("stat"))?;
    let ticks_per_second = rustix::param::clock_ticks_per_second().max(1);
    Ok(Duration::from_nanos(stat.cpu_ticks.saturating_mul(1_000_000_000 / ticks_per_second)))
}

impl ProcessError {
    /// Whether it is the answer of the system for a process that is not there; by `ESRCH` where it ended while it was read about.
    fn says_that_none_is_there(&self) -> bool {
        let ProcessError::Read { source, .. } = self else { return false };
        let errno = Errno::from_io_error(source);
        matches!(errno, Some(Errno::NOENT | Errno::SRCH))
    }
}

fn stat_path(pid: u32) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/stat"))
}

/// The PID namespace that this process is in. Its link has the form `pid:[4026531836]`; reading it takes no descriptor.
fn namespace() -> Result<u64, ProcessError> {
    let path = PathBuf::from("/proc/self/ns/pid");
    let link = match fs::read_link(&path) {
        Ok(link) => link.to_string_lossy().into_owned(),
        Err(source) => return Err(ProcessError::Read { path, source }),
    };
    let inode = link.strip_prefix("pid:[").and_then(|rest| rest.strip_suffix(']'));
    inode.and_then(|inode| inode.parse().ok()).ok_or(ProcessError::Form { path, text: link })
}

fn boot() -> Result<String, ProcessError> {
    let path = PathBuf::from("/proc/sys/kernel/random/boot_id");
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(source) => return Err(ProcessError::Read { path, source }),
    };
    match text.trim() {
        // It would be another boot than that on record.
        "" => Err(ProcessError::Form { path, text }),
        boot => Ok(boot.to_owned()),
    }
}

/// Whether a SIGKILL is among the pending signals of `/proc/PID/status`, see proc_pid_status(5). Those that any thread may take keep it
/// until the process is gone.
fn is_killed(status: &str) -> bool {
    const KILL: u64 = 1 << (rustix::process::Signal::KILL.as_raw() - 1);
    status.lines().any(|line| {
        let pending = line.strip_prefix("SigPnd:").or_else(|| line.strip_prefix("ShdPnd:"));
        let signals = pending.and_then(|text| u64::from_str_radix(text.trim(), 16).ok());
        signals.is_some_and(|signals| signals & KILL != 0)
    })
}

/// What is needed of `/proc/PID/stat`, see proc_pid_stat(5).
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    state: char,
    flags: u64,
    cpu_ticks: u64,
    threads: u64,
    start_time: u64,
}

impl Stat {
    /// Whether nothing of it runs any more: its parent alone has not asked for its status. The first thread of a process may have
    /// ended before the others, and these hold its memory and its files for as long as they wait for storage.
    fn has_ended(&self) -> bool {
        matches!(self.state, 'Z' | 'X') && self.threads <= 1
    }

    /// Whether its first thread has begun to end: for QEMU it is the one that follows what its monitor says.
    fn is_exiting(&self) -> bool {
        /// `PF_EXITING` of the kernel's `include/linux/sched.h`.
        const EXITING: u64 = 0x4;
        self.flags & EXITING != 0
    }

    fn read(path: &Path) -> Result<Stat, ProcessError> {
        let text = fs::read_to_string(path)
            .map_err(|source| ProcessError::Read { path: path.to_owned(), source })?;
        Stat::parse(&text).ok_or_else(|| ProcessError::Form { path: path.to_owned(), text })
    }

    fn parse(text: &str) -> Option<Stat> {
        // The command's name is in parentheses and may itself contain blanks and parentheses.
        let fields: Vec<&str> = text[text.rfind(')')? + 1..].split_whitespace().collect();
        let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
        Some(Stat {
            state: fields.first()?.chars().next()?,
            flags: number(9)?,
            cpu_ticks: number(14)?.checked_add(number(15)?)?,
            threads: number(20)?,
            start_time: number(22)?,
        })
    }
}

#[cfg(test)]
mod tests;
