//! A machine of which it is not certain where it should run: whoever can be asked is asked, nobody else's word counts, and it never runs
//! twice.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use end_to_end::{Guest, Pair, Points, Refusal, UnderWay, report_adds_up, until, vmirror};
use session::Outcome;
use session::points::Point;
use testbed::{BadDisk, Host, Inventory, Shim, Status, fault};

/// Who runs a guest that should not is heard in that time.
const HEARD: Duration = Duration::from_secs(2);

/// A guest on host A.
struct Scene {
    pair: Pair,
    guest: Guest,
    before: Status,
    /// What host B held before.
    held: Inventory,
}

impl Scene {
    fn new() -> Scene {
        let pair = Pair::start();
        let guest = pair.run(pair.a(), "vm", &pair.spec("vm", 128));
        let (before, held) = (guest.status(), pair.b().inventory().unwrap());
        Scene { pair, guest, before, held }
    }

    fn a(&self) -> &Host {
        self.pair.a()
    }

    fn b(&self) -> &Host {
        self.pair.b()
    }

    fn begin(&self) -> UnderWay<'_> {
        self.pair.begin("vm", self.a(), self.b(), &["--max-downtime", "60s"])
    }

    /// Asserts that a host has the machine in doubt, and that it runs nowhere.
    #[track_caller]
    fn in_doubt(&self, host: &Host) {
        until("the machine is in doubt", || {
            self.pair.show("vm", host).is_some_and(|vm| vm["state"] == "uncertain")
        });
        assert!(self.guest.is_silent_for(HEARD), "it runs while in doubt");
    }

    /// Asserts that the guest runs at the source and nowhere else, has lost nothing, and can be migrated.
    fn stays_and_moves_after_all(&self) {
        self.guest.runs_on();
        until("it runs at the source", || self.pair.runs_on("vm", self.a()));
        self.pair.holds(self.b(), &self.held);
        assert_eq!(self.pair.show("vm", self.b()), None);
        report_adds_up(&self.pair.migrate("vm", self.a(), self.b(), &[]), &self.guest);
        self.has_moved();
    }

    /// Asserts that the guest runs at the destination and nowhere else, and has lost nothing.
    fn has_moved(&self) {
        until("the guest runs at the destination", || self.pair.runs_on("vm", self.b()));
        until("the source has let go", || self.pair.show("vm", self.a()).is_none());
        self.pair.holds_nothing(self.a());
        let _ = self.guest.sound_since(&self.before);
    }
}

/// A guest that was about to be handed over, by a source that can put nothing on record from then on.
fn not_recorded() -> (Scene, Shim) {
    let scene = Scene::new();
    let shim = Shim::new(scene.a().directory(), &scene.a().state_dir()).unwrap();
    let points = Points::of(scene.a(), shim.environment());
    let held = points.hold(Point::ReadyHeard);
    let migration = scene.begin();
    held.reached();
    shim.set_disk(BadDisk::FailsToSync).unwrap();
    drop(held);
    let said = migration.ended();
    assert_eq!(said.code, Some(3), "{said:?}\n{}", scene.pair.logs());
    let report = said.report();
    assert_eq!(report.outcome, Outcome::Uncertain, "{report:#?}");
    assert_eq!(report.error.unwrap().finding.kind, "journal");
    scene.in_doubt(scene.a());
    (scene, shim)
}

#[test]
fn a_guest_that_could_not_be_handed_over_for_its_journal_runs_on_as_soon_as_that_can_be_written() {
    let (scene, shim) = not_recorded();
    shim.set_disk(BadDisk::Sound).unwrap();
    scene.stays_and_moves_after_all();
}

#[test]
fn a_person_can_decide_nothing_that_the_journal_cannot_say_and_not_need_to_wait_once_it_can() {
    let (scene, shim) = not_recorded();
    for decision in ["--run-here", "--give-up"] {
        let refusal = scene.pair.refused(scene.a(), &["resolve", "vm", decision]);
        refusal.is("journal-unusable", &["put on record", "state_dir"]);
        scene.in_doubt(scene.a());
    }
    shim.set_disk(BadDisk::Sound).unwrap();
    let _ = vmirror(scene.a(), &["resolve", "vm", "--run-here"]).done();
    assert!(scene.pair.runs_on("vm", scene.a()), "{}", scene.pair.logs());
    scene.stays_and_moves_after_all();
}

/// Bytes of a half of a record's file.
const SLOT: usize = 256 * 1024;

#[test]
fn what_was_handed_over_and_not_heard_of_is_on_record_twice_while_it_is_asked_about() {
    let scene = Scene::new();
    let (migration, destination) = scene.pair.handed_over("vm");
    let record = scene.a().state_dir().join("vms/vm.journal");
    until("both halves of its record say so", || {
        let slots = fs::read(&record).unwrap();
        let says = |slot: &[u8]| String::from_utf8_lossy(slot).contains("\"ownership\":{\"handed-over\"");
        slots.chunks(SLOT).filter(|slot| says(slot)).count() == 2
    });
    assert!(!migration.has_ended(), "{}", scene.pair.logs());
    drop(destination);
    assert_eq!(migration.ended().report().outcome, Outcome::Completed);
    scene.has_moved();
}

/// A migration whose source is held at a point after its destination has said that the copy is ready, and whose destination's agent is
/// another one by now, which has that copy in doubt.
fn waits_for_the_source(scene: &Scene, point: Point, then: impl FnOnce()) {
    let points = Points::of(scene.a(), &[]);
    let held = points.hold(point);
    let migration = scene.begin();
    held.reached();
    scene.b().kill_agent().unwrap();
    scene.b().start_agent().unwrap();
    scene.in_doubt(scene.b());
    then();
    drop(held);
    let _ = migration.ended();
    scene.has_moved();
}

#[test]
fn a_copy_is_not_run_on_a_persons_word_while_its_source_says_that_the_machine_is_its_own() {
    let scene = Scene::new();
    waits_for_the_source(&scene, Point::ReadyHeard, || {
        let refusal = scene.pair.refused(scene.b(), &["resolve", "vm", "--run-here"]);
        refusal.is("owned-there", &["host-a", "its own", "--give-up"]);
        scene.in_doubt(scene.b());
    });
}

#[test]
fn a_copy_that_its_source_has_handed_over_runs_on_a_persons_word() {
    let scene = Scene::new();
    waits_for_the_source(&scene, Point::HandedOver, || {
        let _ = vmirror(scene.b(), &["resolve", "vm", "--run-here"]).done();
        scene.guest.runs_on();
        assert!(scene.pair.runs_on("vm", scene.b()), "{}", scene.pair.logs());
    });
}

/// An agent of another host, at the address of host B and in its place.
fn stranger(scene: &Scene) {
    let b = scene.b();
    let address = b.listen().ip().to_string();
    let certificates = scene.pair.testbed().certificates();
    let issue = ["cert", "issue", "--dir", certificates.to_str().unwrap(), "--name", "host-c", "--address"];
    let _ = vmirror(b, &[&issue[..], &[&address]].concat()).done();
    let places = ["state", "run", "ram"].map(|part| b.directory().join(format!("{part}-of-c")));
    for place in &places {
        fs::create_dir(place).unwrap();
    }
    b.configure(|config| {
        config.insert("name".to_owned(), "host-c".into());
        for (key, place) in ["state_dir", "run_dir", "ram_dir"].into_iter().zip(&places) {
            config.insert(key.to_owned(), place.to_str().unwrap().into());
        }
        let tls = config["tls"].as_table_mut().unwrap();
        for (key, file) in [("cert", "host-c.pem"), ("key", "host-c-key.pem")] {
            tls.insert(key.to_owned(), certificates.join(file).to_str().unwrap().into());
        }
    })
    .unwrap();
    b.start_agent().unwrap();
}

/// Host B has its own agent again.
fn no_stranger(scene: &Scene, config: &str) {
    scene.b().stop_agent().unwrap();
    fs::write(scene.b().config_path(), config).unwrap();
    scene.b().start_agent().unwrap();
}

/// How often that host's agent has said this in its log.
fn said(host: &Host, what: &str) -> usize {
    fs::read_to_string(host.agent_log()).unwrap().matches(what).count()
}

/// What host B has of a machine waits there without an agent, and so does the machine at host A, since that had come to a point; an agent
/// of another host has come to the place of host B's. Gives back the configuration of that.
fn left_to_a_stranger(scene: &Scene, point: Point) -> String {
    let config = fs::read_to_string(scene.b().config_path()).unwrap();
    let points = Points::of(scene.a(), &[]);
    let held = points.hold(point);
    let migration = scene.begin();
    held.reached();
    scene.b().kill_agent().unwrap();
    scene.a().kill_agent().unwrap();
    assert_eq!(migration.ended().code, Some(3));
    stranger(scene);
    scene.a().start_agent().unwrap();
    config
}

#[test]
fn the_word_of_another_agent_at_the_destinations_address_settles_nothing() {
    let scene = Scene::new();
    let config = left_to_a_stranger(&scene, Point::HandedOver);
    scene.in_doubt(scene.a());
    // It knows nothing of the machine, and never will: that says nothing of host-b.
    for decision in ["--run-here", "--give-up"] {
        let refusal = scene.pair.refused(scene.a(), &["resolve", "vm", decision]);
        refusal.is("unheard", &["host-b cannot be asked"]);
        scene.in_doubt(scene.a());
    }
    no_stranger(&scene, &config);
    scene.has_moved();
}

#[test]
fn a_copy_is_not_forgotten_because_another_agent_at_its_hosts_address_knows_nothing_of_it() {
    let scene = Scene::new();
    let config = left_to_a_stranger(&scene, Point::ReadyHeard);
    // It runs on at host A, and host-b is to throw its copy away: who is there instead is not told that.
    until("the other agent was asked who it is, or what it has", || {
        said(scene.b(), "connected and said nothing") > 0 || said(scene.a(), "has thrown its copy away") > 0
    });
    no_stranger(&scene, &config);
    scene.stays_and_moves_after_all();
}

/// A machine that host A has handed over, and that host B has not heard of; both agents have ended.
fn handed_over_unheard(scene: &Scene) {
    let points = Points::of(scene.a(), &[]);
    let held = points.hold(Point::HandedOver);
    let migration = scene.begin();
    held.reached();
    scene.b().kill_agent().unwrap();
    scene.a().kill_agent().unwrap();
    assert_eq!(migration.ended().code, Some(3));
}

/// The migration by which a host has, or has had, the machine.
fn arrived_by(state_dir: &Path) -> String {
    let journal = fs::read(state_dir.join("vms/vm.journal")).unwrap();
    let journal = String::from_utf8_lossy(&journal);
    journal.split("\"arrived_by\":\"").nth(1).unwrap()[..36].to_owned()
}

#[test]
fn a_destination_that_has_lost_its_state_directory_gives_nothing_back_to_the_source() {
    let scene = Scene::new();
    handed_over_unheard(&scene);
    let (state, aside) = (scene.b().state_dir(), scene.b().directory().join("aside"));
    fs::rename(&state, &aside).unwrap();
    for knows_of_it in [false, true] {
        // As of a volume that is not mounted; and one of another agent's, which says that the copy never ran.
        fs::create_dir(&state).unwrap();
        if knows_of_it {
            fs::create_dir(state.join("withdrawn")).unwrap();
            fs::write(state.join("withdrawn").join(arrived_by(&aside)), "").unwrap();
        }
        scene.b().start_agent().unwrap();
        scene.a().start_agent().unwrap();
        scene.in_doubt(scene.a());
        // What the agent is answered is what a person is told.
        Refusal::of(scene.a(), &["resolve", "vm", "--give-up"]).is("unknown-there", &["host-b"]);
        scene.in_doubt(scene.a());
        assert_eq!(scene.pair.show("vm", scene.b()), None);
        scene.a().stop_agent().unwrap();
        scene.b().stop_agent().unwrap();
        fs::remove_dir_all(&state).unwrap();
    }
    fs::rename(&aside, &state).unwrap();
    scene.b().start_agent().unwrap();
    scene.a().start_agent().unwrap();
    scene.has_moved();
}

#[test]
fn who_gives_up_a_copy_that_is_just_let_run_is_not_told_that_it_is_gone() {
    let scene = Scene::new();
    let b_points = Points::of(scene.b(), &[]);
    let points = Points::of(scene.a(), &[]);
    let handed_over = points.hold(Point::HandedOver);
    let migration = scene.begin();
    handed_over.reached();
    scene.b().kill_agent().unwrap();
    scene.b().start_agent_with(b_points.options()).unwrap();
    scene.in_doubt(scene.b());
    let owned = b_points.hold(Point::Owned);
    drop(handed_over);
    owned.reached();
    thread::scope(|threads| {
        let person = threads.spawn(|| vmirror(scene.b(), &["resolve", "vm", "--give-up", "--json"]));
        until("it has been decided", || said(scene.b(), "resolved by a person") > 0);
        drop(owned);
        let refused = Refusal::told(&person.join().unwrap());
        assert_eq!(refused.kind, "settled", "{refused:?}\n{}", scene.pair.logs());
    });
    scene.guest.runs_on();
    assert_eq!(migration.ended().code, Some(0));
    scene.has_moved();
}

#[test]
fn who_wants_it_at_the_source_is_not_told_that_a_copy_is_gone_which_is_just_let_run() {
    let scene = Scene::new();
    let shim = Shim::new(scene.b().directory(), &scene.b().state_dir()).unwrap();
    let points = Points::of(scene.b(), shim.environment());
    let commit_heard = points.hold(Point::CommitHeard);
    let migration = scene.begin();
    commit_heard.reached();
    scene.a().kill_agent().unwrap();
    assert_eq!(migration.ended().code, Some(3));
    scene.a().start_agent().unwrap();
    scene.in_doubt(scene.a());
    // It is decided, and by what the agent there knows it is still a copy.
    shim.set_disk(BadDisk::HangsToSync).unwrap();
    drop(commit_heard);
    let record = scene.b().state_dir().join("vms/vm.journal");
    until("it is being written down", || {
        String::from_utf8_lossy(&fs::read(&record).unwrap()).contains("\"resuming\":true")
    });
    thread::scope(|threads| {
        let person = threads.spawn(|| vmirror(scene.a(), &["resolve", "vm", "--run-here", "--json"]));
        until("it has been decided", || said(scene.a(), "resolved by a person") > 0);
        // It has been asked for by then; later it would be too late as well.
        thread::sleep(Duration::from_secs(1));
        assert!(scene.guest.is_silent_for(HEARD), "it runs before it is certain where");
        shim.set_disk(BadDisk::Sound).unwrap();
        let refused = Refusal::told(&person.join().unwrap());
        assert_eq!(refused.kind, "runs-there", "{refused:?}\n{}", scene.pair.logs());
    });
    scene.guest.runs_on();
    scene.has_moved();
}

#[test]
fn a_destination_whose_qemu_dies_before_it_is_told_to_run_the_guest_gives_it_back() {
    let scene = Scene::new();
    let points = Points::of(scene.b(), &[]);
    let owned = points.hold(Point::Owned);
    let migration = scene.begin();
    owned.reached();
    fault::kill(scene.pair.qemu(scene.b()).unwrap());
    drop(owned);
    let said = migration.ended();
    assert_eq!(said.code, Some(1), "{said:?}\n{}", scene.pair.logs());
    scene.stays_and_moves_after_all();
}

#[test]
fn a_destination_whose_qemu_and_agent_die_when_it_is_told_to_run_the_guest_does_not_say_that_it_never_has() {
    let scene = Scene::new();
    let points = Points::of(scene.b(), &[]);
    let owned = points.hold(Point::Owned);
    let migration = scene.begin();
    owned.reached();
    scene.b().kill_agent().unwrap();
    fault::kill(scene.pair.qemu(scene.b()).unwrap());
    drop(owned);
    scene.b().start_agent().unwrap();
    let said = migration.ended();
    assert_eq!(said.code, Some(3), "{said:?}\n{}", scene.pair.logs());
    scene.in_doubt(scene.a());
    let there = scene.pair.show("vm", scene.b()).unwrap();
    assert_eq!(there["state"], "unreachable", "{there}");
    // Who has looked, and knows that it never ran, says so there.
    let _ = vmirror(scene.b(), &["resolve", "vm", "--give-up"]).done();
    scene.stays_and_moves_after_all();
}

#[test]
fn where_the_agents_do_not_reach_each_other_a_person_runs_it_at_the_destination() {
    let scene = Scene::new();
    handed_over_unheard(&scene);
    // As for who reaches both: one host is looked at while the other one's agent cannot be.
    scene.b().start_agent().unwrap();
    scene.in_doubt(scene.b());
    scene.pair.refused(scene.b(), &["resolve", "vm", "--run-here"]).is("unheard", &["host-a"]);
    let _ = vmirror(scene.b(), &["resolve", "vm", "--run-here", "--force"]).done();
    assert!(scene.pair.runs_on("vm", scene.b()), "{}", scene.pair.logs());
    // Nothing is said at the source, which hears of it.
    scene.a().start_agent().unwrap();
    scene.has_moved();
}

#[test]
fn where_the_agents_do_not_reach_each_other_a_person_runs_it_at_the_source() {
    let scene = Scene::new();
    handed_over_unheard(&scene);
    scene.b().start_agent().unwrap();
    scene.in_doubt(scene.b());
    let said = vmirror(scene.b(), &["resolve", "vm", "--give-up"]).done();
    assert!(said.stdout.contains("what was left of vm here is removed"), "{said:?}");
    scene.b().stop_agent().unwrap();
    scene.a().start_agent().unwrap();
    scene.in_doubt(scene.a());
    scene.pair.refused(scene.a(), &["resolve", "vm", "--run-here"]).is("unheard", &["host-b"]);
    let _ = vmirror(scene.a(), &["resolve", "vm", "--run-here", "--force"]).done();
    scene.b().start_agent().unwrap();
    scene.stays_and_moves_after_all();
}
