//! What is on its way to a guest when it moves reaches it: once, and in order.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use end_to_end::{Guest, Pair, accounted, until};
use testbed::guest_spec::{GuestSpec, Nic};
use testbed::{Host, root_or_skip};

const TAP: &str = "tap0";
const FRAMES_PER_SECOND: u32 = 5000;
const HOPS: usize = 10;
const BUSY: usize = 10;
const IDLE: usize = 50;

struct Scene {
    pair: Pair,
    nic: Nic,
    guest: Guest,
}

impl Scene {
    fn new() -> Option<Scene> {
        if !root_or_skip("namespaces and taps") {
            return None;
        }
        let pair = Pair::start();
        pair.a().add_tap(TAP).unwrap();
        // Two seconds of frames: it is not about how soon a QEMU without CPU time takes them.
        let length =
            pair.a().command("ip").args(["link", "set", TAP, "txqueuelen", "10000"]).status().unwrap();
        assert!(length.success());
        let nic = Nic::new(TAP, 10);
        let spec = GuestSpec { nic: Some(nic.clone()), fill_mib: 16, rate: 100, ..pair.spec("vm", 128) };
        let guest = pair.run(pair.a(), "vm", &spec);
        Some(Scene { pair, nic, guest })
    }

    /// Moves there, and is found there by the network.
    fn moves(&self, [from, to]: [&Host; 2], options: &[&str]) -> migration::Report {
        let report = self.pair.migrate("vm", from, to, options);
        if from.inventory().unwrap().links.contains_key(TAP) {
            // Made by hand, and left to whoever made it.
            from.remove_tap(TAP).unwrap();
        }
        self.pair.holds_nothing(from);
        let behind = self.pair.testbed().behind(&self.nic.mac).unwrap();
        assert_eq!(behind.map(Host::name), Some(to.name()), "where the switch has learned it to be");
        for host in [from, to] {
            let links = host.inventory().unwrap().links;
            assert!(links.keys().all(|link| !link.starts_with("vmirror")), "{}: {links:?}", host.name());
            let qdiscs = host.command("tc").args(["qdisc", "show"]).output().unwrap();
            let qdiscs = String::from_utf8(qdiscs.stdout).unwrap();
            assert!(!qdiscs.contains("clsact"), "{}: {qdiscs}", host.name());
        }
        report
    }
}

#[test]
fn no_frame_is_lost_or_repeated_when_the_guest_moves() {
    let Some(scene) = Scene::new() else { return };
    let Scene { pair, guest, nic } = &scene;
    let before = guest.status();
    let client = pair.client().unwrap();
    let heartbeats = client.heartbeats(nic.address, FRAMES_PER_SECOND).unwrap();
    let goes_on = || {
        let received = heartbeats.report().received;
        until("frames come back", || heartbeats.report().received > received + 1000);
    };
    goes_on();
    let mut hosts = [pair.a(), pair.b()];
    for hop in 1..=HOPS {
        let report = scene.moves(hosts, &[]);
        accounted(&report, guest);
        eprintln!("hop {hop}: downtime {:.2} ms; {:?}", report.downtime_ms, report.network);
        assert!(report.network.frames_forwarded > 0, "{:?}", report.network);
        assert_eq!(report.network.frames_dropped, 0, "{:?}", report.network);
        goes_on();
        hosts.reverse();
    }
    let frames = heartbeats.stop();
    eprintln!("{frames:?}");
    assert_eq!((frames.lost, frames.repeated), (0, 0), "{frames:?}");
    guest.sound_since(&before);

    // Where nothing is carried it is otherwise.
    let heartbeats = client.heartbeats(nic.address, FRAMES_PER_SECOND).unwrap();
    until("frames come back", || heartbeats.report().received > 1000);
    let report = scene.moves(hosts, &["--engine", "qemu"]);
    until("frames come back", || heartbeats.report().received > 2000);
    let frames = heartbeats.stop();
    eprintln!(
        "by QEMU's engine: downtime {:.2} ms, {} of {} lost",
        report.downtime_ms, frames.lost, frames.sent
    );
    assert!(frames.lost > 0, "{frames:?}");
}

/// A connection on which nothing has been said yet still carries what is said.
fn speaks(mut connection: &TcpStream, number: usize) {
    connection.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let said = [number as u8; 1000];
    connection.write_all(&said).unwrap();
    let mut heard = [0; 1000];
    connection.read_exact(&mut heard).unwrap();
    assert_eq!(said, heard, "connection {number}");
}

#[test]
fn connections_that_are_idle_and_that_are_busy_survive() {
    let Some(scene) = Scene::new() else { return };
    let Scene { pair, guest, nic } = &scene;
    let client = pair.client().unwrap();
    let idle: Vec<TcpStream> = (0..IDLE).map(|_| client.connection(nic.address).unwrap()).collect();
    let echo = client.echo(nic.address, BUSY).unwrap();
    let goes_on = || {
        let bytes = echo.report().bytes;
        until("traffic goes on", || echo.report().bytes > bytes + 50_000);
    };
    goes_on();
    let mut hosts = [pair.a(), pair.b()];
    for _ in 0..4 {
        let report = scene.moves(hosts, &[]);
        accounted(&report, guest);
        goes_on();
        eprintln!(
            "downtime {:.2} ms; {:?}; {:?}",
            report.downtime_ms,
            report.network,
            echo.report().longest_stall
        );
        hosts.reverse();
    }
    for (number, connection) in idle.iter().enumerate() {
        speaks(connection, number);
    }
    let echo = echo.stop();
    assert_eq!((echo.connections, echo.mismatches, echo.broken.as_slice()), (BUSY, 0, &[][..]), "{echo:?}");
}

#[test]
fn a_guest_that_stays_has_what_came_while_it_was_to_go() {
    let Some(scene) = Scene::new() else { return };
    let Scene { pair, guest, nic } = &scene;
    let before = guest.status();
    let client = pair.client().unwrap();
    let heartbeats = client.heartbeats(nic.address, 1000).unwrap();
    until("frames come back", || heartbeats.report().received > 500);
    let (migration, stopped) = pair.switching_over("vm");
    // It is paused, and what comes is diverted.
    testbed::fault::kill(pair.qemu(pair.b()).unwrap());
    drop(stopped);
    assert_eq!(migration.ended().code, Some(1));
    let received = heartbeats.report().received;
    until("frames come back", || heartbeats.report().received > received + 1000);
    let frames = heartbeats.stop();
    eprintln!("{frames:?}");
    assert_eq!((frames.lost, frames.repeated), (0, 0), "{frames:?}");
    guest.sane_since(&before);
    let qdiscs = pair.a().command("tc").args(["qdisc", "show"]).output().unwrap();
    assert!(!String::from_utf8(qdiscs.stdout).unwrap().contains("clsact"));
}
