//! Whatever crashes, and whenever: never two run, never none that could, and nothing is left behind.

use end_to_end::{Pair, Points, Said, Scene, UnderWay, report_adds_up, until, vmirror};
use session::points::Point;
use session::{Outcome, Phase};
use testbed::fault;
use testbed::guest_spec::{GuestSpec, Nic};
use testbed::{Host, Wire, root_or_skip};

/// Slow enough for the memory of the guest to take half a minute.
const SLOWLY: &[&str] = &["--bandwidth", "1MiB/s"];

/// A migration that is mirroring.
fn synchronizing(scene: &Scene) -> UnderWay<'_> {
    let migration = scene.begin(SLOWLY);
    migration.reaches("synchronize");
    migration
}

/// Asserts that whoever waited was told that it failed and that the machine runs where it was.
fn failed(scene: &Scene, said: &Said, kind: &str) {
    assert_eq!(said.code, Some(1), "{said:?}\n{}", scene.pair.logs());
    let report = said.report();
    assert_eq!(report.outcome, Outcome::Failed, "{report:#?}");
    assert_eq!(report.error.as_ref().unwrap().finding.kind, kind, "{report:#?}");
}

/// Asserts that the guest runs on at the source and nowhere else, and that the destination has thrown its copy away.
fn stays(scene: &Scene) {
    scene.stays();
    assert_eq!(scene.pair.show("vm", scene.b()), None);
}

/// Hands the guest over to a destination whose agent is killed before it hears of that.
fn loses_the_destination_at_the_hand_over(scene: &Scene) {
    let (migration, destination) = scene.pair.handed_over("vm");
    scene.b().kill_agent().unwrap();
    drop(destination);
    let said = migration.ended();
    assert_eq!(said.code, Some(3), "{said:?}\n{}", scene.pair.logs());
    assert_eq!(said.report().outcome, Outcome::Uncertain);
    in_doubt(scene, scene.a());
}

/// Asserts that the machine, as a host lists it, may run there or not and that only a person or the other host can tell.
fn in_doubt(scene: &Scene, host: &Host) {
    until("the machine is in doubt", || {
        scene.pair.show("vm", host).is_some_and(|vm| vm["state"] == "uncertain")
    });
    assert!(
        scene.guest.is_silent_for(std::time::Duration::from_secs(3)),
        "it runs while in doubt\n{}",
        scene.pair.logs()
    );
}

#[test]
fn a_source_agent_that_is_killed_leaves_the_guest_running_and_untracked() {
    let scene = Scene::default();
    let migration = synchronizing(&scene);
    scene.a().kill_agent().unwrap();
    // Who waited does not know what becomes of it, and is told where to look.
    let said = migration.ended();
    assert_eq!(said.code, Some(3), "{said:?}");
    assert!(said.stderr.contains("vmirror list"), "{said:?}");
    scene.guest.runs_on();
    scene.pair.holds(scene.b(), &scene.held[1]);
    scene.a().start_agent().unwrap();
    stays(&scene);
    scene.moves_after_all();
}

#[test]
fn a_destination_agent_that_is_killed_leaves_the_guest_running_and_comes_back_empty() {
    let scene = Scene::default();
    let migration = synchronizing(&scene);
    scene.b().kill_agent().unwrap();
    failed(&scene, &migration.ended(), "link");
    scene.guest.runs_on();
    scene.b().start_agent().unwrap();
    stays(&scene);
    scene.moves_after_all();
}

#[test]
fn a_destination_qemu_that_is_killed_while_mirroring_leaves_the_guest_running() {
    let scene = Scene::default();
    let migration = synchronizing(&scene);
    fault::kill(scene.pair.qemu(scene.b()).unwrap());
    failed(&scene, &migration.ended(), "qemu-gone");
    stays(&scene);
    scene.moves_after_all();
}

/// A guest of QEMU 10, where there is one.
fn scene_of_qemu_10(test: &str) -> Option<Scene> {
    Pair::of_qemu_10_or_skip(test).map(Scene::on)
}

#[test]
fn a_destination_qemu_that_is_killed_while_switching_over_leaves_the_guest_running() {
    loses_the_destination_in_the_pause(&Scene::default());
}

#[test]
fn a_destination_of_qemu_10_that_is_killed_while_switching_over_leaves_the_guest_running() {
    let test = "a_destination_of_qemu_10_that_is_killed_while_switching_over_leaves_the_guest_running";
    if let Some(scene) = scene_of_qemu_10(test) {
        loses_the_destination_in_the_pause(&scene);
    }
}

fn loses_the_destination_in_the_pause(scene: &Scene) {
    let (migration, stopped) = scene.pair.switching_over("vm");
    fault::kill(scene.pair.qemu(scene.b()).unwrap());
    drop(stopped);
    let said = migration.ended();
    assert_eq!(said.code, Some(1), "{said:?}");
    stays(scene);
    scene.moves_after_all();
}

#[test]
fn a_destination_qemu_that_hangs_is_not_waited_for_for_ever() {
    let scene = Scene::default();
    let migration = scene.begin(&["--bandwidth", "16MiB/s"]);
    migration.reaches("synchronize");
    let stopped = fault::pause(scene.pair.qemu(scene.b()).unwrap());
    let said = migration.ended();
    assert_eq!(said.code, Some(1), "{said:?}");
    assert_eq!(said.report().phases.last().unwrap().name, Phase::SwitchOver);
    stays(&scene);
    drop(stopped);
    scene.moves_after_all();
}

#[test]
fn a_source_qemu_that_is_killed_ends_everything_clearly() {
    let scene = Scene::default();
    let migration = synchronizing(&scene);
    fault::kill(scene.pair.qemu(scene.a()).unwrap());
    failed(&scene, &migration.ended(), "qemu-gone");
    scene.pair.holds_nothing(scene.b());
    scene.pair.holds_nothing(scene.a());
    until("nobody lists it", || {
        [scene.a(), scene.b()].iter().all(|host| scene.pair.show("vm", host).is_none())
    });
}

#[test]
fn a_link_that_is_cut_leaves_the_guest_running() {
    if !root_or_skip("a_link_that_is_cut_leaves_the_guest_running") {
        return;
    }
    let scene = Scene::default();
    let migration = synchronizing(&scene);
    scene.pair.testbed().cut(scene.b(), Wire::Link).unwrap();
    failed(&scene, &migration.ended(), "link");
    // Neither side needs the link to find out.
    stays(&scene);
    scene.pair.testbed().mend(scene.b(), Wire::Link).unwrap();
    scene.moves_after_all();
}

/// A guest that can be told to do things.
fn reachable(test: &str) -> Option<(Scene, Nic)> {
    if !root_or_skip(test) {
        return None;
    }
    let pair = Pair::start();
    pair.a().add_tap("tap0").unwrap();
    let nic = Nic::new("tap0", 10);
    let spec = GuestSpec { nic: Some(nic.clone()), ..pair.spec("vm", 256) };
    Some((Scene::of(pair, spec), nic))
}

#[test]
fn a_guest_that_powers_off_ends_its_migration_clearly() {
    let test = "a_guest_that_powers_off_ends_its_migration_clearly";
    let Some((scene, nic)) = reachable(test) else { return };
    let migration = synchronizing(&scene);
    scene.pair.client().unwrap().tell(nic.address, "poweroff").unwrap();
    let said = migration.ended();
    assert_eq!(said.code, Some(1), "{said:?}");
    let kind = said.report().error.unwrap().finding.kind;
    assert!(["vm-ended", "qemu-gone"].contains(&kind.as_str()), "{said:?}");
    scene.pair.holds_nothing(scene.b());
    until("the source has noticed", || scene.pair.show("vm", scene.a()).is_none());
    assert_eq!(scene.pair.qemu(scene.a()), None);
}

/// Tells the guest something that makes it boot anew while it is mirrored; that must neither end nor harm the migration.
fn boots_anew_on_the_way(scene: &Scene, nic: &Nic, order: &str) {
    let migration = scene.begin(&["--bandwidth", "8MiB/s"]);
    migration.reaches("synchronize");
    scene.pair.client().unwrap().tell(nic.address, order).unwrap();
    let said = migration.ended().done();
    report_adds_up(&said.report(), &scene.guest);
    assert!(scene.pair.runs_on("vm", scene.b()));
    let status = scene
        .guest
        .console()
        .wait_for("a sound second boot", end_to_end::PATIENCE, |status| {
            status.boot_id != scene.before.boot_id && (status.passes > 1 || status.faults() > 0)
        })
        .unwrap();
    assert_eq!(status.faults(), 0, "{status:?}");
}

#[test]
fn a_guest_that_reboots_is_mirrored_on() {
    if let Some((scene, nic)) = reachable("a_guest_that_reboots_is_mirrored_on") {
        boots_anew_on_the_way(&scene, &nic, "reboot");
    }
}

#[test]
fn a_guest_that_panics_and_boots_again_is_mirrored_on() {
    if let Some((scene, nic)) = reachable("a_guest_that_panics_and_boots_again_is_mirrored_on") {
        boots_anew_on_the_way(&scene, &nic, "panic");
    }
}

#[test]
fn a_source_agent_that_is_killed_before_the_copy_is_ready_runs_the_guest_again() {
    let scene = Scene::default();
    let (migration, stopped) = scene.pair.switching_over("vm");
    scene.a().kill_agent().unwrap();
    assert_eq!(migration.ended().code, Some(3));
    // The guest is paused, and nobody is there to run it: the next agent does.
    scene.a().start_agent().unwrap();
    until("the guest runs again at the source", || scene.pair.runs_on("vm", scene.a()));
    scene.guest.runs_on();
    assert!(!scene.pair.runs_on("vm", scene.b()));
    drop(stopped);
    scene.pair.give_up_if_in_doubt("vm", &scene.held[1]);
    stays(&scene);
    scene.moves_after_all();
}

#[test]
fn a_source_agent_that_is_killed_before_the_hand_over_runs_the_guest_again() {
    loses_the_source_in_the_pause(&Scene::default());
}

#[test]
fn a_source_agent_that_is_killed_before_the_hand_over_runs_the_guest_of_qemu_10_again() {
    let test = "a_source_agent_that_is_killed_before_the_hand_over_runs_the_guest_of_qemu_10_again";
    if let Some(scene) = scene_of_qemu_10(test) {
        loses_the_source_in_the_pause(&scene);
    }
}

fn loses_the_source_in_the_pause(scene: &Scene) {
    let (migration, source) = scene.pair.ready("vm");
    scene.a().kill_agent().unwrap();
    drop(source);
    assert_eq!(migration.ended().code, Some(3));
    assert!(!scene.pair.runs_on("vm", scene.b()), "it runs without the source's word");
    scene.a().start_agent().unwrap();
    until("the guest runs again at the source", || scene.pair.runs_on("vm", scene.a()));
    scene.guest.runs_on();
    assert!(!scene.pair.runs_on("vm", scene.b()));
    scene.pair.give_up_if_in_doubt("vm", &scene.held[1]);
    stays(scene);
    scene.moves_after_all();
}

#[test]
fn a_copy_that_waits_in_vain_does_not_stand_in_the_way_of_the_next_migration() {
    let scene = Scene::default();
    let (migration, source) = scene.pair.ready("vm");
    scene.a().kill_agent().unwrap();
    drop(source);
    assert_eq!(migration.ended().code, Some(3));
    scene.a().start_agent().unwrap();
    until("the guest runs again at the source", || scene.pair.runs_on("vm", scene.a()));
    // Not even when that one is cancelled.
    let migration = synchronizing(&scene);
    let _ = vmirror(scene.a(), &["cancel", "vm"]).done();
    assert_eq!(migration.ended().code, Some(1));
    stays(&scene);
    scene.moves_after_all();
}

#[test]
fn a_complete_copy_does_not_give_way_to_a_source_that_has_forgotten_it() {
    let scene = Scene::default();
    let (migration, source) = scene.pair.ready("vm");
    scene.a().kill_agent().unwrap();
    fault::kill(scene.pair.qemu(scene.a()).unwrap());
    drop(source);
    assert_eq!(migration.ended().code, Some(3));
    scene.a().start_agent().unwrap();
    until("the source has forgotten it", || scene.pair.show("vm", scene.a()).is_none());
    // Somebody starts it anew from its disks; what waits is all that there is of what it has done since.
    let _anew = scene.pair.run(scene.a(), "vm", &scene.pair.spec("vm", 128));
    scene.pair.migration_refused("vm", &[]).is("copy-waits", &["host-b", "host-a", "--give-up"]);
    let waits = scene.pair.show("vm", scene.b()).unwrap();
    assert_eq!(waits["state"], "uncertain", "{waits}");
    let _ = vmirror(scene.b(), &["resolve", "vm", "--give-up"]).done();
    let _ = scene.pair.migrate("vm", scene.a(), scene.b(), &[]);
    assert!(scene.pair.runs_on("vm", scene.b()));
}

#[test]
fn a_destination_agent_that_is_killed_when_ready_is_asked_again_when_it_is_back() {
    let scene = Scene::default();
    let (migration, source) = scene.pair.ready("vm");
    scene.b().kill_agent().unwrap();
    drop(source);
    scene.b().start_agent().unwrap();
    // Whether its word had reached the source before it died or not: the guest runs exactly once.
    let said = migration.ended();
    match said.code {
        Some(0) => scene.has_moved(),
        Some(1) => {
            scene.pair.give_up_if_in_doubt("vm", &scene.held[1]);
            stays(&scene);
            scene.moves_after_all();
        }
        _ => panic!("{said:?}\n{}", scene.pair.logs()),
    }
}

#[test]
fn a_destination_agent_that_goes_down_with_a_copy_that_it_has_not_said_to_be_ready_leaves_the_guest_running()
{
    let scene = Scene::default();
    let points = Points::of(scene.b(), &[]);
    let ready = points.hold(Point::Ready);
    let migration = scene.begin(&[]);
    ready.reached();
    assert!(scene.b().stop_agent().unwrap().unwrap().success(), "it goes down as if nothing were");
    // On record it is ready: it goes no further, and is not thrown away before its source has said so.
    let copy = scene.pair.qemu(scene.b()).expect("the copy is there");
    let said = migration.ended();
    assert_eq!(said.code, Some(1), "{said:?}\n{}", scene.pair.logs());
    scene.guest.runs_on();
    assert_eq!(scene.pair.qemu(scene.b()), Some(copy));
    drop(ready);
    scene.b().start_agent().unwrap();
    stays(&scene);
    scene.moves_after_all();
}

#[test]
fn a_destination_agent_that_is_killed_while_it_resumes_the_guest_finds_it_and_turns_the_network() {
    let Some((scene, nic)) = reachable("a destination agent that is killed while it resumes the guest")
    else {
        return;
    };
    let client = scene.pair.client().unwrap();
    assert!(client.status(nic.address).is_ok());
    let (migration, qemu) = scene.pair.resuming("vm");
    scene.b().kill_agent().unwrap();
    // Somebody has told the client something else of the guest, and only the guest's own word puts that right.
    let forget = [
        "neighbour",
        "replace",
        &nic.address.to_string(),
        "lladdr",
        "02:00:00:00:00:01",
        "dev",
        "uplink",
        "nud",
        "stale",
    ];
    assert!(client.command("ip").args(forget).status().unwrap().success());
    drop(qemu);
    scene.b().start_agent().unwrap();
    let _ = migration.ended();
    until("the client knows where the guest is", || {
        let known =
            client.command("ip").args(["neighbour", "show", &nic.address.to_string()]).output().unwrap();
        String::from_utf8_lossy(&known.stdout).contains(&nic.mac)
    });
    let behind = scene.pair.testbed().behind(&nic.mac).unwrap();
    assert_eq!(behind.map(Host::name), Some("host-b"));
    scene.a().remove_tap("tap0").unwrap();
    scene.has_moved();
}

#[test]
fn a_source_agent_that_is_killed_after_the_hand_over_does_not_run_the_guest_again() {
    let scene = Scene::default();
    let (migration, destination) = scene.pair.handed_over("vm");
    scene.a().kill_agent().unwrap();
    assert_eq!(migration.ended().code, Some(3));
    scene.a().start_agent().unwrap();
    // It must not run here any more, whether or not it runs there.
    in_doubt(&scene, scene.a());
    drop(destination);
    scene.has_moved();
}

#[test]
fn a_cancel_after_the_hand_over_is_told_that_it_is_too_late() {
    let scene = Scene::default();
    let (migration, destination) = scene.pair.handed_over("vm");
    let cancel = std::thread::scope(|threads| {
        let cancel = threads.spawn(|| vmirror(scene.a(), &["cancel", "vm"]));
        // It has been told by then; later it would be too late as well.
        std::thread::sleep(std::time::Duration::from_secs(1));
        drop(destination);
        cancel.join().unwrap()
    });
    assert_eq!(cancel.code, Some(2), "{cancel:?}");
    assert!(cancel.stderr.contains("too late to cancel: vm runs on host-b"), "{cancel:?}");
    report_adds_up(&migration.ended().done().report(), &scene.guest);
    scene.has_moved();
}

#[test]
fn a_destination_that_is_lost_at_the_hand_over_makes_it_uncertain_until_it_is_back() {
    let scene = Scene::default();
    loses_the_destination_at_the_hand_over(&scene);
    scene.b().start_agent().unwrap();
    scene.has_moved();
}

#[test]
fn giving_up_at_the_source_hands_over_once_more_before_anything_is_thrown_away() {
    let scene = Scene::default();
    loses_the_destination_at_the_hand_over(&scene);
    scene.b().start_agent().unwrap();
    // Whoever asks first: the person, or the agent by itself. The copy has not run before, and the source's is the only other one.
    let _ = vmirror(scene.a(), &["resolve", "vm", "--give-up"]);
    scene.has_moved();
}

#[test]
fn a_person_may_decide_when_the_destination_never_comes_back() {
    let scene = Scene::default();
    loses_the_destination_at_the_hand_over(&scene);
    // Nobody can be asked: neither is done on a person's first word.
    for decision in ["--give-up", "--run-here"] {
        scene
            .pair
            .refused(scene.a(), &["resolve", "vm", decision])
            .is("unheard", &["host-b cannot be asked"]);
        in_doubt(&scene, scene.a());
    }
    let _ = vmirror(scene.a(), &["resolve", "vm", "--run-here", "--force"]).done();
    scene.guest.runs_on();
    assert!(scene.pair.runs_on("vm", scene.a()));
    // Should it come back after all, its copy does not run.
    scene.b().start_agent().unwrap();
    scene.guest.runs_on();
    assert!(!scene.pair.runs_on("vm", scene.b()));
    scene.pair.give_up_if_in_doubt("vm", &scene.held[1]);
    stays(&scene);
    scene.moves_after_all();
}
