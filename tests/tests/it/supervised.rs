//! What would start a machine again that has left is found before it leaves, and what was adopted is let go of untouched.

use end_to_end::{Guest, PATIENCE, Pair, Refusal, Said, Supervisor, report_adds_up, until, vmirror};
use testbed::guest_spec::{GuestSpec, Ram};
use testbed::root_or_skip;

fn by_hand(pair: &Pair) -> GuestSpec {
    let a = pair.a();
    let (ram, qmp) = (Ram::File(a.ram_dir().join("own")), Some(a.directory().join("own.qmp")));
    GuestSpec { ram, qmp, fill_mib: 16, rate: 50, ..pair.spec("vm", 128) }
}

/// A machine on host A that a supervisor has started, taken in by the agent.
fn adopted(pair: &Pair) -> (Supervisor, Guest, Said) {
    let (a, spec) = (pair.a(), by_hand(pair));
    let supervisor = Supervisor::of(a, &spec);
    let guest = Guest::ready("vm", &spec);
    let qmp = spec.qmp.as_ref().unwrap().to_str().unwrap();
    (supervisor, guest, vmirror(a, &["adopt", "vm", "--qmp", qmp]).done())
}

#[test]
fn a_machine_that_nothing_keeps_from_running_twice_does_not_leave_its_supervisor() {
    if root_or_skip("a supervisor on a host") {
        does_not_leave_its_supervisor(&Pair::start());
    }
}

#[test]
fn nor_does_one_of_qemu_10() {
    if root_or_skip("a supervisor on a host")
        && let Some(pair) = Pair::of_qemu_10_or_skip("nor_does_one_of_qemu_10")
    {
        does_not_leave_its_supervisor(&pair);
    }
}

fn does_not_leave_its_supervisor(pair: &Pair) {
    let (a, b) = (pair.a(), pair.b());
    let (supervisor, guest, adopted) = adopted(pair);
    let before = guest.status();
    assert!(
        adopted.stderr.contains("a loop of a shell") && adopted.stderr.contains("[supervised]"),
        "{adopted:?}"
    );

    // Its memory is all that it has: there is no lock that a second copy could fail at.
    let to = b.listen().to_string();
    assert_eq!(pair.check("vm"), ["supervised"]);
    let words = ["VM vm is started again by a loop of a shell", "--accept-supervisor", "end that shell"];
    Refusal::of(a, &["migrate", "vm", "--to", &to]).is("supervised", &words);
    assert!(pair.runs_on("vm", a) && supervisor.begun() == 1);

    // The person has seen to it.
    let said = vmirror(a, &["check", "vm", "--to", &to, "--accept-supervisor"]).done();
    assert!(said.stderr.contains("[supervised]"), "{said:?}");
    drop(supervisor);
    until("it has no supervisor any more", || pair.check("vm").is_empty());
    report_adds_up(&pair.migrate("vm", a, b, &[]), &guest);
    guest.sound_since(&before);
}

#[test]
fn a_second_copy_that_runs_after_all_is_told_everywhere() {
    if !root_or_skip("a supervisor on a host") {
        return;
    }
    let pair = Pair::start();
    let (a, b) = (pair.a(), pair.b());
    let (supervisor, ..) = adopted(&pair);
    let to = b.listen().to_string();
    let said = vmirror(a, &["migrate", "vm", "--to", &to, "--accept-supervisor"]);
    assert!(said.stderr.contains("[supervised]"), "{said:?}");
    // It has moved, and that is not all: whoever goes by the exit code looks.
    assert_eq!(said.code, Some(3), "{said:?}");
    assert!(said.stderr.contains("two copies may run") && said.stdout.contains("host-b"), "{said:?}");

    // A person said that it does no harm that it is started again; that it was is told all the same.
    until("it is listed", || pair.left("vm", a).is_some_and(|vm| vm["problem"]["kind"] == "started-again"));
    let second = pair.qemu(a).unwrap();
    let list = vmirror(a, &["list"]).done().stdout;
    let words =
        ["has left for host-b", &format!("process {second} here has its RAM file"), "two copies may run"];
    assert!(words.iter().all(|word| list.contains(word)), "{list}");
    let events = vmirror(a, &["events"]).done().stdout;
    assert!(events.contains(&format!("process {second} here has its")), "{events}");
    assert!(std::fs::read_to_string(a.agent_log()).unwrap().contains("two copies may run"));

    // Nothing is told of it any more when it has ended.
    drop(supervisor);
    testbed::fault::kill(second);
    until("it is not listed", || pair.left("vm", a).is_none());
    assert!(pair.runs_on("vm", b));
}

#[test]
fn one_that_a_person_gave_up_is_watched_for_as_well_and_by_the_next_agent_too() {
    if !root_or_skip("a supervisor on a host") {
        return;
    }
    let pair = Pair::start();
    let (a, b) = (pair.a(), pair.b());
    let (supervisor, ..) = adopted(&pair);
    let (migration, stopped) = pair.handed_over_with("vm", &["--accept-supervisor"]);
    let _ = migration.ended();
    let _ = vmirror(a, &["resolve", "vm", "--give-up", "--force"]).done();
    drop(stopped);
    // Before it has been there for long enough to be told.
    a.kill_agent().unwrap();
    a.start_agent().unwrap();
    until("it is listed", || pair.left("vm", a).is_some_and(|vm| vm["problem"]["kind"] == "started-again"));
    let second = pair.qemu(a).unwrap();
    drop(supervisor);
    testbed::fault::kill(second);
    until("it is not listed", || pair.left("vm", a).is_none());
    // What the source was made to forget nobody tells the copy: a person does, unless the source's word has reached it before.
    if !pair.runs_on("vm", b) {
        let _ = vmirror(b, &["resolve", "vm", "--run-here", "--force"]);
    }
    until("it runs there", || pair.runs_on("vm", b));
}

#[test]
fn a_machine_that_is_let_go_of_runs_on_and_can_be_adopted_again() {
    let pair = Pair::start();
    let (a, b) = (pair.a(), pair.b());
    let spec = by_hand(&pair);
    let mut started = a.boot(&spec).unwrap();
    started.wait_ready(PATIENCE).unwrap();
    let guest = Guest::ready("vm", &spec);
    let before = guest.status();
    let held = a.inventory().unwrap();
    let qmp = spec.qmp.as_ref().unwrap().to_str().unwrap().to_owned();
    let adopt = ["adopt", "vm", "--qmp", &qmp];
    let _ = vmirror(a, &adopt).done();

    // Not while it is on its way.
    let _ = pair.mirror("vm", a, b, &[]);
    Refusal::of(a, &["forget", "vm"]).is("in-migration", &["vm"]);
    let _ = vmirror(a, &["cancel", "vm"]).done();
    until("nothing of it is left there", || pair.qemu(b).is_none());

    let said = vmirror(a, &["forget", "vm"]).done();
    assert!(said.stdout.contains("vm is let go of, and runs on"), "{said:?}");
    assert!(pair.show("vm", a).is_none());
    pair.holds_but_for_growth(a, &held);
    Refusal::of(a, &["forget", "vm"]).is("unknown-vm", &["vm"]);
    // Neither does the next agent know of it.
    a.kill_agent().unwrap();
    a.start_agent().unwrap();
    assert!(pair.show("vm", a).is_none() && started.exit_status().is_none());
    let _ = guest.sane_since(&before);

    let _ = vmirror(a, &adopt).done();
    report_adds_up(&pair.migrate("vm", a, b, &[]), &guest);
    // Where it arrived, its files are the agent's.
    Refusal::of(b, &["forget", "vm"]).is("not-adopted", &["vm", "stop"]);
    assert!(pair.runs_on("vm", b));
    guest.sound_since(&before);
}
