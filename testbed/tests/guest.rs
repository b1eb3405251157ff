//! The test guest, booted for real.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::PathBuf;
use std::time::Duration;

use testbed::guest_spec::{GuestSpec, Nic, Pattern, Ram};
use testbed::{Programs, RunningGuest, Testbed, ram, root_or_skip};

/// Longer than any boot takes, even with the machine full of other work.
const BOOT: Duration = Duration::from_secs(120);
const WORK: Duration = Duration::from_secs(120);

fn rootless() -> Testbed {
    let programs = Programs { vmirror: None, ..Programs::find() };
    Testbed::rootless_with(&programs).unwrap()
}

fn boot(testbed: &Testbed, spec: &GuestSpec) -> RunningGuest {
    let mut guest = testbed.a().boot(spec).unwrap();
    guest.wait_ready(BOOT).unwrap();
    guest
}

/// Boots a guest with that pattern and lets it check itself twice while it writes.
fn writes_and_stays_whole(pattern: Pattern, qemu: Option<PathBuf>) {
    let testbed = rootless();
    let mut spec = GuestSpec {
        fill_mib: 64,
        memory_mib: 256,
        pattern,
        ..GuestSpec::new(testbed.a().serial("vm")).unwrap()
    };
    spec.rate = 1000;
    spec.qemu = qemu.unwrap_or(spec.qemu);
    let guest = boot(&testbed, &spec);
    let status = guest
        .console()
        .wait_for("two passes and a thousand writes", WORK, |status| {
            status.passes >= 2 && status.writes > 1000
        })
        .unwrap();
    assert_eq!(status.faults(), 0, "{status:?}");
    assert_eq!(status.pages, 64 * 256);
    assert!(status.generation_max > 1);
}

#[test]
fn random_writes_leave_memory_whole() {
    writes_and_stays_whole(Pattern::Random, None);
}

#[test]
fn sequential_writes_leave_memory_whole() {
    writes_and_stays_whole(Pattern::Sequential, None);
}

#[test]
fn counters_leave_memory_whole() {
    writes_and_stays_whole(Pattern::Counter, None);
}

#[test]
fn incompressible_writes_leave_memory_whole() {
    writes_and_stays_whole(Pattern::Incompressible, None);
}

#[test]
fn qemu_10_runs_the_guest() {
    if let Some(qemu) = Programs::qemu_10_or_skip("qemu_10_runs_the_guest") {
        writes_and_stays_whole(Pattern::Random, Some(qemu));
    }
}

/// A guest with its RAM in a file, so that the test can reach it.
fn with_ram_file(testbed: &Testbed) -> (RunningGuest, PathBuf) {
    let path = testbed.a().ram_dir().join("vm");
    let spec = GuestSpec {
        fill_mib: 32,
        memory_mib: 256,
        ram: Ram::File(path.clone()),
        ..GuestSpec::new(testbed.a().serial("vm")).unwrap()
    };
    (boot(testbed, &spec), path)
}

#[test]
fn a_bit_flipped_from_outside_is_reported_as_torn() {
    let testbed = rootless();
    let (guest, path) = with_ram_file(&testbed);
    let sound = guest.console().wait_for("a pass", WORK, |status| status.passes > 0).unwrap();
    assert_eq!(sound.faults(), 0);
    let (offset, identity) = ram::find_page(&path, |page| page.number == 100).unwrap().unwrap();
    assert_eq!((offset % 4096, identity.generation), (0, 1));
    ram::flip(&path, offset + 1234, 0x10).unwrap();
    let status = guest.console().wait_for("the fault", WORK, |status| status.faults() > 0).unwrap();
    assert_eq!((status.torn, status.stale, status.lost), (1, 0, 0), "{status:?}");
    assert!(guest.console().text().contains("page: 100"), "the console names the page");
}

#[test]
fn a_page_wiped_or_taken_back_from_outside_is_reported_as_lost_or_stale() {
    use std::os::unix::fs::FileExt;
    let testbed = rootless();
    let (guest, path) = with_ram_file(&testbed);
    let file = std::fs::File::options().read(true).write(true).open(&path).unwrap();
    let (wiped, _) = ram::find_page(&path, |page| page.number == 10).unwrap().unwrap();
    file.write_all_at(&[0; 4096], wiped).unwrap();
    let status = guest.console().wait_for("the loss", WORK, |status| status.faults() > 0).unwrap();
    assert_eq!((status.torn, status.stale, status.lost), (0, 0, 1), "{status:?}");

    // The same page with an older generation than its record says: written anew with another number it would be lost, so
    // another page takes its place in time, not in space.
    let (offset, identity) = ram::find_page(&path, |page| page.number == 20).unwrap().unwrap();
    let mut page = vec![0; 4096];
    file.read_exact_at(&mut page, offset).unwrap();
    let older = guest::page::Identity { generation: identity.generation - 1, ..identity };
    guest::page::write(&mut page, older, guest::page::Content::Text);
    file.write_all_at(&page, offset).unwrap();
    let status = guest.console().wait_for("staleness", WORK, |status| status.stale > 0).unwrap();
    assert_eq!((status.torn, status.stale, status.lost), (0, 1, 1), "{status:?}");
}

#[test]
fn a_guest_that_reboots_shows_another_boot_id() {
    if !root_or_skip("a_guest_that_reboots_shows_another_boot_id") {
        return;
    }
    let testbed = Testbed::with(&Programs { vmirror: None, ..Programs::find() }).unwrap();
    testbed.a().add_tap("tap0").unwrap();
    let nic = Nic::new("tap0", 10);
    let address = nic.address;
    let spec = GuestSpec {
        fill_mib: 16,
        memory_mib: 256,
        nic: Some(nic),
        ..GuestSpec::new(testbed.a().serial("vm")).unwrap()
    };
    let mut guest = boot(&testbed, &spec);
    let client = testbed.client().unwrap();
    let first = client.status(address).unwrap();
    client.tell(address, "reboot").unwrap();
    let second =
        guest.console().wait_for("another boot", BOOT, |status| status.boot_id != first.boot_id).unwrap();
    assert_eq!(second.faults(), 0);

    client.tell(address, "rate 500").unwrap();
    guest.console().wait_for("writes", WORK, |status| status.writes > 0).unwrap();
    client.tell(address, "pause").unwrap();
    // Writes that were under way when the answer was sent may still be counted; after that, none are.
    std::thread::sleep(Duration::from_millis(500));
    let paused = client.status(address).unwrap();
    let later =
        guest.console().wait_for("time", WORK, |status| status.uptime_ms > paused.uptime_ms + 2000).unwrap();
    assert_eq!(later.writes, paused.writes);
    assert!(client.tell(address, "dance").is_err());

    client.tell(address, "poweroff").unwrap();
    let start = std::time::Instant::now();
    while guest.exit_status().is_none() {
        assert!(start.elapsed() < WORK, "QEMU ends when the guest switches itself off");
        std::thread::sleep(Duration::from_millis(50));
    }
}
