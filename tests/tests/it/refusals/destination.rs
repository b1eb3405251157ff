//! What a destination has not, or does not let through: room, CPU, machine type, QEMU, bridges, files, arguments.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use end_to_end::{Pair, vmirror};
use testbed::guest_spec::GuestSpec;
use testbed::{Host, Programs, root_or_skip};

use super::{allow, pair, reconfigure};

/// The same of QEMU 10, where there is one.
fn pair_of_qemu_10(test: &str) -> Option<Pair> {
    let pair = Pair::of_qemu_10_or_skip(test)?;
    pair.run_tiny(pair.a(), "vm", &[]);
    Some(pair)
}

#[test]
fn a_machine_for_which_there_is_no_room_is_refused() {
    if !root_or_skip("a_machine_for_which_there_is_no_room_is_refused") {
        return;
    }
    let pair = pair();
    pair.b().limit_ram(16 << 20).unwrap();
    pair.migration_refused("vm", &[]).is("no-room", &["32 MiB", "16 MiB", "host-b", "ram_dir"]);
    pair.a().limit_ram(64 << 20).unwrap();
    // What the machine that is there may still allocate is not free.
    let run = ["run", "big", "--", "qemu-system-x86_64", "-m", "48"];
    pair.refused(pair.a(), &run).is("no-room", &["48 MiB", "host-a", "ram_dir"]);
    pair.b().limit_ram(1 << 30).unwrap();
    reconfigure(pair.b(), |config| allow(config, "max_memory", "24MiB"));
    pair.migration_refused("vm", &[]).is("memory-limit", &["32 MiB", "24 MiB", "[allow] max_memory"]);
    reconfigure(pair.b(), |config| allow(config, "max_memory", "1GiB"));
    assert!(pair.check("vm").is_empty());
}

/// Lets a host run only a QEMU that is the pair's, but for what these lines of shell do to its arguments.
fn other_qemu(pair: &Pair, host: &Host, change: &str) {
    let directory = host.directory().join("other-qemu");
    fs::create_dir_all(&directory).unwrap();
    let path = directory.join("qemu-system-x86_64");
    let real = pair.qemu_program().display();
    fs::write(&path, format!("#!/bin/bash\n{change}\nexec {real} \"$@\"\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    let path = path.to_str().unwrap().to_owned();
    reconfigure(host, |config| allow(config, "qemu", vec![path]));
}

#[test]
fn a_cpu_that_lacks_what_the_guest_was_given_is_refused_by_naming_it() {
    a_cpu_that_lacks_something_is_refused(&pair());
}

#[test]
fn a_cpu_of_qemu_10_that_lacks_something_is_refused() {
    if let Some(pair) = pair_of_qemu_10("a_cpu_of_qemu_10_that_lacks_something_is_refused") {
        a_cpu_that_lacks_something_is_refused(&pair);
    }
}

fn a_cpu_that_lacks_something_is_refused(pair: &Pair) {
    other_qemu(pair, pair.b(), "set -- \"$@\" -cpu qemu64,-pni,-cx16");
    let refusal = pair.migration_refused("vm", &[]);
    refusal.is("cpu-feature-missing", &["the CPU on host-b lacks", "pni", "cx16", "-cpu"]);
    other_qemu(pair, pair.b(), "");
    assert!(pair.check("vm").is_empty());
}

#[test]
fn a_machine_type_that_the_destination_does_not_have_is_refused_by_naming_it() {
    let pair = pair();
    other_qemu(&pair, pair.b(), "set -- \"${@/pc-i440fx-/pc-future-}\"");
    pair.migration_refused("vm", &[]).is("machine-type", &["host-b does not have machine type pc-i440fx-"]);
    // One that makes another machine of the same name is found out too.
    other_qemu(
        &pair,
        pair.b(),
        "for word; do shift; [[ $word = pc-i440fx-* ]] && word=q35; set -- \"$@\" \"$word\"; done",
    );
    pair.migration_refused("vm", &[]).is("machine-type", &["pc-q35-", "pc-i440fx-", "host-b"]);
}

#[test]
fn a_machine_of_a_newer_qemu_is_refused_where_there_is_only_an_older_one() {
    let test = "a_machine_of_a_newer_qemu_is_refused_where_there_is_only_an_older_one";
    let Some(newer) = Programs::qemu_10_or_skip(test) else { return };
    let pair = Pair::start();
    let mut arguments = vec!["run", "vm", "--", newer.to_str().unwrap()];
    arguments.extend(["-accel", "tcg", "-m", "32", "-nodefaults", "-display", "none"]);
    let _ = vmirror(pair.a(), &arguments).done();
    let older = Programs::find().qemu.to_str().unwrap().to_owned();
    reconfigure(pair.b(), |config| allow(config, "qemu", vec![older]));
    pair.migration_refused("vm", &[]).is("machine-type", &["host-b does not have machine type pc-i440fx-10"]);
}

#[test]
fn a_qemu_that_is_not_allowed_is_not_run() {
    let pair = pair();
    reconfigure(pair.b(), |config| allow(config, "qemu", Vec::<String>::new()));
    pair.migration_refused("vm", &[])
        .is("qemu-not-allowed", &["qemu-system-x86_64", "host-b", "[allow] qemu"]);
}

/// Runs `ip` on a host.
fn ip(host: &Host, arguments: &[&str]) {
    assert!(host.command("ip").args(arguments).status().unwrap().success(), "ip {arguments:?}");
}

#[test]
fn a_bridge_that_is_not_allowed_or_not_there_is_refused() {
    if !root_or_skip("a_bridge_that_is_not_allowed_or_not_there_is_refused") {
        return;
    }
    let pair = Pair::start();
    pair.a().add_tap("tap7").unwrap();
    let nic = [
        "-netdev",
        "tap,id=n,ifname=tap7,script=no,downscript=no",
        "-device",
        "virtio-net-pci,netdev=n,romfile=",
    ];
    pair.run_tiny(pair.a(), "vm", &nic);
    reconfigure(pair.b(), |config| allow(config, "bridges", Vec::<String>::new()));
    pair.migration_refused("vm", &[])
        .is("bridge-not-allowed", &["host-b does not allow bridge br0", "[allow] bridges"]);
    ip(pair.a(), &["link", "add", "br9", "type", "bridge"]);
    ip(pair.a(), &["link", "set", "tap7", "master", "br9"]);
    reconfigure(pair.b(), |config| allow(config, "bridges", vec!["br9".to_owned()]));
    pair.migration_refused("vm", &[]).is("bridge-missing", &["host-b has no bridge br9", "make the bridge"]);
    // An interface of that name that somebody else uses is not taken from them.
    ip(pair.a(), &["link", "set", "tap7", "master", "br0"]);
    ip(pair.b(), &["link", "add", "tap7", "type", "bridge"]);
    reconfigure(pair.b(), |config| allow(config, "bridges", vec!["br0".to_owned()]));
    pair.migration_refused("vm", &[]).is("interface-taken", &["host-b", "tap7"]);
    ip(pair.b(), &["link", "delete", "tap7"]);
    assert!(pair.check("vm").is_empty());
}

#[test]
fn a_kernel_file_that_the_destination_has_not_or_may_not_use_is_refused() {
    let pair = Pair::start();
    let directory = pair.testbed().directory().join("boot");
    fs::create_dir(&directory).unwrap();
    let kernel = directory.join("vmlinuz");
    let spec = pair.spec("vm", 128);
    fs::copy(&spec.kernel, &kernel).unwrap();
    let guest = pair.run(pair.a(), "vm", &GuestSpec { kernel: kernel.clone(), ..spec });
    let before = guest.status();
    let name = kernel.to_str().unwrap();
    pair.migration_refused("vm", &[]).is("path-not-allowed", &[name, "host-b", "[allow] disk_dirs"]);
    fs::rename(&kernel, directory.join("gone")).unwrap();
    pair.migration_refused("vm", &[]).is("file-missing", &[name, "host-b", "same path"]);
    fs::rename(directory.join("gone"), &kernel).unwrap();
    guest.runs_on();
    let _ = guest.sane_since(&before);
}

#[test]
fn what_the_destination_does_not_let_through_is_refused_with_the_key_that_would() {
    let pair = Pair::start();
    let line = [
        "-vnc",
        "127.0.0.1:77",
        "-chardev",
        "udp,id=u,host=127.0.0.1,port=9",
        "-trace",
        "enable=nothing_of_that_name",
    ];
    pair.run_tiny(pair.a(), "vm", &line);
    let check = || vmirror(pair.a(), &["check", "vm", "--to", &pair.b().listen().to_string()]);
    let said = check();
    assert_eq!(said.code, Some(2), "{said:?}");
    for words in [
        "host-b does not let -vnc 127.0.0.1:77 through: it listens on 127.0.0.1",
        "add \"127.0.0.1\" to [allow] listen in the configuration of host-b",
        "-chardev udp,id=u,host=127.0.0.1,port=9 through",
        "add \"-chardev udp\" to [allow] arguments",
        "-trace enable=nothing_of_that_name through",
    ] {
        assert!(said.stdout.contains(words), "{words:?}: {said:?}");
    }
    assert_eq!(said.stdout.matches("[argument-not-allowed]").count(), 3, "all of it at once: {said:?}");
    reconfigure(pair.b(), |config| {
        allow(config, "listen", vec!["127.0.0.1"]);
        allow(config, "arguments", vec!["-chardev udp", "-trace"]);
    });
    assert_eq!(check().code, Some(0), "{:?}", check());
    let _ = pair.migrate("vm", pair.a(), pair.b(), &[]);
    let listens = pair.b().command("ss").args(["-Hltn", "sport = :5977"]).output().unwrap();
    assert!(String::from_utf8_lossy(&listens.stdout).contains("127.0.0.1:5977"), "{listens:?}");
    // It runs under a filter of system calls, though nobody has asked for one at its source.
    let pid = pair.qemu(pair.b()).unwrap();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    assert!(status.contains("Seccomp:\t2"), "{status}");
}
