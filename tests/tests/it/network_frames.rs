//! What is on its way to a guest when it moves reaches it: once, and in order.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use end_to_end::{Guest, Pair, all_came_once, report_adds_up, unbroken, until};
use session::Phase;
use testbed::guest_spec::{GuestSpec, Nic};
use testbed::{AgentOptions, Host, root_or_skip};

const TAP: &str = "tap0";
const FRAMES_PER_SECOND: u32 = 5000;
const HOPS: usize = 10;
const BUSY: usize = 10;
const IDLE: usize = 50;

struct Scene {
    pair: Pair,
    nic: Nic,
    guest: Guest,
    /// What both hosts' firewalls have before anything is moved.
    rules: [String; 2],
}

/// What a program says on a host.
fn on(host: &Host, program: &str, arguments: &[&str]) -> String {
    let said = host.command(program).args(arguments).output().unwrap();
    assert!(said.status.success(), "{}: {program} {arguments:?}: {said:?}", host.name());
    String::from_utf8(said.stdout).unwrap()
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
        let rules = [pair.a(), pair.b()].map(|host| on(host, "nft", &["list", "ruleset"]));
        Some(Scene { pair, nic, guest, rules })
    }

    /// Moves there, and is found there by the network.
    fn moves(&self, [from, to]: [&Host; 2], options: &[&str]) -> session::Report {
        let report = self.pair.migrate("vm", from, to, options);
        if from.inventory().unwrap().links.contains_key(TAP) {
            // Made by hand, and left to whoever made it.
            from.remove_tap(TAP).unwrap();
        }
        self.pair.holds_nothing(from);
        let behind = self.pair.testbed().behind(&self.nic.mac).unwrap();
        assert_eq!(behind.map(Host::name), Some(to.name()), "where the switch has learned it to be");
        let behind = on(from, "bridge", &["fdb", "show", "br", "br0"]);
        assert!(!behind.contains(TAP), "{}: {behind}", from.name());
        for (host, rules) in [from, to].into_iter().zip(&self.rules) {
            assert_eq!(&on(host, "nft", &["list", "ruleset"]), rules, "{}", host.name());
            assert_eq!(on(host, "ip", &["neighbour", "show", "dev", "br0"]), "", "{}", host.name());
        }
        for host in [from, to] {
            let links = host.inventory().unwrap().links;
            assert!(links.keys().all(|link| !link.starts_with("vmirror")), "{}: {links:?}", host.name());
            let qdiscs = on(host, "tc", &["qdisc", "show"]);
            assert!(!qdiscs.contains("clsact"), "{}: {qdiscs}", host.name());
        }
        report
    }
}

#[test]
fn no_frame_is_lost_or_repeated_when_the_guest_moves() {
    let Some(scene) = Scene::new() else { return };
    let Scene { pair, guest, nic, .. } = &scene;
    let before = guest.status();
    let client = pair.client().unwrap();
    let heartbeats = client.heartbeats_as_taken(nic.address, FRAMES_PER_SECOND).unwrap();
    let goes_on = || {
        let received = heartbeats.report().received;
        until("frames come back", || heartbeats.report().received > received + 1000);
    };
    goes_on();
    let mut hosts = [pair.a(), pair.b()];
    let places = pair.testbed().watch_places().unwrap();
    let mut late = Vec::new();
    for hop in 1..=HOPS {
        let first = heartbeats.report().sent;
        let report = scene.moves(hosts, &[]);
        eprintln!("frames {first} to {} were sent meanwhile", heartbeats.report().sent);
        let learned = pair.testbed().learned(&places, &nic.mac, hosts[1]).unwrap();
        late.push(later(learned, resumed(&report)));
        report_adds_up(&report, guest);
        eprintln!("hop {hop}: downtime {:.2} ms; {:?}", report.downtime_ms, report.network);
        assert!(report.network.frames_forwarded > 0, "{:?}", report.network);
        assert_eq!(report.network.frames_dropped, 0, "{:?}", report.network);
        assert!(report.network.turned, "{:?}", report.network);
        goes_on();
        hosts.reverse();
    }
    let frames = heartbeats.stop();
    eprintln!("{frames:?}");
    all_came_once(&frames);
    late.sort_by(f64::total_cmp);
    eprintln!("the switch has learned its place so many ms after the hand-over: {late:.1?}");
    guest.sound_since(&before);

    // Where nothing is carried it is otherwise.
    for host in hosts {
        host.stop_agent().unwrap();
        host.start_agent_with(&AgentOptions { without_bpf: true, ..AgentOptions::default() }).unwrap();
    }
    let heartbeats = client.heartbeats(nic.address, FRAMES_PER_SECOND).unwrap();
    until("frames come back", || heartbeats.report().received > 1000);
    let report = scene.moves(hosts, &[]);
    let received = heartbeats.report().received;
    until("frames come back from there", || heartbeats.report().received > received + 1000);
    let frames = heartbeats.stop();
    eprintln!(
        "with nothing that diverts: downtime {:.2} ms, {} of {} lost",
        report.downtime_ms, frames.lost, frames.sent
    );
    assert!(frames.lost > 0, "{frames:?}");
    assert_eq!(report.network.frames_forwarded, 0);
    assert!(pair.logs().contains("frames that come for the guest while it moves will be lost"));
    report_adds_up(&report, guest);
}

/// When the guest was known to run at its new place.
fn resumed(report: &session::Report) -> SystemTime {
    let resume = report.phases.iter().find(|phase| phase.name == Phase::Resume).unwrap();
    UNIX_EPOCH
        + Duration::from_millis(report.started_unix_ms)
        + Duration::from_secs_f64(resume.start_ms / 1e3)
}

/// How much later one time is than another, in milliseconds; negative for earlier.
fn later(one: SystemTime, other: SystemTime) -> f64 {
    match one.duration_since(other) {
        Ok(later) => later.as_secs_f64() * 1e3,
        Err(earlier) => -earlier.duration().as_secs_f64() * 1e3,
    }
}

/// The number that `nstat` shows.
fn count(shown: &[u8]) -> u64 {
    let shown = String::from_utf8_lossy(shown);
    let line = shown.lines().find(|line| line.starts_with("Tcp")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
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
    let Scene { pair, guest, nic, .. } = &scene;
    let client = pair.client().unwrap();
    let idle: Vec<TcpStream> = (0..IDLE).map(|_| client.connection(nic.address).unwrap()).collect();
    let echo = client.echo(nic.address, BUSY).unwrap();
    let goes_on = || {
        let bytes = echo.report().bytes;
        until("traffic goes on", || echo.report().bytes > bytes + 50_000);
    };
    goes_on();
    let mut hosts = [pair.a(), pair.b()];
    let timeouts =
        || count(&client.command("nstat").args(["-asz", "TcpExtTCPTimeouts"]).output().unwrap().stdout);
    let before = timeouts();
    let mut beyond = Vec::new();
    for _ in 0..5 {
        let _ = echo.take_longest_stall();
        let report = scene.moves(hosts, &[]);
        report_adds_up(&report, guest);
        goes_on();
        let stall = echo.take_longest_stall().as_secs_f64() * 1e3;
        eprintln!("downtime {:.2} ms; {:?}; longest stall {stall:.1} ms", report.downtime_ms, report.network);
        beyond.push(stall - report.downtime_ms);
        hosts.reverse();
    }
    beyond.sort_by(f64::total_cmp);
    eprintln!(
        "stalls beyond the downtime: {beyond:.1?} ms; {} retransmission time-outs",
        timeouts() - before
    );
    for (number, connection) in idle.iter().enumerate() {
        speaks(connection, number);
    }
    unbroken(&echo.stop());
}

#[test]
fn a_guest_that_stays_has_what_came_while_it_was_to_go() {
    let Some(scene) = Scene::new() else { return };
    let Scene { pair, guest, nic, .. } = &scene;
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
    all_came_once(&frames);
    guest.sane_since(&before);
    let qdiscs = pair.a().command("tc").args(["qdisc", "show"]).output().unwrap();
    assert!(!String::from_utf8(qdiscs.stdout).unwrap().contains("clsact"));
}
