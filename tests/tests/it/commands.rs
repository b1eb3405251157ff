//! No command may tell a script something else than a person, or print anything but its document to a script.

use end_to_end::{Guest, Pair, report_adds_up, until, vmirror};
use serde_json::Value;
use testbed::Host;

/// What a command says to a script: one document, and nothing on standard error.
#[track_caller]
fn document(host: &Host, arguments: &[&str]) -> Value {
    let said = vmirror(host, &[arguments, &["--json"]].concat()).done();
    assert_eq!(said.stderr, "", "{arguments:?}");
    said.json()
}

/// What a command says to a person on standard output.
#[track_caller]
fn words(host: &Host, arguments: &[&str]) -> String {
    vmirror(host, arguments).done().stdout
}

/// Asserts that each of those parts is in the text.
#[track_caller]
fn has(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
}

fn a_mirror_is_shown_verified_and_ended(pair: &Pair, guest: &Guest) {
    let (a, to) = (pair.a(), pair.b().listen().to_string());
    assert_eq!(document(a, &["check", "vm", "--to", &to])["findings"], Value::Array(Vec::new()));
    has(&words(a, &["check", "vm", "--to", &to]), &["vm can move to host-b"]);

    let standing = document(a, &["mirror", "vm", "--to", &to, "--detach"]);
    assert_eq!(
        (&standing["in_sync"], &standing["total_bytes"]),
        (&true.into(), &(guest.pages() * 4096).into())
    );
    for arguments in [&["status"][..], &["status", "vm"]] {
        let status = document(a, arguments);
        assert_eq!((&status[0]["vm"], &status[0]["id"]), (&"vm".into(), &standing["id"]), "{status}");
        has(&words(a, arguments), &["vm", "host-b", "mirror"]);
    }
    has(&words(a, &["list"]), &["vm", "running", "host-b"]);
    assert_eq!(document(a, &["show", "vm"])["session"]["id"], standing["id"]);
    assert!(document(a, &["verify", "vm"])["audited_pages"].as_u64().unwrap() >= guest.pages());
    has(&words(a, &["verify", "vm"]), &["vm was compared with its copy on both hosts", "0 repaired"]);

    // A second one is refused, and the first does not mind.
    let second = vmirror(a, &["mirror", "vm", "--to", &to, "--json"]).refusal();
    assert_eq!(second["kind"], "in-migration", "{second}");
    assert_eq!(document(a, &["status"])[0]["id"], standing["id"]);

    assert_eq!(document(a, &["cancel", "vm"])["outcome"], "cancelled");
    assert_eq!(document(a, &["status"]), Value::Array(Vec::new()));
    pair.holds_nothing(pair.b());

    has(
        &words(a, &["mirror", "vm", "--to", &to, "--detach"]),
        &["in sync", "vmirror switch vm", "vmirror cancel vm"],
    );
    has(&words(a, &["cancel", "vm"]), &["the migration of vm to host-b has ended"]);
    has(&words(a, &["status", "vm"]), &["vm has no mirror and is not being migrated"]);
    pair.holds_nothing(pair.b());
}

fn what_has_ended_is_remembered(host: &Host, id: &str) {
    let history = document(host, &["history"]);
    let ended: Vec<_> =
        history.as_array().unwrap().iter().map(|entry| entry["outcome"].as_str().unwrap()).collect();
    assert_eq!(ended, ["completed", "cancelled", "cancelled"], "{history}");
    assert_eq!(history[0]["id"], id);
    assert_eq!(document(host, &["history", "--vm", "vm", "-n", "1"]).as_array().unwrap().len(), 1);
    has(&words(host, &["history"]), &["ID", &id[..8], "host-b", "cancelled"]);

    let report = document(host, &["report", &id[..8]]);
    assert_eq!((&report["id"], &report["outcome"]), (&id.into(), &"completed".into()));
    has(
        &words(host, &["report", id]),
        &["vm now runs on host-b", "downtime", "gate match, proof match", "ROUND"],
    );
    let page = host.directory().join("report.html");
    words(host, &["report", id, "--html", page.to_str().unwrap()]);
    has(&std::fs::read_to_string(page).unwrap(), &["<html", "vm", "host-b"]);

    let lines = vmirror(host, &["events", "--json"]).done().stdout;
    let events: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(events.is_sorted_by_key(|event| event["seq"].as_u64().unwrap()), "{lines}");
    let count = |kind: &str| events.iter().filter(|event| event["event"] == kind).count();
    assert_eq!(
        (count("vm-added"), count("session-started"), count("session-finished")),
        (1, 3, 3),
        "{lines}"
    );
    has(&words(host, &["events"]), &["vm  started", "mirror to", "synchronize", "runs elsewhere now"]);
}

#[test]
fn no_command_tells_a_script_other_things_than_a_person() {
    let pair = Pair::start();
    let guest = pair.run(pair.a(), "vm", &pair.spec("vm", 128));
    let before = guest.status();
    a_mirror_is_shown_verified_and_ended(&pair, &guest);

    let to = pair.b().listen().to_string();
    words(pair.a(), &["mirror", "vm", "--to", &to, "--detach"]);
    let told = vmirror(pair.a(), &["switch", "vm"]).done();
    has(&told.stdout, &["vm", "host-b", "downtime"]);
    until("it is off the list", || pair.show("vm", pair.a()).is_none());
    let id = document(pair.a(), &["history"])[0]["id"].as_str().unwrap().to_owned();
    report_adds_up(&vmirror(pair.a(), &["report", &id, "--json"]).done().report(), &guest);
    what_has_ended_is_remembered(pair.a(), &id);

    let back = pair.a().listen().to_string();
    let quiet = vmirror(pair.b(), &["migrate", "vm", "--to", &back, "--quiet"]).done();
    assert_eq!((quiet.stdout.as_str(), quiet.stderr.as_str()), ("", ""));
    pair.holds_nothing(pair.b());
    guest.sound_since(&before);
    has(&words(pair.a(), &["stop", "vm", "--force"]), &["vm is off"]);
    pair.holds_nothing(pair.a());
}
