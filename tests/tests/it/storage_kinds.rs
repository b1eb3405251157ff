//! Disks that are more than one file, or move in another way: a base that both hosts share, firmware's variables, post-copy, a copy that
//! is read back.

use std::fs;

use end_to_end::{Pair, image, noise, report_adds_up, until, write_noise};
use session::Report;
use session::report::DiskMode;
use testbed::disk::{self, Format};
use testbed::guest_spec::{GuestSpec, Io, Nic, Pattern, TestDisk, Work};
use testbed::root_or_skip;

const MIB: u64 = 1 << 20;
const TAP: &str = "tap0";
const SIZE: u64 = 32 * MIB;
/// What the guest works on; the rest of a disk is noise.
const WORKED: u64 = 16 * MIB;

/// A guest like this, with a disk of that name at host A, moves there and back with these options; nothing is lost. Gives back the
/// reports.
fn moves(pair: &Pair, name: &str, format: Format, spec: GuestSpec, options: &[&str]) -> Vec<Report> {
    for host in [pair.a(), pair.b()] {
        host.add_tap(TAP).unwrap();
    }
    let blocks =
        Work::Blocks { pattern: Pattern::Random, io: Io::Direct, rate: 100, depth: 2, check_rate: 100 };
    let disk = TestDisk {
        roles: vec![blocks.within(WORKED / MIB - 1), Work::Journal { rate: 50 }.within(1)],
        ..TestDisk::new(pair.a().local_dir().join(name), format, "d")
    };
    let nic = Nic::new(TAP, 10);
    let address = nic.address;
    let spec = GuestSpec { nic: Some(nic), disks: vec![disk], ..spec };
    let guest = pair.run(pair.a(), "vm", &spec);
    let before = guest.status();
    let client = pair.client().unwrap();
    let journal = client.journal(address, "d").unwrap();
    let mut reports = Vec::new();
    for hosts in [[pair.a(), pair.b()], [pair.b(), pair.a()]] {
        let acknowledged = journal.acknowledged();
        until("records are written", || journal.acknowledged() > acknowledged + 10);
        let report = pair.migrate("vm", hosts[0], hosts[1], options);
        if report.post_copy.is_none() {
            report_adds_up(&report, &guest);
        }
        until("the guest is listed where it runs", || pair.runs_on("vm", hosts[1]));
        let disk = report.disks.iter().find(|disk| disk.name.ends_with(name)).unwrap();
        assert_eq!(disk.mode, DiskMode::Mirrored, "{disk:?}");
        assert_eq!((report.verification.mismatched_blocks, report.verification.repaired_blocks), (0, 0));
        reports.push(report);
        let acknowledged = journal.acknowledged();
        until("records are written", || journal.acknowledged() > acknowledged + 10);
        let verdict = client.check_disks(address).unwrap();
        assert_eq!(verdict.faults.total(), 0, "{}", guest.console().text());
    }
    assert_eq!(journal.report().went_back, []);
    guest.sound_since(&before);
    reports
}

/// A guest that does little else than to use its disk.
fn calm(pair: &Pair) -> GuestSpec {
    GuestSpec { fill_mib: 32, rate: 100, ..pair.spec("vm", 192) }
}

#[test]
fn of_a_disk_with_a_base_that_both_hosts_share_only_what_is_on_top_of_it_moves() {
    if !root_or_skip("hosts with storage of their own") {
        return;
    }
    let pair = Pair::with_local_disks();
    let base = pair.a().shared_dir().join("base.raw");
    disk::create(&base, Format::Raw, SIZE).unwrap();
    write_noise(&base, WORKED, SIZE - WORKED);
    let content = fs::read(&base).unwrap();
    disk::create_overlay(&image(pair.a(), "top.qcow2"), &base, SIZE).unwrap();
    let reports = moves(&pair, "top.qcow2", Format::Qcow2, calm(&pair), &[]);
    for disk in reports.iter().map(|report| &report.disks[0]) {
        assert!(disk.wire_bytes < SIZE - WORKED, "the base was copied: {disk:?}");
    }
    assert!(fs::read(&base).unwrap() == content, "the base was written to");
}

#[test]
fn the_variables_of_firmware_move_with_the_machine() {
    const VARIABLES: u64 = 256 << 10;
    if !root_or_skip("hosts with storage of their own") {
        return;
    }
    let pair = Pair::with_local_disks();
    fs::write(image(pair.a(), "vars.fd"), noise(VARIABLES)).unwrap();
    disk::create(&image(pair.a(), "disk.raw"), Format::Raw, SIZE).unwrap();
    // Either host has the firmware itself.
    for host in [pair.a(), pair.b()] {
        fs::copy("/usr/share/seabios/bios-256k.bin", image(host, "bios.fd")).unwrap();
    }
    let flash = |unit: u32, name: &str, more: &str| {
        let file = pair.a().local_dir().join(name);
        format!("if=pflash,unit={unit},format=raw,file={}{more}", file.display())
    };
    let extra = [flash(0, "bios.fd", ",readonly=on"), flash(1, "vars.fd", "")];
    let extra = extra.into_iter().flat_map(|drive| ["-drive".to_owned(), drive]).collect();
    let _ = moves(&pair, "disk.raw", Format::Raw, GuestSpec { extra, ..calm(&pair) }, &[]);
    for host in [pair.a(), pair.b()] {
        assert!(fs::read(image(host, "vars.fd")).unwrap() == noise(VARIABLES), "{}", host.name());
    }
}

#[test]
fn disks_are_complete_when_memory_follows_later() {
    if !root_or_skip("hosts with storage of their own") {
        return;
    }
    let pair = Pair::with_local_disks();
    disk::create(&image(pair.a(), "disk.qcow2"), Format::Qcow2, SIZE).unwrap();
    let spec = pair.outrun_by(pair.spec("vm", 256));
    let reports = moves(&pair, "disk.qcow2", Format::Qcow2, spec, &["--on-diverge", "post-copy"]);
    assert!(reports.iter().all(|report| report.post_copy.is_some()), "{reports:#?}");
}

#[test]
fn a_copy_that_is_read_back_within_the_pause_is_what_was_sent() {
    if !root_or_skip("hosts with storage of their own") {
        return;
    }
    let pair = Pair::with_local_disks();
    disk::create(&image(pair.a(), "disk.raw"), Format::Raw, SIZE).unwrap();
    write_noise(&image(pair.a(), "disk.raw"), WORKED, SIZE - WORKED);
    let _ = moves(&pair, "disk.raw", Format::Raw, calm(&pair), &["--verify", "strict"]);
}
