//! Whatever fails, and whenever: the machine writes on at the source with the block graph that it had, nothing leaks, and a second
//! attempt goes on from what was copied.

use std::cell::RefCell;
use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use end_to_end::{
    BlockDevice, Guest, Pair, Said, UnderWay, Writes, image, local, noise, report_adds_up, until, vmirror,
    write_noise,
};
use serde_json::json;
use session::Outcome;
use session::report::DiskMode;
use testbed::disk::{self, Format};
use testbed::guest_spec::{Cache, GuestSpec, Io, Nic, Pattern, Syntax, TestDisk, Work};
use testbed::{Inventory, Monitor, Status, Wire, fault, root_or_skip};

const MIB: u64 = 1 << 20;
/// Bytes of the disk: what the guest works on, which is a hole at first, and then what cannot be compressed.
const SIZE: u64 = 48 * MIB;
const WORKED: u64 = 8 * MIB;
const NOISE: u64 = SIZE - WORKED;
/// Of that, what is there when it is interfered with copying.
const COPIED: u64 = SIZE / 4;
const TAP: &str = "tap0";
/// Slow enough for the copy to take seconds.
const SLOWLY: &[&str] = &["--bandwidth", "8MiB/s"];
/// A guest that waits for its disk as long as this waits for whatever has failed: for a link that is silent it is longer.
const STALL: Duration = Duration::from_secs(4);

/// What is to hold the disk at the destination.
#[derive(Clone, Copy, PartialEq, Eq)]
enum There {
    File(Format),
    /// A file where there is not room for everything.
    Cramped,
    Device,
}

struct Scene {
    pair: Pair,
    guest: Guest,
    nic: Nic,
    writes: Writes,
    before: Status,
    qmp: RefCell<Monitor>,
    nodes: Vec<String>,
    held: [Inventory; 2],
    there: There,
    devices: Vec<BlockDevice>,
}

impl Scene {
    fn new(there: There) -> Option<Scene> {
        if !root_or_skip("hosts with storage of their own") {
            return None;
        }
        let pair = Pair::with_local_disks();
        for host in [pair.a(), pair.b()] {
            host.add_tap(TAP).unwrap();
        }
        if there == There::Cramped {
            pair.b().stop_agent().unwrap();
            pair.b().limit_disks(2 * SIZE).unwrap();
            pair.b().start_agent_with(&local()).unwrap();
        }
        let mut devices = Vec::new();
        let (name, format) = match there {
            There::File(format) => ("disk", format),
            There::Cramped => ("disk", Format::Raw),
            There::Device => ("device", Format::Raw),
        };
        if there == There::Device {
            let mut content = vec![0; WORKED as usize];
            content.extend(noise(NOISE));
            devices = vec![
                BlockDevice::new(pair.a(), &content),
                BlockDevice::new(pair.b(), &vec![0; SIZE as usize]),
            ];
        } else {
            disk::create(&image(pair.a(), name), format, SIZE).unwrap();
        }
        if there != There::Device && format == Format::Raw {
            write_noise(&image(pair.a(), name), WORKED, NOISE);
        }
        let blocks =
            Work::Blocks { pattern: Pattern::Random, io: Io::Direct, rate: 100, depth: 1, check_rate: 50 };
        let disk = TestDisk {
            cache: Cache::Writeback,
            roles: vec![blocks.within(WORKED / MIB - 1), Work::Journal { rate: 100 }.within(1)],
            // This finds the driver that goes with the image.
            syntax: Syntax::Drive,
            ..TestDisk::new(pair.a().local_dir().join(name), format, "d")
        };
        let nic = Nic::new(TAP, 10);
        let qmp = pair.a().directory().join("user.qmp");
        let spec = GuestSpec {
            qmp: Some(qmp.clone()),
            nic: Some(nic.clone()),
            fill_mib: 16,
            rate: 50,
            disks: vec![disk],
            ..pair.spec("vm", 128)
        };
        let guest = pair.run(pair.a(), "vm", &spec);
        let before = guest.status();
        let writes = Writes::watch(pair.client().unwrap().journal(nic.address, "d").unwrap());
        until("records are written", || writes.journal().acknowledged() > 20);
        // An agent that has started a QEMU holds it by more than one that has found it again, as these do sooner or later.
        pair.a().stop_agent().unwrap();
        pair.a().start_agent_with(&local()).unwrap();
        let held = [pair.a().inventory().unwrap(), pair.b().inventory().unwrap()];
        let mut qmp = Monitor::connect(&qmp).unwrap();
        let nodes = nodes(&mut qmp);
        Some(Scene { pair, guest, nic, writes, before, qmp: RefCell::new(qmp), nodes, held, there, devices })
    }

    /// A migration of which some of the disk has come to the destination.
    fn copying(&self) -> UnderWay<'_> {
        let migration =
            self.pair.begin("vm", self.pair.a(), self.pair.b(), &[SLOWLY, self.options()].concat());
        migration.reaches("synchronize");
        until("some of the disk is there", || self.copied() > COPIED);
        migration
    }

    /// Bytes that the copy takes.
    fn copied(&self) -> u64 {
        match self.devices.last() {
            Some(device) => device.content().iter().filter(|byte| **byte != 0).count() as u64,
            None => disk::allocated(&self.copy()).unwrap_or_default(),
        }
    }

    /// A standing mirror that is in sync. Gives back its id.
    fn mirrored(&self) -> String {
        let progress = self.pair.mirror("vm", self.pair.a(), self.pair.b(), self.options()).json();
        assert_eq!(progress["in_sync"], true, "{progress}");
        progress["id"].as_str().unwrap().to_owned()
    }

    /// Waits until a standing mirror has ended, and tells why.
    fn failed(&self, mirror: &str) -> String {
        until("the mirror has ended", || self.pair.progress("vm", self.pair.a()).is_none());
        let report = vmirror(self.pair.a(), &["report", mirror, "--json"]).done().report();
        assert_eq!(report.outcome, Outcome::Failed, "{report:#?}");
        report.error.unwrap().finding.kind
    }

    fn options(&self) -> &'static [&'static str] {
        if self.there == There::Device { &["--disks", "mirror"] } else { &[] }
    }

    fn copy(&self) -> PathBuf {
        image(self.pair.b(), if self.there == There::Device { "device" } else { "disk" })
    }

    /// From here on it is watched how long the guest waits for its disk.
    fn fails_now(&self) {
        let _ = self.writes.longest_wait();
    }

    fn cut(&self) {
        self.pair.testbed().cut(self.pair.a(), Wire::Link).unwrap();
    }

    fn mend(&self) {
        self.pair.testbed().mend(self.pair.a(), Wire::Link).unwrap();
    }

    fn restart(&self, host: &testbed::Host) {
        host.kill_agent().unwrap();
        host.start_agent_with(&local()).unwrap();
    }

    /// Takes all the room that there is.
    fn fill_up(&self) -> PathBuf {
        let filler = image(self.pair.b(), "filler");
        // Until there is none.
        let _ = fs::write(&filler, noise(2 * SIZE));
        filler
    }

    /// The machine has gone on all the time, is as it was before, and so are both hosts.
    fn wrote_on(&self) {
        let acknowledged = self.writes.journal().acknowledged();
        until("records are written", || self.writes.journal().acknowledged() > acknowledged + 20);
        let waited = self.writes.longest_wait();
        eprintln!("the guest waited {waited:.2?} for its disk");
        assert!(waited < STALL, "the guest waited {waited:?} for its disk\n{}", self.pair.logs());
        self.is_as_before();
    }

    /// The machine is as it was before, and so are both hosts.
    fn is_as_before(&self) {
        self.guest.runs_on();
        assert!(self.pair.runs_on("vm", self.pair.a()), "{}", self.pair.logs());
        self.pair.holds(self.pair.b(), &self.held[1]);
        self.pair.holds_but_for_growth(self.pair.a(), &self.held[0]);
        assert_eq!(nodes(&mut self.qmp.borrow_mut()), self.nodes, "QEMU's block graph");
        let _ = self.guest.sane_since(&self.before);
        self.disk_is_whole();
    }

    fn disk_is_whole(&self) {
        let verdict = self.pair.client().unwrap().check_disks(self.nic.address).unwrap();
        assert_eq!(verdict.faults.total(), 0, "{}", self.guest.console().text());
        assert_eq!(self.writes.journal().report().went_back, []);
    }

    /// A second attempt succeeds.
    fn moves(&self) -> session::report::Disk {
        let report = self.pair.migrate("vm", self.pair.a(), self.pair.b(), self.options());
        report_adds_up(&report, &self.guest);
        let disk = report.disks[0].clone();
        assert_eq!((disk.mode, report.verification.proof_blocks), (DiskMode::Mirrored, SIZE >> 16));
        self.has_moved();
        disk
    }

    /// The machine runs at the destination and nowhere else, and has lost nothing.
    fn has_moved(&self) {
        until("the guest runs at the destination", || self.pair.runs_on("vm", self.pair.b()));
        until("the source has let go", || self.pair.show("vm", self.pair.a()).is_none());
        let acknowledged = self.writes.journal().acknowledged();
        until("records are written", || self.writes.journal().acknowledged() > acknowledged + 20);
        self.disk_is_whole();
        self.guest.sound_since(&self.before);
        if self.there != There::File(Format::Qcow2) {
            let copy = fs::read(self.copy()).unwrap();
            assert!(copy[WORKED as usize..] == noise(NOISE), "what nobody writes to differs");
        }
    }

    /// A second attempt goes on from what was copied: so many bytes at least of what nobody writes to.
    fn goes_on(&self, copied: u64) {
        let disk = self.moves();
        // Three quarters of that may be what the guest has written since, or was on its way.
        assert!(disk.wire_bytes < NOISE - copied / 4, "{disk:?}, {copied} bytes were there");
    }
}

/// The names of QEMU's block nodes.
fn nodes(qmp: &mut Monitor) -> Vec<String> {
    let nodes = qmp.execute("query-named-block-nodes", json!({ "flat": true })).unwrap();
    let mut names: Vec<String> =
        nodes.as_array().unwrap().iter().map(|node| node["node-name"].as_str().unwrap().to_owned()).collect();
    names.sort();
    names
}

/// It ended, and did not succeed. Says as what kind.
fn failed(said: &Said) -> String {
    assert_eq!(said.code, Some(1), "{said:?}");
    let report = said.report();
    assert_eq!(report.outcome, Outcome::Failed, "{report:#?}");
    report.error.unwrap().finding.kind
}

const RAW: There = There::File(Format::Raw);

#[test]
fn whoever_fails_before_anything_is_copied_the_guest_writes_on() {
    let Some(scene) = Scene::new(RAW) else { return };
    let (a, b) = (scene.pair.a(), scene.pair.b());
    // Wherever that is: connecting, reserving, the first moments of copying.
    for moment in [0, 100, 500].map(Duration::from_millis) {
        for victim in ["source", "destination", "link"] {
            scene.fails_now();
            let migration = scene.pair.begin("vm", a, b, SLOWLY);
            migration.shows("anything", |_| true);
            thread::sleep(moment);
            match victim {
                "source" => a.kill_agent().map(drop).unwrap(),
                "destination" => b.kill_agent().map(drop).unwrap(),
                _ => scene.cut(),
            }
            let said = migration.ended();
            match victim {
                "source" => a.start_agent_with(&local()).unwrap(),
                "destination" => b.start_agent_with(&local()).unwrap(),
                _ => scene.mend(),
            }
            eprintln!("{moment:?}, {victim}: {:?}", said.code);
            assert_ne!(said.code, Some(0), "{said:?}");
            scene.wrote_on();
        }
    }
    scene.moves();
}

#[test]
fn a_cancelled_copy_leaves_nothing_in_the_block_graph_and_is_gone_on_from() {
    let Some(scene) = Scene::new(RAW) else { return };
    let migration = scene.copying();
    scene.fails_now();
    let said = vmirror(scene.pair.a(), &["cancel", "vm", "--json"]).done();
    assert_eq!(said.report().outcome, Outcome::Cancelled, "{said:?}");
    assert_eq!(migration.ended().code, Some(1));
    scene.wrote_on();
    scene.goes_on(COPIED);
}

#[test]
fn an_agent_of_the_source_that_is_killed_leaves_the_guest_writing_and_its_successor_cleans_up() {
    let Some(scene) = Scene::new(RAW) else { return };
    let migration = scene.copying();
    scene.fails_now();
    scene.pair.a().kill_agent().unwrap();
    drop(migration.ended());
    scene.pair.a().start_agent_with(&local()).unwrap();
    scene.wrote_on();

    let _ = scene.mirrored();
    scene.fails_now();
    scene.restart(scene.pair.a());
    scene.wrote_on();
    scene.goes_on(NOISE);
}

#[test]
fn an_agent_of_the_destination_that_is_killed_leaves_a_copy_to_go_on_from() {
    let Some(scene) = Scene::new(RAW) else { return };
    let migration = scene.copying();
    scene.fails_now();
    scene.pair.b().kill_agent().unwrap();
    assert_eq!(failed(&migration.ended()), "link");
    scene.pair.b().start_agent_with(&local()).unwrap();
    scene.wrote_on();

    let mirror = scene.mirrored();
    scene.fails_now();
    scene.restart(scene.pair.b());
    assert_eq!(scene.failed(&mirror), "link");
    scene.wrote_on();
    scene.goes_on(NOISE);
}

#[test]
fn a_link_that_is_cut_ends_the_migration_and_not_the_guests_writes() {
    let Some(scene) = Scene::new(RAW) else { return };
    let migration = scene.copying();
    scene.fails_now();
    scene.cut();
    assert_eq!(failed(&migration.ended()), "link");
    scene.mend();
    scene.wrote_on();

    let mirror = scene.mirrored();
    scene.fails_now();
    scene.cut();
    assert_eq!(scene.failed(&mirror), "link");
    scene.mend();
    scene.wrote_on();
    scene.goes_on(NOISE);
}

#[test]
fn a_qemu_of_the_destination_that_is_killed_ends_the_migration_and_not_the_guests_writes() {
    let Some(scene) = Scene::new(RAW) else { return };
    let migration = scene.copying();
    scene.fails_now();
    fault::kill(scene.pair.qemu(scene.pair.b()).unwrap());
    assert_eq!(failed(&migration.ended()), "qemu-gone");
    scene.wrote_on();

    let mirror = scene.mirrored();
    scene.fails_now();
    fault::kill(scene.pair.qemu(scene.pair.b()).unwrap());
    assert_eq!(scene.failed(&mirror), "qemu-gone");
    scene.wrote_on();
    scene.goes_on(NOISE);
}

/// The process that writes images of QEMU's own format at the destination.
fn storage_daemon(scene: &Scene) -> i32 {
    let is_daemon = |pid: &i32| {
        let program = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
        program.to_string_lossy().contains("qemu-storage-daemon")
    };
    scene.pair.b().processes().into_iter().find(is_daemon).unwrap()
}

#[test]
fn a_storage_daemon_that_is_killed_ends_the_migration_and_not_the_guests_writes() {
    let Some(scene) = Scene::new(There::File(Format::Qcow2)) else { return };
    // Long enough for the daemon to be found at work: the memory takes that.
    let migration = scene.pair.begin("vm", scene.pair.a(), scene.pair.b(), &["--bandwidth", "1MiB/s"]);
    migration.reaches("synchronize");
    scene.fails_now();
    fault::kill(storage_daemon(&scene));
    assert_eq!(failed(&migration.ended()), "disk");
    scene.wrote_on();

    let mirror = scene.mirrored();
    scene.fails_now();
    fault::kill(storage_daemon(&scene));
    assert_eq!(scene.failed(&mirror), "disk");
    scene.wrote_on();
    scene.moves();
}

#[test]
fn a_device_that_takes_no_writes_ends_the_migration_and_not_the_guests_writes() {
    let Some(scene) = Scene::new(There::Device) else { return };
    let device = &scene.devices[1];
    let migration = scene.copying();
    scene.fails_now();
    device.fail_writes(true);
    let said = migration.ended();
    assert_eq!(failed(&said), "disk");
    let error = said.report().error.unwrap();
    for word in ["device", "at the destination", "cannot be written", "not permitted"] {
        assert!(error.finding.message.contains(word), "{word:?} is not said: {error:?}");
    }
    device.fail_writes(false);
    scene.wrote_on();

    let mirror = scene.mirrored();
    scene.fails_now();
    device.fail_writes(true);
    assert_eq!(scene.failed(&mirror), "disk");
    device.fail_writes(false);
    scene.wrote_on();
    scene.goes_on(NOISE);
}

#[test]
fn a_file_system_that_is_full_ends_the_migration_and_not_the_guests_writes() {
    let Some(scene) = Scene::new(There::Cramped) else { return };
    let migration = scene.copying();
    scene.fails_now();
    let filler = scene.fill_up();
    let said = migration.ended();
    assert_eq!(failed(&said), "disk");
    let error = said.report().error.unwrap();
    let path = scene.pair.b().local_dir().join("disk").display().to_string();
    for word in [path.as_str(), "No space left on device", "at the destination"] {
        assert!(error.finding.message.contains(word), "{word:?} is not said: {error:?}");
    }
    assert!(error.finding.hint.contains("make room there"), "{error:?}");
    scene.wrote_on();

    fs::remove_file(&filler).unwrap();
    let mirror = scene.mirrored();
    scene.fails_now();
    let filler = scene.fill_up();
    assert_eq!(scene.failed(&mirror), "disk");
    scene.wrote_on();
    fs::remove_file(filler).unwrap();
    scene.goes_on(NOISE);
}

#[test]
fn whoever_fails_while_the_guest_is_paused_it_runs_again_at_the_source_with_its_disk() {
    let Some(scene) = Scene::new(RAW) else { return };
    let (pair, a, b) = (&scene.pair, scene.pair.a(), scene.pair.b());
    for victim in ["source", "destination", "link", "qemu"] {
        let (migration, stopped) = pair.switching_over("vm");
        match victim {
            "source" => a.kill_agent().map(drop).unwrap(),
            "destination" => scene.restart(b),
            "link" => scene.cut(),
            _ => fault::kill(pair.qemu(b).unwrap()),
        }
        drop(stopped);
        let said = migration.ended();
        eprintln!("{victim}: {:?}", said.code);
        match victim {
            "source" => a.start_agent_with(&local()).unwrap(),
            "link" => scene.mend(),
            _ => {}
        }
        assert_ne!(said.code, Some(0), "{said:?}");
        until("the guest runs again at the source", || pair.runs_on("vm", a));
        pair.give_up_if_in_doubt("vm", &scene.held[1]);
        scene.is_as_before();
    }
    scene.goes_on(NOISE);
}

#[test]
fn a_source_that_is_killed_before_its_word_has_its_disk_back() {
    let Some(scene) = Scene::new(RAW) else { return };
    let (migration, source) = scene.pair.ready("vm");
    scene.pair.a().kill_agent().unwrap();
    drop(source);
    assert_eq!(migration.ended().code, Some(3));
    scene.pair.a().start_agent_with(&local()).unwrap();
    until("the guest runs again at the source", || scene.pair.runs_on("vm", scene.pair.a()));
    scene.pair.give_up_if_in_doubt("vm", &scene.held[1]);
    scene.is_as_before();
    scene.goes_on(NOISE);
}

#[test]
fn a_source_that_is_killed_after_its_word_has_given_its_disk_away() {
    let Some(scene) = Scene::new(RAW) else { return };
    let (migration, destination) = scene.pair.handed_over("vm");
    scene.pair.a().kill_agent().unwrap();
    assert_eq!(migration.ended().code, Some(3));
    scene.pair.a().start_agent_with(&local()).unwrap();
    drop(destination);
    scene.has_moved();
}

#[test]
fn a_person_who_decides_for_the_source_gets_its_disk() {
    let Some(scene) = Scene::new(RAW) else { return };
    let (migration, destination) = scene.pair.handed_over("vm");
    scene.pair.b().kill_agent().unwrap();
    drop(destination);
    assert_eq!(migration.ended().code, Some(3));
    let _ = vmirror(scene.pair.a(), &["resolve", "vm", "--run-here", "--force"]).done();
    scene.guest.runs_on();
    // Should it come back after all, its copy does not run.
    scene.pair.b().start_agent_with(&local()).unwrap();
    scene.guest.runs_on();
    assert!(!scene.pair.runs_on("vm", scene.pair.b()));
    scene.pair.give_up_if_in_doubt("vm", &scene.held[1]);
    scene.is_as_before();
    scene.moves();
}
