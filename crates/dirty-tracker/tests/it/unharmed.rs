//! The tracked process is left exactly as it was: memory, descriptors, registers, signals, system calls.

use crate::tracee::{PAGE, Ram, Tracee, map};
use dirty_tracker::{DescriptorSource, Scan, Tracker, mappings};
use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hasher};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Enough attachments to meet the process in different instants.
const ATTACHMENTS: usize = 100;

/// The open files of a process: number, and what it is of.
pub(crate) fn open_files(pid: u32) -> BTreeMap<String, String> {
    std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            let target = std::fs::read_link(entry.path()).unwrap();
            (entry.file_name().into_string().unwrap(), target.to_string_lossy().into_owned())
        })
        .collect()
}

/// Everything about a process that must not change while it spins: files, mappings, signal state, and a hash
/// of all its memory.
#[derive(PartialEq, Eq)]
pub(crate) struct Portrait {
    files: BTreeMap<String, String>,
    maps: String,
    status: Vec<String>,
    memory: Vec<(Range<u64>, u64)>,
}

impl Portrait {
    pub(crate) fn of(pid: u32) -> Self {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let kept = |line: &&str| {
            [
                "SigPnd",
                "SigBlk",
                "SigIgn",
                "SigCgt",
                "ShdPnd",
                "TracerPid",
                "State",
                "Seccomp",
                "FDSize",
                "Threads",
            ]
            .iter()
            .any(|name| line.starts_with(name))
        };
        let memory = std::fs::File::open(format!("/proc/{pid}/mem")).unwrap();
        let mut hashes = Vec::new();
        for mapping in mappings(pid).unwrap() {
            // The kernel's clock data changes by itself, and is not readable this way.
            if mapping.path.to_string_lossy().starts_with("[v") && mapping.path != Path::new("[vdso]") {
                continue;
            }
            let mut bytes = vec![0; (mapping.range.end - mapping.range.start) as usize];
            if memory.read_exact_at(&mut bytes, mapping.range.start).is_ok() {
                let mut hasher = DefaultHasher::new();
                hasher.write(&bytes);
                hashes.push((mapping.range, hasher.finish()));
            }
        }
        Self {
            files: open_files(pid),
            maps: std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap(),
            status: status.lines().filter(kept).map(str::to_owned).collect(),
            memory: hashes,
        }
    }
}

impl Portrait {
    /// Fails, naming what differs, unless the process is as it was when this was made.
    pub(crate) fn assert_unchanged(&self, pid: u32) {
        let now = Self::of(pid);
        assert_eq!(now.files, self.files);
        assert_eq!(now.status, self.status);
        assert_eq!(now.maps, self.maps);
        let differing: Vec<_> =
            now.memory.iter().zip(&self.memory).filter(|(now, then)| now != then).collect();
        assert!(differing.is_empty(), "memory changed: {differing:x?} in\n{}", now.maps);
        assert_eq!(now.memory.len(), self.memory.len());
    }
}

/// The role of a main thread whose every register is known, in a loop that needs none of them changed; another
/// thread ends it at a line of input.
pub(crate) fn spin(path: &Path) {
    let memory = map(path);
    memory.fill(3);
    // On one CPU for good: the kernel keeps the number of the CPU in the memory of a thread (rseq).
    let cpus = rustix::thread::sched_getaffinity(None).unwrap();
    let mut one = rustix::thread::CpuSet::new();
    one.set((0..rustix::thread::CpuSet::MAX_CPU).find(|&cpu| cpus.is_set(cpu)).unwrap());
    rustix::thread::sched_setaffinity(None, &one).unwrap();
    // What a tracer must not disturb: SIGTRAP ignored and blocked, an odd signal blocked.
    // SAFETY: plain libc calls on values that live long enough.
    unsafe {
        libc::signal(libc::SIGTRAP, libc::SIG_IGN);
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigaddset(&raw mut set, libc::SIGTRAP);
        libc::sigaddset(&raw mut set, libc::SIGUSR2);
        libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
    }
    /// Where the loop jumps, and where it is to jump to end.
    static JUMP: [AtomicU64; 2] = [AtomicU64::new(0), AtomicU64::new(0)];
    let stopper = std::thread::spawn(|| {
        while JUMP[1].load(Ordering::SeqCst) == 0 {
            std::thread::yield_now();
        }
        println!("ready");
        std::io::stdin().read_line(&mut String::new()).unwrap();
        JUMP[0].store(JUMP[1].load(Ordering::SeqCst), Ordering::SeqCst);
    });
    let kept = spin_with_known_registers(&JUMP);
    stopper.join().unwrap();
    println!("{}", if kept { "every register kept" } else { "REGISTERS CHANGED" });
    std::io::stdin().read_line(&mut String::new()).unwrap();
}

/// Loads registers, flags included, jumps in place until `jump[0]` is changed, and compares.
///
/// `jmp [rdi]` reads nothing but rdi and changes nothing at all, neither flags nor rcx and r11, which any
/// system call made here would.
fn spin_with_known_registers(jump: &[AtomicU64; 2]) -> bool {
    let value = |number: u64| 0x1111_1111_1111_1111 * number;
    let mut rax = value(1);
    let mut rcx = value(2);
    let mut rdx = value(3);
    let mut r8 = value(4);
    let mut r9 = value(5);
    let mut r10 = value(6);
    let mut r11 = value(7);
    let mut r12 = value(8);
    let mut r13 = value(9);
    let mut r14 = value(10);
    let mut r15 = value(11);
    let mut vectors = [1.5_f64, 2.5, 3.5, 4.5];
    let [x0, x1, x7, x15] = &mut vectors;
    let flags: u64;
    let stack_kept: u64;
    // SAFETY: the assembly declares every register it changes, leaves the stack as it found it, and writes no
    // memory but the two atomics that rdi points to, which outlive it.
    unsafe {
        std::arch::asm!(
            "push rbx",
            "push rbp",
            "mov rbx, rsp",
            "mov rbp, rsp",
            "push rax",
            "lea rax, [rip + 2f]",
            "mov [rdi], rax",
            "lea rax, [rip + 3f]",
            "mov [rdi + 8], rax",
            "pop rax",
            // Carry, parity, zero and sign set, overflow clear.
            "push 0xc7",
            "popfq",
            "2: jmp qword ptr [rdi]",
            "3: pushfq",
            "pop rsi",
            "sub rbx, rsp",
            "sub rbp, rsp",
            "or rbx, rbp",
            "mov rdi, rbx",
            "pop rbp",
            "pop rbx",
            inout("rdi") jump.as_ptr() => stack_kept,
            out("rsi") flags,
            inout("rax") rax, inout("rcx") rcx, inout("rdx") rdx, inout("r8") r8, inout("r9") r9,
            inout("r10") r10, inout("r11") r11, inout("r12") r12, inout("r13") r13, inout("r14") r14,
            inout("r15") r15, inout("xmm0") *x0, inout("xmm1") *x1, inout("xmm7") *x7, inout("xmm15") *x15,
        );
    }
    /// Carry, parity, zero and sign.
    const SET: u64 = 0xc5;
    let general = [rax, rcx, rdx, r8, r9, r10, r11, r12, r13, r14, r15];
    general.iter().zip(1..).all(|(register, number)| *register == value(number))
        && vectors == [1.5, 2.5, 3.5, 4.5]
        && flags & (SET | 0x800) == SET
        && stack_kept == 0
}

#[test]
fn nothing_in_the_process_changes_by_tracking_and_ending_it() {
    let ram = Ram::new(256);
    let mut tracee = Tracee::start("spin", &[ram.path().to_str().unwrap()]);
    assert_eq!(tracee.line(), "ready");
    until_settled(&tracee);
    let range = tracee.range_of(&ram.path());
    let before = Portrait::of(tracee.pid());
    assert!(before.memory.len() > 10);
    for part in [range.clone(), range.start + 4 * PAGE..range.end - 8 * PAGE] {
        for _ in 0..ATTACHMENTS {
            let mut tracker =
                Tracker::attach(tracee.pid(), std::slice::from_ref(&part), DescriptorSource::Injected)
                    .unwrap();
            assert!(!tracker.hold().is_zero());
            tracker.scan(Scan::OneStep, &mut Vec::new()).unwrap();
            assert_eq!(open_files(tracee.pid()), before.files, "while tracked");
            tracker.detach().unwrap();
        }
        before.assert_unchanged(tracee.pid());
    }
    assert_eq!(tracee.ask("stop"), "every register kept");
    assert!(tracee.finish().success());
}

/// Waits until the second thread of the role `spin` has come to rest: nothing but the tracker could change anything then.
pub(crate) fn until_settled(tracee: &Tracee) {
    until_in(tracee, "read by the second thread", |pid| {
        std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().any(|task| {
            let call = std::fs::read_to_string(task.unwrap().path().join("syscall")).unwrap_or_default();
            call.starts_with(&format!("{} ", libc::SYS_read))
        })
    });
}

/// Waits until the process is as wanted; fails after a time no scheduling explains.
fn until_in(tracee: &Tracee, what: &str, wanted: impl Fn(u32) -> bool) {
    let begin = Instant::now();
    while !wanted(tracee.pid()) {
        assert!(begin.elapsed() < Duration::from_secs(30), "never: {what}");
        std::thread::yield_now();
    }
}

/// How long the waits of the role `wait` last that end by themselves.
const NAP: Duration = Duration::from_millis(700);

/// Signals the role `wait signals` has handled.
static HANDLED: AtomicU64 = AtomicU64::new(0);

extern "C" fn handle(_: i32) {
    HANDLED.fetch_add(1, Ordering::SeqCst);
}

/// The role of a main thread that waits in a system call, and then says what that returned.
pub(crate) fn wait(kind: &str, path: &Path) {
    map(path).fill(3);
    let timeout = libc::timespec { tv_sec: 0, tv_nsec: i64::from(NAP.subsec_nanos()) };
    let word = 0_u32;
    let futex = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
    println!("ready");
    let begin = Instant::now();
    // SAFETY: each call is given values that live until it returns; the handler only touches an atomic.
    let result = unsafe {
        match kind {
            "ppoll" => {
                let mut pipe = libc::pollfd { fd: 0, events: libc::POLLPRI, revents: 0 };
                let mut time = timeout;
                let mask: u64 = 0;
                libc::syscall(libc::SYS_ppoll, &raw mut pipe, 1, &raw mut time, &raw const mask, 8)
            }
            "nanosleep" => libc::syscall(
                libc::SYS_clock_nanosleep,
                libc::CLOCK_MONOTONIC,
                0,
                &raw const timeout,
                0_usize,
            ),
            "futex" => libc::syscall(libc::SYS_futex, &raw const word, futex, 0, &raw const timeout),
            "read" => {
                let mut byte = 0_u8;
                libc::syscall(libc::SYS_read, 0, &raw mut byte, 1)
            }
            "signals" => {
                libc::signal(libc::SIGRTMIN(), handle as *const () as usize);
                println!("handling");
                std::thread::spawn(|| {
                    for line in std::io::stdin().lines() {
                        assert_eq!(line.unwrap(), "count");
                        println!("{}", HANDLED.load(Ordering::SeqCst));
                    }
                    std::process::exit(0);
                });
                loop {
                    libc::pause();
                }
            }
            _ => panic!("{kind}"),
        }
    };
    let error = if result < 0 { std::io::Error::last_os_error().raw_os_error().unwrap() } else { 0 };
    println!("{result} {error} {}", begin.elapsed().as_millis());
    std::io::stdin().read_line(&mut String::new()).unwrap();
}

fn waiting(kind: &str) -> (Ram, Tracee, Range<u64>) {
    let ram = Ram::new(64);
    let mut tracee = Tracee::start("wait", &[kind, ram.path().to_str().unwrap()]);
    assert_eq!(tracee.line(), "ready");
    let range = tracee.range_of(&ram.path());
    (ram, tracee, range)
}

#[test]
fn a_waiting_system_call_returns_what_and_when_it_would_have() {
    for (kind, call, expected) in [
        ("ppoll", libc::SYS_ppoll, "0 0"),
        ("nanosleep", libc::SYS_clock_nanosleep, "0 0"),
        ("futex", libc::SYS_futex, "-1 110"),
        ("read", libc::SYS_read, "1 0"),
    ] {
        let (_ram, mut tracee, range) = waiting(kind);
        until_in(&tracee, kind, |pid| {
            let now = std::fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap_or_default();
            now.starts_with(&format!("{call} "))
        });
        let begin = Instant::now();
        let mut attachments = 0;
        // Some attachments during the wait, none that would only begin after it.
        while begin.elapsed() < NAP / 3 {
            let tracker =
                Tracker::attach(tracee.pid(), std::slice::from_ref(&range), DescriptorSource::Injected);
            tracker.unwrap().detach().unwrap();
            attachments += 1;
        }
        assert!(attachments > 1, "{kind}: {attachments}");
        if kind == "read" {
            tracee.say("x");
        }
        let line = tracee.line();
        let (returned, milliseconds) = line.rsplit_once(' ').unwrap();
        assert_eq!(returned, expected, "{kind} after {attachments} attachments");
        let milliseconds: u128 = milliseconds.parse().unwrap();
        let least = if kind == "read" { 0 } else { NAP.as_millis() };
        assert!((least..least + 20_000).contains(&milliseconds), "{kind} took {milliseconds} ms");
    }
}

fn send(pid: u32, signal: i32) {
    let pid = i32::try_from(pid).unwrap();
    // SAFETY: takes two numbers.
    assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
}

#[test]
fn no_signal_is_lost_or_added() {
    const SIGNALS: u64 = 3000;
    let (_ram, mut tracee, range) = waiting("signals");
    assert_eq!(tracee.line(), "handling");
    let pid = tracee.pid();
    let sender = std::thread::spawn(move || {
        for number in 0..SIGNALS {
            // Real-time signals queue up, so each one sent is one handled. Between them, stops and continues.
            send(pid, libc::SIGRTMIN());
            match number % 16 {
                3 => send(pid, libc::SIGSTOP),
                5 => send(pid, libc::SIGCONT),
                _ => {}
            }
            std::thread::yield_now();
        }
        send(pid, libc::SIGCONT);
    });
    let mut attachments = 0;
    while !sender.is_finished() || attachments < 20 {
        let tracker = Tracker::attach(pid, std::slice::from_ref(&range), DescriptorSource::Injected);
        tracker.unwrap().detach().unwrap();
        attachments += 1;
    }
    sender.join().unwrap();
    let begin = Instant::now();
    loop {
        let handled: u64 = tracee.ask("count").parse().unwrap();
        assert!(handled <= SIGNALS, "{handled} handled of {SIGNALS}");
        if handled == SIGNALS {
            break;
        }
        assert!(begin.elapsed() < Duration::from_secs(30), "{handled} handled of {SIGNALS}");
    }
    assert!(tracee.finish().success());
}

#[test]
fn a_stopped_process_is_tracked_and_stays_stopped() {
    let (_ram, mut tracee, range) = waiting("read");
    let state = |pid| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        status.lines().find_map(|line| line.strip_prefix("State:\t")).unwrap().chars().next()
    };
    send(tracee.pid(), libc::SIGSTOP);
    until_in(&tracee, "stopped", |pid| state(pid) == Some('T'));
    let mut tracker = Tracker::attach(tracee.pid(), &[range], DescriptorSource::Injected).unwrap();
    tracker.scan(Scan::OneStep, &mut Vec::new()).unwrap();
    until_in(&tracee, "stopped again", |pid| state(pid) == Some('T'));
    tracker.detach().unwrap();
    tracee.say("x");
    assert_eq!(state(tracee.pid()), Some('T'), "a stopped process reads nothing");
    assert!(!tracee.has_ended());
    send(tracee.pid(), libc::SIGCONT);
    assert!(tracee.line().starts_with("1 0 "));
}
