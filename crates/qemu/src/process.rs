//! Which process: one that can be found again and is never mistaken for another.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::{
    Spec,
    qmp::{Qmp, QmpError},
};

/// A running QEMU. The process id alone is used again by the system sooner or later; with the start time and the
/// boot it names one process for ever.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Process {
    /// Process id.
    pub pid: u32,
    /// When it was started, in clock ticks since the host's boot (`/proc/PID/stat`, field 22).
    pub start_time: u64,
    /// The host's boot (`/proc/sys/kernel/random/boot_id`).
    pub boot: String,
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

/// Whether a process is still there.
#[derive(Debug)]
pub enum Presence {
    /// It runs, and its QMP socket answers.
    Alive,
    /// It runs, but its QMP socket does not answer.
    Silent(QmpError),
    /// It has ended.
    Gone,
}

impl Presence {
    /// Whether it runs and answers.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        matches!(self, Presence::Alive)
    }
}

/// Why a process cannot be looked at.
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
}

impl Process {
    /// The process with this id as it is now.
    ///
    /// # Errors
    /// If there is none.
    pub fn of_pid(pid: u32, qmp_socket: &Path) -> Result<Process, ProcessError> {
        let stat = Stat::read(&PathBuf::from(format!("/proc/{pid}/stat")))?;
        Ok(Process { pid, start_time: stat.start_time, boot: boot()?, qmp_socket: qmp_socket.to_owned() })
    }

    /// Whether this very process exists and has not ended.
    #[must_use]
    pub fn exists(&self) -> bool {
        boot().is_ok_and(|boot| boot == self.boot)
            && Stat::read(&PathBuf::from(format!("/proc/{}/stat", self.pid)))
                .is_ok_and(|stat| stat.start_time == self.start_time && !matches!(stat.state, 'Z' | 'X'))
    }

    /// Sends it SIGKILL if it is still this process. Whether it was there.
    pub fn kill(&self) -> bool {
        // The descriptor pins the process, so the check that follows stays true until the signal is sent.
        let pid = i32::try_from(self.pid).ok().and_then(rustix::process::Pid::from_raw);
        let Some(pid) = pid else { return false };
        let Ok(process) = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()) else {
            return false;
        };
        self.exists() && rustix::process::pidfd_send_signal(&process, rustix::process::Signal::KILL).is_ok()
    }

    /// Waits until it has ended. Whether it did in time.
    pub async fn wait_for_end(&self, deadline: Duration) -> bool {
        let end = tokio::time::Instant::now() + deadline;
        while self.exists() {
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
    if !process.exists() {
        return Presence::Gone;
    }
    match Qmp::connect(&process.qmp_socket).await {
        Ok(_) => Presence::Alive,
        Err(_) if !process.exists() => Presence::Gone,
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

fn boot() -> Result<String, ProcessError> {
    let path = PathBuf::from("/proc/sys/kernel/random/boot_id");
    match fs::read_to_string(&path) {
        Ok(text) => Ok(text.trim().to_owned()),
        Err(source) => Err(ProcessError::Read { path, source }),
    }
}

/// What is needed of `/proc/PID/stat`, see proc_pid_stat(5).
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    state: char,
    cpu_ticks: u64,
    start_time: u64,
}

impl Stat {
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
            cpu_ticks: number(14)?.checked_add(number(15)?)?,
            start_time: number(22)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_parentheses_do_not_confuse_the_fields() {
        let text = "7 (a) R (b)) S 1 7 7 0 -1 4194560 1 2 3 4 50 8 0 0 20 0 1 0 12345 0 0";
        assert_eq!(Stat::parse(text), Some(Stat { state: 'S', cpu_ticks: 58, start_time: 12345 }));
        assert_eq!(Stat::parse("7 (a) S 1"), None);
        assert_eq!(Stat::parse(""), None);
    }

    #[test]
    fn another_start_time_or_boot_is_another_process() {
        let this = Process::of_pid(std::process::id(), Path::new("/none")).unwrap();
        assert!(this.exists());
        assert!(!Process { start_time: this.start_time + 1, ..this.clone() }.exists());
        let other_boot = Process { boot: "x".to_owned(), ..this.clone() };
        assert!(!other_boot.exists() && !other_boot.kill());
        assert!(vcpu_cpu_time(&this, this.pid).is_ok());
        assert!(vcpu_cpu_time(&this, 1).is_err());
    }

    #[tokio::test]
    async fn a_process_that_has_ended_is_gone() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::of_pid(child.id(), Path::new("/none")).unwrap();
        assert!(matches!(find(&process).await, Presence::Silent(_)));
        assert!(process.kill());
        assert!(process.wait_for_end(Duration::from_secs(10)).await, "a zombie counts as ended");
        assert!(matches!(find(&process).await, Presence::Gone));
        child.wait().unwrap();
    }
}
