//! Disks that cannot come are refused before anything is copied: each with its own reason, and with nothing changed on either host.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::path::{Path, PathBuf};

use end_to_end::{BlockDevice, Pair, Refusal, image, local, until, vmirror};
use serde_json::json;
use session::report::DiskMode;
use testbed::disk::{self, Format};
use testbed::{Host, Monitor, root_or_skip};

const MIB: u64 = 1 << 20;
/// Bytes of the machine's disk.
const SIZE: u64 = 16 * MIB;
/// Overwrites what is there.
const OVER: &[&str] = &["--disks", "mirror"];

/// Two hosts with storage of their own, and on host A a machine `vm` with a disk of that format and name.
fn pair_with(name: &str, format: Format) -> Option<Pair> {
    if !root_or_skip("hosts with storage of their own") {
        return None;
    }
    let pair = Pair::with_local_disks();
    let there = image(pair.a(), name);
    fs::create_dir_all(there.parent().unwrap()).unwrap();
    disk::create(&there, format, SIZE).unwrap();
    run(&pair, pair.a(), "vm", &pair.a().local_dir().join(name), format);
    Some(pair)
}

fn pair() -> Option<Pair> {
    pair_with("vm.raw", Format::Raw)
}

fn run(pair: &Pair, host: &Host, name: &str, image: &Path, format: Format) {
    let format = match format {
        Format::Raw => "raw",
        Format::Qcow2 => "qcow2",
        Format::Qed => "qed",
    };
    let drive = format!("file={},format={format},if=virtio", image.display());
    pair.run_tiny(host, name, &["-drive", &drive]);
}

/// Everything in a host's directory of disks: what it is, and when it was last changed in any way.
fn files(directory: &Path) -> BTreeMap<PathBuf, (u64, i64, i64)> {
    let mut found = BTreeMap::new();
    for file in fs::read_dir(directory).unwrap().map(|file| file.unwrap().path()) {
        let known = fs::symlink_metadata(&file).unwrap();
        if known.is_dir() {
            found.append(&mut files(&file));
        }
        // The directories of the source have had a probe in them.
        let changed = if known.is_dir() { 0 } else { known.ctime_nsec() };
        found.insert(file, (known.size(), known.mode().into(), changed));
    }
    found
}

/// The only reason against a migration of `vm` from host A to host B, which a check tells too.
fn refused(pair: &Pair, options: &[&str]) -> Refusal {
    let disks = || [pair.a(), pair.b()].map(|host| files(&host.disk_dir()));
    let before = disks();
    let refusal = pair.migration_refused("vm", options);
    let to = pair.b().listen().to_string();
    let said = vmirror(pair.a(), &[&["check", "vm", "--to", &to, "--json"], options].concat());
    let findings = said.json()["findings"].as_array().unwrap().clone();
    let kinds: Vec<&str> = findings.iter().map(|finding| finding["kind"].as_str().unwrap()).collect();
    assert_eq!((said.code, kinds), (Some(2), vec![refusal.kind.as_str()]), "{said:?}");
    assert_eq!(disks(), before, "the disks of both hosts");
    assert!(pair.runs_on("vm", pair.a()));
    refusal
}

/// Starts the agent of host B anew, after something was done that only then is seen.
fn anew(pair: &Pair, change: impl FnOnce(&Host)) {
    pair.b().stop_agent().unwrap();
    change(pair.b());
    pair.b().start_agent_with(&local()).unwrap();
}

fn allow_disks(host: &Host, directories: Vec<String>) {
    let allow = |config: &mut toml::Table| {
        config["allow"].as_table_mut().unwrap().insert("disk_dirs".to_owned(), directories.into());
    };
    host.configure(allow).unwrap();
}

#[test]
fn an_image_that_is_there_already_is_not_overwritten_unless_told_to() {
    let Some(pair) = pair() else { return };
    let there = image(pair.b(), "vm.raw");
    disk::create(&there, Format::Raw, SIZE).unwrap();
    let name = pair.a().local_dir().join("vm.raw");
    refused(&pair, &[]).is("disk-exists", &[name.to_str().unwrap(), "host-b", "--disks mirror"]);
    // Nor is one that does not fit.
    disk::create(&there, Format::Raw, SIZE - MIB).unwrap();
    refused(&pair, &[]).is("disk-exists", &["--disks mirror"]);
    refused(&pair, OVER).is("disk-smaller", &["vm.raw", "15728640 bytes", "16777216", "same size"]);
    disk::create(&there, Format::Raw, SIZE + MIB).unwrap();
    refused(&pair, OVER).is("disk-larger", &["vm.raw", "17825792 bytes", "16777216"]);
    disk::create(&there, Format::Qcow2, SIZE).unwrap();
    refused(&pair, OVER).is("disk-format", &["vm.raw on host-b is of format qcow2", "it is raw"]);
    fs::remove_file(&there).unwrap();
    fs::create_dir(&there).unwrap();
    refused(&pair, OVER).is("disk-kind", &["vm.raw on host-b is no file"]);
    fs::remove_dir(&there).unwrap();
    assert!(pair.check("vm").is_empty());
}

#[test]
fn an_image_that_another_machine_uses_is_not_overwritten() {
    let Some(pair) = pair() else { return };
    disk::create(&image(pair.b(), "vm.raw"), Format::Raw, SIZE).unwrap();
    run(&pair, pair.b(), "other", &pair.b().local_dir().join("vm.raw"), Format::Raw);
    refused(&pair, OVER).is("disk-in-use", &["vm.raw on host-b is VM other's"]);
    refused(&pair, &[]).is("disk-exists", &["vm.raw"]);
}

#[test]
fn an_image_of_another_size_or_format_is_not_taken_for_qcow2() {
    let Some(pair) = pair_with("vm.qcow2", Format::Qcow2) else { return };
    let there = image(pair.b(), "vm.qcow2");
    disk::create(&there, Format::Raw, SIZE).unwrap();
    refused(&pair, OVER).is("disk-format", &["is of format raw", "it is qcow2", "host-b"]);
    disk::create(&there, Format::Qcow2, SIZE / 2).unwrap();
    refused(&pair, OVER).is("disk-smaller", &["8388608 bytes", "16777216"]);
    refused(&pair, &[]).is("disk-exists", &["--disks mirror"]);
}

#[test]
fn an_image_outside_the_allowed_directories_is_neither_made_nor_overwritten() {
    let Some(pair) = pair() else { return };
    let name = pair.a().local_dir().join("vm.raw");
    let words = [name.to_str().unwrap(), "host-b", "[allow] disk_dirs"];
    anew(&pair, |host| allow_disks(host, Vec::new()));
    refused(&pair, &[]).is("path-not-allowed", &words);
    let there = image(pair.b(), "vm.raw");
    disk::create(&there, Format::Raw, SIZE).unwrap();
    refused(&pair, OVER).is("path-not-allowed", &words);
    // Nor by a link out of them, wherever that leads.
    anew(&pair, |host| allow_disks(host, vec![host.local_dir().display().to_string()]));
    let elsewhere = pair.testbed().directory().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    for target in ["there.raw", "nowhere.raw"] {
        disk::create(&elsewhere.join("there.raw"), Format::Raw, SIZE).unwrap();
        fs::remove_file(&there).unwrap();
        symlink(elsewhere.join(target), &there).unwrap();
        for options in [&[], OVER] {
            match target {
                "there.raw" => refused(&pair, options).is("path-not-allowed", &words),
                _ => refused(&pair, options).is("disk-missing", &[words[0], words[1], "leads nowhere"]),
            }
        }
    }
    assert!(!elsewhere.join("nowhere.raw").exists());
}

#[test]
fn a_directory_that_is_missing_leads_elsewhere_or_cannot_be_written_is_refused() {
    let Some(pair) = pair_with("sub/vm.raw", Format::Raw) else { return };
    let directory = pair.a().local_dir().join("sub");
    let words = [directory.to_str().unwrap(), "host-b"];
    refused(&pair, &[]).is("directory-missing", &words);
    let elsewhere = pair.testbed().directory().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    symlink(&elsewhere, image(pair.b(), "sub")).unwrap();
    let leads = format!("leads to {}/vm.raw, which is in none", elsewhere.display());
    refused(&pair, &[]).is("path-not-allowed", &[words[0], words[1], &leads]);
    assert_eq!(fs::read_dir(&elsewhere).unwrap().count(), 0);
    fs::remove_file(image(pair.b(), "sub")).unwrap();
    fs::create_dir(image(pair.b(), "sub")).unwrap();
    anew(&pair, |host| host.freeze_disks().unwrap());
    refused(&pair, &[]).is("disk-permission", &[words[0], words[1], "let it write there"]);
}

#[test]
fn an_image_on_a_file_system_that_cannot_be_written_is_not_overwritten() {
    let Some(pair) = pair() else { return };
    disk::create(&image(pair.b(), "vm.raw"), Format::Raw, SIZE).unwrap();
    anew(&pair, |host| host.freeze_disks().unwrap());
    refused(&pair, OVER).is("disk-permission", &["vm.raw", "host-b", "let it write there"]);
}

#[test]
fn an_image_whose_base_the_destination_has_not_is_refused() {
    if !root_or_skip("hosts with storage of their own") {
        return;
    }
    let pair = Pair::with_local_disks();
    let overlay = image(pair.a(), "vm.qcow2");
    let base = pair.a().local_dir().join("base.raw");
    disk::create(&image(pair.a(), "base.raw"), Format::Raw, SIZE).unwrap();
    disk::create_overlay(&overlay, &base, SIZE).unwrap();
    run(&pair, pair.a(), "vm", &pair.a().local_dir().join("vm.qcow2"), Format::Qcow2);
    let base = base.to_str().unwrap();
    refused(&pair, &[]).is("backing-missing", &["vm.qcow2", base, "host-b"]);
    disk::create(&image(pair.b(), "base.raw"), Format::Raw, SIZE).unwrap();
    refused(&pair, &[]).is("backing-not-shared", &["vm.qcow2", base, "not the same storage"]);
}

#[test]
fn an_image_that_leads_elsewhere_by_what_is_in_it_is_not_opened() {
    let pair = Pair::start();
    let (secret, shared) = (pair.testbed().directory().join("secret.raw"), pair.a().shared_dir());
    disk::create(&secret, Format::Raw, SIZE).unwrap();
    // Both hosts have it, as they would have what an earlier machine has left: its base is nothing that peers may use.
    let (first, second) = (shared.join("first.qcow2"), shared.join("second.qcow2"));
    disk::create_overlay(&first, &secret, SIZE).unwrap();
    disk::create_overlay(&second, &shared.join("third.qcow2"), SIZE).unwrap();
    fs::rename(&first, shared.join("third.qcow2")).unwrap();
    for (name, image, format) in [
        ("one", "third.qcow2", ",format=qcow2"),
        ("two", "second.qcow2", ",format=qcow2"),
        ("three", "third.qcow2", ""),
    ] {
        // The second's base is said to be raw in its head, and then it is not looked into.
        let drive = format!("file={}{format},if=virtio,readonly=on", shared.join(image).display());
        pair.run_tiny(pair.a(), name, &["-drive", &drive]);
        let said = vmirror(pair.a(), &["check", name, "--to", &pair.b().listen().to_string()]);
        match name {
            "two" => assert_eq!(said.code, Some(0), "{said:?}"),
            _ => {
                let words = [secret.to_str().unwrap(), "is in none of the directories", "path-not-allowed"];
                assert!(
                    said.code == Some(2) && words.iter().all(|word| said.stdout.contains(word)),
                    "{said:?}"
                );
            }
        }
    }
}

#[test]
fn an_image_of_a_format_that_cannot_be_made_is_refused() {
    let Some(pair) = pair_with("vm.qed", Format::Qed) else { return };
    refused(&pair, &[]).is("disk-not-shared", &["vm.qed", "images of format qed cannot be made"]);
}

#[test]
fn shared_storage_is_not_copied_onto_itself() {
    if !root_or_skip("hosts with storage of their own") {
        return;
    }
    let pair = Pair::with_local_disks();
    let image = pair.a().shared_dir().join("vm.raw");
    disk::create(&image, Format::Raw, SIZE).unwrap();
    run(&pair, pair.a(), "vm", &image, Format::Raw);
    refused(&pair, OVER).is("disk-shared", &[image.to_str().unwrap(), "host-b", "--disks"]);
    assert!(pair.check("vm").is_empty());
}

#[test]
fn storage_that_takes_no_probe_is_not_taken_for_another() {
    if !root_or_skip("hosts with storage of their own") {
        return;
    }
    let pair = Pair::with_local_disks();
    disk::create(&image(pair.a(), "cd.iso"), Format::Raw, SIZE).unwrap();
    pair.a().stop_agent().unwrap();
    pair.a().freeze_disks().unwrap();
    pair.a().start_agent_with(&local()).unwrap();
    let name = pair.a().local_dir().join("cd.iso");
    let name = name.to_str().unwrap();
    pair.run_tiny(pair.a(), "vm", &["-drive", &format!("file={name},format=raw,if=virtio,readonly=on")]);
    assert!(pair.check("vm").is_empty(), "there is nothing in its place");
    disk::create(&image(pair.b(), "cd.iso"), Format::Raw, SIZE).unwrap();
    for options in [&[], OVER] {
        let refusal = refused(&pair, options);
        refusal.is("disk-sharing-unknown", &[name, "host-b", "cannot be told", "--disks shared"]);
    }
    // The same file is known all the same, where one kernel has both.
    anew(&pair, |host| host.share_disks_of(pair.a()).unwrap());
    assert!(pair.check("vm").is_empty());
    let report = pair.migrate("vm", pair.a(), pair.b(), &[]);
    assert_eq!(report.disks[0].mode, DiskMode::Shared);
}

#[test]
fn the_engine_of_qemu_does_not_leave_local_disks_behind() {
    let Some(pair) = pair() else { return };
    refused(&pair, &["--engine", "qemu"]).is("disk-not-shared", &["vm.raw", "--engine qemu moves no disks"]);
}

#[test]
fn disks_without_room_for_them_are_refused() {
    let Some(pair) = pair() else { return };
    anew(&pair, |host| host.limit_disks(SIZE / 2).unwrap());
    assert!(pair.check("vm").is_empty(), "there is nothing on the disk yet");
    refused(&pair, &["--disk-room", "whole"]).is("disk-room", &["16 MiB", "8 MiB", "host-b", "make room"]);
}

#[test]
fn what_a_drive_has_in_it_by_now_is_not_left_behind() {
    if !root_or_skip("hosts with storage of their own") {
        return;
    }
    let pair = Pair::with_local_disks();
    let shared = |name: &str| pair.a().shared_dir().join(name).display().to_string();
    for name in ["disk.raw", "first.iso", "second.iso"] {
        disk::create(Path::new(&shared(name)), Format::Raw, SIZE).unwrap();
    }
    let socket = pair.a().directory().join("user.qmp");
    let more = [
        "-drive".to_owned(),
        format!("file={},format=raw,if=virtio,id=disk", shared("disk.raw")),
        "-drive".to_owned(),
        format!("file={},format=raw,if=ide,media=cdrom,id=cd", shared("first.iso")),
        "-qmp".to_owned(),
        format!("unix:{},server=on,wait=off", socket.display()),
    ];
    pair.run_tiny(pair.a(), "vm", &more.each_ref().map(String::as_str));
    let mut qmp = Monitor::connect(&socket).unwrap();
    assert!(pair.check("vm").is_empty());

    let mut change = |name: &str| {
        let arguments = json!({ "device": "cd", "filename": shared(name), "format": "raw" });
        qmp.execute("blockdev-change-medium", arguments).unwrap();
    };
    change("second.iso");
    assert_eq!(pair.check("vm"), ["drive-changed", "drive-changed"]);
    let refusal = pair.migration_refused("vm", &["--disks", "shared"]);
    refusal.begins("drive-changed", &["drive cd has", "second.iso", "not on the VM's command line"]);
    change("first.iso");
    assert!(pair.check("vm").is_empty());
    qmp.execute("eject", json!({ "device": "cd", "force": true })).unwrap();
    assert_eq!(pair.check("vm"), ["drive-changed"]);
    let refusal = pair.migration_refused("vm", &[]);
    refusal.is("drive-changed", &["first.iso is on the VM's command line", "none of its drives"]);
    let arguments = json!({ "device": "cd", "filename": shared("first.iso"), "format": "raw" });
    qmp.execute("blockdev-change-medium", arguments).unwrap();

    let snapshot = json!({ "device": "disk", "snapshot-file": shared("snapshot.qcow2"), "format": "qcow2" });
    qmp.execute("blockdev-snapshot-sync", snapshot).unwrap();
    assert_eq!(pair.check("vm"), ["drive-changed", "drive-changed"]);
}

#[test]
fn a_file_that_has_taken_the_place_of_a_disk_does_not_move_in_its_stead() {
    let Some(pair) = pair() else { return };
    let there = image(pair.a(), "vm.raw");
    fs::rename(&there, image(pair.a(), "moved.raw")).unwrap();
    disk::create(&there, Format::Raw, SIZE).unwrap();
    refused(&pair, &[]).is("disk-replaced", &["vm.raw is another file", "move the VM's image back"]);
    fs::remove_file(&there).unwrap();
    assert_eq!(pair.check("vm")[0], "disk-missing");
    fs::rename(image(pair.a(), "moved.raw"), &there).unwrap();
    assert!(pair.check("vm").is_empty());
}

#[test]
fn an_image_that_two_drives_have_is_not_copied_twice() {
    if !root_or_skip("hosts with storage of their own") {
        return;
    }
    let pair = Pair::with_local_disks();
    disk::create(&image(pair.a(), "vm.raw"), Format::Raw, SIZE).unwrap();
    let drive = format!(
        "file={},format=raw,if=virtio,file.locking=off",
        pair.a().local_dir().join("vm.raw").display()
    );
    pair.run_tiny(pair.a(), "vm", &["-drive", &drive, "-drive", &drive]);
    let refusal = pair.migration_refused("vm", &[]);
    // Two drives can have it only without its locks, which no host takes over from another.
    refusal.begins("argument-not-allowed", &["vm.raw", "takes no lock on its image"]);
    assert_eq!(refusal.more, ["argument-not-allowed", "disk-not-shared", "disk-not-shared"]);
    assert!(!image(pair.b(), "vm.raw").exists());
}

#[test]
fn what_the_kernel_has_mounted_is_not_overwritten() {
    let Some(pair) = pair() else { return };
    let there = image(pair.b(), "vm.raw");
    disk::create(&there, Format::Raw, SIZE).unwrap();
    let device = BlockDevice::over(pair.b(), &there);
    refused(&pair, OVER)
        .is("disk-in-use", &["vm.raw on host-b is in use there", "/dev/loop", "is made of it"]);
    drop(device);
    fs::remove_file(&there).unwrap();
    assert!(pair.check("vm").is_empty());
}

#[test]
fn a_device_with_a_file_system_that_is_mounted_is_not_overwritten() {
    if !root_or_skip("block devices") {
        return;
    }
    let pair = Pair::with_local_disks();
    let ext4 = pair.b().directory().join("ext4");
    disk::create_ext4(&ext4, SIZE).unwrap();
    let content = fs::read(&ext4).unwrap();
    let (_here, there) = (BlockDevice::new(pair.a(), &content), BlockDevice::new(pair.b(), &content));
    run(&pair, pair.a(), "vm", &pair.a().local_dir().join("device"), Format::Raw);
    let mounted = there.mount(&pair.b().directory().join("mounted"));
    refused(&pair, OVER).is("disk-in-use", &["device on host-b is in use there: it is mounted", "unmount"]);
    drop(mounted);
    let to = pair.b().listen().to_string();
    let check = || vmirror(pair.a(), &[&["check", "vm", "--to", &to], OVER].concat());
    // A mount namespace that somebody made meanwhile has it mounted for as long as it lasts.
    until("it is mounted nowhere any more", || check().code == Some(0));
    let said = check().done();
    assert!(said.stdout.contains("is copied over what is there"), "{said:?}");
}

#[test]
fn what_a_machine_has_left_is_neither_started_from_nor_taken_for_its_disk() {
    let Some(pair) = pair() else { return };
    let (a, b) = (pair.a(), pair.b());
    let _ = pair.migrate("vm", a, b, &[]);
    end_to_end::until("the source has let go", || pair.show("vm", a).is_none());
    let name = a.local_dir().join("vm.raw").display().to_string();
    let drive = format!("file={name},format=raw,if=virtio");
    let qemu = testbed::Programs::find().qemu.display().to_string();
    let line = [&qemu, "-accel", "tcg", "-m", "32", "-nodefaults", "-display", "none", "-drive", &drive];
    let again = ["run", "again"];
    let refusal = pair.refused(a, &[&again[..], &["--"], &line].concat());
    refusal.is("disk-stale", &[&name, "what a migration of VM vm has left here", "--stale-disks"]);

    // Nobody's word makes it the disk that the machine has by now.
    let to = a.listen().to_string();
    let back = ["migrate", "vm", "--to", &to];
    let refusal = pair.refused(b, &[&back[..], &["--disks", "shared"]].concat());
    refusal.is("disk-not-shared", &[&name, "host-a", "left there"]);
    let _ = vmirror(a, &[&again[..], &["--stale-disks", "--"], &line].concat()).done();
    let _ = vmirror(a, &["stop", "again", "--force"]).done();
    // Whoever has run from it may have written to it.
    let refusal = pair.refused(b, &back);
    refusal.is("disk-exists", &[&name, "host-a"]);
}

#[test]
fn a_disk_that_is_said_to_be_shared_and_is_not_is_noticed() {
    let Some(pair) = pair() else { return };
    disk::create(&image(pair.b(), "vm.raw"), Format::Raw, SIZE).unwrap();
    let refusal = refused(&pair, &["--disks", "shared"]);
    refusal.is("disk-not-shared", &["vm.raw on host-b is not the same storage", "beside it is not there"]);
}
