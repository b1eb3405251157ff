//! What is refused: each with its own message, and with nothing changed on either host.

mod destination;
mod disks;
mod trust;

use std::fs;
use std::os::unix::net::UnixStream;

use end_to_end::{Pair, until, vmirror};
use session::Outcome;
use testbed::guest_spec::{GuestSpec, Ram};
use testbed::{AgentOptions, Host, Testbed};

/// A pair with a machine named `vm` on host A.
fn pair() -> Pair {
    let pair = Pair::start();
    pair.run_tiny(pair.a(), "vm", &[]);
    pair
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
