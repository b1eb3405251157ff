//! A machine that was started without vmirror must not need a restart to move, and one that cannot move must not be touched.

use std::path::{Path, PathBuf};
use std::time::Duration;

use end_to_end::{Guest, PATIENCE, Pair, report_adds_up, until, vmirror};
use serde_json::json;
use testbed::guest_spec::{GuestSpec, Pattern, Ram};
use testbed::{Host, Monitor, RunningGuest};

/// The parts of a guest started by hand: its own QMP socket, and RAM in a file of the user's.
fn by_hand(pair: &Pair, host: &Host, name: &str) -> (GuestSpec, PathBuf) {
    let qmp = host.directory().join(format!("{name}-own.qmp"));
    let ram = Ram::File(host.ram_dir().join(format!("own-{name}")));
    let pattern = Pattern::Incompressible;
    (GuestSpec { ram, qmp: Some(qmp.clone()), rate: 1000, pattern, ..pair.spec(name, 256) }, qmp)
}

fn adopt(host: &Host, name: &str, qmp: &Path) {
    let vm = vmirror(host, &["adopt", name, "--qmp", qmp.to_str().unwrap(), "--json"]).done().json();
    assert_eq!(
        (&vm["name"], &vm["origin"], &vm["state"]),
        (&name.into(), &"adopted".into(), &"running".into()),
        "{vm}"
    );
}

#[test]
fn a_running_guest_is_adopted_and_moved_without_a_restart() {
    let pair = Pair::start();
    let (spec, qmp) = by_hand(&pair, pair.a(), "vm");
    let mut started = pair.a().boot(&spec).unwrap();
    started.wait_ready(PATIENCE).unwrap();
    let guest = Guest::ready("vm", &spec);
    let before = guest.status();
    let pid = started.pid();

    adopt(pair.a(), "vm", &qmp);
    assert_eq!(pair.show("vm", pair.a()).unwrap()["pid"], pid);
    report_adds_up(&pair.migrate("vm", pair.a(), pair.b(), &[]), &guest);
    until("the source's QEMU has ended", || started.exit_status().is_some());
    assert!(pair.runs_on("vm", pair.b()) && pair.show("vm", pair.a()).is_none());
    guest.sound_since(&before);

    // Its RAM file was the user's, but on a tmpfs it is a stale copy that takes memory: it goes with the rest.
    pair.holds_nothing(pair.a());

    // From now on it is a machine like any other.
    report_adds_up(&pair.migrate("vm", pair.b(), pair.a(), &[]), &guest);
    pair.holds_nothing(pair.b());
    guest.sound_since(&before);
}

#[test]
fn a_daemonized_guest_is_not_lost_when_its_agent_is_killed_after_adoption() {
    let pair = Pair::start();
    let (mut spec, qmp) = by_hand(&pair, pair.a(), "vm");
    spec.extra.push("-daemonize".into());
    let line = spec.command_line();
    assert!(pair.a().command(&line[0]).args(&line[1..]).status().unwrap().success());
    let guest = Guest::ready("vm", &spec);
    let before = guest.status();
    adopt(pair.a(), "vm", &qmp);
    let pid = pair.show("vm", pair.a()).unwrap()["pid"].clone();

    pair.a().kill_agent().unwrap();
    pair.a().start_agent().unwrap();
    let found = pair.show("vm", pair.a()).unwrap();
    assert_eq!(
        (&found["pid"], &found["state"], &found["origin"]),
        (&pid, &"running".into(), &"adopted".into()),
        "{found}"
    );

    report_adds_up(&pair.migrate("vm", pair.a(), pair.b(), &[]), &guest);
    let process = PathBuf::from(format!("/proc/{pid}"));
    until("the source's QEMU has ended", || !process.exists());
    guest.sound_since(&before);
}

#[test]
fn a_guest_is_found_again_by_an_agent_that_ended_or_was_killed() {
    let pair = Pair::start();
    let spec = GuestSpec { rate: 1000, ..pair.spec("vm", 256) };
    let guest = pair.run(pair.a(), "vm", &spec);
    let before = guest.status();
    let pid = pair.show("vm", pair.a()).unwrap()["pid"].clone();
    for end in [Host::stop_agent, Host::kill_agent] {
        end(pair.a()).unwrap();
        guest.runs_on();
        pair.a().start_agent().unwrap();
        let found = pair.show("vm", pair.a()).unwrap();
        assert_eq!(
            (&found["pid"], &found["state"], &found["origin"]),
            (&pid, &"running".into(), &"run".into()),
            "{found}"
        );
    }
    report_adds_up(&pair.migrate("vm", pair.a(), pair.b(), &[]), &guest);
    pair.holds_nothing(pair.a());

    // One that has arrived is found again as well, and moves on.
    for end in [Host::kill_agent, Host::stop_agent] {
        end(pair.b()).unwrap();
        pair.b().start_agent().unwrap();
        let found = pair.show("vm", pair.b()).unwrap();
        assert_eq!((&found["state"], &found["origin"]), (&"running".into(), &"arrived".into()), "{found}");
    }
    report_adds_up(&pair.migrate("vm", pair.b(), pair.a(), &[]), &guest);
    pair.holds_nothing(pair.b());
    guest.sound_since(&before);
}

/// An adopted guest on host A, and a monitor of its user's.
fn with_own_monitor(pair: &Pair) -> (RunningGuest, Guest, Monitor) {
    let (mut spec, qmp) = by_hand(pair, pair.a(), "vm");
    let own = pair.a().directory().join("second.qmp");
    spec.extra.extend(["-qmp".into(), format!("unix:{},server=on,wait=off", own.display())]);
    let mut started = pair.a().boot(&spec).unwrap();
    started.wait_ready(PATIENCE).unwrap();
    let guest = Guest::ready("vm", &spec);
    adopt(pair.a(), "vm", &qmp);
    (started, guest, Monitor::connect(&own).unwrap())
}

#[test]
fn a_guest_that_its_user_has_just_stopped_is_not_listed_as_one_that_runs() {
    is_listed_as_its_user_has_it(&Pair::start());
}

#[test]
fn nor_is_one_of_qemu_10() {
    if let Some(pair) = Pair::of_qemu_10_or_skip("nor_is_one_of_qemu_10") {
        is_listed_as_its_user_has_it(&pair);
    }
}

/// A list goes by what QEMU has told, where it told it just now.
fn is_listed_as_its_user_has_it(pair: &Pair) {
    let (_started, guest, mut monitor) = with_own_monitor(pair);
    let is_listed_to_run = || pair.runs_on("vm", pair.a());
    for _ in 0..20 {
        assert!(is_listed_to_run() && is_listed_to_run());
        monitor.execute("stop", json!({})).unwrap();
        assert!(!is_listed_to_run() && !is_listed_to_run());
        monitor.execute("cont", json!({})).unwrap();
    }
    guest.runs_on();
}

/// Agents that go down, by a crash or because they are told to, and the next one: it has found what there is when this returns.
fn restarts(host: &Host) -> impl Iterator<Item = ()> {
    [Host::kill_agent, Host::stop_agent].into_iter().map(move |end| {
        end(host).unwrap();
        host.start_agent().unwrap();
    })
}

#[test]
fn a_guest_that_its_user_has_migrated_elsewhere_is_not_run_here_again() {
    let pair = Pair::start();
    let (_started, guest, mut monitor) = with_own_monitor(&pair);
    let elsewhere = pair.a().directory().join("elsewhere");
    monitor.execute("migrate", json!({ "uri": format!("exec:cat > {}", elsewhere.display()) })).unwrap();
    until("it is elsewhere", || {
        monitor.execute("query-migrate", json!({})).unwrap()["status"] == "completed"
    });
    for () in restarts(pair.a()) {
        assert!(guest.is_silent_for(Duration::from_secs(1)), "it runs here again");
        assert_eq!(monitor.execute("query-status", json!({})).unwrap()["status"], "postmigrate");
        let listed = pair.show("vm", pair.a()).unwrap();
        assert_eq!(listed["state"], "unreachable", "{listed}");
        let why = listed["problem"]["message"].as_str().unwrap();
        assert!(why.contains("migrated by another program"), "{listed}");
    }
    // Its user's word is another matter.
    monitor.execute("cont", json!({})).unwrap();
    guest.runs_on();
    until("it is listed as what it is", || pair.runs_on("vm", pair.a()));
}

#[test]
fn a_migration_of_its_users_is_not_cancelled_by_an_agent_that_is_started_again() {
    let pair = Pair::start();
    let (_started, guest, mut monitor) = with_own_monitor(&pair);
    let before = guest.status();
    monitor.execute("migrate-set-parameters", json!({ "max-bandwidth": 1 << 16 })).unwrap();
    monitor.execute("migrate", json!({ "uri": "exec:cat > /dev/null" })).unwrap();
    let status =
        |monitor: &mut Monitor| monitor.execute("query-migrate", json!({})).unwrap()["status"].clone();
    until("it is under way", || status(&mut monitor) == "active");
    for () in restarts(pair.a()) {
        assert!(pair.runs_on("vm", pair.a()));
        assert_eq!(status(&mut monitor), "active", "{}", pair.logs());
    }
    monitor.execute("migrate_cancel", json!({})).unwrap();
    until("it is cancelled by its user", || status(&mut monitor) == "cancelled");
    report_adds_up(&pair.migrate("vm", pair.a(), pair.b(), &[]), &guest);
    guest.sound_since(&before);
}

/// Whether a machine is told to be somebody's copy that may never have run.
fn may_be_a_copy(pair: &Pair, name: &str) -> bool {
    let shown = vmirror(pair.a(), &["show", name, "--json"]).done().json();
    let warnings = shown["warnings"].as_array().cloned().unwrap_or_default();
    warnings.iter().any(|warning| warning["kind"] == "paused-copy")
}

#[test]
fn a_copy_that_has_never_run_is_not_taken_in_without_a_word_of_that() {
    let pair = Pair::start();
    let (spec, qmp) = by_hand(&pair, pair.a(), "vm");
    let mut started = pair.a().boot(&spec).unwrap();
    started.wait_ready(PATIENCE).unwrap();
    // Somebody has it come here, and has not let it run yet.
    let incoming = pair.a().directory().join("incoming");
    let (mut copy, copy_qmp) = by_hand(&pair, pair.a(), "copy");
    let own = pair.a().directory().join("second.qmp");
    copy.extra.extend(["-S".into(), "-incoming".into(), format!("unix:{}", incoming.display())]);
    copy.extra.extend(["-qmp".into(), format!("unix:{},server=on,wait=off", own.display())]);
    let _copy = pair.a().boot(&copy).unwrap();
    until("it can come", || incoming.exists());
    let mut monitor = Monitor::connect(&qmp).unwrap();
    monitor.execute("migrate", json!({ "uri": format!("unix:{}", incoming.display()) })).unwrap();
    until("it has come", || monitor.execute("query-migrate", json!({})).unwrap()["status"] == "completed");

    let said = vmirror(pair.a(), &["adopt", "copy", "--qmp", copy_qmp.to_str().unwrap()]).done();
    assert!(said.stdout.contains("taken in, paused"), "{said:?}");
    for words in ["may be a copy that has never run", "somebody else's migration", "vmirror forget copy"] {
        assert!(said.stderr.contains(words), "{words:?} is not said: {said:?}");
    }
    assert!(may_be_a_copy(&pair, "copy"));
    let mut own = Monitor::connect(&own).unwrap();
    own.execute("cont", json!({})).unwrap();
    until("it runs", || pair.runs_on("copy", pair.a()));
    assert!(!may_be_a_copy(&pair, "copy"));
}
