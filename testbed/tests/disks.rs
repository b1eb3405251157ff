//! The test guest's work on its disks, and that it notices what becomes of them.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use testbed::disk::{self, Format};
use testbed::guest_spec::{Aio, Cache, GuestSpec, Io, Nic, Pattern, Syntax, TestDisk, Work};
use testbed::{Client, Monitor, Programs, RunningGuest, Testbed, ram, root_or_skip};

const MIB: u64 = 1 << 20;
/// Longer than any boot takes, even with the machine full of other work.
const BOOT: Duration = Duration::from_secs(120);
const WORK: Duration = Duration::from_secs(120);

/// A testbed with a guest that has these disks. The guest first: it goes first.
struct Bed {
    guest: RunningGuest,
    testbed: Testbed,
    address: Ipv4Addr,
    qmp: PathBuf,
}

impl Bed {
    fn start(disks: impl FnOnce(&Path) -> Vec<TestDisk>) -> Self {
        let testbed = Testbed::with(&Programs { vmirror: None, ..Programs::find() }).unwrap();
        testbed.a().add_tap("tap0").unwrap();
        let nic = Nic::new("tap0", 10);
        let (address, qmp) = (nic.address, testbed.a().run_dir().join("vm.qmp"));
        let spec = GuestSpec {
            fill_mib: 16,
            memory_mib: 256,
            nic: Some(nic),
            qmp: Some(qmp.clone()),
            disks: disks(&testbed.a().disk_dir()),
            ..GuestSpec::new(testbed.a().serial("vm")).unwrap()
        };
        let mut guest = testbed.a().boot(&spec).unwrap();
        guest.wait_ready(BOOT).unwrap();
        Self { guest, testbed, address, qmp }
    }

    fn client(&self) -> &Client {
        self.testbed.client().unwrap()
    }

    /// Switches the guest off, and waits until QEMU has ended.
    fn power_off(&mut self) {
        self.client().tell(self.address, "poweroff").unwrap();
        let start = Instant::now();
        while self.guest.exit_status().is_none() {
            assert!(start.elapsed() < WORK, "QEMU ends when the guest switches itself off");
            thread::sleep(Duration::from_millis(50));
        }
    }
}

fn blocks(pattern: Pattern, io: Io, rate: u64) -> Work {
    Work::Blocks { pattern, io, rate, depth: 2, check_rate: 100 }
}

#[test]
fn a_guest_at_work_on_its_disks_finds_them_sound_and_leaves_them_clean() {
    const NAME: &str = "a_guest_at_work_on_its_disks_finds_them_sound_and_leaves_them_clean";
    if !root_or_skip(NAME) {
        return;
    }
    let (mut raw, mut qcow2, mut ext4) = (PathBuf::new(), PathBuf::new(), PathBuf::new());
    let mut bed = Bed::start(|directory| {
        [raw, qcow2, ext4] = ["d.raw", "d.qcow2", "d.ext4"].map(|name| directory.join(name));
        disk::create(&raw, Format::Raw, 64 * MIB).unwrap();
        disk::create(&qcow2, Format::Qcow2, 64 * MIB).unwrap();
        disk::create_ext4(&ext4, 64 * MIB).unwrap();
        vec![
            TestDisk {
                aio: Aio::Native,
                roles: vec![blocks(Pattern::Random, Io::Direct, 300).in_the_rest()],
                ..TestDisk::new(&raw, Format::Raw, "random")
            },
            TestDisk {
                cache: Cache::Writeback,
                roles: vec![
                    blocks(Pattern::Sequential, Io::Buffered, 300).within(32),
                    Work::Journal { rate: 50 }.within(1),
                ],
                ..TestDisk::new(&qcow2, Format::Qcow2, "journal")
            },
            TestDisk {
                syntax: Syntax::Drive,
                roles: vec![Work::Ext4 { rate: 20 }.in_the_rest()],
                ..TestDisk::new(&ext4, Format::Raw, "files")
            },
        ]
    });
    let journal = bed.client().journal(bed.address, "journal").unwrap();
    let status = bed
        .guest
        .console()
        .wait_for("work on all disks", WORK, |status| {
            let disks = status.disks.clone().unwrap();
            disks.writes > 1500 && disks.checked > 50 && disks.acknowledged["journal"] > 20
        })
        .unwrap();
    assert_eq!(status.faults(), 0, "{}", bed.guest.console().text());
    let verdict = bed.client().check_disks(bed.address).unwrap();
    eprintln!("{verdict:?}");
    assert_eq!(verdict.faults.total(), 0, "{}", bed.guest.console().text());
    assert!(verdict.blocks > 500 && verdict.records > 20 && verdict.files > 0, "{verdict:?}");

    assert!(disk::check_ext4(&ext4, Format::Raw).is_err(), "a file system in use is not clean");
    let quiet = bed.client().quiet_disks(bed.address).unwrap();
    let disks = quiet.disks.clone().unwrap();
    assert!(disks.quiet && quiet.faults() == 0, "{quiet:?}");
    let acknowledged = disks.acknowledged["journal"];
    let start = Instant::now();
    while journal.acknowledged() < acknowledged {
        assert!(start.elapsed() < WORK, "{:?}, {acknowledged} acknowledged", journal.report());
        thread::sleep(Duration::from_millis(20));
    }
    // Clean while the guest still runs, as it no longer touches it; so is a second time of quiet.
    disk::check_ext4(&ext4, Format::Raw).unwrap();
    let later = bed.client().quiet_disks(bed.address).unwrap().disks.unwrap();
    assert_eq!((later.writes, &later.acknowledged), (disks.writes, &disks.acknowledged));
    let verdict = bed.client().check_disks(bed.address).unwrap();
    assert_eq!((verdict.faults.total(), verdict.files), (0, 0), "{verdict:?}");

    let report = journal.report();
    assert_eq!((report.acknowledged, report.connections, report.went_back), (acknowledged, 1, vec![]));
    bed.power_off();
    let replay = disk::journal(&qcow2, Format::Qcow2, "journal", 32 * MIB..33 * MIB).unwrap();
    assert_eq!((replay.last(), replay.faults(acknowledged)), (acknowledged, vec![]));
    assert!(disk::allocated(&raw).unwrap() < 64 * MIB);
}

#[test]
fn a_guest_that_crashes_loses_no_record_that_it_has_acknowledged() {
    if !root_or_skip("a_guest_that_crashes_loses_no_record_that_it_has_acknowledged") {
        return;
    }
    let bed = Bed::start(|directory| {
        let [raw, ext4] = ["d.raw", "d.ext4"].map(|name| directory.join(name));
        disk::create(&raw, Format::Raw, 4 * MIB).unwrap();
        disk::create_ext4(&ext4, 64 * MIB).unwrap();
        let journal = vec![Work::Journal { rate: 0 }.within(1), Work::BLOCKS.in_the_rest()];
        let files = vec![Work::Ext4 { rate: 0 }.in_the_rest()];
        vec![
            TestDisk { roles: journal, ..TestDisk::new(raw, Format::Raw, "journal") },
            TestDisk { roles: files, ..TestDisk::new(ext4, Format::Raw, "files") },
        ]
    });
    let journal = bed.client().journal(bed.address, "journal").unwrap();
    let console = bed.guest.console();
    let before = console
        .wait_for("records", WORK, |status| status.disks.clone().unwrap().acknowledged["journal"] > 50)
        .unwrap();
    bed.client().tell(bed.address, "panic").unwrap();
    let after = console.wait_for("another boot", BOOT, |status| status.boot_id != before.boot_id).unwrap();
    assert_eq!(after.faults(), 0, "{}", console.text());
    let acknowledged = journal.acknowledged();
    console
        .wait_for("more records", WORK, |status| {
            status.disks.clone().unwrap().acknowledged["journal"] > acknowledged + 20
        })
        .unwrap();
    let start = Instant::now();
    while journal.report().connections < 2 || journal.acknowledged() <= acknowledged {
        assert!(start.elapsed() < WORK, "{:?}", journal.report());
        thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(journal.report().went_back, []);
    assert_eq!(bed.client().check_disks(bed.address).unwrap().faults.total(), 0, "{}", console.text());
}

#[test]
fn a_block_changed_behind_the_guests_back_is_found() {
    if !root_or_skip("a_block_changed_behind_the_guests_back_is_found") {
        return;
    }
    let mut image = PathBuf::new();
    let bed = Bed::start(|directory| {
        image = directory.join("d.raw");
        disk::create(&image, Format::Raw, 16 * MIB).unwrap();
        // Hardly anything is read in passing, and no block is written a second time before it is changed.
        let work =
            Work::Blocks { pattern: Pattern::Sequential, io: Io::Direct, rate: 200, depth: 1, check_rate: 1 };
        vec![TestDisk {
            roles: vec![work.within(8), Work::Journal { rate: 20 }.within(1)],
            ..TestDisk::new(&image, Format::Raw, "d")
        }]
    });
    let console = bed.guest.console();
    console
        .wait_for("blocks and records", WORK, |status| {
            let disks = status.disks.clone().unwrap();
            disks.writes > 300 && disks.acknowledged["d"] > 20
        })
        .unwrap();
    bed.client().tell(bed.address, "pause").unwrap();
    assert_eq!(bed.client().check_disks(bed.address).unwrap().faults.total(), 0, "{}", console.text());

    let mut monitor = Monitor::connect(&bed.qmp).unwrap();
    monitor.execute("stop", json!({})).unwrap();
    let block = |number| disk::find_block(&image, |block| block.number == number).unwrap().unwrap();
    let [(torn, _), (misplaced, _), (lost, _)] = [10, 20, 30].map(block);
    ram::flip(&image, torn + 1234, 0x10).unwrap();
    let file = std::fs::File::options().read(true).write(true).open(&image).unwrap();
    use std::os::unix::fs::FileExt;
    let mut bytes = vec![0; 4096];
    file.read_exact_at(&mut bytes, lost).unwrap();
    file.write_all_at(&bytes, misplaced).unwrap();
    file.write_all_at(&vec![0; 4096], lost).unwrap();
    // The fifth record.
    file.write_all_at(&[0; 512], 8 * MIB + 4 * 512).unwrap();
    monitor.execute("cont", json!({})).unwrap();

    let faults = bed.client().check_disks(bed.address).unwrap().faults;
    assert_eq!((faults.torn, faults.misplaced, faults.lost, faults.total()), (1, 1, 2, 4));
    let status = bed.client().status(bed.address).unwrap();
    assert_eq!(status.faults(), 4, "what was found stays in the status: {status:?}");
    let text = console.text();
    assert!(text.contains("disk d: Block(10): Torn"), "the console names the block: {text}");
    assert!(text.contains("disk d: Record(5): Lost { found: 0 }, expected 5"), "{text}");
}
