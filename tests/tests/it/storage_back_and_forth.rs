//! Ten moves of a guest at work on its disks: nothing that it wrote is lost, nothing is copied twice, nothing is left behind.

use std::time::Instant;

use end_to_end::{Guest, Pair, image, report_adds_up, until, vmirror, write_noise};
use session::Report;
use session::report::DiskMode;
use testbed::disk::{self, Format};
use testbed::guest_spec::{Cache, GuestSpec, Io, Nic, Pattern, Syntax, TestDisk, Work};
use testbed::{Host, root_or_skip};

const MIB: u64 = 1 << 20;
const TAP: &str = "tap0";
/// Migrations under load; one more follows without.
const HOPS: usize = 10;
/// Bytes of each disk.
const SIZE: u64 = 96 * MIB;
/// Of the first disk, what the guest works on. Behind it is noise that cannot be compressed, much more than the guest writes during a
/// hop, and then a hole.
const WORKED: u64 = 16 * MIB;
const NOISE: u64 = 48 * MIB;
const DISKS: [(&str, Format); 3] =
    [("random.raw", Format::Raw), ("journal.qcow2", Format::Qcow2), ("files.raw", Format::Raw)];
/// Of the disk with the journal, how much lies before it and what it takes, in MiB.
const JOURNAL: (u64, u64) = (32, 1);

fn disks(pair: &Pair) -> Vec<TestDisk> {
    let [(raw, _), (qcow2, _), (ext4, _)] = DISKS;
    disk::create(&image(pair.a(), raw), Format::Raw, SIZE).unwrap();
    write_noise(&image(pair.a(), raw), WORKED, NOISE);
    disk::create(&image(pair.a(), qcow2), Format::Qcow2, SIZE).unwrap();
    disk::create_ext4(&image(pair.a(), ext4), SIZE).unwrap();
    let local = |name: &str| pair.a().local_dir().join(name);
    let blocks = |pattern, io| Work::Blocks { pattern, io, rate: 200, depth: 2, check_rate: 100 };
    vec![
        TestDisk {
            roles: vec![blocks(Pattern::Random, Io::Direct).within(WORKED / MIB)],
            ..TestDisk::new(local(raw), Format::Raw, "random")
        },
        TestDisk {
            cache: Cache::Writeback,
            roles: vec![
                blocks(Pattern::Sequential, Io::Buffered).within(JOURNAL.0),
                Work::Journal { rate: 50 }.within(JOURNAL.1),
            ],
            ..TestDisk::new(local(qcow2), Format::Qcow2, "journal")
        },
        TestDisk {
            syntax: Syntax::Drive,
            roles: vec![Work::Ext4 { rate: 20 }.in_the_rest()],
            ..TestDisk::new(local(ext4), Format::Raw, "files")
        },
    ]
}

/// One move, with all that must hold for it. Gives back what the disks took on the link.
fn moves(pair: &Pair, guest: &Guest, [from, to]: [&Host; 2]) -> (Report, u64) {
    let report = pair.migrate("vm", from, to, &[]);
    report_adds_up(&report, guest);
    let modes: Vec<DiskMode> = report.disks.iter().map(|disk| disk.mode).collect();
    assert_eq!(modes, [DiskMode::Mirrored; DISKS.len()]);
    let verification = &report.verification;
    assert_eq!(verification.proof_blocks, DISKS.len() as u64 * SIZE / 65536, "{verification:?}");
    assert_eq!((verification.mismatched_blocks, verification.repaired_blocks), (0, 0), "{verification:?}");
    if to.name() == pair.b().name() && from.inventory().unwrap().links.contains_key(TAP) {
        // This one was made by hand, and is left to whoever made it.
        from.remove_tap(TAP).unwrap();
    }
    pair.holds_nothing(from);
    for host in [from, to] {
        let mut files: Vec<String> = std::fs::read_dir(host.disk_dir())
            .unwrap()
            .map(|file| file.unwrap().file_name().into_string().unwrap())
            .collect();
        files.sort();
        assert_eq!(files, ["files.raw", "journal.qcow2", "random.raw"], "at {}", host.name());
    }
    let wire = report.disks.iter().map(|disk| disk.wire_bytes).sum();
    (report, wire)
}

#[test]
fn nothing_that_was_written_is_lost_and_nothing_is_copied_twice() {
    if !root_or_skip("hosts with storage of their own") {
        return;
    }
    let pair = Pair::with_local_disks();
    pair.a().add_tap(TAP).unwrap();
    let nic = Nic::new(TAP, 10);
    let address = nic.address;
    let spec =
        GuestSpec { nic: Some(nic), fill_mib: 32, rate: 200, disks: disks(&pair), ..pair.spec("vm", 192) };
    let guest = pair.run(pair.a(), "vm", &spec);
    let before = guest.status();
    let client = pair.client().unwrap();
    let journal = client.journal(address, "journal").unwrap();

    let mut hosts = [pair.a(), pair.b()];
    let mut wires = Vec::new();
    for hop in 1..=HOPS {
        let acknowledged = journal.acknowledged();
        let start = Instant::now();
        let (report, wire) = moves(&pair, &guest, hosts);
        eprintln!(
            "hop {hop}: {:.1?}, of the disks {} KiB sent; downtime {:.1} ms, {:?}",
            start.elapsed(),
            wire >> 10,
            report.downtime_ms,
            report.pause,
        );
        wires.push(wire);
        guest.sane_since(&before);
        until("records are acknowledged to the client", || journal.acknowledged() > acknowledged);
        hosts.reverse();
    }
    // The noise has travelled once. What the first hop made is there still.
    assert!(wires[0] > NOISE, "{wires:?}");
    assert!(wires[1..].iter().all(|wire| *wire < NOISE), "{wires:?}");

    let verdict = client.check_disks(address).unwrap();
    assert_eq!(verdict.faults.total(), 0, "{}", guest.console().text());
    assert!(verdict.blocks > 500 && verdict.records > 50 && verdict.files > 0, "{verdict:?}");
    let quiet = client.quiet_disks(address).unwrap();
    let acknowledged = quiet.disks.unwrap().acknowledged["journal"];
    until("the client knows of all records", || journal.acknowledged() >= acknowledged);
    assert_eq!(journal.report().went_back, []);

    // Nobody writes any more: the images at both ends are those of the last pause.
    let _ = moves(&pair, &guest, hosts);
    guest.sound_since(&before);
    assert_eq!(client.check_disks(address).unwrap().faults.total(), 0, "{}", guest.console().text());
    // Nothing may be using an image of QEMU's own format to be read.
    let _ = vmirror(hosts[1], &["stop", "vm", "--force"]).done();
    until("it is gone", || pair.qemu(hosts[1]).is_none());
    for (name, format) in DISKS {
        let [left, there] = hosts.map(|host| image(host, name));
        assert_eq!(
            disk::hash(&left, format).unwrap(),
            disk::hash(&there, format).unwrap(),
            "what the guest sees of {name}"
        );
        let [left, there] = [left, there].map(|image| disk::allocated(&image).unwrap());
        eprintln!("{name}: {left} bytes allocated, the copy {there}");
        // Zeros that took room there take none here: less is fine. QEMU's own format has tables of its own, clusters of which may be
        // used or not.
        let tables = if format == Format::Qcow2 { MIB } else { 0 };
        assert!(there <= left + left / 10 + tables, "{name} is not as sparse");
    }
    assert!(disk::allocated(&image(hosts[1], "random.raw")).unwrap() < SIZE * 3 / 4);
    for host in hosts {
        disk::check_ext4(&image(host, "files.raw"), Format::Raw).unwrap();
        let region = JOURNAL.0 * MIB..(JOURNAL.0 + JOURNAL.1) * MIB;
        let replay = disk::journal(&image(host, "journal.qcow2"), Format::Qcow2, "journal", region).unwrap();
        assert_eq!((replay.last(), replay.faults(acknowledged)), (acknowledged, vec![]), "{}", host.name());
    }
}
