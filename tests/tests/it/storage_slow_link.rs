//! A guest that writes faster than its disks' mirror may send is slowed, and not made to stand still in between.

use std::time::Duration;

use end_to_end::{Pair, Writes, image, report_adds_up, until, vmirror};
use testbed::disk::{self, Format};
use testbed::guest_spec::{Cache, GuestSpec, Io, Nic, Pattern, TestDisk, Work};
use testbed::root_or_skip;

const MIB: u64 = 1 << 20;
/// Bytes of the disk, to all of which the guest writes, all the time.
const SIZE: u64 = 64 * MIB;
/// For how long it is looked at, while the disk is copied.
const WATCHED: Duration = Duration::from_secs(10);
const TAP: &str = "tap0";
/// A guest that waits for all that waits waits longer.
const STALL: Duration = Duration::from_secs(2);

#[test]
fn a_guest_that_writes_more_than_the_link_takes_goes_on_writing() {
    if !root_or_skip("hosts with storage of their own") {
        return;
    }
    let pair = Pair::with_local_disks();
    for host in [pair.a(), pair.b()] {
        host.add_tap(TAP).unwrap();
    }
    disk::create(&image(pair.a(), "disk"), Format::Raw, SIZE).unwrap();
    let blocks = Work::Blocks { pattern: Pattern::Random, io: Io::Direct, rate: 0, depth: 1, check_rate: 50 };
    let disk = TestDisk {
        cache: Cache::Writeback,
        roles: vec![blocks.within(SIZE / MIB - 1), Work::Journal { rate: 100 }.within(1)],
        ..TestDisk::new(pair.a().local_dir().join("disk"), Format::Raw, "d")
    };
    let nic = Nic::new(TAP, 10);
    let address = nic.address;
    let spec =
        GuestSpec { nic: Some(nic), fill_mib: 16, rate: 50, disks: vec![disk], ..pair.spec("vm", 128) };
    let guest = pair.run(pair.a(), "vm", &spec);
    let before = guest.status();
    let client = pair.client().unwrap();
    let writes = Writes::watch(client.journal(address, "d").unwrap());
    until("most of the disk is written to", || {
        disk::allocated(&image(pair.a(), "disk")).unwrap() > SIZE / 4 * 3
            && writes.journal().acknowledged() > 20
    });
    let alone = writes.longest_wait();

    let migration = pair.begin("vm", pair.a(), pair.b(), &["--bandwidth", "6MiB/s"]);
    migration.reaches("synchronize");
    let begin = writes.journal().acknowledged();
    std::thread::sleep(WATCHED);
    let (records, longest) = (writes.journal().acknowledged() - begin, writes.longest_wait());
    eprintln!("{records} records in {WATCHED:?}, the longest wait {longest:.2?}, {alone:.2?} before");
    assert!(longest < STALL, "the guest waited {longest:?} for its disk\n{}", pair.logs());
    assert_eq!(vmirror(pair.a(), &["cancel", "vm"]).code, Some(0));
    assert_eq!(migration.ended().code, Some(1));

    let report = pair.migrate("vm", pair.a(), pair.b(), &[]);
    report_adds_up(&report, &guest);
    assert_eq!(client.check_disks(address).unwrap().faults.total(), 0, "{}", guest.console().text());
    assert_eq!(writes.journal().report().went_back, []);
    guest.sound_since(&before);
}
