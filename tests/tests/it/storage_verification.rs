//! A copy of a disk that differs from its original is found, and must not stay different.

use std::fs;

use end_to_end::{Guest, Pair, image, report_adds_up, until, vmirror, write_noise};
use session::report::DiskMode;
use testbed::disk::{self, Format};
use testbed::guest_spec::{Cache, GuestSpec, Io, Pattern, TestDisk, Work};
use testbed::{Host, ram, root_or_skip};

const MIB: u64 = 1 << 20;
/// Bytes of the disk, of which the guest writes to the first half.
const SIZE: u64 = 32 * MIB;
const BLOCKS: u64 = SIZE / 65536;
/// A byte that the guest does not write to.
const STILL: u64 = SIZE * 3 / 4 + 1234;

/// A small guest at work on a disk at host A, with a mirror of it at host B that is in sync.
fn mirrored(pair: &Pair) -> Guest {
    let name = "d.raw";
    disk::create(&image(pair.a(), name), Format::Raw, SIZE).unwrap();
    write_noise(&image(pair.a(), name), SIZE / 2, SIZE / 2);
    let work = Work::Blocks { pattern: Pattern::Random, io: Io::Direct, rate: 50, depth: 1, check_rate: 50 };
    let disk = TestDisk {
        cache: Cache::Writeback,
        roles: vec![work.within(SIZE / 2 / MIB)],
        ..TestDisk::new(pair.a().local_dir().join(name), Format::Raw, "d")
    };
    let spec = GuestSpec { fill_mib: 16, rate: 50, disks: vec![disk], ..pair.spec("vm", 128) };
    let guest = pair.run(pair.a(), "vm", &spec);
    let progress = pair.mirror("vm", pair.a(), pair.b(), &[]).json();
    assert_eq!(progress["in_sync"], true, "{progress}");
    guest
}

fn repaired(host: &Host) -> u64 {
    let status = vmirror(host, &["status", "vm", "--json"]).done().json();
    status[0]["verification"]["repaired_blocks"].as_u64().unwrap()
}

/// Whether the copy has that byte as the original has it.
fn is_whole(pair: &Pair, byte: u64) -> bool {
    let [original, copy] = [pair.a(), pair.b()].map(|host| fs::read(image(host, "d.raw")).unwrap());
    let byte = usize::try_from(byte).unwrap();
    original[byte] == copy[byte]
}

fn switches(pair: &Pair, guest: &Guest, spoiled: u64) {
    let report = vmirror(pair.a(), &["switch", "vm", "--json"]).done().report();
    report_adds_up(&report, guest);
    let verification = &report.verification;
    assert_eq!(report.disks[0].mode, DiskMode::Mirrored);
    assert_eq!(
        (verification.proof_blocks, verification.mismatched_blocks, verification.repaired_blocks),
        (BLOCKS, 0, spoiled),
        "{verification:?}"
    );
    assert!(verification.audited_blocks > 0, "{verification:?}");
    eprintln!("downtime {:.1} ms, {:?}", report.downtime_ms, report.pause);
    assert!(pair.runs_on("vm", pair.b()));
    pair.holds_nothing(pair.a());
}

#[test]
fn a_flipped_bit_of_a_disk_does_not_survive_an_audit() {
    if !root_or_skip("hosts with storage of their own") {
        return;
    }
    let pair = Pair::with_local_disks();
    let guest = mirrored(&pair);
    let before = guest.status();
    ram::flip(&image(pair.b(), "d.raw"), STILL, 0x10).unwrap();
    let found = vmirror(pair.a(), &["verify", "vm", "--json"]).done().json();
    // All but what the guest was at.
    assert!(found["audited_blocks"].as_u64().unwrap() >= 2 * BLOCKS - BLOCKS / 4, "{found}");
    until("the block is repaired", || repaired(pair.a()) >= 1 && is_whole(&pair, STILL));
    switches(&pair, &guest, 1);
    guest.sound_since(&before);
}

#[test]
fn a_flipped_bit_of_a_disk_does_not_stay_even_if_nobody_asks() {
    if !root_or_skip("hosts with storage of their own") {
        return;
    }
    let pair = Pair::with_local_disks();
    let guest = mirrored(&pair);
    let before = guest.status();
    let bytes = [STILL, STILL + 10 * 65536, STILL + 20 * 65536];
    bytes.iter().for_each(|byte| ram::flip(&image(pair.b(), "d.raw"), *byte, 0x10).unwrap());
    until("the rolling audit has been over all of it", || {
        repaired(pair.a()) >= bytes.len() as u64 && bytes.iter().all(|byte| is_whole(&pair, *byte))
    });
    switches(&pair, &guest, bytes.len() as u64);
    guest.sound_since(&before);
}
