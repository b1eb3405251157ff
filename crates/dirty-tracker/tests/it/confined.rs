//! A process under a seccomp filter that kills is never made to make a call that the filter might kill it for.

use crate::tracee::{Ram, Tracee, map};
use dirty_tracker::{
    AttachError, DescriptorSource, InjectError, Injection, KnownFilters, Scan, Tracker, may_attach,
    seccomp_filters,
};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch, apply_filter};
use std::path::Path;

/// The role of a process that puts itself under a filter: one that `kills` for `userfaultfd`, as systemd's
/// `SystemCallFilter=` does, or one that does `not-mind` that call, as QEMU's own.
pub(crate) fn confined(kind: &str, path: &Path) {
    map(path).fill(3);
    let call = match kind {
        "kills" => libc::SYS_userfaultfd,
        "not-mind" => libc::SYS_reboot,
        other => panic!("{other}"),
    };
    let filter = SeccompFilter::new(
        [(call, vec![])].into(),
        SeccompAction::Allow,
        SeccompAction::KillProcess,
        TargetArch::x86_64,
    );
    let program: BpfProgram = filter.unwrap().try_into().unwrap();
    apply_filter(&program).unwrap();
    println!("ready");
    for line in std::io::stdin().lines() {
        println!("{}", line.unwrap());
    }
}

fn start(kind: &str) -> (Ram, Tracee, std::ops::Range<u64>) {
    let ram = Ram::new(64);
    let mut tracee = Tracee::start("confined", &[kind, ram.path().to_str().unwrap()]);
    assert_eq!(tracee.line(), "ready");
    let range = tracee.range_of(&ram.path());
    (ram, tracee, range)
}

/// Runs this on a thread without the capability to put filters aside, but able to trace: capabilities are a thread's own,
/// and the process that injects is forked from it.
fn without_leave_to_suspend<T: Send>(what: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let mut held = capabilities(None).unwrap();
            for set in [&mut held.effective, &mut held.permitted, &mut held.inheritable] {
                set.remove(CapabilitySet::SYS_ADMIN);
            }
            set_capabilities(None, held).unwrap();
            what()
        });
        thread.join().unwrap()
    })
}

fn is_confined(error: &AttachError) -> bool {
    matches!(error, AttachError::Inject { source: InjectError::Confined { .. }, .. })
}

#[test]
fn a_process_under_a_filter_that_kills_is_not_killed() {
    let (_ram, mut tracee, range) = start("kills");
    let pid = tracee.pid();
    assert_eq!(seccomp_filters(pid).unwrap() - seccomp_filters(std::process::id()).unwrap(), 1);
    let own = seccomp_filters(std::process::id()).unwrap();
    let error = without_leave_to_suspend(|| {
        for known in [KnownFilters::Are(0), KnownFilters::Are(own)] {
            let error = may_attach(pid, known).unwrap_err();
            assert!(is_confined(&error), "{error:?}");
        }
        let injection = Injection { source: DescriptorSource::Injected, known: KnownFilters::Are(own) };
        Tracker::attach(pid, std::slice::from_ref(&range), injection).unwrap_err()
    });
    assert!(is_confined(&error), "{error:?}");
    let said = std::error::Error::source(&error).unwrap().to_string();
    for told in ["seccomp filter", "userfaultfd()", "CAP_SYS_ADMIN"] {
        assert!(said.contains(told), "{told}: {said}");
    }
    assert_eq!(tracee.ask("alive"), "alive");
    assert!(tracee.finish().success());
}

#[test]
fn a_filter_that_is_known_not_to_mind_is_no_obstacle() {
    let (_ram, mut tracee, range) = start("not-mind");
    let filters = seccomp_filters(tracee.pid()).unwrap();
    without_leave_to_suspend(|| {
        for known in [KnownFilters::Are(filters), KnownFilters::All] {
            may_attach(tracee.pid(), known).unwrap();
            let injection = Injection { source: DescriptorSource::Injected, known };
            let mut tracker = Tracker::attach(tracee.pid(), std::slice::from_ref(&range), injection).unwrap();
            tracker.scan(Scan::OneStep, &mut Vec::new()).unwrap();
            tracker.detach().unwrap();
        }
    });
    assert_eq!(tracee.ask("alive"), "alive");
    assert!(tracee.finish().success());
}

#[test]
fn whoever_may_put_filters_aside_does() {
    if !rustix::process::geteuid().is_root() || seccomp_filters(std::process::id()).unwrap() > 0 {
        eprintln!("SKIPPED whoever_may_put_filters_aside_does: needs root that is under no filter itself");
        return;
    }
    let (_ram, mut tracee, range) = start("kills");
    may_attach(tracee.pid(), KnownFilters::Are(0)).unwrap();
    let mut tracker = Tracker::attach(tracee.pid(), &[range], DescriptorSource::Injected).unwrap();
    tracker.scan(Scan::OneStep, &mut Vec::new()).unwrap();
    tracker.detach().unwrap();
    assert_eq!(tracee.ask("alive"), "alive");
    assert!(tracee.finish().success());
}

#[test]
fn trying_out_does_not_even_stop_the_process() {
    let (_ram, tracee, _) = start("not-mind");
    let switches = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", tracee.pid())).unwrap();
        status.lines().filter(|line| line.contains("ctxt_switches")).map(str::to_owned).collect::<Vec<_>>()
    };
    let asleep = || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", tracee.pid())).unwrap();
        stat.contains(") S ")
    };
    while !asleep() {
        std::thread::yield_now();
    }
    let before = switches();
    for _ in 0..20 {
        may_attach(tracee.pid(), KnownFilters::All).unwrap();
    }
    assert_eq!(switches(), before);
}
