//! A guest whose memory is in no file that anybody can open, as QEMU has it by default and most managers start it, moves as any other.

use std::fs;
use std::path::{Path, PathBuf};

use end_to_end::{
    Guest, PATIENCE, Pair, Points, Said, copy, image, local, noise, report_adds_up, until, vmirror,
};
use serde_json::json;
use session::points::Point;
use session::report::{DiskMode, Outcome, Verdict};
use testbed::disk::{self, Format};
use testbed::guest_spec::{GuestSpec, Io, Pattern, Ram, TestDisk, Work};
use testbed::{Host, Monitor, fault, root_or_skip};

const MIB: u64 = 1 << 20;

/// A guest as its user would start it, at work, with these options more.
fn by_hand(pair: &Pair, extra: &[&str]) -> (GuestSpec, PathBuf) {
    let qmp = pair.a().directory().join("vm-own.qmp");
    let extra = extra.iter().map(|word| (*word).to_owned()).collect();
    let pattern = Pattern::Incompressible;
    let spec = GuestSpec {
        ram: Ram::Private,
        qmp: Some(qmp.clone()),
        rate: 1000,
        pattern,
        extra,
        ..pair.spec("vm", 256)
    };
    (spec, qmp)
}

fn adopt(host: &Host, qmp: &Path) {
    let vm = vmirror(host, &["adopt", "vm", "--qmp", qmp.to_str().unwrap(), "--json"]).done().json();
    assert_eq!((&vm["origin"], &vm["state"]), (&"adopted".into(), &"running".into()), "{vm}");
}

/// Adopts a guest that was started so, and moves it this often. Ends where it was started.
fn moves_there_and_back(extra: &[&str], times: usize) {
    moves_with_more_memory(0, extra, times);
}

/// The same, of one to which the options give so many MiB more.
fn moves_with_more_memory(mib: u64, extra: &[&str], times: usize) {
    let pair = Pair::start();
    let (mut spec, qmp) = by_hand(&pair, extra);
    spec.memory_mib += mib;
    let mut qemu = pair.a().boot(&spec).unwrap();
    qemu.wait_ready(PATIENCE).unwrap();
    let guest = Guest::ready("vm", &spec);
    let before = guest.status();
    adopt(pair.a(), &qmp);
    for time in 0..times {
        let (from, to) = if time % 2 == 0 { (pair.a(), pair.b()) } else { (pair.b(), pair.a()) };
        report_adds_up(&pair.migrate("vm", from, to, &[]), &guest);
        pair.holds_nothing(from);
    }
    until("the QEMU that was started by hand has ended", || qemu.exit_status().is_some());
    guest.sound_since(&before);
}

#[test]
fn a_guest_with_private_memory_moves_without_a_restart() {
    moves_there_and_back(&[], 10);
}

#[test]
fn a_guest_whose_memory_is_a_file_without_a_name_moves() {
    moves_there_and_back(
        &["-object", "memory-backend-memfd,id=m,size=256M,share=on", "-machine", "memory-backend=m"],
        2,
    );
}

#[test]
fn a_guest_whose_private_memory_is_all_there_from_the_start_moves() {
    moves_there_and_back(&["-mem-prealloc"], 2);
}

#[test]
fn a_guest_with_two_private_blocks_of_one_size_moves() {
    let block = |id| format!("memory-backend-ram,id={id},size=128M");
    let (a, b) = (block("a"), block("b"));
    moves_there_and_back(
        &["-object", &a, "-object", &b, "-numa", "node,memdev=a", "-numa", "node,memdev=b"],
        2,
    );
}

#[test]
fn a_guest_with_private_memory_and_a_screen_moves_with_what_is_on_it() {
    // With QEMU's default devices, and much video memory: that, option ROMs and a network card's.
    moves_there_and_back(&["-device", "VGA,vgamem_mb=128", "-device", "e1000"], 2);
}

#[test]
fn a_guest_with_private_memory_and_a_dimm_moves() {
    // Each DIMM is a block of its own, and the machine has room for more.
    moves_with_more_memory(
        128,
        &[
            "-m",
            "256M,slots=2,maxmem=1G",
            "-object",
            "memory-backend-ram,id=more,size=128M",
            "-device",
            "pc-dimm,id=dimm,memdev=more",
        ],
        2,
    );
}

#[test]
fn a_guest_with_private_memory_and_more_by_virtio_mem_moves() {
    // A block whose name begins with that of its device.
    moves_with_more_memory(
        256,
        &[
            "-m",
            "256M,maxmem=1G",
            "-object",
            "memory-backend-ram,id=more,size=256M",
            "-device",
            "virtio-mem-pci,memdev=more,requested-size=128M",
        ],
        2,
    );
}

#[test]
fn a_guest_whose_memory_is_shared_with_children_moves_and_what_it_never_touched_is_not_made() {
    let pair = Pair::start();
    let backend = "memory-backend-ram,id=m,size=1G,share=on";
    let (spec, qmp) = by_hand(&pair, &["-object", backend, "-machine", "memory-backend=m"]);
    let spec = GuestSpec { memory_mib: 1024, fill_mib: 32, rate: 100, ..spec };
    let mut qemu = pair.a().boot(&spec).unwrap();
    qemu.wait_ready(PATIENCE).unwrap();
    let guest = Guest::ready("vm", &spec);
    let before = guest.status();
    adopt(pair.a(), &qmp);
    let shared = || {
        let status = fs::read_to_string(format!("/proc/{}/status", pair.qemu(pair.a()).unwrap())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("RssShmem:")).unwrap();
        line.trim().strip_suffix(" kB").unwrap().trim().parse::<u64>().unwrap() << 10
    };
    let at_first = shared();
    let _ = pair.mirror("vm", pair.a(), pair.b(), &[]);
    assert!(shared() < at_first + 64 * MIB, "{at_first} bytes before, {} now", shared());
    report_adds_up(&vmirror(pair.a(), &["switch", "vm", "--json"]).done().report(), &guest);
    guest.sound_since(&before);
}

#[test]
fn a_guest_with_private_memory_whose_qemu_is_killed_once_its_copy_is_complete_runs_there() {
    for point in [Point::Sent, Point::LoadSaid, Point::ReadyHeard, Point::HandedOver] {
        let pair = Pair::start();
        let points = Points::of(pair.a(), &[]);
        let (spec, qmp) = by_hand(&pair, &[]);
        let mut qemu = pair.a().boot(&spec).unwrap();
        qemu.wait_ready(PATIENCE).unwrap();
        let guest = Guest::ready("vm", &spec);
        let before = guest.status();
        adopt(pair.a(), &qmp);
        let held = points.hold(point);
        let migration = pair.begin("vm", pair.a(), pair.b(), &[]);
        held.reached();
        fault::kill(pair.qemu(pair.a()).unwrap());
        drop(held);
        let said = migration.ended();
        assert!(pair.runs_on("vm", pair.b()), "{}: {said:?}\n{}", point.name(), pair.logs());
        guest.sound_since(&before);
        let report = said.report();
        // Of memory that is gone nothing can be proved, and nothing is said to differ.
        assert_eq!(
            (report.verification.gate, report.verification.mismatches),
            (Verdict::Match, 0),
            "{said:?}"
        );
        assert_ne!(report.verification.proof, Verdict::Mismatch, "{said:?}");
    }
}

#[test]
fn a_state_dir_of_before_it_was_handed_over_lets_nothing_run_twice() {
    let pair = Pair::start();
    let points = Points::of(pair.a(), &[]);
    let (guest, mut monitor) = with_another_monitor(&pair);
    let before = guest.status();
    let kept = pair.a().directory().join("kept");
    copy(&pair.a().state_dir(), &kept);
    let held = points.hold(Point::HandedOver);
    let migration = pair.begin("vm", pair.a(), pair.b(), &[]);
    held.reached();
    pair.a().kill_agent().unwrap();
    drop(held);
    assert_eq!(migration.ended().code, Some(3));
    copy(&kept, &pair.a().state_dir());
    pair.a().start_agent().unwrap();
    until("it is listed with what is wrong", || {
        pair.show("vm", pair.a()).is_some_and(|vm| vm["state"] == "unreachable")
    });
    assert_eq!(status(&mut monitor), "paused", "{}", pair.logs());
    // The copy is the machine, when a person has said so.
    assert_eq!(
        vmirror(pair.b(), &["resolve", "vm", "--run-here", "--force"]).code,
        Some(0),
        "{}",
        pair.logs()
    );
    assert!(pair.runs_on("vm", pair.b()));
    guest.sound_since(&before);
}

#[test]
fn a_switch_over_that_fails_leaves_a_guest_with_private_memory_running_where_it_was() {
    let pair = Pair::start();
    let (spec, qmp) = by_hand(&pair, &[]);
    let mut qemu = pair.a().boot(&spec).unwrap();
    qemu.wait_ready(PATIENCE).unwrap();
    let guest = Guest::ready("vm", &spec);
    let before = guest.status();
    adopt(pair.a(), &qmp);
    let held = [pair.a(), pair.b()].map(|host| host.inventory().unwrap());
    // Its agent ends when the guest is paused and the copy complete, and the next finds it so.
    let (migration, source) = pair.ready("vm");
    pair.a().kill_agent().unwrap();
    drop(source);
    assert_eq!(migration.ended().code, Some(3));
    pair.a().start_agent().unwrap();
    until("it runs again", || pair.runs_on("vm", pair.a()));
    pair.give_up_if_in_doubt("vm", &held[1]);
    guest.sound_since(&before);
    report_adds_up(&pair.migrate("vm", pair.a(), pair.b(), &[]), &guest);
    guest.sound_since(&before);
}

#[test]
fn a_guest_with_private_memory_has_its_disk_where_it_stays_and_where_it_goes() {
    if !root_or_skip("hosts with storage of their own") {
        return;
    }
    let pair = Pair::with_local_disks();
    disk::create(&image(pair.a(), "disk.qcow2"), Format::Qcow2, 32 * MIB).unwrap();
    let blocks =
        Work::Blocks { pattern: Pattern::Random, io: Io::Direct, rate: 100, depth: 2, check_rate: 100 };
    let own = TestDisk {
        roles: vec![blocks.within(16)],
        ..TestDisk::new(pair.a().local_dir().join("disk.qcow2"), Format::Qcow2, "d")
    };
    let (spec, qmp) = by_hand(&pair, &[]);
    let spec = GuestSpec { disks: vec![own], extra: vec!["-daemonize".into()], ..spec };
    // Where the agent sees the host's own storage.
    let place = format!("--mount=/proc/{}/ns/mnt", pair.a().agent_pid().unwrap());
    let line = spec.command_line();
    assert!(pair.a().command("nsenter").arg(place).arg("--").args(&line).status().unwrap().success());
    let guest = Guest::ready("vm", &spec);
    let before = guest.status();
    adopt(pair.a(), &qmp);
    // QEMU has given its images up by then, and takes them back.
    let (migration, source) = pair.ready("vm");
    pair.a().kill_agent().unwrap();
    drop(source);
    assert_eq!(migration.ended().code, Some(3));
    pair.a().start_agent_with(&local()).unwrap();
    until("it runs again", || pair.runs_on("vm", pair.a()));
    let now = guest.status();
    guest.sound_since(&before);
    let moved = pair.migrate("vm", pair.a(), pair.b(), &[]);
    assert_eq!(moved.disks[0].mode, DiskMode::Mirrored);
    report_adds_up(&moved, &guest);
    report_adds_up(&pair.migrate("vm", pair.b(), pair.a(), &[]), &guest);
    guest.sound_since(&now);
}

#[test]
fn a_switch_over_that_is_cancelled_leaves_a_guest_with_private_memory_as_it_was() {
    let pair = Pair::start();
    let (guest, mut monitor) = with_another_monitor(&pair);
    let before = guest.status();
    let (migration, stopped) = pair.switching_over("vm");
    assert!(is_marked(&mut monitor));
    let _ = vmirror(pair.a(), &["cancel", "vm"]);
    drop(stopped);
    assert_eq!(migration.ended().report().outcome, Outcome::Cancelled);
    until("it runs again", || pair.runs_on("vm", pair.a()));
    assert!(!is_marked(&mut monitor));
    guest.sound_since(&before);
    // One that its user pauses after that is a paused VM to the next agent, too.
    monitor.execute("stop", json!({})).unwrap();
    pair.a().stop_agent().unwrap();
    pair.a().start_agent().unwrap();
    until("it is found again", || pair.show("vm", pair.a()).is_some_and(|vm| vm["state"] != "recovering"));
    assert_eq!(pair.show("vm", pair.a()).unwrap()["state"], "paused", "{}", pair.logs());
    monitor.execute("cont", json!({})).unwrap();
    report_adds_up(&pair.migrate("vm", pair.a(), pair.b(), &[]), &guest);
}

#[test]
fn a_guest_with_private_memory_moves_by_qemus_own_stream() {
    // QEMU 7.2's own migration loses pages of an emulated guest that writes, were it only its kernel.
    let test = "a_guest_with_private_memory_moves_by_qemus_own_stream";
    let Some(pair) = Pair::of_qemu_10_or_skip(test) else { return };
    let (spec, qmp) = by_hand(&pair, &["-daemonize"]);
    let guest = Guest::by_hand(pair.a(), "vm", &spec);
    adopt(pair.a(), &qmp);
    let before = guest.status();
    let report = pair.migrate("vm", pair.a(), pair.b(), &["--engine", "qemu"]);
    assert_eq!(report.outcome, Outcome::Completed, "{report:#?}");
    guest.sound_since(&before);
}

#[test]
fn a_guest_with_private_memory_that_outruns_the_link_arrives_and_lacks_nothing() {
    if !root_or_skip("a link that is limited") {
        return;
    }
    let pair = Pair::start();
    let (spec, qmp) = by_hand(&pair, &["-daemonize"]);
    let spec = pair.outrun_by(spec);
    let guest = Guest::by_hand(pair.a(), "vm", &spec);
    let before = guest.status();
    adopt(pair.a(), &qmp);
    let report = pair.migrate("vm", pair.a(), pair.b(), &["--on-diverge", "post-copy"]);
    assert_eq!(report.verification.proof, Verdict::Match, "{report:#?}");
    assert!(report.post_copy.is_some_and(|late| late.pages > 0));
    guest.sound_since(&before);
}

/// An adopted guest, and the monitor of another program beside the agent's.
fn with_another_monitor(pair: &Pair) -> (Guest, Monitor) {
    let other = pair.a().directory().join("other.qmp");
    let second = format!("unix:{},server=on,wait=off", other.display());
    let (spec, qmp) = by_hand(pair, &["-qmp", &second, "-daemonize"]);
    let guest = Guest::by_hand(pair.a(), "vm", &spec);
    let monitor = Monitor::connect(&other).unwrap();
    adopt(pair.a(), &qmp);
    (guest, monitor)
}

/// Whether QEMU has what says that it is about to be handed over.
fn is_marked(monitor: &mut Monitor) -> bool {
    let objects = monitor.execute("qom-list", json!({ "path": "/objects" })).unwrap();
    let name = |object: &serde_json::Value| object["name"].as_str().unwrap().to_owned();
    objects.as_array().unwrap().iter().map(name).any(|name| name.starts_with("vmirror-"))
}

/// A guest that is about to be handed over, while something is done to it by another monitor.
fn about_to_leave(during: impl FnOnce(&Pair, &mut Monitor)) -> (Pair, Said) {
    let pair = Pair::start();
    let (guest, mut monitor) = with_another_monitor(&pair);
    let before = guest.status();
    let (migration, source) = pair.ready("vm");
    during(&pair, &mut monitor);
    drop(source);
    let said = migration.ended();
    assert!(!pair.runs_on("vm", pair.b()), "{said:?}");
    if status(&mut monitor) == "running" {
        guest.sound_since(&before);
        assert!(!is_marked(&mut monitor));
    }
    (pair, said)
}

fn status(monitor: &mut Monitor) -> String {
    monitor.execute("query-status", json!({})).unwrap()["status"].as_str().unwrap().to_owned()
}

#[test]
fn a_guest_that_somebody_lets_run_before_it_is_handed_over_stays() {
    let (pair, said) = about_to_leave(|_, monitor| drop(monitor.execute("cont", json!({})).unwrap()));
    assert_eq!(said.report().error.unwrap().finding.kind, "touched", "{said:?}");
    assert!(pair.runs_on("vm", pair.a()));
}

#[test]
fn a_guest_that_somebody_migrates_before_it_is_handed_over_is_neither_run_nor_handed_over() {
    let to = |pair: &Pair| format!("exec:cat > {}", pair.a().directory().join("elsewhere").display());
    let (pair, said) = about_to_leave(|pair, monitor| {
        monitor.execute("migrate", json!({ "uri": to(pair) })).unwrap();
        until("it has been migrated", || {
            monitor.execute("query-migrate", json!({})).unwrap()["status"] == "completed"
        });
    });
    assert_eq!(said.report().error.unwrap().finding.kind, "migrates-already", "{said:?}");
    assert!(!pair.runs_on("vm", pair.a()));
    // Nor does an agent that finds it so.
    pair.a().kill_agent().unwrap();
    pair.a().start_agent().unwrap();
    until("it is found again", || pair.show("vm", pair.a()).unwrap()["state"] != "recovering");
    assert!(!pair.runs_on("vm", pair.a()));
}

#[test]
fn a_guest_that_is_reset_before_it_is_handed_over_stays_and_boots_anew() {
    let pair = Pair::start();
    let (_guest, mut monitor) = with_another_monitor(&pair);
    let (migration, source) = pair.ready("vm");
    monitor.execute("system_reset", json!({})).unwrap();
    drop(source);
    let said = migration.ended();
    assert_eq!(said.report().error.unwrap().finding.kind, "touched", "{said:?}");
    until("it runs", || pair.runs_on("vm", pair.a()));
    // Nor does it stand for good where its agent ends then: QEMU says that it was never launched.
    let (_migration, source) = pair.ready("vm");
    monitor.execute("system_reset", json!({})).unwrap();
    until("it is reset", || status(&mut monitor) == "prelaunch");
    pair.a().kill_agent().unwrap();
    drop(source);
    pair.a().start_agent().unwrap();
    until("it runs again", || pair.runs_on("vm", pair.a()));
}

#[test]
fn a_file_that_a_guest_has_a_private_copy_of_is_not_the_guests_memory() {
    let pair = Pair::start();
    let template = pair.a().directory().join("template");
    let content = noise(256 * MIB);
    fs::write(&template, &content).unwrap();
    let backend = format!("memory-backend-file,id=m,size=256M,share=off,mem-path={}", template.display());
    let (spec, qmp) = by_hand(&pair, &["-object", &backend, "-machine", "memory-backend=m"]);
    let mut qemu = pair.a().boot(&spec).unwrap();
    qemu.wait_ready(PATIENCE).unwrap();
    let guest = Guest::ready("vm", &spec);
    let before = guest.status();
    adopt(pair.a(), &qmp);
    report_adds_up(&pair.migrate("vm", pair.a(), pair.b(), &["--verify", "strict"]), &guest);
    guest.sound_since(&before);
    assert!(fs::read(&template).unwrap() == content, "it is others' too");
}

#[test]
fn what_a_guest_with_private_memory_gives_back_is_zero_there_too() {
    let pair = Pair::start();
    let second = pair.a().directory().join("balloon.qmp");
    let socket = format!("unix:{},server=on,wait=off", second.display());
    let (spec, qmp) = by_hand(&pair, &["-device", "virtio-balloon-pci", "-qmp", &socket]);
    // Of 160 MiB, with kernel and all.
    let spec = GuestSpec { fill_mib: 64, ..spec };
    let mut qemu = pair.a().boot(&spec).unwrap();
    qemu.wait_ready(PATIENCE).unwrap();
    let guest = Guest::ready("vm", &spec);
    let before = guest.status();
    adopt(pair.a(), &qmp);
    let _ = pair.mirror("vm", pair.a(), pair.b(), &[]);
    let mut monitor = Monitor::connect(&second).unwrap();
    for size in [160 * MIB, 256 * MIB, 192 * MIB] {
        monitor.execute("balloon", json!({ "value": size })).unwrap();
        until("the balloon has its size", || {
            monitor.execute("query-balloon", json!({})).unwrap()["actual"].as_u64().unwrap().abs_diff(size)
                < MIB
        });
    }
    let audit = vmirror(pair.a(), &["verify", "vm", "--json"]).done().json();
    assert_eq!((&audit["gate"], &audit["mismatches"]), (&"match".into(), &0.into()), "{audit}");
    report_adds_up(&vmirror(pair.a(), &["switch", "vm", "--json"]).done().report(), &guest);
    guest.sound_since(&before);
}
