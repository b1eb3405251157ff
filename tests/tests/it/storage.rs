//! Disks move with the machine, and what it boots from.

use std::fs;
use std::path::Path;

use end_to_end::{BlockDevice, Pair, noise, report_adds_up, until, vmirror};
use session::report::DiskMode;
use testbed::Host;
use testbed::guest_spec::GuestSpec;

#[test]
fn a_disk_of_a_local_file_moves_with_its_machine() {
    if !testbed::root_or_skip("hosts with storage of their own") {
        return;
    }
    let pair = Pair::with_local_disks();
    let image = pair.a().local_dir().join("disk.raw");
    let here = pair.a().disk_dir().join("disk.raw");
    let content: Vec<u8> = (0..64 << 20 >> 12).flat_map(guest::reader::block).collect();
    std::fs::write(&here, &content).unwrap();
    let spec = GuestSpec { direct_disk: Some(image), ..pair.spec("disk", 256) };
    let guest = pair.run(pair.a(), "disk", &spec);
    let before = guest.status();
    let report = pair.migrate("disk", pair.a(), pair.b(), &[]);
    report_adds_up(&report, &guest);
    assert_eq!(report.disks[0].mode, DiskMode::Mirrored);
    guest.sound_since(&before);
    assert!(std::fs::read(pair.b().disk_dir().join("disk.raw")).unwrap() == content);
}

#[test]
fn what_a_machine_needs_to_start_is_there_before_it_is_and_gone_if_it_does_not_come() {
    if !testbed::root_or_skip("hosts with storage of their own") {
        return;
    }
    let pair = Pair::with_local_disks();
    let spec = pair.spec("vm", 128);
    for (from, name) in [(&spec.kernel, "vmlinuz"), (&spec.initramfs, "initrd")] {
        fs::copy(from, pair.a().disk_dir().join(name)).unwrap();
    }
    let local = |name: &str| pair.a().local_dir().join(name);
    // QEMU makes these itself when it starts.
    let extra = vec![
        "-chardev".to_owned(),
        format!("file,id=log,path={}", local("log").display()),
        "-monitor".to_owned(),
        format!("unix:{},server=on,wait=off", local("monitor").display()),
    ];
    let spec = GuestSpec { kernel: local("vmlinuz"), initramfs: local("initrd"), extra, ..spec };
    let guest = pair.run(pair.a(), "vm", &spec);
    let before = guest.status();
    let there = || names(pair.b());

    let checked = vmirror(pair.a(), &["check", "vm", "--to", &pair.b().listen().to_string()]);
    assert_eq!((checked.code, there()), (Some(0), Vec::new()), "a rehearsal leaves nothing: {checked:?}");
    let migration = pair.begin("vm", pair.a(), pair.b(), &["--bandwidth", "1MiB/s"]);
    migration.reaches("synchronize");
    assert_eq!(there(), ["initrd", "log", "vmlinuz"]);
    let _ = vmirror(pair.a(), &["cancel", "vm"]).done();
    assert_eq!(migration.ended().code, Some(1));
    until("what was shipped is gone", || there().is_empty());

    let report = pair.migrate("vm", pair.a(), pair.b(), &[]);
    report_adds_up(&report, &guest);
    for name in ["vmlinuz", "initrd"] {
        let read = |host: &Host| fs::read(host.disk_dir().join(name)).unwrap();
        assert!(read(pair.a()) == read(pair.b()), "{name}");
    }
    guest.sound_since(&before);
    // They are the machine's now, and stay when it ends.
    let _ = vmirror(pair.b(), &["stop", "vm", "--force"]).done();
    pair.holds_nothing(pair.b());
    assert_eq!(there(), ["initrd", "log", "vmlinuz"]);
}

/// What is in a host's directory of disks.
fn names(host: &Host) -> Vec<String> {
    let entries = fs::read_dir(host.disk_dir()).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_block_device_is_not_overwritten_unless_told_to_and_then_is_equal() {
    if !testbed::root_or_skip("block devices") {
        return;
    }
    const SIZE: usize = 16 << 20;
    let pair = Pair::with_local_disks();
    let (here, there) =
        (BlockDevice::new(pair.a(), &noise(SIZE as u64)), BlockDevice::new(pair.b(), &vec![7; SIZE]));
    let drive = |path: &Path| format!("file={},format=raw,if=virtio", path.display());
    let extra = vec!["-drive".to_owned(), drive(&pair.a().local_dir().join("device"))];
    let guest = pair.run(pair.a(), "vm", &GuestSpec { extra, ..pair.spec("vm", 128) });
    let before = guest.status();
    pair.migration_refused("vm", &[]).is("disk-exists", &["device", "host-b", "--disks mirror"]);
    assert!(there.content() == vec![7; SIZE]);
    let report = pair.migrate("vm", pair.a(), pair.b(), &["--disks", "mirror"]);
    report_adds_up(&report, &guest);
    assert_eq!((report.disks[0].mode, report.disks[0].size), (DiskMode::Mirrored, SIZE as u64));
    assert!(there.content() == here.content());
    guest.sound_since(&before);
    pair.holds_nothing(pair.a());
}
