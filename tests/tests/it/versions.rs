//! A guest must not notice which QEMU it runs on, and must not be sent to one that has no such machine.

use std::path::{Path, PathBuf};
use std::process::Command;

use end_to_end::{Guest, Pair, report_adds_up};
use finding::Stage;
use session::Outcome;
use testbed::guest_spec::{GuestSpec, Pattern};
use testbed::{Host, Programs, Testbed, root_or_skip};

/// Hops of each story.
const HOPS: usize = 20;

/// Moves the guest back and forth, A first, and checks it after each hop.
fn back_and_forth(pair: &Pair, guest: &Guest, hops: usize) {
    let first = guest.status();
    let mut hosts = [pair.a(), pair.b()];
    for hop in 1..=hops {
        let [from, to] = hosts;
        let before = guest.status();
        let report = pair.migrate(&guest.name, from, to, &[]);
        report_adds_up(&report, guest);
        pair.holds_nothing(from);
        let after = guest.sound_since(&before);
        assert!(after.writes > before.writes, "{after:?}, was {before:?}");
        eprintln!(
            "hop {hop}: downtime {:.2} ms, device state {} bytes",
            report.downtime_ms, report.device_state_bytes
        );
        hosts.reverse();
    }
    guest.sound_since(&first);
}

/// What a QEMU calls its version.
fn version(qemu: &Path) -> String {
    let output = Command::new(qemu).arg("--version").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let version = text.split_once("version ").unwrap().1;
    version.split(|c: char| c != '.' && !c.is_ascii_digit()).next().unwrap().to_owned()
}

fn major(version: &str) -> u32 {
    version.split('.').next().unwrap().parse().unwrap()
}

/// The machine's own QEMU and the one of backports, if they are of different versions; says so if not.
fn both_or_skip(what: &str) -> Option<(PathBuf, PathBuf)> {
    let new = Programs::qemu_10_or_skip(what)?;
    let old = Programs::find().qemu;
    let differ = major(&version(&old)) < 10;
    if !differ {
        eprintln!("SKIPPED {what}: {} is not older than QEMU 10", old.display());
    }
    differ.then_some((old, new))
}

/// Lets a host run that QEMU for its peers, and no other.
fn only(host: &Host, qemu: &Path) {
    let qemu = qemu.to_str().unwrap();
    host.configure(|config| config["allow"]["qemu"] = toml::Value::Array(vec![qemu.into()])).unwrap();
}

/// Host A with one QEMU, host B with the other.
fn mixed(a: &Path, b: &Path) -> Pair {
    let testbed = if root_or_skip("namespaces") { Testbed::new() } else { Testbed::rootless() }.unwrap();
    only(testbed.a(), a);
    only(testbed.b(), b);
    Pair::of(testbed)
}

/// What a machine's process on that host calls its version, asked of the program it really is.
fn runs_with(pair: &Pair, host: &Host, name: &str) -> String {
    let view = pair.show(name, host).unwrap();
    view["argv"][0].as_str().map(|program| version(Path::new(program))).unwrap()
}

fn machine(pair: &Pair, host: &Host, name: &str) -> String {
    let view = pair.show(name, host).unwrap();
    let words: Vec<&str> =
        view["argv"].as_array().unwrap().iter().map(|word| word.as_str().unwrap()).collect();
    let at = words.iter().position(|word| *word == "-machine").unwrap();
    words[at + 1].split(',').next().unwrap().trim_start_matches("type=").to_owned()
}

#[test]
fn no_page_is_lost_between_two_qemus_of_version_10() {
    let Some(pair) = Pair::of_qemu_10_or_skip("no_page_is_lost_between_two_qemus_of_version_10") else {
        return;
    };
    let spec = GuestSpec { rate: 2000, pattern: Pattern::Counter, ..pair.spec("vm", 512) };
    let guest = pair.run(pair.a(), "vm", &spec);
    assert_eq!(major(&runs_with(&pair, pair.a(), "vm")), 10);
    back_and_forth(&pair, &guest, HOPS);
}

#[test]
fn no_page_is_lost_on_the_way_to_another_version_and_back() {
    let name = "no_page_is_lost_on_the_way_to_another_version_and_back";
    let Some((old, new)) = both_or_skip(name) else { return };
    let pair = mixed(&old, &new);
    // An alias, as most people have it: at the other end it would mean another machine.
    let spec = GuestSpec {
        qemu: old.clone(),
        machine: "q35".into(),
        rate: 2000,
        pattern: Pattern::Sequential,
        ..pair.spec("vm", 512)
    };
    let guest = pair.run(pair.a(), "vm", &spec);
    back_and_forth(&pair, &guest, 1);
    let there = runs_with(&pair, pair.b(), "vm");
    assert_eq!(there, version(&new));
    let old_version = version(&old);
    let minor: Vec<&str> = old_version.split('.').take(2).collect();
    assert_eq!(machine(&pair, pair.b(), "vm"), format!("pc-q35-{}", minor.join(".")));

    let before = guest.status();
    report_adds_up(&pair.migrate("vm", pair.b(), pair.a(), &[]), &guest);
    pair.holds_nothing(pair.b());
    guest.sound_since(&before);
    assert_eq!(runs_with(&pair, pair.a(), "vm"), old_version);
    // Nothing of the way there has remained that would be in the way of going there again.
    back_and_forth(&pair, &guest, HOPS - 2);
}

#[test]
fn a_machine_type_that_the_destination_has_not_is_refused_and_the_guest_left_alone() {
    let name = "a_machine_type_that_the_destination_has_not_is_refused_and_the_guest_left_alone";
    let Some((old, new)) = both_or_skip(name) else { return };
    let pair = mixed(&new, &old);
    let spec = GuestSpec { qemu: new, machine: "pc-q35-10.0".into(), rate: 100, ..pair.spec("vm", 256) };
    let guest = pair.run(pair.a(), "vm", &spec);
    let before = guest.status();

    let said = pair.try_migrate("vm", pair.a(), pair.b(), &[]);
    assert_eq!(said.code, Some(2), "{said:?}");
    let report = said.report();
    let error = report.error.unwrap();
    assert_eq!((report.outcome, error.stage), (Outcome::Failed, Stage::Refused));
    assert_eq!(error.finding.kind, "machine-type", "{error:?}");
    assert!(error.finding.message.contains("pc-q35-10.0") && !error.finding.hint.is_empty(), "{error:?}");

    pair.holds_nothing(pair.b());
    assert!(pair.runs_on("vm", pair.a()));
    guest.sound_since(&before);
}
