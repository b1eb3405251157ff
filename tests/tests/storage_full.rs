//! A destination whose file system fills up while a disk is copied: the migration fails in words, the guest does not notice, and a
//! second attempt goes on from what was copied.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::time::{Duration, Instant};

use end_to_end::{Pair, accounted, image, local, noise, until, write_noise};
use migration::Outcome;
use migration::report::DiskMode;
use testbed::disk::{self, Format};
use testbed::guest_spec::{Cache, GuestSpec, Io, Nic, Pattern, TestDisk, Work};
use testbed::root_or_skip;

const MIB: u64 = 1 << 20;
const TAP: &str = "tap0";
/// Bytes of the disk: what the guest writes to, and what cannot be compressed.
const SIZE: u64 = 48 * MIB;
const WORKED: u64 = 8 * MIB;
/// How long a write may take that the copy's failure comes across.
const STALL: Duration = Duration::from_secs(1);

fn moves_when_there_is_room(format: Format) {
    if !root_or_skip("hosts with storage of their own") {
        return;
    }
    let pair = Pair::with_local_disks();
    for host in [pair.a(), pair.b()] {
        host.add_tap(TAP).unwrap();
    }
    pair.b().stop_agent().unwrap();
    pair.b().limit_disks(2 * SIZE).unwrap();
    pair.b().start_agent_with(&local()).unwrap();
    let name = "disk";
    disk::create(&image(pair.a(), name), format, SIZE).unwrap();
    if format == Format::Raw {
        write_noise(&image(pair.a(), name), WORKED, SIZE - WORKED);
    }
    let work = Work::Blocks { pattern: Pattern::Random, io: Io::Direct, rate: 100, depth: 1, check_rate: 50 };
    let disk = TestDisk {
        cache: Cache::Writeback,
        roles: vec![work.within(WORKED / MIB - 1), Work::Journal { rate: 100 }.within(1)],
        ..TestDisk::new(pair.a().local_dir().join(name), format, "d")
    };
    let nic = Nic::new(TAP, 10);
    let address = nic.address;
    let spec =
        GuestSpec { nic: Some(nic), fill_mib: 16, rate: 50, disks: vec![disk], ..pair.spec("vm", 128) };
    let guest = pair.run(pair.a(), "vm", &spec);
    let before = guest.status();
    let journal = pair.client().unwrap().journal(address, "d").unwrap();
    until("records are written", || journal.acknowledged() > 20);

    let copied = || fs::metadata(image(pair.b(), name)).map_or(0, |file| file.blocks() * 512);
    let migration = pair.begin("vm", pair.a(), pair.b(), &["--bandwidth", "8MiB/s"]);
    until("some of the disk is there", || copied() > SIZE / 8);
    let filler = image(pair.b(), "filler");
    // Until there is no room.
    let _ = fs::write(&filler, noise(2 * SIZE));
    let (mut last, mut since, mut longest) = (journal.acknowledged(), Instant::now(), Duration::ZERO);
    let start = Instant::now();
    let mut ended_at = None;
    // A while longer than it takes: the way back is no time to stand still either.
    while ended_at.is_none_or(|ended: Instant| ended.elapsed() < Duration::from_secs(2)) {
        assert!(start.elapsed() < Duration::from_secs(60), "it ends\n{}", pair.logs());
        if migration.has_ended() {
            ended_at.get_or_insert_with(Instant::now);
        }
        let now = journal.acknowledged();
        if now > last {
            (last, since) = (now, Instant::now());
        }
        longest = longest.max(since.elapsed());
        std::thread::sleep(Duration::from_millis(5));
    }
    let said = migration.ended();
    assert_eq!(said.code, Some(1), "{said:?}");
    let report = said.report();
    let error = report.error.unwrap();
    eprintln!("longest wait for a record {longest:.2?}; {error:?}");
    assert_eq!(report.outcome, Outcome::Failed);
    assert_eq!((error.finding.kind.as_str(), error.finding.hint.contains("make room there")), ("disk", true));
    let path = pair.b().local_dir().join(name).display().to_string();
    for word in [path.as_str(), "No space left on device", "at the destination"] {
        assert!(error.finding.message.contains(word), "{word:?} is not said: {error:?}");
    }
    assert!(longest < STALL, "the guest waited {longest:?} for its disk");
    assert!(pair.runs_on("vm", pair.a()));
    assert_eq!(pair.client().unwrap().check_disks(address).unwrap().faults.total(), 0);

    fs::remove_file(&filler).unwrap();
    let was_copied = copied();
    let report = pair.migrate("vm", pair.a(), pair.b(), &[]);
    accounted(&report, &guest);
    let disk = &report.disks[0];
    assert_eq!(disk.mode, DiskMode::Mirrored);
    assert!(
        format != Format::Raw || disk.wire_bytes < SIZE - was_copied / 2,
        "{disk:?}, {was_copied} bytes were there"
    );
    assert_eq!(pair.client().unwrap().check_disks(address).unwrap().faults.total(), 0);
    assert_eq!(journal.report().went_back, []);
    guest.sound_since(&before);
}

#[test]
fn a_full_file_system_ends_the_migration_and_not_the_guests_writes() {
    moves_when_there_is_room(Format::Raw);
}
