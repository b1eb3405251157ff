use std::fs::File;
use std::process::{Child, Command};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::*;

/// Says to this very program, run once more by a test, about which process it is asked.
const ABOUT: &str = "VMIRROR_TEST_PROCESS";

/// Ended with its value.
struct Sleeper(Child);

impl Sleeper {
    fn start() -> (Sleeper, Process) {
        let child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::of_pid(child.id(), Path::new("/none")).unwrap();
        (Sleeper(child), process)
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn names_with_parentheses_do_not_confuse_the_fields() {
    let text = "7 (a) R (b)) S 1 7 7 0 -1 4194560 1 2 3 4 50 8 0 0 20 0 1 0 12345 0 0";
    assert_eq!(
        Stat::parse(text),
        Some(Stat { state: 'S', flags: 4_194_560, cpu_ticks: 58, threads: 1, start_time: 12345 })
    );
    assert_eq!(Stat::parse("7 (a) S 1"), None);
    assert_eq!(Stat::parse(""), None);
}

#[test]
fn another_start_time_or_boot_is_another_process() {
    let this = Process::of_pid(std::process::id(), Path::new("/none")).unwrap();
    assert!(this.look().runs());
    assert!(Process { start_time: this.start_time + 1, ..this.clone() }.look().is_gone());
    let other_boot = Process { boot: "x".to_owned(), ..this.clone() };
    assert!(other_boot.look().is_gone() && matches!(other_boot.kill(), Kill::Gone));
    assert!(vcpu_cpu_time(&this, this.pid).is_ok());
    assert!(vcpu_cpu_time(&this, 1).is_err());
}

#[tokio::test]
async fn a_process_that_has_ended_is_gone() {
    let (mut sleeper, process) = Sleeper::start();
    assert!(matches!(find(&process).await, Presence::Silent(_)));
    assert!(process.kill().was_sent());
    assert!(process.wait_for_end(Duration::from_secs(10)).await, "a zombie counts as ended");
    assert!(matches!(find(&process).await, Presence::Gone));
    sleeper.0.wait().unwrap();
    assert!(process.look().is_gone() && matches!(process.kill(), Kill::Gone));
}

#[test]
fn a_process_that_was_killed_is_ending_from_then_on() {
    for _ in 0..50 {
        let (sleeper, process) = Sleeper::start();
        assert!(!process.is_ending());
        assert!(process.kill().was_sent());
        assert!(process.is_ending(), "it has not been reaped: {:?}", process.stat());
        drop(sleeper);
        assert!(process.is_ending(), "gone");
    }
    assert!(is_killed("Name:\tx\nSigPnd:\t0000000000000100\nShdPnd:\t0000000000000000\n"));
    assert!(is_killed("SigPnd:\t0000000000000000\nShdPnd:\t0000000000000102\n"));
    assert!(!is_killed("SigPnd:\t0000000000000000\nShdPnd:\t0000000000000200\nSigBlk:\t0000000000000100\n"));
    assert!(!is_killed(""));
    let exiting = "7 (qemu) S 1 7 7 0 -1 4194564 1 2 3 4 50 8 0 0 20 0 4 0 12345 0 0";
    assert!(Stat::parse(exiting).unwrap().is_exiting());
}

#[test]
fn only_what_says_so_for_certain_is_gone() {
    let process = Process {
        pid: 7,
        start_time: 12,
        boot: "b".to_owned(),
        namespace: Some(1),
        qmp_socket: PathBuf::new(),
    };
    let stat = |state, threads, start_time| Some(Stat { state, flags: 0, cpu_ticks: 0, threads, start_time });
    let boot = |id: &str| Ok(id.to_owned());
    assert!(process.verdict(boot("b"), Ok(()), Ok(stat('S', 3, 12))).runs());
    assert!(process.verdict(boot("b"), Ok(()), Ok(stat('D', 1, 12))).runs());
    assert!(
        process.verdict(boot("b"), Ok(()), Ok(stat('Z', 2, 12))).runs(),
        "a thread of it waits for storage"
    );
    for gone in [stat('Z', 1, 12), stat('X', 0, 12), stat('S', 1, 13), None] {
        assert!(process.verdict(boot("b"), Ok(()), Ok(gone)).is_gone());
    }
    assert!(process.verdict(boot("other"), Ok(()), Ok(stat('S', 1, 12))).is_gone());

    for errno in [Errno::MFILE, Errno::NFILE, Errno::ACCESS, Errno::NOMEM, Errno::IO, Errno::PERM] {
        let error = || ProcessError::Read { path: PathBuf::new(), source: errno.into() };
        assert!(!error().says_that_none_is_there(), "{errno}");
        assert!(matches!(process.verdict(boot("b"), Ok(()), Err(error())), Look::CannotTell(_)), "{errno}");
        assert!(
            matches!(process.verdict(Err(error()), Ok(()), Ok(stat('S', 1, 12))), Look::CannotTell(_)),
            "{errno}"
        );
        assert!(
            matches!(process.verdict(Err(error()), Ok(()), Err(error())), Look::CannotTell(_)),
            "{errno}"
        );
        // Without the boot's name, that no such process is there is certain all the same.
        assert!(process.verdict(Err(error()), Ok(()), Ok(None)).is_gone());
    }
    let hidden = Errno::NOENT;
    let no_boot = ProcessError::Read { path: PathBuf::new(), source: hidden.into() };
    assert!(matches!(process.verdict(Err(no_boot), Ok(()), Ok(stat('S', 1, 12))), Look::CannotTell(_)));
    // What has that id in another namespace, or does not, is another matter; a boot is everybody's.
    let elsewhere = || Err(ProcessError::OtherNamespace { pid: 7, recorded: 1, here: 2 });
    for stat in [stat('S', 1, 12), stat('S', 1, 13), stat('Z', 1, 12), None] {
        assert!(matches!(process.verdict(boot("b"), elsewhere(), Ok(stat)), Look::CannotTell(_)));
    }
    assert!(process.verdict(boot("other"), elsewhere(), Ok(None)).is_gone());
}

/// Runs one test of this program in a process of its own, which may change its own limits and what it sees.
fn asked_of_another(test: &str, wrapper: &[&str], process: &Process) {
    let this = std::env::current_exe().unwrap();
    let mut line: Vec<&std::ffi::OsStr> = wrapper.iter().map(AsRef::as_ref).collect();
    line.push(this.as_os_str());
    let asked = Command::new(line[0])
        .args(&line[1..])
        .args(["--exact", &format!("process::tests::{test}"), "--nocapture"])
        .env(ABOUT, serde_json::to_string(process).unwrap())
        .output()
        .unwrap();
    assert!(asked.status.success(), "{asked:?}");
}

/// The process that this program was asked about.
fn asked_about() -> Option<Process> {
    std::env::var(ABOUT).ok().map(|json| serde_json::from_str(&json).unwrap())
}

#[test]
fn without_descriptors_a_process_that_runs_is_neither_gone_nor_killed() {
    let Some(process) = asked_about() else {
        let (mut sleeper, process) = Sleeper::start();
        asked_of_another("without_descriptors_a_process_that_runs_is_neither_gone_nor_killed", &[], &process);
        assert!(sleeper.0.try_wait().unwrap().is_none());
        assert!(process.look().runs());
        return;
    };
    assert!(process.look().runs());
    setrlimit(Resource::Nofile, Rlimit { current: Some(64), ..getrlimit(Resource::Nofile) }).unwrap();
    let mut all: Vec<File> = std::iter::from_fn(|| File::open("/dev/null").ok()).collect();
    assert!(matches!(process.look(), Look::CannotTell(ProcessError::Read { .. })), "{:?}", process.look());
    assert!(matches!(process.kill(), Kill::NotSent(_)));
    // One is enough to look, not to kill.
    all.pop();
    assert!(process.look().runs());
    all.pop();
    assert!(process.look().runs());
}

#[test]
fn where_the_boot_cannot_be_read_a_process_that_runs_is_not_gone() {
    let Some(process) = asked_about() else {
        let (mut sleeper, process) = Sleeper::start();
        let hidden = "mount -t tmpfs none /proc/sys/kernel/random && exec \"$@\"";
        let wrapper = ["unshare", "--mount", "--map-root-user", "--", "sh", "-c", hidden, "sh"];
        if !Command::new(wrapper[0]).args(&wrapper[1..]).arg("true").output().unwrap().status.success() {
            eprintln!("SKIPPED: no mount namespace can be made");
            return;
        }
        asked_of_another("where_the_boot_cannot_be_read_a_process_that_runs_is_not_gone", &wrapper, &process);
        assert!(sleeper.0.try_wait().unwrap().is_none());
        return;
    };
    assert!(matches!(process.look(), Look::CannotTell(ProcessError::Read { .. })), "{:?}", process.look());
    assert!(matches!(process.kill(), Kill::NotSent(_)));
    let nobody = Process { start_time: process.start_time + 1, ..process };
    assert!(nobody.look().is_gone(), "no other process is meant, whatever the boot");
}

#[test]
fn a_process_that_proc_hides_is_not_gone() {
    let Some(process) = asked_about() else {
        let (mut sleeper, process) = Sleeper::start();
        // What is mounted over /proc keeps it from view, and the process is there.
        let hidden = "mount -t tmpfs none /proc && exec \"$@\"";
        let wrapper = ["unshare", "--mount", "--map-root-user", "--", "sh", "-c", hidden, "sh"];
        if !Command::new(wrapper[0]).args(&wrapper[1..]).arg("true").output().unwrap().status.success() {
            eprintln!("SKIPPED: no mount namespace can be made");
            return;
        }
        asked_of_another("a_process_that_proc_hides_is_not_gone", &wrapper, &process);
        assert!(sleeper.0.try_wait().unwrap().is_none());
        return;
    };
    assert!(matches!(process.look(), Look::CannotTell(_)), "{:?}", process.look());
    assert!(matches!(process.kill(), Kill::NotSent(_)));
}

#[test]
fn a_process_of_another_pid_namespace_is_not_gone() {
    let Some(process) = asked_about() else {
        let (mut sleeper, process) = Sleeper::start();
        let wrapper = ["unshare", "--map-root-user", "--pid", "--fork", "--mount-proc", "--"];
        if !Command::new(wrapper[0]).args(&wrapper[1..]).arg("true").output().unwrap().status.success() {
            eprintln!("SKIPPED: no PID namespace can be made");
            return;
        }
        asked_of_another("a_process_of_another_pid_namespace_is_not_gone", &wrapper, &process);
        assert!(sleeper.0.try_wait().unwrap().is_none());
        return;
    };
    // As a container that was started anew sees it: no such process, or another one.
    assert!(Stat::read(&stat_path(process.pid)).is_err());
    let other = Process { pid: std::process::id(), ..process.clone() };
    for process in [&process, &other] {
        let look = process.look();
        assert!(matches!(look, Look::CannotTell(ProcessError::OtherNamespace { .. })), "{look:?}");
        assert!(matches!(process.kill(), Kill::NotSent(ProcessError::OtherNamespace { .. })));
    }
    assert!(Process { boot: "x".to_owned(), ..process }.look().is_gone(), "its boot is over everywhere");
}

#[test]
fn a_record_of_an_earlier_version_has_no_namespace_and_is_read() {
    let mut json =
        serde_json::to_value(Process::of_pid(std::process::id(), Path::new("/none")).unwrap()).unwrap();
    assert!(json.as_object_mut().unwrap().remove("namespace").is_some_and(|inode| inode.is_u64()));
    let process: Process = serde_json::from_value(json).unwrap();
    assert!(process.namespace.is_none() && process.look().runs());
    assert!(Process { start_time: process.start_time + 1, ..process }.look().is_gone());
}
