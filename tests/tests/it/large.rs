//! A guest with much memory, little of it touched, must not cost time or memory for what it does not use.

use std::os::unix::fs::MetadataExt;

use end_to_end::{Pair, report_adds_up};
use testbed::Host;
use testbed::guest_spec::{GuestSpec, Pattern};

const MIB: u64 = 1 << 20;

/// A line of a process's status in /proc, in bytes.
fn status(pid: u32, name: &str) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap();
    line.trim().strip_suffix("kB").unwrap().trim().parse::<u64>().unwrap() << 10
}

/// The most memory of its own that a host's agent has ever had.
fn most_memory(host: &Host) -> u64 {
    status(host.agent_pid().unwrap().try_into().unwrap(), "VmHWM")
}

/// Bytes of guest RAM that a host holds.
fn ram(host: &Host) -> u64 {
    host.ram_files().iter().map(|file| file.metadata().unwrap().blocks() * 512).sum()
}

/// Migrates a guest of that many GiB and looks at what it takes. The figures go to standard error.
fn moves_cheaply(gib: u64) {
    let pair = Pair::start();
    let spec = GuestSpec { fill_mib: 128, rate: 200, pattern: Pattern::Random, ..pair.spec("vm", gib << 10) };
    let guest = pair.run(pair.a(), "vm", &spec);
    let before = guest.status();
    let touched = ram(pair.a());
    let idle = [pair.a(), pair.b()].map(most_memory);
    let report = pair.migrate("vm", pair.a(), pair.b(), &[]);
    report_adds_up(&report, &guest);
    let took = [pair.a(), pair.b()].map(most_memory);
    let mib = |bytes: u64| bytes / MIB;
    eprintln!(
        "{gib} GiB, {} MiB touched: {:.0} ms, first round {:.0} ms, downtime {:.1} ms; agents {:?} MiB, idle {:?} MiB; copy {} MiB",
        mib(touched),
        report.total_ms,
        report.rounds[0].duration_ms,
        report.downtime_ms,
        took.map(mib),
        idle.map(mib),
        mib(ram(pair.b())),
    );
    for phase in &report.phases {
        eprintln!("  {:?} {:.0} ms", phase.name, phase.duration_ms);
    }
    for round in &report.rounds {
        eprintln!(
            "  round {}: {} due, {} sent, scan {:.1} ms, all {:.1} ms",
            round.n, round.dirty_pages, round.plain, round.scan_ms, round.duration_ms
        );
    }
    let allowed = (gib << 30) / 100 + 128 * MIB;
    assert!(took.iter().all(|bytes| *bytes <= allowed), "{took:?} bytes, more than {allowed}");
    // What the guest has written meanwhile comes on top, and pages that hold nothing but zeros need no room.
    assert!(ram(pair.b()) <= touched + 64 * MIB, "the copy fills {} bytes of {touched}", ram(pair.b()));
    guest.runs_on();
    let _ = guest.sound_since(&before);
}

#[test]
fn a_guest_whose_memory_lies_below_and_above_4_gib_arrives_whole() {
    moves_cheaply(5);
}

#[test]
#[ignore = "16 GiB of guest RAM, on a machine with 24: run by `make test-full`"]
fn a_guest_of_16_gib_that_touches_little_costs_little() {
    moves_cheaply(16);
}
