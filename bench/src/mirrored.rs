//! The guest that vmirror moves: started, migrated and looked at with the program that a user has.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, SystemTime};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use session::{Outcome, Phase, Report};
use testbed::cpu::watch_threads;
use testbed::guest_spec::Ram;
use testbed::link::LinkWatch;
use testbed::{GuestSpec, Host, cpu};

use crate::baseline::serves;
use crate::error::BenchError;
use crate::measure::ms;
use crate::record::{DiskCopy, Method, Sample};
use crate::run::Run;
use crate::throughput::unix_ms;

/// The guest's name.
pub const NAME: &str = "web1";

/// Starts the guest under a host's agent; one with private memory by hand, and has it adopted.
pub fn start(host: &Host, spec: &GuestSpec) -> Result<(), BenchError> {
    let line = spec.command_line();
    if let (Ram::Private, Some(qmp)) = (&spec.ram, &spec.qmp) {
        let mut qemu = host.command(&line[0]);
        qemu.args(&line[1..]);
        let output = qemu.output().map_err(|error| BenchError::baseline("qemu", error.to_string()))?;
        succeeded("qemu", output)?;
        let adopted = host.vmirror(&["adopt", NAME, "--qmp", &qmp.to_string_lossy()])?;
        return succeeded("vmirror adopt", adopted).map(drop);
    }
    let mut arguments = vec!["run", NAME, "--json", "--"];
    arguments.extend(line.iter().map(String::as_str));
    succeeded("vmirror run", host.vmirror(&arguments)?).map(drop)
}

/// Ends the guest, at once.
pub fn stop(host: &Host) -> Result<(), BenchError> {
    succeeded("vmirror stop", host.vmirror(&["stop", NAME, "--force"])?).map(drop)
}

/// Process id of the guest's QEMU on this host.
pub fn pid(host: &Host) -> Result<i32, BenchError> {
    const COMMAND: &str = "vmirror show";
    let output = host.vmirror(&["show", NAME, "--json"])?;
    let shown: Value =
        serde_json::from_slice(&succeeded(COMMAND, output)?).map_err(BenchError::document(COMMAND))?;
    Ok(shown["pid"].as_i64().and_then(|pid| pid.try_into().ok()).unwrap_or_default())
}

/// How the guest is to be moved.
#[derive(Clone, Copy, Debug)]
pub struct Order<'a> {
    /// More options for `vmirror`.
    pub options: &'a [&'a str],
    /// Of a guest with a disk that moves with it: how long it stays mirrored once everything is copied, before it is switched over.
    pub disk: Option<Duration>,
    /// How long all of it may take.
    pub patience: Duration,
}

/// Migrates the guest and measures what that takes. `entered` hears of each phase as it begins.
///
/// A migration that does not complete is no error here: the report says so.
pub fn migrate(
    from: &Host,
    to: &Host,
    order: &Order<'_>,
    run: &Run,
    mut entered: impl FnMut(Phase),
) -> Result<Sample, BenchError> {
    let phases = Phases::follow(from)?;
    let agents = [from, to].map(Host::agent_pid);
    let cpu = || agents.map(|agent| agent.and_then(cpu::process_time).unwrap_or_default());
    // The disk is read by QEMU: its time counts as well, the guest's own apart.
    let copying = order.disk.map(|_| pid(from).map(|pid| watch_threads(pid, serves))).transpose()?;
    let before = cpu();
    let link = LinkWatch::start(from);
    let mut in_sync = None;
    let mut report = None;
    let hear = || phases.heard().for_each(&mut entered);
    let address = to.listen().to_string();
    if let Some(hold) = order.disk.filter(|hold| !hold.is_zero()) {
        let words = [&["mirror", NAME, "--to", &address, "--json", "--detach"], order.options].concat();
        // Its report, if it has ended instead of standing.
        let output = run_on(from, &words, order.patience, run, || ())?;
        if !output.status.success() {
            report = Some(reported(words[0], output)?);
        }
        in_sync = Some(unix_ms(SystemTime::now()));
        run.sleep(hold)?;
    }
    let words = match in_sync {
        Some(_) => vec!["switch", NAME, "--json"],
        None => [&["migrate", NAME, "--to", &address, "--json"], order.options].concat(),
    };
    let mut report = match report {
        Some(report) => report,
        None => reported(words[0], run_on(from, &words, order.patience, run, hear)?)?,
    };
    for disk in &mut report.disks {
        // Where the testbed's directory was is nobody's business.
        disk.name = Path::new(&disk.name).file_name().unwrap_or_default().to_string_lossy().into_owned();
    }
    let link_bytes = link.and_then(|link| link.bytes());
    let after = cpu();
    phases.heard().for_each(entered);
    let mut used = [0, 1].map(|side: usize| ms(after[side].saturating_sub(before[side])));
    if let Some(copying) = copying {
        used[0] += ms(copying.stop());
        // A QEMU that was started for it: from its beginning on.
        let threads = pid(to).map(cpu::thread_times).unwrap_or_default();
        used[1] +=
            threads.iter().filter(|thread| serves(&thread.name)).map(|thread| ms(thread.time)).sum::<f64>();
    }
    let disk = order.disk.and_then(|_| copied(&report, in_sync));
    let resumed = report.phases.iter().find(|phase| phase.name == Phase::Resume);
    Ok(Sample {
        method: Method::Vmirror,
        round: 0,
        from: from.name().to_owned(),
        to: to.name().to_owned(),
        began_unix_ms: report.started_unix_ms as f64,
        total_ms: report.total_ms,
        until_running_ms: resumed.map_or(report.total_ms, |phase| phase.start_ms),
        downtime_ms: report.downtime_ms,
        cpu_source_ms: used[0],
        cpu_destination_ms: used[1],
        link_bytes,
        sent_bytes: report.memory.wire_bytes,
        heartbeats: None,
        disk,
        report: Some(report),
        qemu: None,
    })
}

/// When the disk was copied; none where it came to nothing. A mirror that was held says so itself.
fn copied(report: &Report, in_sync_unix_ms: Option<f64>) -> Option<DiskCopy> {
    let phase = report.phases.iter().find(|phase| phase.name == Phase::Synchronize)?;
    let copied_ms = match in_sync_unix_ms {
        Some(at) => at - report.started_unix_ms as f64,
        None => phase.start_ms + phase.duration_ms,
    };
    Some(DiskCopy { began_ms: phase.start_ms, copied_ms })
}

/// The report that a command has printed, whatever came of the migration.
fn reported(command: &str, output: Output) -> Result<Report, BenchError> {
    let command = format!("vmirror {command}");
    serde_json::from_slice(&output.stdout).map_err(|error| {
        let error = BenchError::document(&*command)(error);
        succeeded(&command, output).err().unwrap_or(error)
    })
}

fn run_on(
    from: &Host,
    words: &[&str],
    patience: Duration,
    run: &Run,
    mut meanwhile: impl FnMut(),
) -> Result<Output, BenchError> {
    const COMMAND: &str = "vmirror";
    let mut command = vmirror(from);
    command.args(words).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().map_err(BenchError::file(COMMAND))?;
    let pid = Pid::from_child(&child);
    // What it prints is one document, which fits no pipe: read while it runs.
    let output = thread::spawn(move || child.wait_with_output());
    let ended = run.wait(COMMAND, patience, || {
        meanwhile();
        Ok(output.is_finished().then_some(()))
    });
    if ended.is_err() {
        let _ = kill_process(pid, Signal::KILL);
    }
    let output = output.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    ended.and_then(|()| output.map_err(BenchError::file(COMMAND)))
}

/// vmirror's own page about a migration.
pub fn page(host: &Host, report: &Report) -> Result<String, BenchError> {
    let file = host.directory().join(format!("{}.html", report.id));
    let path = file.to_string_lossy();
    succeeded("vmirror report", host.vmirror(&["report", &report.id, "--html", &path])?)?;
    std::fs::read_to_string(&file).map_err(BenchError::file(&file))
}

/// Whether a report is of a migration that completed with everything proved.
pub fn is_proved(report: &Report) -> bool {
    use session::report::Verdict;
    report.outcome == Outcome::Completed
        && report.verification.gate == Verdict::Match
        && report.verification.proof == Verdict::Match
        && report.verification.proof_pages == report.memory.pages
        && report.verification.mismatches == 0
}

/// The phases of migrations away from a host, as its agent tells of them.
struct Phases {
    _child: Ends,
    heard: Receiver<Phase>,
}

impl Phases {
    fn follow(host: &Host) -> Result<Self, BenchError> {
        let mut command = vmirror(host);
        command.args(["events", "--follow", "--json"]).stdout(Stdio::piped()).stderr(Stdio::null());
        let since = unix_ms(SystemTime::now()) as u64;
        let mut child = Ends(command.spawn().map_err(BenchError::file("vmirror events"))?);
        let (tell, heard) = channel();
        if let Some(output) = child.0.stdout.take() {
            thread::spawn(move || {
                for line in BufReader::new(output).lines().map_while(Result::ok) {
                    // Whoever listened may be gone, which ends this.
                    if phase_since(&line, since).is_some_and(|phase| tell.send(phase).is_err()) {
                        break;
                    }
                }
            });
        }
        Ok(Self { _child: child, heard })
    }

    fn heard(&self) -> impl Iterator<Item = Phase> {
        self.heard.try_iter()
    }
}

/// The phase that an event of this guest is about, if it is of that time or later.
fn phase_since(line: &str, since_unix_ms: u64) -> Option<Phase> {
    let event: Value = serde_json::from_str(line).ok()?;
    let fits = event["vm"] == NAME
        && event["event"] == "phase-entered"
        && event["at_unix_ms"].as_u64() >= Some(since_unix_ms);
    if fits { serde_json::from_value(event["phase"].clone()).ok() } else { None }
}

/// A process that does not outlive its use.
struct Ends(Child);

impl Drop for Ends {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The output of a command that succeeded.
fn succeeded(command: &str, output: Output) -> Result<Vec<u8>, BenchError> {
    if output.status.success() {
        return Ok(output.stdout);
    }
    let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    let message = if message.is_empty() { output.status.to_string() } else { message };
    Err(BenchError::Vmirror { command: command.to_owned(), message })
}

fn vmirror(host: &Host) -> std::process::Command {
    let program = testbed::Programs::find().vmirror.unwrap_or_else(|| "vmirror".into());
    host.command(program)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_phases_of_this_guest_and_this_time_are_heard() {
        let line = |vm: &str, event: &str| {
            format!(
                r#"{{"seq":7,"at_unix_ms":1000,"vm":"{vm}","event":"{event}","session":"x","phase":"switch-over"}}"#
            )
        };
        assert_eq!(phase_since(&line(NAME, "phase-entered"), 1000), Some(Phase::SwitchOver));
        assert_eq!(phase_since(&line(NAME, "phase-entered"), 1001), None);
        assert_eq!(phase_since(&line("other", "phase-entered"), 0), None);
        assert_eq!(phase_since(&line(NAME, "vm-paused"), 0), None);
        assert_eq!(phase_since("nonsense", 0), None);
    }
}
