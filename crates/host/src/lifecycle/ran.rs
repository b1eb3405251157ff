//! Whether the guest of a copy has run here, whatever its record says: a state directory may have been set back to a time at which the
//! copy had not come, or was not complete, and what is its QEMU may be all that there is of the machine.

use std::time::Duration;

use qemu::{Process, Qmp, QmpError};
use tokio::time::timeout;

use crate::deadlines::QUIT_GRACE;
use crate::handed_over;
use crate::vm::{Origin, Record, Vm};
use finding::{Finding, chain};
use ownership::VmName;

/// What QEMU says of a guest that it has loaded and never run.
pub const NEVER_RAN: [&str; 3] = ["inmigrate", "prelaunch", "paused"];

/// CPU time that no vCPU needs to come to be, to be loaded and to wait: one that has used more has run a guest, though that may be
/// paused now.
const RAN: Duration = Duration::from_millis(500);

/// What can be told of a copy's guest.
#[derive(Debug)]
pub enum Ran {
    /// It has not run here: QEMU says so, or has ended.
    Never,
    /// It runs, or has run; what QEMU says of it.
    Has(String),
    /// QEMU does not answer, and has not worked more than one does that has never run a guest.
    Idle(String),
    /// QEMU does not answer, and has worked too much for that.
    Unheard(String),
}

/// Asks the QEMU of a copy, over a connection to it where there is one.
pub async fn has_run(record: &Record, qmp: Option<&Qmp>) -> Ran {
    let Some(process) = record.process.as_ref().filter(|process| !process.look().is_gone()) else {
        return Ran::Never;
    };
    let asked = async {
        let qmp = match qmp {
            Some(qmp) => qmp.clone(),
            None => Qmp::connect(&record.qmp_socket).await?,
        };
        let state = qmp.status().await?;
        let worked = qmp.vcpus().await?.iter().filter_map(|vcpu| used(process, vcpu.thread_id)).max();
        Ok::<_, QmpError>((state, worked.unwrap_or_default()))
    };
    match timeout(QUIT_GRACE, asked).await {
        Ok(Ok((state, worked))) => by_status(&state.status, worked),
        silent if process.look().is_gone() => {
            drop(silent);
            Ran::Never
        }
        Ok(Err(e)) => by_work(process, chain(&e)),
        Err(_) => by_work(process, format!("no answer within {QUIT_GRACE:?}")),
    }
}

fn by_status(status: &str, worked: Duration) -> Ran {
    if NEVER_RAN.contains(&status) && worked < RAN { Ran::Never } else { Ran::Has(status.to_owned()) }
}

/// Its first thread loads what comes; the others do next to nothing before the guest runs.
fn by_work(process: &Process, why: String) -> Ran {
    let threads = std::fs::read_dir(format!("/proc/{}/task", process.pid)).into_iter().flatten().flatten();
    let ids = threads.filter_map(|thread| thread.file_name().to_str()?.parse::<u32>().ok());
    let worked: Duration = ids.filter(|id| *id != process.pid).filter_map(|id| used(process, id)).sum();
    if worked < RAN { Ran::Idle(why) } else { Ran::Unheard(why) }
}

fn used(process: &Process, thread: u32) -> Option<Duration> {
    qemu::vcpu_cpu_time(process, thread).ok()
}

/// A copy by its record, whose guest runs or has run.
pub fn runs_here(record: &Record, status: &str) -> Finding {
    let (name, socket) = (&record.name, record.qmp_socket.display());
    let pid = record.process.as_ref().map_or(0, |process| process.pid);
    Finding::new(
        "runs-here",
        format!(
            "{name} runs here (QEMU, process {pid}, says {status}), and its record says that it never came: state_dir was set back, or \
             somebody else has let it run; nothing of it is touched"
        ),
        format!(
            "find out where it runs: ask the agents that it may have moved to or come from. If it runs here, stop this agent, move \
             {name}.journal out of state_dir/vms, start the agent, and say `vmirror adopt {name} --qmp {socket}`; if it runs elsewhere, \
             end process {pid}"
        ),
    )
}

/// What is to be said of a machine that was adopted while its guest was paused, where that may be a copy that has never run: of a
/// migration that somebody else has made, or that an agent with another state directory has served.
pub async fn may_never_have_run(vm: &Vm) -> Option<Finding> {
    let process = vm.record.process.as_ref().filter(|_| vm.record.origin == Origin::Adopted)?;
    if vm.qmp.status().await.ok()?.running {
        return None;
    }
    let ran = has_run(&vm.record, Some(&vm.qmp)).await;
    let copy = paused_copy(&vm.record.name, process.pid, &ran, qemu::was_started_incoming(process));
    if copy.is_none() && handed_over::is_marked(&vm.qmp).await.ok()? {
        return Some(left(&vm.record.name, process.pid));
    }
    copy
}

/// What QEMU itself says only of a machine whose RAM is in files.
fn left(name: &VmName, pid: u32) -> Finding {
    Finding::new(
        "paused-copy",
        format!(
            "the guest of {name} is paused: its QEMU (process {pid}) was to be handed over to another host, and was not let run here since"
        ),
        format!(
            "before you let it run, find out whether the VM runs elsewhere: two copies would spoil its disks; `vmirror forget {name}` lets \
             go of this one"
        ),
    )
}

fn paused_copy(name: &VmName, pid: u32, ran: &Ran, incoming: bool) -> Option<Finding> {
    let finding = || {
        Finding::new(
            "paused-copy",
            format!(
                "the guest of {name} is paused, and its QEMU (process {pid}) was started to receive a migration: it may be a copy that \
                 has never run, and somebody else's migration to here may still be under way"
            ),
            format!(
                "before you let it run, find out whether the VM runs elsewhere, or is to: two copies would spoil its disks; \
                 `vmirror forget {name}` lets go of this one"
            ),
        )
    };
    (incoming && matches!(ran, Ran::Never | Ran::Idle(_))).then(finding)
}

/// One of which neither can be told.
pub fn may_run_here(record: &Record, why: &str) -> Finding {
    let pid = record.process.as_ref().map_or(0, |process| process.pid);
    Finding::new(
        "may-run-here",
        format!(
            "the QEMU of {} (process {pid}) does not answer, and has worked more than one that has never run a guest: {why}; nothing of \
             it is touched",
            record.name
        ),
        "it is asked again from time to time; see what it waits for, and end that process only if the VM runs elsewhere",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_has_worked_has_run_though_it_is_paused() {
        let (none, some) = (Duration::from_millis(20), Duration::from_secs(1));
        for status in NEVER_RAN {
            assert!(matches!(by_status(status, none), Ran::Never), "{status}");
            assert!(matches!(by_status(status, some), Ran::Has(_)), "{status}");
        }
        for status in ["running", "postmigrate", "finish-migrate", "shutdown", "io-error", "guest-panicked"] {
            assert!(matches!(by_status(status, none), Ran::Has(_)), "{status}");
        }
    }

    #[test]
    fn only_who_was_started_to_receive_and_has_not_run_may_be_somebody_elses_copy() {
        let name = "web1".parse().unwrap();
        let told = |ran, incoming| paused_copy(&name, 7, &ran, incoming).is_some();
        assert!(told(Ran::Never, true));
        assert!(!told(Ran::Never, false), "it was started paused");
        assert!(!told(Ran::Has("paused".to_owned()), true), "its user has paused it");
    }

    #[test]
    fn who_is_silent_and_has_not_worked_has_run_nothing() {
        let itself = |pid| Process::of_pid(pid, std::path::Path::new("")).unwrap();
        let mut sleeps = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        assert!(matches!(by_work(&itself(sleeps.id()), String::new()), Ran::Idle(_)));
        sleeps.kill().unwrap();
        sleeps.wait().unwrap();
        let worker = std::thread::spawn(move || {
            let begin = std::time::Instant::now();
            let worked = || by_work(&itself(std::process::id()), "silent".to_owned());
            while matches!(worked(), Ran::Idle(_)) && begin.elapsed() < Duration::from_secs(60) {}
            worked()
        });
        assert!(matches!(worker.join().unwrap(), Ran::Unheard(why) if why == "silent"));
    }
}
