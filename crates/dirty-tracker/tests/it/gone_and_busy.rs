//! What is in the way of tracking, or comes in its way, is told apart.

use crate::tracee::{PAGE, Ram, Tracee, map};
use dirty_tracker::{
    ATTACH_PATIENCE, AttachError, DescriptorSource, InjectError, Region, Scan, ScanError, Tracker,
};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::time::{Duration, Instant};

fn tracee() -> (Ram, Tracee, std::ops::Range<u64>) {
    let ram = Ram::new(64);
    let mut tracee = Tracee::start("memory", &[ram.path().to_str().unwrap()]);
    assert_eq!(tracee.line(), "ready");
    let range = tracee.range_of(&ram.path());
    (ram, tracee, range)
}

#[test]
fn a_second_tracker_is_refused_until_the_first_is_gone() {
    let (_ram, tracee, range) = tracee();
    let attach = || Tracker::attach(tracee.pid(), std::slice::from_ref(&range), DescriptorSource::Injected);
    let first = attach().unwrap();
    let error = attach().unwrap_err();
    assert!(matches!(&error, AttachError::Busy { range: busy, .. } if *busy == range), "{error}");
    // The first one is none the worse for it.
    let mut first = first;
    first.scan(Scan::OneStep, &mut Vec::new()).unwrap();
    drop(first);
    attach().unwrap().detach().unwrap();
}

#[test]
fn a_process_that_ends_is_told_from_one_that_writes_nothing() {
    let (_ram, mut tracee, range) = tracee();
    let mut tracker = Tracker::attach(tracee.pid(), &[range], DescriptorSource::Injected).unwrap();
    let mut regions = Vec::new();
    tracker.scan(Scan::OneStep, &mut regions).unwrap();
    tracee.kill();
    // Killing is not instant. But a scan is either of the whole living process or an error.
    let error = loop {
        match tracker.scan(Scan::TwoStep, &mut regions) {
            Ok(_) => std::thread::yield_now(),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, ScanError::Gone { pid } if pid == tracee.pid()), "{error}");
    assert!(matches!(tracker.scan(Scan::List, &mut regions), Err(ScanError::Gone { .. })));
    tracker.detach().unwrap();
}

#[test]
fn a_process_that_replaces_itself_is_gone() {
    let (_ram, mut tracee, range) = tracee();
    let mut tracker = Tracker::attach(tracee.pid(), &[range], DescriptorSource::Injected).unwrap();
    tracker.scan(Scan::OneStep, &mut Vec::new()).unwrap();
    tracee.say("exec");
    let error = loop {
        match tracker.scan(Scan::OneStep, &mut Vec::new()) {
            Ok(_) => std::thread::yield_now(),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, ScanError::Gone { .. }), "{error}");
    // `cat` has taken over and is unharmed.
    assert_eq!(tracee.ask("hello"), "hello");
}

#[test]
fn a_zombie_is_gone() {
    let (_ram, mut tracee, range) = tracee();
    tracee.kill();
    let status = format!("/proc/{}/status", tracee.pid());
    while !std::fs::read_to_string(&status).unwrap().contains("State:\tZ") {
        std::thread::yield_now();
    }
    let error = Tracker::attach(tracee.pid(), &[range], DescriptorSource::Injected).unwrap_err();
    assert!(matches!(error, AttachError::Gone { .. }), "{error}");
}

/// The role of a tracer: traces the process, and lets go when its input ends.
pub(crate) fn tracer(pid: &str) {
    let pid: i32 = pid.parse().unwrap();
    // SAFETY: seizing takes numbers only.
    assert_eq!(unsafe { libc::ptrace(libc::PTRACE_SEIZE, pid, 0_usize, 0_usize) }, 0);
    println!("tracing");
    std::io::stdin().read_line(&mut String::new()).unwrap();
}

#[test]
fn a_traced_process_is_refused_by_naming_its_tracer() {
    let (_ram, tracee, range) = tracee();
    let mut tracer = Tracee::start("traced", &[&tracee.pid().to_string()]);
    assert_eq!(tracer.line(), "tracing");
    let attach = || Tracker::attach(tracee.pid(), std::slice::from_ref(&range), DescriptorSource::Injected);
    match attach().unwrap_err() {
        AttachError::Inject { source: InjectError::AlreadyTraced { tracer: found, .. }, .. } => {
            assert_eq!(found, tracer.pid());
        }
        error => panic!("{error:?}"),
    }
    assert!(tracer.finish().success());
    attach().unwrap().detach().unwrap();
}

#[test]
fn memory_of_an_ordinary_file_is_tracked_too() {
    // The directory of the test program is on a disk, on most machines.
    let ram = Ram::on(std::env::current_exe().unwrap().parent().unwrap(), 64 * PAGE);
    let mut tracee = Tracee::start("memory", &[ram.path().to_str().unwrap()]);
    assert_eq!(tracee.line(), "ready");
    let range = tracee.range_of(&ram.path());
    let mut tracker = Tracker::attach(tracee.pid(), &[range], DescriptorSource::Injected).unwrap();
    tracee.ask("write 5");
    tracker.scan(Scan::OneStep, &mut Vec::new()).unwrap();
    ram.file.sync_all().unwrap();
    tracee.ask("write 5");
    let mut regions = Vec::new();
    tracker.scan(Scan::TwoStep, &mut regions).unwrap();
    assert_eq!(regions, [Region { range: 0, start: 5 * PAGE, end: 6 * PAGE }]);
}

#[test]
fn memory_that_nobody_may_write_is_refused_as_such() {
    let (_ram, tracee, _) = tracee();
    let found = dirty_tracker::mappings(tracee.pid()).unwrap();
    let clock = found.iter().find(|mapping| mapping.path.as_os_str() == "[vvar]").unwrap().range.clone();
    let error = Tracker::attach(tracee.pid(), &[clock], DescriptorSource::Injected).unwrap_err();
    assert!(matches!(error, AttachError::NotTrackable { .. }), "{error}");
}

#[test]
fn a_descriptor_that_is_not_the_device_is_refused() {
    let (_ram, tracee, range) = tracee();
    for fd_in_process in [0, 999] {
        let source = DescriptorSource::Device { fd_in_process };
        match Tracker::attach(tracee.pid(), std::slice::from_ref(&range), source).unwrap_err() {
            AttachError::Inject { source: InjectError::NotTheDevice { descriptor, .. }, .. } => {
                assert_eq!(descriptor, fd_in_process);
            }
            error => panic!("{error:?}"),
        }
    }
}

#[test]
fn a_descriptor_made_by_the_device_tracks_as_well() {
    let Ok(device) = std::fs::File::open("/dev/userfaultfd") else {
        eprintln!("SKIPPED a_descriptor_made_by_the_device_tracks_as_well: may not open /dev/userfaultfd");
        return;
    };
    let ram = Ram::new(64);
    let fd_in_process = 77;
    let mut tracee = Tracee::start_as("memory", &[ram.path().to_str().unwrap()], |command| {
        // What QMP `add-fd` does: the process gets the descriptor without being able to open the device.
        // SAFETY: dup2 is async-signal-safe, and the closure does nothing else.
        unsafe {
            command.pre_exec(move || {
                let made = libc::dup2(device.as_raw_fd(), fd_in_process);
                if made < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
            });
        }
    });
    assert_eq!(tracee.line(), "ready");
    let range = tracee.range_of(&ram.path());
    let source = DescriptorSource::Device { fd_in_process };
    let mut tracker = Tracker::attach(tracee.pid(), &[range], source).unwrap();
    tracker.scan(Scan::OneStep, &mut Vec::new()).unwrap();
    tracee.ask("write 5");
    let mut regions = Vec::new();
    tracker.scan(Scan::OneStep, &mut regions).unwrap();
    assert!(regions.iter().any(|region| (region.start..region.end).contains(&(5 * PAGE))), "{regions:?}");
    tracker.detach().unwrap();
}

#[test]
fn a_process_of_another_user_is_refused_with_what_to_allow() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED a_process_of_another_user_is_refused_with_what_to_allow: needs root to start one");
        return;
    }
    let (_ram, tracee, range) = tracee();
    // The agent here is nobody, and the tracee root's: maps cannot even be read.
    let directory = tempfile::Builder::new().prefix("dirty-tracker-test-").tempdir().unwrap();
    let program = directory.path().join("agent");
    std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    for path in [directory.path(), &program] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    let arguments = [tracee.pid().to_string(), range.start.to_string(), range.end.to_string()];
    let output = std::process::Command::new(&program)
        .env("DIRTY_TRACKER_TEST_ROLE", "agent")
        .env("DIRTY_TRACKER_TEST_ARGUMENTS", arguments.join(" "))
        .uid(65534)
        .gid(65534)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("refused: cannot find out what process"), "{output:?}");
}

/// How long the main thread of the role `naps` does not stop for anybody: longer than one attempt waits.
const NAP: Duration = Duration::from_millis(2500);

/// The role of a main thread that is at times in uninterruptible sleep, as one that waits for storage or swap is: at each
/// `nap` for a while, at `sleep` until its input ends.
pub(crate) fn naps(path: &Path) {
    map(path).fill(3);
    println!("ready");
    for line in std::io::stdin().lines() {
        let sleeps_on = match line.unwrap().as_str() {
            "sleep" => true,
            "nap" => false,
            // What is left of the line that ended its sleep.
            _ => continue,
        };
        println!("asleep");
        // SAFETY: as fork, whose child makes async-signal-safe calls only; its parent sleeps until it ends, as the flag says.
        unsafe {
            let flags = libc::c_long::from(libc::CLONE_VFORK | libc::SIGCHLD);
            if libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) == 0 {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                let mut byte = 0_u8;
                if sleeps_on {
                    libc::read(0, (&raw mut byte).cast(), 1);
                } else {
                    libc::usleep(u32::try_from(NAP.as_micros()).unwrap());
                }
                libc::_exit(0);
            }
            libc::wait(std::ptr::null_mut());
        }
        println!("awake");
    }
}

fn napping(word: &str) -> (Ram, Tracee, std::ops::Range<u64>) {
    let ram = Ram::new(64);
    let mut tracee = Tracee::start("naps", &[ram.path().to_str().unwrap()]);
    assert_eq!(tracee.line(), "ready");
    let range = tracee.range_of(&ram.path());
    assert_eq!(tracee.ask(word), "asleep");
    let state = || std::fs::read_to_string(format!("/proc/{}/stat", tracee.pid())).unwrap();
    let begin = Instant::now();
    while !state().contains(") D ") {
        assert!(begin.elapsed() < ATTACH_PATIENCE, "{}", state());
        std::thread::yield_now();
    }
    (ram, tracee, range)
}

#[test]
fn a_main_thread_that_does_not_stop_at_once_is_asked_again() {
    let (_ram, mut tracee, range) = napping("nap");
    let begin = Instant::now();
    let mut tracker = Tracker::attach(tracee.pid(), &[range], DescriptorSource::Injected).unwrap();
    assert!(tracker.hold() < begin.elapsed());
    tracker.scan(Scan::OneStep, &mut Vec::new()).unwrap();
    tracker.detach().unwrap();
    assert_eq!(tracee.line(), "awake");
    assert!(tracee.finish().success());
}

#[test]
fn a_main_thread_that_never_stops_is_told_with_what_it_does_and_left_alone() {
    let (_ram, mut tracee, range) = napping("sleep");
    let begin = Instant::now();
    let error = Tracker::attach(tracee.pid(), &[range], DescriptorSource::Injected).unwrap_err();
    assert!((ATTACH_PATIENCE..3 * ATTACH_PATIENCE).contains(&begin.elapsed()), "{:?}", begin.elapsed());
    let AttachError::Inject { source: InjectError::DidNotStop { .. }, .. } = &error else {
        panic!("{error:?}")
    };
    let said = std::error::Error::source(&error).unwrap().to_string();
    assert!(said.contains("in uninterruptible sleep (D)") && said.contains("clone"), "{said}");
    // Nobody holds it when it comes back.
    assert_eq!(tracee.ask("x"), "awake");
    assert!(tracee.finish().success());
}
