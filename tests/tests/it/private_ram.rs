//! What a guest has in its memory must be read by no other user of either host, and no memory that somebody else has laid ready used.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use end_to_end::{Guest, PATIENCE, Pair, report_adds_up, vmirror};
use host::{Journal, Record};
use serde_json::{Value, json};
use testbed::guest_spec::{GuestSpec, Ram};
use testbed::{Host, Programs, Testbed, root_or_skip};

/// A user that owns nothing.
const NOBODY: u32 = 65534;

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

/// Makes a host's `ram_dir` one that anybody may write to, as /dev/shm is.
fn open_to_all(host: &Host) {
    fs::set_permissions(host.ram_dir(), Permissions::from_mode(0o1777)).unwrap();
}

/// The file of the only guest on a host.
fn ram_file(host: &Host) -> PathBuf {
    let files = host.ram_files();
    assert_eq!(files.len(), 1, "{files:?}");
    files.into_iter().next().unwrap()
}

/// Asserts that the memory of the only guest of a host is its owner's alone, by every look and by trying.
fn is_private(host: &Host) {
    let file = ram_file(host);
    let directory = file.parent().unwrap();
    assert_eq!(directory, host.ram_dir().join(format!("vmirror-{}", host.name())));
    assert_eq!((mode(directory), mode(&file)), (0o700, 0o600), "{}", file.display());
    assert_eq!(fs::metadata(&file).unwrap().nlink(), 1);
    if rustix::process::geteuid().is_root() {
        let user = NOBODY.to_string();
        let other = ["--reuid", &user, "--regid", &user, "--clear-groups", "head", "-c", "16"];
        let read = Command::new("setpriv").args(other).arg(&file).output().unwrap();
        assert!(!read.status.success() && read.stdout.is_empty(), "{read:?}");
        assert!(String::from_utf8_lossy(&read.stderr).contains("Permission denied"), "{read:?}");
    }
}

fn small(pair: &Pair) -> GuestSpec {
    GuestSpec { fill_mib: 16, rate: 100, ..pair.spec("vm", 128) }
}

/// A machine that boots nothing.
fn run_empty(pair: &Pair) -> Vec<String> {
    let program = pair.spec("vm", 128).command_line()[0].clone();
    let words = ["run", "vm", "--", &program, "-accel", "tcg", "-m", "32", "-nodefaults", "-display", "none"];
    words.map(str::to_owned).to_vec()
}

fn words(line: &[String]) -> Vec<&str> {
    line.iter().map(String::as_str).collect()
}

#[test]
fn no_other_user_reads_a_guests_memory_at_the_source_or_at_the_destination() {
    let pair = Pair::start();
    [pair.a(), pair.b()].into_iter().for_each(open_to_all);
    let guest = pair.run(pair.a(), "vm", &small(&pair));
    let before = guest.status();
    is_private(pair.a());
    report_adds_up(&pair.migrate("vm", pair.a(), pair.b(), &[]), &guest);
    is_private(pair.b());
    pair.holds_nothing(pair.a());
    guest.sound_since(&before);
}

#[test]
fn an_agent_does_not_put_memory_where_another_user_has_made_the_directory() {
    if !root_or_skip("an_agent_does_not_put_memory_where_another_user_has_made_the_directory") {
        return;
    }
    let testbed = Testbed::new().unwrap();
    let theirs = testbed.a().ram_dir().join("vmirror-host-a");
    fs::create_dir(&theirs).unwrap();
    chown(&theirs, Some(NOBODY), Some(NOBODY)).unwrap();
    let refused = testbed.a().start_agent().unwrap_err().to_string();
    assert!(refused.contains("belongs to user 65534") && refused.contains("remove it"), "{refused}");
    // Nor where they have made a link to somewhere else.
    fs::remove_dir(&theirs).unwrap();
    symlink(testbed.b().ram_dir(), &theirs).unwrap();
    let refused = testbed.a().start_agent().unwrap_err().to_string();
    assert!(refused.contains("cannot use") && refused.contains("vmirror-host-a"), "{refused}");
    fs::remove_file(&theirs).unwrap();
    testbed.a().start_agent().unwrap();
}

#[test]
fn a_file_that_lies_ready_under_the_name_of_a_guests_memory_is_not_used() {
    let pair = Pair::start();
    let planted = |host: &Host, name: &str| host.ram_dir().join(format!("vmirror-{}/{name}", host.name()));
    // One that cannot be removed is an error that names it, on either side.
    let stale = planted(pair.a(), "vmirror-vm@pc.ram");
    fs::create_dir(&stale).unwrap();
    let run = run_empty(&pair);
    let path = stale.to_str().unwrap();
    pair.refused(pair.a(), &words(&run)).is("ram-file", &[path, "cannot be removed", "remove it"]);
    fs::remove_dir(&stale).unwrap();

    // One that can is gone, and what a link leads to is as it was.
    let other = pair.a().directory().join("precious");
    fs::write(&other, "precious").unwrap();
    symlink(&other, &stale).unwrap();
    let guest = pair.run(pair.a(), "vm", &small(&pair));
    let before = guest.status();
    assert!(fs::symlink_metadata(&stale).unwrap().is_file());
    assert_eq!(fs::read_to_string(&other).unwrap(), "precious");

    let there = planted(pair.b(), "vmirror-vm@pc.ram");
    fs::create_dir(&there).unwrap();
    pair.migration_refused("vm", &[])
        .is("ram-file", &["host-b", there.to_str().unwrap(), "cannot be removed"]);
    fs::remove_dir(&there).unwrap();
    fs::write(&there, "what an earlier guest has left").unwrap();
    report_adds_up(&pair.migrate("vm", pair.a(), pair.b(), &[]), &guest);
    is_private(pair.b());
    guest.sound_since(&before);
}

#[test]
fn a_machine_whose_memory_others_have_got_at_while_it_started_is_not_run() {
    let pair = Pair::start();
    let qemu = pair.a().directory().join("qemu-system-x86_64");
    let real = Programs::find().qemu;
    let file = pair.a().ram_dir().join("vmirror-host-a/vmirror-vm@pc.ram");
    let mut run = run_empty(&pair);
    run[3] = qemu.to_str().unwrap().to_owned();
    let other = pair.a().ram_dir().join("other");
    for (done, why) in [
        (format!("chmod 666 {}", file.display()), "its mode is 0666"),
        (format!("ln {} {}", file.display(), other.display()), "it has 2 names"),
        (format!("mv {} {}; truncate -s 32M {0}", file.display(), other.display()), "another file"),
    ] {
        fs::write(&qemu, format!("#!/bin/sh\n{done}\nexec {} \"$@\"\n", real.display())).unwrap();
        fs::set_permissions(&qemu, Permissions::from_mode(0o755)).unwrap();
        let said = vmirror(pair.a(), &[&["--json"], &words(&run)[..]].concat());
        let error = said.refusal();
        let message = error["message"].as_str().unwrap();
        assert!(error["kind"] == "ram-file" && message.contains(why), "{error}");
        let _ = fs::remove_file(&other);
        pair.holds_nothing(pair.a());
    }
}

#[test]
fn an_adopted_guest_whose_memory_others_can_read_is_warned_of_and_has_its_own_where_it_goes() {
    let pair = Pair::start();
    fs::set_permissions(pair.a().ram_dir(), Permissions::from_mode(0o755)).unwrap();
    let qmp = pair.a().directory().join("own.qmp");
    let ram = pair.a().ram_dir().join("own");
    let spec = GuestSpec { ram: Ram::File(ram.clone()), qmp: Some(qmp.clone()), ..small(&pair) };
    let mut started = pair.a().boot(&spec).unwrap();
    started.wait_ready(PATIENCE).unwrap();
    let guest = Guest::ready("vm", &spec);
    fs::set_permissions(&ram, Permissions::from_mode(0o644)).unwrap();

    // What else is warned of, as that somebody may start it again, is not of interest here.
    let told = |document: &Value| -> Vec<String> {
        let warnings = document["warnings"].as_array().cloned().unwrap_or_default();
        warnings
            .iter()
            .filter(|warning| warning["kind"] == "ram-exposed")
            .map(|warning| format!("{}: {} → {}", warning["kind"], warning["message"], warning["hint"]))
            .collect()
    };
    let exposed = |warnings: &[String]| {
        assert_eq!(warnings.len(), 1, "{warnings:?}");
        let [path, remedy] = [ram.display().to_string(), format!("chmod 600 {}", ram.display())];
        for word in ["ram-exposed", "every user of this host can read it", &path, &remedy] {
            assert!(warnings[0].contains(word), "{word}: {warnings:?}");
        }
    };
    let adopted = vmirror(pair.a(), &["adopt", "vm", "--qmp", qmp.to_str().unwrap()]).done();
    assert!(adopted.stderr.contains("warning: ") && adopted.stderr.contains("chmod 600"), "{adopted:?}");
    let log = fs::read_to_string(pair.a().agent_log()).unwrap();
    assert!(log.contains("ram-exposed"), "{log}");
    exposed(&told(&vmirror(pair.a(), &["show", "vm", "--json"]).done().json()));
    let check = ["check", "vm", "--to", &pair.b().listen().to_string(), "--json"];
    exposed(&told(&vmirror(pair.a(), &check).done().json()));

    fs::set_permissions(&ram, Permissions::from_mode(0o600)).unwrap();
    assert_eq!(told(&vmirror(pair.a(), &check).done().json()), Vec::<String>::new());
    fs::set_permissions(&ram, Permissions::from_mode(0o666)).unwrap();
    report_adds_up(&pair.migrate("vm", pair.a(), pair.b(), &[]), &guest);
    is_private(pair.b());
    pair.holds_nothing(pair.a());
}

#[test]
fn a_guest_whose_memory_an_earlier_version_has_put_elsewhere_is_found_again_and_leaves_nothing() {
    let pair = Pair::start();
    let (a, name) = (pair.a(), "vm");
    let (qmp, ram) = (a.run_dir().join("vm.qmp"), a.ram_dir().join("vmirror-vm@pc.ram"));
    let monitor = format!("socket,id=vmirror-qmp,path={},server=on,wait=off", qmp.display());
    let extra = ["-chardev", &monitor, "-mon", "chardev=vmirror-qmp,mode=control"];
    let extra = extra.map(str::to_owned).to_vec();
    let spec = GuestSpec { ram: Ram::File(ram.clone()), extra, ..small(&pair) };
    let mut started = a.boot(&spec).unwrap();
    started.wait_ready(PATIENCE).unwrap();
    let guest = Guest::ready(name, &spec);
    let before = guest.status();

    // What that version has left.
    a.stop_agent().unwrap();
    let pid = started.pid();
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let since_boot: u64 = stat[stat.rfind(')').unwrap() + 2..].split(' ').nth(19).unwrap().parse().unwrap();
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let record: Record = serde_json::from_value(json!({
        "name": name, "generation": 0, "ownership": "owner", "origin": "run", "arrived_by": null, "resuming": false,
        "process": {"pid": pid, "start_time": since_boot, "boot": boot.trim(), "qmp_socket": qmp},
        "argv": spec.command_line(), "qmp_socket": qmp, "memory": 128 << 20,
        "made": {"files": [qmp, ram], "taps": []},
    }))
    .unwrap();
    let journal = Journal::open(&a.state_dir()).unwrap();
    journal.claim(record).unwrap();
    drop(journal);
    a.start_agent().unwrap();

    assert!(pair.runs_on(name, a), "{}", pair.logs());
    report_adds_up(&pair.migrate(name, a, pair.b(), &[]), &guest);
    pair.holds_nothing(a);
    report_adds_up(&pair.migrate(name, pair.b(), a, &[]), &guest);
    is_private(a);
    guest.sound_since(&before);
    let _ = vmirror(a, &["stop", name, "--force"]).done();
    pair.holds_nothing(a);
}
