//! Whatever fails while a disk is copied: the machine runs on at the source with the block graph that it had, nothing leaks, and a
//! second attempt goes on from what was copied.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::cell::RefCell;
use std::fs;
use std::path::PathBuf;

use end_to_end::{Guest, Pair, Qmp, UnderWay, accounted, local, noise, until, vmirror};
use migration::Outcome;
use migration::report::DiskMode;
use serde_json::json;
use testbed::guest_spec::GuestSpec;
use testbed::{Inventory, Status, Wire, root_or_skip};

/// Bytes of the disk. What it holds cannot be compressed.
const SIZE: u64 = 64 << 20;
/// Slow enough for the copy to take seconds.
const SLOWLY: &[&str] = &["--bandwidth", "8MiB/s"];

struct Scene {
    pair: Pair,
    guest: Guest,
    before: Status,
    qmp: RefCell<Qmp>,
    nodes: Vec<String>,
    held: [Inventory; 2],
}

impl Scene {
    fn new() -> Option<Scene> {
        if !root_or_skip("hosts with storage of their own") {
            return None;
        }
        let pair = Pair::with_local_disks();
        fs::write(pair.a().disk_dir().join("disk.raw"), noise(SIZE)).unwrap();
        let image = pair.a().local_dir().join("disk.raw");
        let qmp = pair.a().directory().join("user.qmp");
        let spec = GuestSpec {
            qmp: Some(qmp.clone()),
            extra: vec!["-drive".into(), format!("file={},format=raw,if=virtio", image.display())],
            ..pair.spec("vm", 128)
        };
        let guest = pair.run(pair.a(), "vm", &spec);
        let before = guest.status();
        // An agent that has started a QEMU holds it by more than one that has found it again, as these do sooner or later.
        pair.a().stop_agent().unwrap();
        pair.a().start_agent_with(&local()).unwrap();
        let held = [pair.a().inventory().unwrap(), pair.b().inventory().unwrap()];
        let mut qmp = Qmp::connect(&qmp);
        let nodes = nodes(&mut qmp);
        Some(Scene { pair, guest, before, qmp: RefCell::new(qmp), nodes, held })
    }

    /// A migration of which some of the disk has come to the destination.
    fn copying(&self) -> UnderWay<'_> {
        let migration = self.pair.begin("vm", self.pair.a(), self.pair.b(), SLOWLY);
        migration.reaches("synchronize");
        until("some of the disk is there", || self.copied() > SIZE / 8);
        migration
    }

    /// Bytes that the copy takes.
    fn copied(&self) -> u64 {
        use std::os::unix::fs::MetadataExt as _;
        fs::metadata(self.copy()).map_or(0, |file| file.blocks() * 512)
    }

    fn copy(&self) -> PathBuf {
        self.pair.b().disk_dir().join("disk.raw")
    }

    /// The machine is as it was before, and so are both hosts.
    fn is_as_before(&self) {
        self.guest.runs_on();
        assert!(self.pair.runs_on("vm", self.pair.a()), "{}", self.pair.logs());
        assert_eq!(nodes(&mut self.qmp.borrow_mut()), self.nodes, "QEMU's block graph");
        self.pair.holds(self.pair.b(), &self.held[1]);
        self.pair.holds_but_for_growth(self.pair.a(), &self.held[0]);
        let _ = self.guest.sane_since(&self.before);
    }

    /// A second attempt goes on from what the first has copied.
    fn goes_on(&self) {
        let copied = self.copied();
        let report = self.pair.migrate("vm", self.pair.a(), self.pair.b(), &[]);
        accounted(&report, &self.guest);
        let disk = &report.disks[0];
        assert_eq!((disk.mode, report.verification.proof_blocks), (DiskMode::Mirrored, SIZE >> 16));
        // What is not zero of the copy was there already.
        assert!(disk.wire_bytes < SIZE - copied / 2, "{disk:?}, {copied} bytes were copied before");
        assert!(fs::read(self.copy()).unwrap() == noise(SIZE));
        self.guest.sound_since(&self.before);
    }
}

/// The names of QEMU's block nodes.
fn nodes(qmp: &mut Qmp) -> Vec<String> {
    let nodes = qmp.execute("query-named-block-nodes", json!({ "flat": true }));
    let mut names: Vec<String> =
        nodes.as_array().unwrap().iter().map(|node| node["node-name"].as_str().unwrap().to_owned()).collect();
    names.sort();
    names
}

#[test]
fn a_cancelled_copy_leaves_nothing_in_the_block_graph_and_is_gone_on_from() {
    let Some(scene) = Scene::new() else { return };
    let migration = scene.copying();
    let said = vmirror(scene.pair.a(), &["cancel", "vm", "--json"]).done();
    assert_eq!(said.report().outcome, Outcome::Cancelled, "{said:?}");
    assert_eq!(migration.ended().code, Some(1));
    scene.is_as_before();
    scene.goes_on();
}

#[test]
fn an_agent_of_the_source_that_is_killed_leaves_the_guest_writing_and_its_successor_cleans_up() {
    let Some(scene) = Scene::new() else { return };
    let migration = scene.copying();
    scene.pair.a().kill_agent().unwrap();
    drop(migration.ended());
    scene.guest.runs_on();
    scene.pair.a().start_agent_with(&local()).unwrap();
    scene.is_as_before();
    scene.goes_on();
}

#[test]
fn an_agent_of_the_destination_that_is_killed_leaves_a_copy_to_go_on_from() {
    let Some(scene) = Scene::new() else { return };
    let migration = scene.copying();
    scene.pair.b().kill_agent().unwrap();
    let said = migration.ended();
    assert_eq!(said.code, Some(1), "{said:?}");
    scene.pair.b().start_agent_with(&local()).unwrap();
    scene.is_as_before();
    scene.goes_on();
}

#[test]
fn a_link_that_is_cut_while_a_disk_is_copied_ends_the_migration_and_not_the_guests_writes() {
    let Some(scene) = Scene::new() else { return };
    let migration = scene.copying();
    scene.pair.testbed().cut(scene.pair.a(), Wire::Link).unwrap();
    scene.guest.runs_on();
    let said = migration.ended();
    assert_eq!(said.code, Some(1), "{said:?}");
    scene.pair.testbed().mend(scene.pair.a(), Wire::Link).unwrap();
    scene.is_as_before();
    scene.goes_on();
}
