//! An agent that starts with an older state directory ends nothing that runs, and removes nothing that a live QEMU has open; and while a
//! hand-over is under way nobody is told that anything is certain.

use std::path::Path;

use end_to_end::{Guest, Pair, Refusal, copy, until, vmirror};
use serde_json::Value;
use testbed::{Host, Status};

/// A guest that runs on a host whose agent is started with the state directory that it had before.
struct Scene {
    pair: Pair,
    guest: Guest,
    before: Status,
}

impl Scene {
    fn new() -> Scene {
        let pair = Pair::start();
        let guest = pair.run(pair.a(), "vm", &pair.spec("vm", 128));
        let before = guest.status();
        Scene { pair, guest, before }
    }

    /// Ends the agent, and starts it with what was kept of its state directory.
    fn set_back(host: &Host, kept: &Path) {
        host.stop_agent().unwrap();
        copy(kept, &host.state_dir());
        host.start_agent().unwrap();
    }

    /// What the host says is wrong with it.
    fn problem(&self, host: &Host) -> Value {
        until("it is listed with what is wrong", || {
            self.pair.show("vm", host).is_some_and(|vm| vm["state"] == "unreachable")
        });
        self.pair.show("vm", host).unwrap()["problem"].clone()
    }

    /// Does what the hint says.
    fn is_taken_in(&self, host: &Host, hint: &str) {
        let socket = hint.split("--qmp ").nth(1).and_then(|rest| rest.split('`').next()).unwrap();
        host.stop_agent().unwrap();
        std::fs::remove_file(host.state_dir().join("vms/vm.journal")).unwrap();
        host.start_agent().unwrap();
        self.guest.runs_on();
        let _ = vmirror(host, &["adopt", "vm", "--qmp", socket]).done();
        assert!(self.pair.runs_on("vm", host), "{}", self.pair.logs());
        let _ = self.guest.sound_since(&self.before);
    }
}

#[test]
fn a_state_dir_of_when_it_was_a_half_copy_does_not_end_what_runs() {
    let scene = Scene::new();
    let (a, b) = (scene.pair.a(), scene.pair.b());
    let _ = scene.pair.mirror("vm", a, b, &[]);
    until("the copy is on record", || b.state_dir().join("vms/vm.journal").exists());
    let kept = b.directory().join("kept");
    copy(&b.state_dir(), &kept);
    let _ = vmirror(a, &["switch", "vm"]).done();
    until("it runs there", || scene.pair.runs_on("vm", b));
    scene.guest.runs_on();
    Scene::set_back(b, &kept);
    let problem = scene.problem(b);
    assert_eq!(problem["kind"], "runs-here", "{problem}\n{}", scene.pair.logs());
    scene.guest.runs_on();
    // Nor does an agent that goes down, or a person who does not know what they have.
    Scene::set_back(b, &kept);
    let problem = scene.problem(b);
    assert_eq!(vmirror(b, &["stop", "vm", "--force"]).code, Some(2));
    let _ = scene.problem(b);
    scene.guest.runs_on();
    scene.is_taken_in(b, problem["hint"].as_str().unwrap());
}

#[test]
fn a_state_dir_of_before_it_left_and_came_back_takes_nothing_from_what_runs() {
    let scene = Scene::new();
    let (a, b) = (scene.pair.a(), scene.pair.b());
    let kept = a.directory().join("kept");
    copy(&a.state_dir(), &kept);
    let _ = scene.pair.migrate("vm", a, b, &[]);
    let _ = scene.pair.migrate("vm", b, a, &[]);
    scene.guest.runs_on();
    let ram = a.ram_files();
    Scene::set_back(a, &kept);
    let problem = scene.problem(a);
    assert_eq!(problem["kind"], "in-use", "{problem}\n{}", scene.pair.logs());
    assert_eq!(a.ram_files(), ram);
    assert_eq!(vmirror(a, &["stop", "vm", "--force"]).code, Some(2));
    scene.guest.runs_on();
    scene.is_taken_in(a, problem["hint"].as_str().unwrap());
}

#[test]
fn nobody_is_told_that_it_is_certain_where_it_runs_while_a_hand_over_is_under_way() {
    let scene = Scene::new();
    let (migration, destination) = scene.pair.handed_over("vm");
    for decision in ["--run-here", "--give-up"] {
        let refused = Refusal::of(scene.pair.a(), &["resolve", "vm", decision, "--force"]);
        assert_eq!(refused.kind, "handing-over", "{refused:?}");
    }
    drop(destination);
    assert_eq!(migration.ended().code, Some(0));
    let _ = scene.guest.sound_since(&scene.before);
}
