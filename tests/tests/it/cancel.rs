//! A migration that is cancelled leaves the guest where it was, unharmed, and nothing behind: whatever it was doing.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use end_to_end::{Pair, Points, Said, Scene, until, vmirror};
use session::points::Point;
use session::{Outcome, Phase};
use testbed::{Programs, Testbed, fault, root_or_skip};

/// Slow enough for the memory of the guest to take half a minute.
const SLOWLY: &str = "1MiB/s";

/// Cancels the migration, which must say that it has ended.
fn cancel(scene: &Scene) {
    let said = vmirror(scene.pair.a(), &["cancel", "vm", "--json"]).done();
    assert_eq!(said.report().outcome, Outcome::Cancelled, "{said:?}");
}

/// Asserts that whoever waited for the migration was told that it was cancelled in this phase, that the guest runs on at the
/// source, and that both hosts hold what they held before.
fn is_as_before(scene: &Scene, said: &Said, code: i32, phase: &str) {
    assert_eq!(said.code, Some(code), "{said:?}");
    let report = said.report();
    assert_eq!(report.outcome, Outcome::Cancelled, "{report:#?}");
    assert_eq!(report.error.as_ref().unwrap().finding.kind, "cancelled");
    assert_eq!(report.phases.last().unwrap().name.name(), phase, "{:?}", report.phases);
    let line = said.stderr.lines().last().unwrap_or_default();
    assert!(line.starts_with("error: ") && line.contains("runs on where it was"), "{said:?}");
    scene.stays();
}

#[test]
fn a_cancel_while_initializing_leaves_the_guest_as_it_was() {
    let scene = Scene::default();
    // The destination's kernel takes the connection, and its agent does not greet.
    let stopped = fault::pause(scene.pair.b().agent_pid().unwrap());
    let migration = scene.begin(&[]);
    migration.reaches("initialize");
    cancel(&scene);
    let said = migration.ended();
    drop(stopped);
    is_as_before(&scene, &said, 1, "initialize");
    scene.moves_after_all();
}

/// A QEMU for host B that does not start before the gate is opened.
struct Gate(PathBuf);

impl Gate {
    fn at_host_b(testbed: &Testbed) -> Gate {
        let directory = testbed.b().directory().join("gated");
        fs::create_dir(&directory).unwrap();
        let gate = directory.join("gate");
        let script = directory.join("qemu-system-x86_64");
        // A file, looked for: whoever waits at a pipe would have to be let through one by one.
        let wait = format!("while [ ! -e {} ]; do read -t 0.05 < <(:); done", gate.display());
        let qemu = Programs::find().qemu;
        fs::write(&script, format!("#!/bin/bash\n{wait}\nexec {} \"$@\"\n", qemu.display())).unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        let script = script.to_str().unwrap().to_owned();
        testbed
            .b()
            .configure(|config| {
                let allow = config["allow"].as_table_mut().unwrap();
                allow.insert("qemu".to_owned(), vec![script].into());
            })
            .unwrap();
        Gate(gate)
    }

    fn open(&self) {
        File::create(&self.0).unwrap().write_all(b"open").unwrap();
    }
}

/// A testbed in namespaces where that is possible.
fn testbed() -> Testbed {
    let root = root_or_skip("namespaces: the hosts of this test are on loopback");
    if root { Testbed::new() } else { Testbed::rootless() }.unwrap()
}

#[test]
fn a_cancel_while_reserving_leaves_the_guest_as_it_was() {
    let testbed = testbed();
    let gate = Gate::at_host_b(&testbed);
    let scene = Scene::on(Pair::of(testbed));
    let migration = scene.begin(&[]);
    migration.reaches("reserve");
    until("the destination starts QEMU", || scene.pair.b().processes().len() > 1);
    cancel(&scene);
    is_as_before(&scene, &migration.ended(), 1, "reserve");
    gate.open();
    scene.moves_after_all();
}

#[test]
fn a_cancel_while_preparing_leaves_the_guest_as_it_was() {
    let scene = Scene::default();
    let (a, b) = (scene.pair.a(), scene.pair.b());
    let points = Points::of(a, &[]);
    let held = points.hold(Point::Phase(Phase::Prepare));
    let migration = scene.begin(&[]);
    held.reached();
    // The destination's kernel takes the data streams, and its agent does not greet them.
    let stopped = fault::pause(b.agent_pid().unwrap());
    drop(held);
    cancel(&scene);
    let said = migration.ended();
    drop(stopped);
    is_as_before(&scene, &said, 1, "prepare");
    scene.moves_after_all();
}

#[test]
fn a_cancel_while_synchronizing_leaves_the_guest_as_it_was() {
    let scene = Scene::default();
    let migration = scene.begin(&["--bandwidth", SLOWLY]);
    migration.shows("pages under way", |progress| progress["phase"] == "synchronize");
    cancel(&scene);
    is_as_before(&scene, &migration.ended(), 1, "synchronize");
    scene.moves_after_all();
}

#[test]
fn a_cancel_while_the_destination_takes_nothing_leaves_the_guest_as_it_was() {
    let scene = Scene::default();
    let migration = scene.begin(&["--bandwidth", "16MiB/s"]);
    migration.reaches("synchronize");
    let stopped = fault::pause(scene.pair.b().agent_pid().unwrap());
    // Long enough for the streams to be full.
    thread::sleep(Duration::from_secs(2));
    cancel(&scene);
    let said = migration.ended();
    drop(stopped);
    is_as_before(&scene, &said, 1, "synchronize");
    scene.moves_after_all();
}

#[test]
fn a_cancel_while_switching_over_leaves_the_guest_as_it_was() {
    let scene = Scene::default();
    let migration = scene.begin(&["--bandwidth", "8MiB/s", "--max-downtime", "30s"]);
    migration.reaches("synchronize");
    // It is not needed before it is to load the devices.
    let stopped = fault::pause(scene.pair.qemu(scene.pair.b()).unwrap());
    migration.reaches("switch-over");
    until("the guest is paused", || {
        scene.pair.show("vm", scene.pair.a()).is_some_and(|vm| vm["state"] == "paused")
    });
    cancel(&scene);
    let said = migration.ended();
    drop(stopped);
    is_as_before(&scene, &said, 1, "switch-over");
    scene.moves_after_all();
}

/// A cancel at any moment between the first page and the end: either it was in time or it was not.
#[test]
fn a_cancel_at_any_moment_leaves_the_guest_running_exactly_once() {
    let scene = Scene::default();
    let (mut here, mut there) = (scene.pair.a(), scene.pair.b());
    let (mut in_time, mut too_late) = (0, 0);
    for step in 0..16 {
        let migration = scene.pair.begin("vm", here, there, &[]);
        migration.shows("being under way", |_| true);
        thread::sleep(Duration::from_millis(150 * step));
        let cancel = vmirror(here, &["cancel", "vm", "--quiet"]);
        let said = migration.ended();
        let report = said.report();
        match report.outcome {
            Outcome::Cancelled => {
                in_time += 1;
                assert_eq!((said.code, cancel.code), (Some(1), Some(0)), "{said:?} {cancel:?}");
                assert!(scene.pair.runs_on("vm", here) && scene.pair.show("vm", there).is_none());
                scene.pair.holds_nothing(there);
            }
            Outcome::Completed => {
                too_late += 1;
                assert_eq!((said.code, cancel.code), (Some(0), Some(2)), "{said:?} {cancel:?}");
                assert!(scene.pair.runs_on("vm", there) && scene.pair.show("vm", here).is_none());
                scene.pair.holds_nothing(here);
                (here, there) = (there, here);
            }
            _ => panic!("{said:?}\n{}", scene.pair.logs()),
        }
        scene.guest.runs_on();
        let _ = scene.guest.sane_since(&scene.before);
    }
    eprintln!("{in_time} cancels were in time, {too_late} too late");
    assert!(in_time > 0);
    let _ = scene.guest.sound_since(&scene.before);
}

#[test]
fn ctrl_c_cancels_and_exits_as_interrupted() {
    let scene = Scene::default();
    let migration = scene.begin(&["--bandwidth", SLOWLY]);
    migration.reaches("synchronize");
    migration.interrupt();
    is_as_before(&scene, &migration.ended(), 130, "synchronize");
    scene.moves_after_all();
}

#[test]
fn an_agent_that_is_stopped_cancels_its_migrations() {
    let scene = Scene::default();
    let migration = scene.begin(&["--bandwidth", SLOWLY]);
    migration.reaches("synchronize");
    assert!(scene.pair.a().stop_agent().unwrap().unwrap().success());
    let said = migration.ended();
    scene.guest.runs_on();
    scene.pair.holds_nothing(scene.pair.b());
    scene.pair.a().start_agent().unwrap();
    is_as_before(&scene, &said, 1, "synchronize");
    scene.moves_after_all();
}
