//! What QEMU cannot migrate, and disks that are reached in a way that is not known to work, are refused by name before anything is
//! copied; and what is known to work is not.

use std::fs;
use std::path::{Path, PathBuf};

use end_to_end::{Pair, image, vmirror};
use serde_json::{Value, json};
use session::report::DiskMode;
use testbed::disk::{self, Format};
use testbed::{Host, Monitor, root_or_skip};

const MIB: u64 = 1 << 20;

/// An image on storage that both hosts see.
fn shared(pair: &Pair, name: &str) -> PathBuf {
    let image = pair.a().shared_dir().join(name);
    disk::create(&image, Format::Raw, 16 * MIB).unwrap();
    image
}

/// The kinds of what a host warns of about its machine.
fn warnings(host: &Host, name: &str) -> Vec<String> {
    let shown = vmirror(host, &["show", name, "--json"]).done().json();
    let found = shown["warnings"].as_array().cloned().unwrap_or_default();
    found.iter().map(|warning| warning["kind"].as_str().unwrap().to_owned()).collect()
}

/// The argument for a drive of that image.
fn drive(image: &Path, more: &str) -> String {
    format!("file={},format=raw,{more}", image.display())
}

#[test]
fn a_device_that_qemu_cannot_migrate_is_found_before_anything_is_copied() {
    a_device_that_cannot_be_migrated_is_found(&Pair::start());
}

#[test]
fn a_device_that_qemu_10_cannot_migrate_is_found_too() {
    if let Some(pair) = Pair::of_qemu_10_or_skip("a_device_that_qemu_10_cannot_migrate_is_found_too") {
        a_device_that_cannot_be_migrated_is_found(&pair);
    }
}

fn a_device_that_cannot_be_migrated_is_found(pair: &Pair) {
    let drive = drive(&shared(pair, "n.raw"), "if=none,id=d0");
    let qemu = pair.qemu_program();
    // Whoever starts such a machine hears of it while it is easy to start another.
    let start = ["run", "vm", "--", qemu.to_str().unwrap(), "-accel", "tcg", "-m", "32", "-nodefaults"];
    let devices = ["-display", "none", "-drive", &drive, "-device", "nvme,drive=d0,serial=x1"];
    let said = vmirror(pair.a(), &[&start[..], &devices].concat());
    assert_eq!(said.code, Some(0), "{said:?}");
    assert!(said.stderr.contains("warning: ") && said.stderr.contains("not-migratable"), "{said:?}");
    assert_eq!(warnings(pair.a(), "vm"), ["not-migratable"]);

    assert_eq!(pair.check("vm"), ["not-migratable"]);
    pair.migration_refused("vm", &[]).is("not-migratable", &["non-migratable device", "nvme", "virtio-blk"]);
    pair.migration_refused("vm", &["--engine", "qemu"]).is("not-migratable", &["nvme"]);
    assert!(pair.runs_on("vm", pair.a()));
}

#[test]
fn a_directory_of_the_host_does_not_pass_for_a_disk_that_both_hosts_reach() {
    let pair = Pair::start();
    let directory = pair.a().shared_dir().join("files");
    fs::create_dir(&directory).unwrap();
    fs::write(directory.join("a"), "content").unwrap();
    let name = directory.display();
    pair.run_tiny(pair.a(), "ro", &["-drive", &format!("file=fat:{name},format=raw,if=virtio,readonly=on")]);
    assert_eq!(warnings(pair.a(), "ro"), ["disk-driver"]);
    assert_eq!(pair.check("ro")[0], "disk-driver");
    let words = ["block driver vvfat", "a directory of this host", "image"];
    pair.migration_refused("ro", &[]).is("disk-driver", &words);

    // Where the guest may write to it, QEMU has a word to say as well.
    let node = format!(
        r#"{{"driver":"raw","node-name":"f","file":{{"driver":"vvfat","node-name":"v","dir":"{name}","rw":true}}}}"#
    );
    pair.run_tiny(pair.a(), "rw", &["-blockdev", &node, "-device", "virtio-blk-pci,drive=f"]);
    let found = pair.check("rw");
    assert!(
        found.contains(&"disk-driver".to_owned()) && found.contains(&"not-migratable".to_owned()),
        "{found:?}"
    );
}

#[test]
fn a_disk_without_data_is_no_obstacle() {
    let pair = Pair::start();
    let disk = ["-blockdev", "driver=null-co,node-name=n,size=1048576", "-device", "virtio-blk-pci,drive=n"];
    pair.run_tiny(pair.a(), "vm", &disk);
    assert_eq!(warnings(pair.a(), "vm"), [""; 0]);
    assert!(pair.check("vm").is_empty());
    let _ = pair.migrate("vm", pair.a(), pair.b(), &[]);
    assert!(pair.runs_on("vm", pair.b()));
}

#[test]
fn a_disk_that_was_reopened_around_the_page_cache_is_scanned_at_rest() {
    let pair = Pair::start();
    let image = shared(&pair, "d.raw");
    let file = json!({ "driver": "file", "node-name": "e", "filename": image });
    let node = json!({ "driver": "raw", "node-name": "d", "file": file }).to_string();
    for direct in [false, true] {
        let name = format!("direct-{direct}");
        let monitor = pair.a().directory().join(format!("{name}.qmp"));
        let socket = format!("unix:{},server=on,wait=off", monitor.display());
        pair.run_tiny(
            pair.a(),
            &name,
            &["-blockdev", &node, "-device", "virtio-blk-pci,drive=d", "-qmp", &socket],
        );
        // Which the command line does not know of.
        let mut reopened = file.clone();
        reopened["cache"] = json!({ "direct": direct });
        Monitor::connect(&monitor)
            .unwrap()
            .execute("blockdev-reopen", json!({ "options": [reopened] }))
            .unwrap();
        let report = pair.migrate(&name, pair.a(), pair.b(), &[]);
        assert_eq!(report.quiesced.is_some(), direct, "{:?}", report.quiesced);
        let _ = vmirror(pair.b(), &["stop", &name, "--force"]).done();
    }
}

#[test]
fn a_throttled_disk_moves_with_its_limits() {
    if !root_or_skip("hosts with storage of their own") {
        return;
    }
    let pair = Pair::with_local_disks();
    let here = image(pair.a(), "t.qcow2");
    fs::create_dir_all(here.parent().unwrap()).unwrap();
    fs::create_dir_all(image(pair.b(), "t.qcow2").parent().unwrap()).unwrap();
    disk::create(&here, Format::Qcow2, 16 * MIB).unwrap();
    let name = pair.a().local_dir().join("t.qcow2");
    // As Proxmox VE 9 has each of its disks.
    let node = format!(
        r#"{{"driver":"throttle","node-name":"t","throttle-group":"tg0","file":{{"driver":"qcow2","node-name":"f","cache":{{"direct":true}},"file":{{"driver":"file","node-name":"e","filename":"{}","cache":{{"direct":true}}}}}}}}"#,
        name.display()
    );
    let group = "throttle-group,id=tg0,x-iops-total=100000";
    pair.run_tiny(
        pair.a(),
        "vm",
        &["-object", group, "-blockdev", &node, "-device", "virtio-blk-pci,drive=t"],
    );
    assert_eq!(warnings(pair.a(), "vm"), [""; 0]);
    assert_eq!(pair.check("vm"), [""; 0]);
    let report = pair.migrate("vm", pair.a(), pair.b(), &[]);
    assert_eq!(report.disks[0].mode, DiskMode::Mirrored, "{:?}", report.disks);
    assert!(
        report.quiesced.is_some(),
        "the node that opens the file bypasses the page cache, two levels down"
    );
    let arrived: Value = pair.show("vm", pair.b()).unwrap();
    let argv: Vec<&str> =
        arrived["argv"].as_array().unwrap().iter().map(|word| word.as_str().unwrap()).collect();
    assert!(
        argv.contains(&group) && argv.iter().any(|word| word.contains("throttle-group\":\"tg0")),
        "{argv:?}"
    );
}
