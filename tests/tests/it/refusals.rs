//! What is refused: each with its own message, and with nothing changed on either host.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, SystemTime};

use end_to_end::{Pair, until, vmirror};
use link::certificates::{IssueOptions, Validity, issue_with};
use session::Outcome;
use testbed::guest_spec::{GuestSpec, Ram};
use testbed::{AgentOptions, Host, Programs, Testbed, root_or_skip};

/// A pair with a machine named `vm` on host A.
fn pair() -> Pair {
    let pair = Pair::start();
    pair.run_tiny(pair.a(), "vm", &[]);
    pair
}

/// The same of QEMU 10, where there is one.
fn pair_of_qemu_10(test: &str) -> Option<Pair> {
    let pair = Pair::of_qemu_10_or_skip(test)?;
    pair.run_tiny(pair.a(), "vm", &[]);
    Some(pair)
}

/// Starts the agent of a host anew with another configuration.
fn reconfigure(host: &Host, change: impl FnOnce(&mut toml::Table)) {
    host.stop_agent().unwrap();
    host.configure(change).unwrap();
    host.start_agent().unwrap();
}

fn allow(config: &mut toml::Table, key: &str, value: impl Into<toml::Value>) {
    config["allow"].as_table_mut().unwrap().insert(key.to_owned(), value.into());
}

#[test]
fn a_name_that_is_nobodys_is_refused_with_those_there_are() {
    let pair = pair();
    let to = pair.b().listen().to_string();
    for arguments in [
        &["show", "nobody"][..],
        &["stop", "nobody"],
        &["check", "nobody", "--to", &to],
        &["migrate", "nobody", "--to", &to],
        &["mirror", "nobody", "--to", &to],
        &["switch", "nobody"],
        &["verify", "nobody"],
        &["cancel", "nobody"],
        &["resolve", "nobody", "--give-up"],
    ] {
        pair.refused(pair.a(), arguments).is("unknown-vm", &["\"nobody\"", "there are: vm"]);
    }
    pair.refused(pair.a(), &["show", "../vm"]).is("usage", &["\"../vm\" cannot name a VM"]);
}

#[test]
fn a_name_that_is_taken_is_refused() {
    let pair = pair();
    let again = ["run", "vm", "--", "qemu-system-x86_64", "-m", "32"];
    pair.refused(pair.a(), &again).is("name-taken", &["\"vm\"", "another name"]);
    let adopt = ["adopt", "vm", "--qmp", "/nowhere"];
    pair.refused(pair.a(), &adopt).is("name-taken", &["\"vm\""]);
    pair.run_tiny(pair.b(), "vm", &[]);
    pair.migration_refused("vm", &[]).is("name-taken", &["host-b", "vm"]);
}

#[test]
fn a_machine_is_not_taken_in_twice() {
    let pair = Pair::start();
    let second = pair.a().directory().join("second.qmp");
    let qmp = format!("unix:{},server=on,wait=off", second.display());
    pair.run_tiny(pair.a(), "vm", &["-qmp", &qmp]);
    let adopt = ["adopt", "again", "--qmp", second.to_str().unwrap()];
    pair.refused(pair.a(), &adopt).is("already-here", &["vm"]);
}

#[test]
fn without_an_agent_it_says_how_to_start_one() {
    let pair = pair();
    pair.b().stop_agent().unwrap();
    let address = pair.b().listen().to_string();
    pair.migration_refused("vm", &[]).is("no-agent", &[&address, "start the agent there"]);
    for arguments in [&["list"][..], &["run", "x", "--", "qemu-system-x86_64"], &["cancel", "vm"]] {
        let refusal = pair.refused(pair.b(), arguments);
        refusal.is("agent-not-running", &["does not exist", "api.sock", "vmirror agent --config"]);
    }
    // One that was killed has left its socket behind.
    pair.a().kill_agent().unwrap();
    pair.refused(pair.a(), &["list"]).is("agent-not-running", &["nobody answers", "api.sock"]);
    // The next one does not know what has left, and nobody who looks is left without knowing that.
    let record = pair.a().state_dir().join("left-images.json");
    let _ = std::fs::remove_file(&record);
    std::fs::create_dir(&record).unwrap();
    pair.a().start_agent().unwrap();
    let told = vmirror(pair.a(), &["list"]).done().stderr;
    assert!(told.contains("[left-images-unreadable]") && told.contains("Is a directory"), "{told}");
    pair.b().start_agent().unwrap();
    assert_eq!(vmirror(pair.b(), &["list"]).done().stderr, "");
}

/// A new authority in that directory, and a certificate of it for the host.
fn other_authority(host: &Host, directory: &Path) {
    let dir = directory.to_str().unwrap();
    let address = host.listen().ip().to_string();
    let _ = vmirror(host, &["cert", "init", "--dir", dir]).done();
    let _ =
        vmirror(host, &["cert", "issue", "--dir", dir, "--name", host.name(), "--address", &address]).done();
}

fn use_certificates(config: &mut toml::Table, directory: &Path, host: &Host) {
    let tls = config["tls"].as_table_mut().unwrap();
    let (cert, key) = (format!("{}.pem", host.name()), format!("{}-key.pem", host.name()));
    for (part, file) in [("ca", "ca.pem"), ("cert", &cert), ("key", &key)] {
        tls.insert(part.to_owned(), directory.join(file).to_str().unwrap().into());
    }
}

/// A certificate of the testbed's own authority for that host, valid until then.
fn issue_until(pair: &Pair, host: &Host, not_after: SystemTime) -> PathBuf {
    let directory = pair.testbed().directory().join(format!("short-lived-{}", host.name()));
    fs::create_dir_all(&directory).unwrap();
    for file in ["ca.pem", "ca-key.pem"] {
        fs::copy(pair.testbed().certificates().join(file), directory.join(file)).unwrap();
    }
    let validity = Validity { not_before: SystemTime::now() - Duration::from_secs(3600), not_after };
    let addresses = [host.listen().ip().to_string()];
    issue_with(&directory, host.name(), &addresses, &IssueOptions::new(validity)).unwrap();
    directory
}

#[test]
fn an_agent_of_another_authority_is_not_believed() {
    let pair = pair();
    let directory = pair.testbed().directory().join("other-authority");
    other_authority(pair.b(), &directory);
    reconfigure(pair.b(), |config| use_certificates(config, &directory, pair.b()));
    pair.migration_refused("vm", &[]).is("not-trusted", &["same authority"]);
    // In the other direction too.
    pair.run_tiny(pair.b(), "other", &[]);
    let to = pair.a().listen().to_string();
    pair.refused(pair.b(), &["migrate", "other", "--to", &to]).is("not-trusted", &["same authority"]);
}

#[test]
fn an_agent_does_not_start_with_a_certificate_that_has_expired() {
    let pair = pair();
    let host = pair.b();
    host.stop_agent().unwrap();
    let directory = issue_until(&pair, host, SystemTime::now() - Duration::from_secs(60));
    host.configure(|config| use_certificates(config, &directory, host)).unwrap();
    let refusal = pair.refused(host, &["agent", "--config", host.config_path().to_str().unwrap()]);
    refusal.is("certificates", &["host-b.pem", "expired on", "vmirror cert issue"]);
}

#[test]
fn a_certificate_that_expires_while_its_agent_runs_is_not_believed_any_more() {
    let pair = pair();
    // Long enough for two agents to start on a busy machine; one that cannot start fails this aloud.
    let expiry = SystemTime::now() + Duration::from_secs(15);
    for host in [pair.a(), pair.b()] {
        let directory = issue_until(&pair, host, expiry);
        reconfigure(host, |config| use_certificates(config, &directory, host));
    }
    let left = expiry.duration_since(SystemTime::now()).unwrap_or_default();
    thread::sleep(left + Duration::from_secs(2));
    pair.migration_refused("vm", &[]).is("not-trusted", &["expired"]);
    // Now only the source's has expired, which the destination says.
    let good = pair.testbed().certificates();
    reconfigure(pair.b(), |config| use_certificates(config, &good, pair.b()));
    pair.migration_refused("vm", &[]).is("not-trusted", &["expired"]);
}

#[test]
fn a_peer_that_is_not_on_the_list_gets_nothing() {
    let pair = pair();
    reconfigure(pair.b(), |config| allow(config, "peers", vec!["host-c".to_owned()]));
    let refusal = pair.migration_refused("vm", &[]);
    refusal.is("peer-not-allowed", &["host-b does not take VMs from host-a", "[allow] peers"]);
    assert_eq!(pair.check("vm"), ["peer-not-allowed"]);
}

#[test]
fn a_qmp_socket_that_another_program_uses_is_not_taken_from_it() {
    let pair = Pair::start();
    let host = pair.a();
    let socket = host.directory().join("byhand.qmp");
    let ram = Ram::File(host.ram_dir().join("byhand"));
    let spec = GuestSpec { ram, qmp: Some(socket.clone()), ..pair.spec("byhand", 128) };
    let mut guest = host.boot(&spec).unwrap();
    let mut client = None;
    until("QEMU's monitor answers", || {
        client = UnixStream::connect(&socket).ok();
        client.is_some()
    });
    let adopt = ["adopt", "byhand", "--qmp", socket.to_str().unwrap()];
    let refusal = pair.refused(host, &adopt);
    refusal.is("qmp-taken", &[socket.to_str().unwrap(), "another program", "-qmp unix:"]);
    assert_eq!(guest.exit_status(), None);
    drop(client);
    let _ = vmirror(host, &adopt).done();
    assert!(pair.runs_on("byhand", host));
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

#[test]
fn a_kernel_without_dirty_tracking_is_refused_by_naming_what_it_lacks() {
    let pair = Pair::start();
    pair.a().stop_agent().unwrap();
    pair.a().start_agent_with(&AgentOptions { old_kernel: true, ..AgentOptions::default() }).unwrap();
    pair.run_tiny(pair.a(), "vm", &[]);
    pair.migration_refused("vm", &[]).is("kernel-too-old", &["userfaultfd", "Linux 6.7"]);
    assert_eq!(pair.check("vm"), ["kernel-too-old"]);
}

#[test]
fn options_that_make_no_sense_are_refused_by_name() {
    let pair = pair();
    for (options, kind, words) in [
        (
            &["--downtime", "2s", "--max-downtime", "1s"][..],
            "bad-option",
            &["--max-downtime 1s", "--downtime 2s"][..],
        ),
        (&["--max-downtime", "1ms"], "bad-option", &["--max-downtime 1ms", "--downtime 50ms"]),
        (&["--bandwidth", "1"], "bad-option", &["--bandwidth 1 bytes/s"]),
        (&["--bandwidth", "0"], "usage", &["--bandwidth", "nothing would ever move"]),
        (&["--bandwidth", "fast"], "usage", &["--bandwidth", "\"fast\"", "500MiB/s"]),
        (&["--streams", "0"], "usage", &["--streams", "'0'"]),
        (&["--streams", "99"], "bad-option", &["--streams 99", "16"]),
        (&["--timeout", "0s"], "bad-option", &["--timeout 0", "no time"]),
        (&["--downtime", "5"], "usage", &["--downtime", "'5'", "unit"]),
        (&["--verify", "none"], "usage", &["--verify", "'none'"]),
        (&["--colour"], "usage", &["--colour"]),
        (&["--to", "elsewhere"], "usage", &["--to"]),
    ] {
        pair.migration_refused("vm", options).is(kind, words);
    }
    for to in ["nowhere", "host-b:", ":7600", "host-b:0", "host-b:99999", "http://host-b:7600"] {
        pair.refused(pair.a(), &["migrate", "vm", "--to", to]).is("bad-address", &[to, "HOST:PORT"]);
    }
    pair.refused(pair.a(), &["migrate", "vm"]).is("usage", &["--to <HOST:PORT>"]);
    pair.refused(pair.a(), &["migrat", "vm"]).is("usage", &["'migrat'", "'migrate'"]);
    pair.refused(pair.a(), &["resolve", "vm"]).is("usage", &["--run-here", "--give-up"]);
}

#[test]
fn a_host_that_cannot_be_found_is_refused_by_its_name() {
    let pair = pair();
    let refusal = pair.refused(pair.a(), &["migrate", "vm", "--to", "no-such-host.invalid:7600"]);
    refusal.is("unreachable", &["no-such-host.invalid"]);
}

#[test]
fn an_unknown_configuration_key_is_refused_by_name_and_line() {
    let pair = pair();
    let host = pair.b();
    host.stop_agent().unwrap();
    let path = host.config_path();
    let config = path.to_str().unwrap();
    let good = fs::read_to_string(&path).unwrap();
    for (bad, words) in [
        (format!("colour = \"blue\"\n{good}"), &["agent.toml:1:", "\"colour\"", "state_dir"][..]),
        (good.replace("[allow]\n", "[allow]\npeer = [\"host-a\"]\n"), &["\"allow.peer\"", "peers"]),
        (good.replace("listen =", "listen = 7 #"), &["agent.toml:", "listen"]),
        (good.replace("name =", "#name ="), &["name is missing"]),
        (format!("{good}\n[[["), &["agent.toml:"]),
    ] {
        assert_ne!(bad, good);
        fs::write(&path, bad).unwrap();
        pair.refused(host, &["agent", "--config", config]).is("configuration", words);
    }
    let missing = host.directory().join("none.toml");
    let missing = missing.to_str().unwrap();
    pair.refused(host, &["agent", "--config", missing]).is("configuration", &[missing, "--config"]);
}

#[test]
fn a_second_agent_on_the_same_directories_is_refused() {
    let pair = pair();
    let config = pair.a().config_path();
    let refusal = pair.refused(pair.a(), &["agent", "--config", config.to_str().unwrap()]);
    refusal.is("agent-running", &[&pair.a().agent_pid().unwrap().to_string(), "stop that one first"]);
}

#[test]
fn a_destination_that_is_the_source_is_refused() {
    let pair = pair();
    let own = pair.a().listen().to_string();
    pair.refused(pair.a(), &["migrate", "vm", "--to", &own]).is("same-host", &[&own, "host-a"]);
    assert_eq!(vmirror(pair.a(), &["check", "vm", "--to", &own]).code, Some(2));
    // Its own agent by another of its names: whatever the address is, the certificate says who answers.
    let directory = pair.testbed().directory().join("two-addresses");
    let host = pair.a();
    fs::create_dir(&directory).unwrap();
    for file in ["ca.pem", "ca-key.pem"] {
        fs::copy(pair.testbed().certificates().join(file), directory.join(file)).unwrap();
    }
    let addresses = [host.listen().ip().to_string(), "127.0.0.77".to_owned()];
    issue_with(&directory, host.name(), &addresses, &IssueOptions::default()).unwrap();
    reconfigure(host, |config| {
        use_certificates(config, &directory, host);
        config.insert("listen".into(), format!("0.0.0.0:{}", host.listen().port()).into());
    });
    let other = format!("127.0.0.77:{}", host.listen().port());
    pair.refused(host, &["migrate", "vm", "--to", &other]).is("same-host", &[&other, "host-a"]);
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

#[test]
fn what_ties_a_machine_to_its_host_is_refused_by_naming_it() {
    what_ties_a_machine_to_its_host_is_refused(&Pair::start());
}

#[test]
fn what_ties_a_machine_of_qemu_10_to_its_host_is_refused() {
    if let Some(pair) = Pair::of_qemu_10_or_skip("what_ties_a_machine_of_qemu_10_to_its_host_is_refused") {
        what_ties_a_machine_to_its_host_is_refused(&pair);
    }
}

fn what_ties_a_machine_to_its_host_is_refused(pair: &Pair) {
    pair.run_tiny(pair.a(), "vm", &["-netdev", "user,id=slirp", "-device", "e1000,netdev=slirp,romfile="]);
    let refusal = pair.migration_refused("vm", &[]);
    refusal.is("user-networking", &["slirp", "tap on a bridge", "--accept-disconnect"]);
    let report = pair.migrate("vm", pair.a(), pair.b(), &["--accept-disconnect"]);
    assert_eq!(report.outcome, Outcome::Completed, "{report:#?}");
    pair.run_tiny(pair.a(), "still", &["-S"]);
    pair.migration_refused("still", &[]).is("not-running", &["still", "prelaunch", "resume it first"]);
}

#[test]
fn a_machine_in_a_migration_is_left_alone() {
    let pair = pair();
    let to = pair.b().listen().to_string();
    for (arguments, verb) in [
        (&["cancel", "vm"][..], "no-mirror"),
        (&["switch", "vm"], "no-mirror"),
        (&["verify", "vm"], "no-mirror"),
    ] {
        pair.refused(pair.a(), arguments).is(verb, &["vm has no mirror"]);
    }
    pair.refused(pair.a(), &["resolve", "vm", "--run-here"]).is("not-uncertain", &["vm runs here"]);
    pair.mirror("vm", pair.a(), pair.b(), &[]);
    for arguments in [
        &["migrate", "vm", "--to", &to][..],
        &["mirror", "vm", "--to", &to],
        &["check", "vm", "--to", &to],
        &["stop", "vm"],
        &["stop", "vm", "--force"],
    ] {
        pair.refused(pair.a(), arguments)
            .is("in-migration", &["vm is being migrated to", &to, "vmirror cancel vm"]);
    }
    // The copy is not a machine of the destination that anything could be done to.
    for arguments in
        [&["stop", "vm", "--force"][..], &["migrate", "vm", "--to", &pair.a().listen().to_string()]]
    {
        pair.refused(pair.b(), arguments).is("unknown-vm", &["vm"]);
    }
    pair.refused(pair.b(), &["run", "vm", "--", "qemu-system-x86_64", "-m", "32"]).is("name-taken", &["vm"]);
    let _ = vmirror(pair.a(), &["switch", "vm", "--quiet"]).done();
    assert!(pair.runs_on("vm", pair.b()));
    pair.holds_nothing(pair.a());
}

#[test]
fn a_check_tells_every_reason_at_once_and_changes_nothing() {
    let testbed = Testbed::rootless().unwrap();
    testbed
        .b()
        .configure(|config| {
            allow(config, "max_memory", "24MiB");
            allow(config, "disk_dirs", Vec::<String>::new());
            allow(config, "qemu", Vec::<String>::new());
        })
        .unwrap();
    let pair = Pair::of(testbed);
    let image = pair.b().shared_dir().join("vm.raw");
    fs::File::create(&image).unwrap().set_len(16 << 20).unwrap();
    let drive = format!("file={},format=raw,if=virtio", image.display());
    pair.run_tiny(
        pair.a(),
        "vm",
        &["-netdev", "user,id=slirp", "-device", "e1000,netdev=slirp,romfile=", "-drive", &drive],
    );
    let mut kinds = pair.check("vm");
    kinds.sort();
    kinds.dedup();
    assert_eq!(kinds, ["memory-limit", "path-not-allowed", "qemu-not-allowed", "user-networking"]);
    // For a person, each with what to do about it.
    let said = vmirror(pair.a(), &["check", "vm", "--to", &pair.b().listen().to_string()]);
    assert!(said.stdout.contains("reasons:") && said.stdout.matches('→').count() >= 4, "{said:?}");
    assert!(pair.runs_on("vm", pair.a()));
}
