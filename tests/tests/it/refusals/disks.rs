//! Disks on storage that both hosts should see.

use std::fs;
use std::path::{Path, PathBuf};

use end_to_end::Pair;
use testbed::{AgentOptions, root_or_skip};

/// A machine named `vm` on host A with a raw disk at that path.
fn run_with_disk(pair: &Pair, image: &Path) {
    fs::File::create(image).unwrap().set_len(16 << 20).unwrap();
    let drive = format!("file={},format=raw,if=virtio", image.display());
    pair.run_tiny(pair.a(), "vm", &["-drive", &drive]);
}

#[test]
fn another_disk_in_the_place_of_the_sources_is_not_overwritten() {
    if !root_or_skip("another_disk_in_the_place_of_the_sources_is_not_overwritten") {
        return;
    }
    let pair = Pair::start();
    let directory = pair.b().shared_dir();
    let image = directory.join("vm.raw");
    run_with_disk(&pair, &image);
    // Host B sees storage of its own at that path.
    pair.b().stop_agent().unwrap();
    pair.b().start_agent_with(&AgentOptions { hidden: vec![directory], ..AgentOptions::default() }).unwrap();
    let shared = ["--disks", "shared"];
    pair.migration_refused("vm", &shared)
        .is("disk-missing", &["vm.raw does not exist on host-b", "same path"]);
    let agent = pair.b().agent_pid().unwrap();
    let seen = PathBuf::from(format!("/proc/{agent}/root")).join(image.strip_prefix("/").unwrap());
    fs::File::create(&seen).unwrap().set_len(16 << 20).unwrap();
    let refusal = pair.migration_refused("vm", &[]);
    refusal.is(
        "disk-exists",
        &["host-b already has", "vm.raw", "not the storage that the source has", "--disks mirror"],
    );
    assert!(leftover_probes(&image).is_empty());
}

/// Files that were put beside an image to find out who sees it.
fn leftover_probes(image: &Path) -> Vec<String> {
    let names = fs::read_dir(image.parent().unwrap()).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.contains("probe")).collect()
}

#[test]
fn a_disk_outside_the_allowed_directories_is_refused() {
    let pair = Pair::start();
    let directory = pair.testbed().directory().join("elsewhere");
    fs::create_dir(&directory).unwrap();
    run_with_disk(&pair, &directory.join("vm.raw"));
    let refusal = pair.migration_refused("vm", &[]);
    refusal.begins("path-not-allowed", &["elsewhere/vm.raw", "host-b", "[allow] disk_dirs"]);
    // The operator's word that it is shared does not make it allowed.
    pair.migration_refused("vm", &["--disks", "shared"]).begins("path-not-allowed", &["elsewhere/vm.raw"]);
}

#[test]
fn a_disk_on_shared_storage_is_not_refused_and_stays_locked() {
    let pair = Pair::start();
    let image = pair.b().shared_dir().join("vm.raw");
    run_with_disk(&pair, &image);
    let report = pair.migrate("vm", pair.a(), pair.b(), &[]);
    assert_eq!(report.disks.len(), 1);
    assert!(pair.runs_on("vm", pair.b()));
    assert!(leftover_probes(&image).is_empty());
    // The QEMU that has it now holds its lock: no other gets it.
    let drive = format!("file={},format=raw,if=virtio", image.display());
    let second = [
        "run",
        "second",
        "--",
        "qemu-system-x86_64",
        "-nodefaults",
        "-display",
        "none",
        "-m",
        "32",
        "-drive",
        &drive,
    ];
    pair.refused(pair.a(), &second).is("qemu-ended", &["lock"]);
    // And back again.
    pair.migrate("vm", pair.b(), pair.a(), &[]);
    assert!(pair.runs_on("vm", pair.a()));
}
