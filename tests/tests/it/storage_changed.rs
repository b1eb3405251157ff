//! A machine whose disks or devices change while it is mirrored does not go over to a machine that has others.

use std::cell::RefCell;

use end_to_end::{Guest, Pair, image, report_adds_up, until, vmirror, write_noise};
use serde_json::{Value, json};
use session::Outcome;
use session::report::DiskMode;
use testbed::disk::{self, Format};
use testbed::guest_spec::{Cache, GuestSpec, Io, Pattern, TestDisk, Work};
use testbed::{Monitor, Status, root_or_skip};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 32 * MIB;

/// A guest at work on its disk `d`, with an idle disk `idle` and a port for one more; mirrored.
struct Scene {
    pair: Pair,
    guest: Guest,
    before: Status,
    qmp: RefCell<Monitor>,
}

impl Scene {
    fn mirrored() -> Option<Scene> {
        let scene = Scene::new()?;
        let _ = scene.pair.mirror("vm", scene.pair.a(), scene.pair.b(), &[]);
        Some(scene)
    }

    fn new() -> Option<Scene> {
        if !root_or_skip("hosts with storage of their own") {
            return None;
        }
        let pair = Pair::with_local_disks();
        let qmp = pair.a().directory().join("user.qmp");
        let work =
            Work::Blocks { pattern: Pattern::Random, io: Io::Direct, rate: 100, depth: 1, check_rate: 50 };
        let [d, idle] = ["d", "idle"].map(|name| {
            disk::create(&image(pair.a(), name), Format::Raw, SIZE).unwrap();
            write_noise(&image(pair.a(), name), SIZE / 2, MIB);
            let disk = TestDisk::new(pair.a().local_dir().join(name), Format::Raw, name);
            TestDisk { cache: Cache::Writeback, ..disk }
        });
        let d = TestDisk { roles: vec![work.within(8)], ..d };
        // What is unplugged, or plugged in, must sit in a port of its own.
        let spec = GuestSpec {
            machine: "pc".into(),
            qmp: Some(qmp.clone()),
            fill_mib: 16,
            rate: 50,
            disks: vec![d, idle],
            ..pair.spec("vm", 128)
        };
        let guest = pair.run(pair.a(), "vm", &spec);
        let before = guest.status();
        let qmp = RefCell::new(Monitor::connect(&qmp).unwrap());
        Some(Scene { pair, guest, before, qmp })
    }

    fn tell(&self, command: &str, arguments: Value) -> Result<Value, String> {
        self.qmp.borrow_mut().execute(command, arguments).map_err(|error| error.to_string())
    }

    /// The switch-over fails for this reason, and the guest writes on where it was.
    fn is_not_switched(&self, kind: &str, words: &[&str]) {
        let said = vmirror(self.pair.a(), &["switch", "vm", "--json"]);
        assert_eq!(said.code, Some(1), "{said:?}");
        let report = said.report();
        let error = report.error.unwrap();
        assert_eq!((report.outcome, error.finding.kind.as_str()), (Outcome::Failed, kind), "{error:?}");
        for word in words {
            assert!(error.finding.message.contains(word), "{word:?} is not said: {error:?}");
        }
        self.writes_on();
        self.pair.holds_nothing(self.pair.b());
    }

    fn writes_on(&self) {
        assert!(self.pair.runs_on("vm", self.pair.a()), "{}", self.pair.logs());
        let writes = self.guest.status().disks.unwrap().writes;
        until("it writes on", || self.guest.status().disks.unwrap().writes > writes + 50);
        let _ = self.guest.sane_since(&self.before);
    }

    fn moves(&self) {
        let report = self.pair.migrate("vm", self.pair.a(), self.pair.b(), &[]);
        report_adds_up(&report, &self.guest);
        assert!(report.disks.iter().all(|disk| disk.mode == DiskMode::Mirrored), "{:?}", report.disks);
        self.guest.sound_since(&self.before);
    }
}

#[test]
fn a_disk_is_not_resized_under_its_copy() {
    let Some(scene) = Scene::mirrored() else { return };
    let refused = scene.tell("block_resize", json!({ "node-name": "disk-d", "size": 2 * SIZE }));
    eprintln!("block_resize while mirrored: {refused:?}");
    // QEMU refuses it; should it not, the switch-over does.
    if refused.is_ok() {
        return scene.is_not_switched("disk-changed", &["dev-d"]);
    }
    scene.writes_on();
    let report = vmirror(scene.pair.a(), &["switch", "vm", "--json"]).done().report();
    report_adds_up(&report, &scene.guest);
    scene.guest.sound_since(&scene.before);
}

#[test]
fn a_disk_that_is_plugged_in_is_not_left_behind() {
    let Some(scene) = Scene::mirrored() else { return };
    disk::create(&image(scene.pair.a(), "new"), Format::Raw, SIZE).unwrap();
    let node =
        json!({ "driver": "file", "node-name": "new", "filename": scene.pair.a().local_dir().join("new") });
    let _ = scene.tell("blockdev-add", node).unwrap();
    let _ = scene
        .tell("device_add", json!({ "driver": "virtio-blk-pci", "id": "late", "drive": "new" }))
        .unwrap();
    scene.is_not_switched("disk-changed", &["device late was plugged in"]);
    // Nor is it by the next attempt.
    let refusal = scene.pair.migration_refused("vm", &[]);
    refusal.begins("hot-plugged", &["device late was plugged in", "start the VM with it"]);
    let _ = scene.tell("device_del", json!({ "id": "late" })).unwrap();
    // The device is taken apart a little after it is gone from where it was.
    until("its disk is free", || scene.tell("blockdev-del", json!({ "node-name": "new" })).is_ok());
    scene.moves();
}

#[test]
fn a_disk_that_is_unplugged_does_not_come_back() {
    let Some(scene) = Scene::mirrored() else { return };
    let _ = scene.tell("device_del", json!({ "id": "dev-idle" })).unwrap();
    until("it is unplugged", || {
        scene.tell("qom-list", json!({ "path": "/machine/peripheral/dev-idle" })).is_err()
    });
    scene.is_not_switched("disk-changed", &["dev-idle"]);
    scene.pair.migration_refused("vm", &[]).begins("unplugged", &["device dev-idle was unplugged"]);
}

#[test]
fn a_device_that_is_plugged_in_is_not_left_behind() {
    let Some(scene) = Scene::mirrored() else { return };
    let _ = scene.tell("device_add", json!({ "driver": "virtio-balloon-pci", "id": "late" })).unwrap();
    scene.is_not_switched("devices-changed", &["device late was plugged in"]);
}
