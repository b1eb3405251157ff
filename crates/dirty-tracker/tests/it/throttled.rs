//! Threads that are slowed notice nothing but the time, and run on whatever becomes of who slows them.

use crate::tracee::{Ram, Tracee};
use dirty_tracker::{Throttle, ThrottleError};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(30);

fn spinning() -> (Ram, Tracee) {
    let ram = Ram::new(16);
    let mut tracee = Tracee::start("spin", &[ram.path().to_str().unwrap()]);
    assert_eq!(tracee.line(), "ready");
    (ram, tracee)
}

/// The role of a program that slows another, to be killed. Argument: the thread.
pub(crate) fn throttler(thread: &str) {
    let throttle = Throttle::start(&[thread.parse().unwrap()], 0.99).unwrap();
    while throttle.slowed().stops < 20 {
        std::thread::sleep(Duration::from_millis(1));
    }
    println!("slowing");
    std::io::stdin().read_line(&mut String::new()).unwrap();
}

/// The role of a program whose main thread is in a sleep that nothing interrupts, as one that waits for dead storage, while another
/// spins.
pub(crate) fn asleep() {
    std::thread::spawn(|| {
        println!("{}", rustix::thread::gettid().as_raw_nonzero());
        loop {
            std::hint::spin_loop();
        }
    });
    let this = rustix::process::getpid().as_raw_nonzero().get();
    // SAFETY: as fork; the child makes async-signal-safe calls only. Its parent sleeps until it ends, as the flag says.
    unsafe {
        let flags = libc::c_long::from(libc::CLONE_VFORK | libc::SIGCHLD);
        if libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) == 0 {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            while libc::getppid() == this {
                libc::usleep(100_000);
            }
            libc::_exit(0);
        }
    }
}

#[test]
fn a_thread_that_waits_for_storage_keeps_no_other_stopped() {
    let mut tracee = Tracee::start("asleep", &[]);
    let spinner: u32 = tracee.line().parse().unwrap();
    let begin = Instant::now();
    let state = || std::fs::read_to_string(format!("/proc/{}/stat", tracee.pid())).unwrap();
    while !state().contains(") D ") {
        assert!(begin.elapsed() < PATIENCE, "{}", state());
        std::thread::yield_now();
    }
    let threads = [tracee.pid(), spinner];
    let (tell, started) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let throttle = Throttle::start(&threads, 0.5).unwrap();
        while throttle.slowed().stops < 20 {
            std::thread::sleep(Duration::from_millis(1));
        }
        drop(throttle);
        tell.send(()).unwrap();
    });
    started.recv_timeout(PATIENCE).expect("the thread that spins is let go, and stopped again");
    runs_free(tracee.pid(), spinner);
}

fn cpu_time(pid: u32, thread: u32) -> Duration {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{thread}/schedstat")).unwrap();
    Duration::from_nanos(text.split(' ').next().unwrap().parse().unwrap())
}

/// Waits until the thread has nobody who traces it, and has run.
fn runs_free(pid: u32, thread: u32) {
    let status = || std::fs::read_to_string(format!("/proc/{pid}/task/{thread}/status")).unwrap();
    let begin = Instant::now();
    while !status().contains("TracerPid:\t0\n") {
        assert!(begin.elapsed() < PATIENCE, "{}", status());
        std::thread::yield_now();
    }
    let before = cpu_time(pid, thread);
    while cpu_time(pid, thread) < before + Duration::from_millis(20) {
        assert!(begin.elapsed() < PATIENCE, "it does not run: {}", status());
        std::thread::yield_now();
    }
}

#[test]
fn a_slowed_thread_runs_less_and_keeps_everything() {
    let (_ram, mut tracee) = spinning();
    let throttle = Throttle::start(&[tracee.pid(), tracee.pid()], 0.9).unwrap();
    let (begin, ran) = (Instant::now(), cpu_time(tracee.pid(), tracee.pid()));
    while throttle.slowed().stops < 100 {
        assert!(begin.elapsed() < PATIENCE, "{:?}", throttle.slowed());
        std::thread::sleep(Duration::from_millis(1));
    }
    let ran = cpu_time(tracee.pid(), tracee.pid()) - ran;
    assert!(ran < begin.elapsed().mul_f64(0.6), "{ran:?} of {:?}", begin.elapsed());
    throttle.set(0.0);
    assert!(throttle.share() < 0.01);
    runs_free(tracee.pid(), tracee.pid());
    throttle.set(0.5);
    let stops = throttle.slowed().stops;
    while throttle.slowed().stops < stops + 3 {
        assert!(begin.elapsed() < PATIENCE, "it is not slowed again");
        std::thread::sleep(Duration::from_millis(1));
    }
    drop(throttle);
    runs_free(tracee.pid(), tracee.pid());
    tracee.say("");
    assert_eq!(tracee.line(), "every register kept");
}

#[test]
fn a_throttle_that_is_killed_lets_go() {
    let (_ram, mut tracee) = spinning();
    let mut throttler = Tracee::start("throttler", &[&tracee.pid().to_string()]);
    assert_eq!(throttler.line(), "slowing");
    throttler.kill();
    runs_free(tracee.pid(), tracee.pid());
    tracee.say("");
    assert_eq!(tracee.line(), "every register kept");
}

#[test]
fn a_thread_that_somebody_else_traces_is_refused() {
    let (_ram, tracee) = spinning();
    let mut tracer = Tracee::start("traced", &[&tracee.pid().to_string()]);
    assert_eq!(tracer.line(), "tracing");
    match Throttle::start(&[tracee.pid()], 0.5) {
        Err(ThrottleError::NotPermitted { thread, .. }) => assert_eq!(thread, tracee.pid()),
        other => panic!("{other:?}"),
    }
    assert!(tracer.finish().success());
    drop(Throttle::start(&[tracee.pid()], 0.5).unwrap());
}

#[test]
fn a_thread_that_ends_is_not_missed() {
    let (_ram, mut tracee) = spinning();
    let throttle = Throttle::start(&[tracee.pid()], 0.9).unwrap();
    tracee.kill();
    assert_ne!(tracee.last_words(), Some("REGISTERS CHANGED".to_owned()));
    drop(throttle);
    // A thread that never was is one that has ended.
    drop(Throttle::start(&[4_194_304], 0.5).unwrap());
}
