//! A balloon takes pages away under the mirror and gives others back; what the guest then has must arrive all the same.

use std::time::Duration;

use end_to_end::{Guest, Pair, report_adds_up, until, vmirror};
use serde_json::{Value, json};
use session::report::Verdict;
use testbed::guest_spec::{GuestSpec, Pattern};
use testbed::{Monitor, TestbedError};

const MEMORY: u64 = 256;

/// A guest with a balloon, and a monitor that is not the agent's.
fn with_balloon(pair: &Pair) -> (Guest, Monitor) {
    with(pair, &["-device", "virtio-balloon-pci"])
}

/// A guest with these devices, and a monitor that is not the agent's.
fn with(pair: &Pair, devices: &[&str]) -> (Guest, Monitor) {
    let qmp = pair.a().directory().join("own.qmp");
    let spec = GuestSpec {
        fill_mib: 64,
        rate: 300,
        pattern: Pattern::Random,
        qmp: Some(qmp.clone()),
        extra: devices.iter().map(|&word| word.to_owned()).collect(),
        ..pair.spec("vm", MEMORY)
    };
    let guest = pair.run(pair.a(), "vm", &spec);
    (guest, Monitor::connect(&qmp).unwrap())
}

/// Sets the balloon, which takes its time. False where its QEMU has ended.
fn set(qmp: &mut Monitor, mib: u64) -> bool {
    match qmp.execute("balloon", json!({ "value": mib << 20 })) {
        Err(TestbedError::Monitor { .. }) => false,
        set => !set.unwrap().is_null(),
    }
}

/// Sets the balloon, and waits until the guest has followed.
fn leave(qmp: &mut Monitor, mib: u64) {
    qmp.execute("balloon", json!({ "value": mib << 20 })).unwrap();
    until("the balloon has followed", || {
        qmp.execute("query-balloon", json!({})).unwrap()["actual"] == mib << 20
    });
}

#[test]
fn a_balloon_that_moves_while_the_guest_is_mirrored_spoils_no_page() {
    let pair = Pair::start();
    let (guest, mut qmp) = with_balloon(&pair);
    let before = guest.status();
    let _ = pair.mirror("vm", pair.a(), pair.b(), &[]);
    for mib in [140, MEMORY, 160] {
        leave(&mut qmp, mib);
        // Every page that the balloon took is compared, and the guest's writes go on meanwhile.
        let audit: Value = vmirror(pair.a(), &["verify", "vm", "--json"]).done().json();
        assert_eq!(audit["gate"], "match", "{audit}");
        assert_eq!(audit["mismatches"], 0, "{audit}");
        guest.sane_since(&before);
    }
    let report = vmirror(pair.a(), &["switch", "vm", "--json"]).done().report();
    report_adds_up(&report, &guest);
    let after = guest.sound_since(&before);
    assert!(after.writes > before.writes);
    pair.holds_nothing(pair.a());
}

#[test]
fn a_balloon_that_inflates_during_a_migration_spoils_no_page() {
    let pair = Pair::start();
    let (guest, mut qmp) = with_balloon(&pair);
    let before = guest.status();
    leave(&mut qmp, 200);
    let migration = pair.begin("vm", pair.a(), pair.b(), &["--bandwidth", "24MiB/s"]);
    migration.reaches("synchronize");
    qmp.execute("balloon", json!({ "value": 140u64 << 20 })).unwrap();
    qmp.execute("balloon", json!({ "value": 220u64 << 20 })).unwrap();
    report_adds_up(&migration.ended().done().report(), &guest);
    guest.sound_since(&before);
}

#[test]
fn a_balloon_that_never_rests_spoils_no_page() {
    let pair = Pair::start();
    let (guest, mut qmp) = with_balloon(&pair);
    let before = guest.status();
    std::thread::scope(|scope| {
        let moving = scope.spawn(move || {
            let mut sizes = [140u64, 230].into_iter().cycle();
            let mut moved = 0;
            // Until the migration has ended this QEMU.
            while set(&mut qmp, sizes.next().unwrap()) {
                moved += 1;
                std::thread::sleep(Duration::from_millis(150));
            }
            moved
        });
        let report = pair.migrate("vm", pair.a(), pair.b(), &["--bandwidth", "64MiB/s"]);
        report_adds_up(&report, &guest);
        let moved = moving.join().unwrap();
        assert!(moved > 2, "{moved}");
    });
    guest.sound_since(&before);
}

#[test]
fn a_guest_that_reports_free_pages_moves_and_no_page_is_another() {
    for devices in [
        &["-device", "virtio-balloon-pci,free-page-reporting=on"][..],
        &["-global", "virtio-balloon-device.free-page-reporting=on", "-device", "virtio-balloon-pci"],
    ] {
        let pair = Pair::start();
        let (guest, mut qmp) = with(&pair, devices);
        let before = guest.status();
        // What the balloon gives back is free, and reported as such while the mirror stands and the guest is handed over.
        let migration = pair.begin("vm", pair.a(), pair.b(), &["--bandwidth", "24MiB/s"]);
        migration.reaches("synchronize");
        for mib in [140, MEMORY, 150, MEMORY] {
            if !set(&mut qmp, mib) {
                break;
            }
            std::thread::sleep(Duration::from_millis(400));
        }
        report_adds_up(&migration.ended().done().report(), &guest);
        guest.sound_since(&before);
        // And back, when most of its memory has not been mapped by its new QEMU yet.
        report_adds_up(&pair.migrate("vm", pair.b(), pair.a(), &[]), &guest);
        guest.sound_since(&before);
    }
}

#[test]
fn memory_that_virtio_mem_gives_back_at_a_reset_raises_no_alarm() {
    let pair = Pair::start();
    let monitor = pair.a().directory().join("own.qmp");
    let monitor = monitor.to_str().unwrap();
    let socket = format!("unix:{monitor},server=on,wait=off");
    pair.run_tiny(
        pair.a(),
        "vm",
        &[
            "-m",
            "64,maxmem=512M",
            "-object",
            "memory-backend-ram,id=v,size=128M",
            "-device",
            "virtio-mem-pci,memdev=v,id=m,requested-size=64M",
            "-qmp",
            &socket,
        ],
    );
    let mut qmp = Monitor::connect(monitor.as_ref()).unwrap();
    let _ = pair.mirror("vm", pair.a(), pair.b(), &[]);
    for _ in 0..3 {
        qmp.execute("system_reset", json!({})).unwrap();
        let audit: Value = vmirror(pair.a(), &["verify", "vm", "--json"]).done().json();
        assert_eq!((&audit["gate"], &audit["mismatches"]), (&"match".into(), &0.into()), "{audit}");
    }
    qmp.execute("system_reset", json!({})).unwrap();
    let report = vmirror(pair.a(), &["switch", "vm", "--json"]).done().report();
    assert_eq!((report.verification.proof, report.verification.mismatches), (Verdict::Match, 0));
    assert!(pair.runs_on("vm", pair.b()));
}
