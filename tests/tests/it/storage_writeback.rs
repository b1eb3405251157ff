//! A destination that takes every write and does not keep them: the error comes when what was written is put on stable storage, or
//! read back.

use std::fs;

use end_to_end::{
    BlockDevice, Guest, Pair, image, local, noise, report_adds_up, until, vmirror, write_noise,
};
use finding::Finding;
use session::{Outcome, Phase, Report};
use testbed::disk::{self, Format};
use testbed::guest_spec::{Cache, GuestSpec, Io, Nic, Pattern, Syntax, TestDisk, Work};
use testbed::{Inventory, Status, fault, root_or_skip};

const MIB: u64 = 1 << 20;
const TAP: &str = "tap0";
const SIZE: u64 = 24 * MIB;
/// What the guest works on, which is a hole at first; the rest is what cannot be compressed.
const WORKED: u64 = 16 * MIB;

/// A guest with a disk that it writes to and never flushes: nothing has to be on stable storage before the guest is paused.
struct Scene {
    pair: Pair,
    guest: Guest,
    nic: Nic,
    before: Status,
    held: [Inventory; 2],
    devices: Option<[BlockDevice; 2]>,
}

impl Scene {
    /// `thin`: the disk is a device, and at the destination one with less room than it says.
    fn new(thin: bool) -> Option<Scene> {
        if !root_or_skip("hosts with storage of their own") {
            return None;
        }
        let pair = Pair::with_local_disks();
        let (a, b) = (pair.a(), pair.b());
        for host in [a, b] {
            host.add_tap(TAP).unwrap();
        }
        let devices = thin.then(|| {
            b.stop_agent().unwrap();
            b.limit_disks(2 * SIZE).unwrap();
            b.start_agent_with(&local()).unwrap();
            let mut content = vec![0; WORKED as usize];
            content.extend(noise(SIZE - WORKED));
            [BlockDevice::new(a, &content), BlockDevice::thin(b, SIZE)]
        });
        let name = if thin { "device" } else { "disk" };
        if !thin {
            disk::create(&image(a, name), Format::Raw, SIZE).unwrap();
            write_noise(&image(a, name), WORKED, SIZE - WORKED);
        }
        let blocks =
            Work::Blocks { pattern: Pattern::Random, io: Io::Direct, rate: 50, depth: 1, check_rate: 50 };
        let disk = TestDisk {
            cache: Cache::Writeback,
            roles: vec![blocks.within(WORKED / MIB)],
            // This finds the driver that goes with the image.
            syntax: Syntax::Drive,
            ..TestDisk::new(a.local_dir().join(name), Format::Raw, "d")
        };
        let nic = Nic::new(TAP, 10);
        let nics = Some(nic.clone());
        let spec = GuestSpec { nic: nics, fill_mib: 16, rate: 50, disks: vec![disk], ..pair.spec("vm", 128) };
        let guest = pair.run(a, "vm", &spec);
        let before = guest.status();
        a.stop_agent().unwrap();
        a.start_agent_with(&local()).unwrap();
        let held = [a.inventory().unwrap(), b.inventory().unwrap()];
        let scene = Scene { pair, guest, nic, before, held, devices };
        let mirror = scene.pair.mirror("vm", scene.pair.a(), scene.pair.b(), scene.options()).json();
        assert_eq!(mirror["in_sync"], true, "{mirror}");
        Some(scene)
    }

    fn options(&self) -> &'static [&'static str] {
        if self.devices.is_some() { &["--disks", "mirror"] } else { &[] }
    }

    /// Switches over, which fails for the destination's disk.
    fn fails(&self) -> (Report, Finding) {
        let said = vmirror(self.pair.a(), &["switch", "vm", "--json"]);
        assert_eq!(said.code, Some(1), "{said:?}");
        let report = said.report();
        assert_eq!(report.outcome, Outcome::Failed, "{report:#?}");
        let error = report.error.clone().unwrap().finding;
        eprintln!("{}: {}", error.kind, error.message);
        assert_eq!(error.kind, "disk", "{report:#?}");
        (report, error)
    }

    /// The guest goes on as if nothing had been tried, and moves when that is tried again.
    fn is_sound_and_moves(&self) {
        let Scene { pair, guest, .. } = self;
        guest.runs_on();
        pair.holds(pair.b(), &self.held[1]);
        pair.holds_but_for_growth(pair.a(), &self.held[0]);
        let writes = guest.sane_since(&self.before).disks.unwrap().writes;
        until("it writes on", || guest.status().disks.unwrap().writes > writes + 50);

        let report = pair.migrate("vm", pair.a(), pair.b(), self.options());
        report_adds_up(&report, guest);
        assert_eq!(report.verification.proof_blocks, SIZE >> 16);
        until("the guest runs at the destination", || pair.runs_on("vm", pair.b()));
        let verdict = pair.client().unwrap().check_disks(self.nic.address).unwrap();
        assert_eq!(verdict.faults.total(), 0, "{}", guest.console().text());
        guest.sound_since(&self.before);
        let copy = match &self.devices {
            Some(devices) => devices[1].content(),
            None => fs::read(image(pair.b(), "disk")).unwrap(),
        };
        assert!(copy[WORKED as usize..] == noise(SIZE - WORKED), "what nobody writes to differs");
    }
}

#[test]
fn a_write_that_is_lost_when_it_is_flushed_within_the_pause_ends_the_migration() {
    for error in ["EIO", "ENOSPC"] {
        let Some(scene) = Scene::new(false) else { return };
        let b = scene.pair.b();
        let disk = b.local_dir().join("disk");
        let failing = fault::fail(b.agent_pid().unwrap(), "fdatasync", &disk, error).unwrap();
        let (report, why) = scene.fails();
        drop(failing);
        let says = if error == "EIO" { "Input/output error" } else { "No space left on device" };
        for word in ["disk", "at the destination", "cannot be put on stable storage", says] {
            assert!(why.message.contains(word), "{word:?} is not said: {why:?}");
        }
        assert!(report.phases.iter().any(|phase| phase.name == Phase::SwitchOver), "{:?}", report.phases);
        scene.is_sound_and_moves();
    }
}

#[test]
fn a_device_with_less_room_than_it_says_ends_the_migration_and_is_not_trusted_by_the_next() {
    let Some(scene) = Scene::new(true) else { return };
    let filler = image(scene.pair.b(), "filler");
    // Until there is no room.
    let _ = fs::write(&filler, noise(2 * SIZE));
    let _ = scene.fails();
    fs::remove_file(&filler).unwrap();
    // What the system has in its cache of the device is more than the device holds: by that the next attempt is not deceived.
    scene.is_sound_and_moves();
}
