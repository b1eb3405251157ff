//! A guest that moves to a host in another subnet stays in the network that it is in, until it is released.

use std::net::{SocketAddrV4, TcpStream};
use std::time::Duration;

use end_to_end::{Guest, Pair, all_came_once, report_adds_up, unbroken, until, vmirror};
use testbed::guest_spec::{GuestSpec, Nic};
use testbed::{Host, Testbed, root_or_skip};

const TAP: &str = "tap0";
const CONNECTIONS: usize = 10;

/// Two hosts in two subnets, the second of which allows VMs that stay in the first.
fn scene() -> Option<(Pair, Guest, Nic)> {
    if !root_or_skip("namespaces and taps") {
        return None;
    }
    let pair = Pair::of(Testbed::routed().unwrap());
    pair.a().add_tap(TAP).unwrap();
    let nic = Nic::new(TAP, 10);
    let spec = GuestSpec { nic: Some(nic.clone()), fill_mib: 16, rate: 100, ..pair.spec("vm", 128) };
    let guest = pair.run(pair.a(), "vm", &spec);
    Some((pair, guest, nic))
}

fn allow(host: &Host) {
    host.stop_agent().unwrap();
    let forward = |config: &mut toml::Table| {
        let allow = config["allow"].as_table_mut().unwrap();
        allow.insert("forward".to_owned(), true.into());
    };
    host.configure(forward).unwrap();
    host.start_agent().unwrap();
}

/// The interfaces of tunnels on a host.
fn tunnels(host: &Host) -> Vec<String> {
    let links = host.inventory().unwrap().links.into_keys();
    links.filter(|name| name.starts_with("vmf") || name.starts_with("vmb")).collect()
}

fn state(host: &Host, name: &str) -> String {
    let said = vmirror(host, &["show", name, "--json"]).done();
    said.json()["state"].as_str().unwrap().to_owned()
}

#[test]
fn connections_survive_a_move_to_another_subnet_and_back() {
    let Some((pair, guest, nic)) = scene() else { return };
    let (a, b) = (pair.a(), pair.b());
    let before = guest.status();

    let refused = pair.migration_refused("vm", &["--forward"]);
    refused.begins("forward-not-allowed", &["host-b", "forward = true"]);
    assert_eq!((tunnels(a), tunnels(b)), (vec![], vec![]), "nothing is left of what was refused");
    allow(b);
    let to_b = b.listen().to_string();
    let _ = vmirror(a, &["check", "vm", "--to", &to_b, "--forward"]).done();
    assert_eq!((tunnels(a), tunnels(b)), (vec![], vec![]), "nor of what was only tried");

    let client = pair.client().unwrap();
    let echo = client.echo(nic.address, CONNECTIONS).unwrap();
    let heartbeats = client.heartbeats(nic.address, 1000).unwrap();
    let goes_on = || {
        let (bytes, received) = (echo.report().bytes, heartbeats.report().received);
        until("connections go on", || echo.report().bytes > bytes + 200_000);
        until("frames come back", || heartbeats.report().received > received + 500);
    };
    goes_on();
    let report = pair.migrate("vm", a, b, &["--forward"]);
    report_adds_up(&report, &guest);
    let forwarding = report.network.forwarding.clone().unwrap();
    assert_eq!(forwarding.to, Some(b.listen().ip()));
    assert_eq!(forwarding.interfaces, tunnels(a), "{forwarding:?}");
    a.remove_tap(TAP).unwrap();
    goes_on();
    assert_eq!(state(a, "vm"), "forwarded");
    let shown = vmirror(b, &["show", "vm", "--json"]).done();
    assert_eq!(shown.json()["network_of"], "host-a");

    // Neither agent is needed for that, and both know of it again.
    for host in [a, b] {
        host.kill_agent().unwrap();
    }
    goes_on();
    for host in [a, b] {
        host.start_agent().unwrap();
    }
    assert_eq!(state(a, "vm"), "forwarded");
    goes_on();

    // Its name is taken here for as long as that.
    let spec = GuestSpec { nic: None, ..pair.spec("vm", 128) };
    let line = spec.command_line();
    let mut again = vec!["run", "vm", "--"];
    again.extend(line.iter().map(String::as_str));
    pair.refused(a, &again).is("name-forwarded", &["host-b"]);

    let report = pair.migrate("vm", b, a, &[]);
    report_adds_up(&report, &guest);
    goes_on();
    assert_eq!((tunnels(a), tunnels(b)), (vec![], vec![]), "at home nothing is forwarded");
    assert_eq!(a.inventory().unwrap().links[TAP], "tun in br0, up");
    assert_eq!(state(a, "vm"), "running");

    let frames = heartbeats.stop();
    eprintln!("{frames:?}");
    all_came_once(&frames);
    unbroken(&echo.stop());
    guest.sound_since(&before);
}

#[test]
fn a_guest_that_moves_on_takes_its_network_along() {
    let Some((pair, guest, nic)) = scene() else { return };
    let (a, b) = (pair.a(), pair.b());
    let before = guest.status();
    allow(a);
    allow(b);
    let client = pair.client().unwrap();
    let heartbeats = client.heartbeats(nic.address, 1000).unwrap();
    let goes_on = || {
        let received = heartbeats.report().received;
        until("frames come back", || heartbeats.report().received > received + 500);
    };
    let _ = pair.migrate("vm", a, b, &["--forward"]);
    a.remove_tap(TAP).unwrap();
    goes_on();
    // A third network would be another host's; this way it goes through both tunnels as well.
    let _ = pair.migrate("vm", b, a, &["--forward"]);
    goes_on();
    assert_eq!((tunnels(a).len(), tunnels(b).len()), (3, 3));
    assert_eq!((state(a, "vm"), state(b, "vm")), ("running".to_owned(), "forwarded".to_owned()));
    for host in [a, b] {
        host.kill_agent().unwrap();
        host.start_agent().unwrap();
    }
    goes_on();
    assert_eq!((tunnels(a).len(), tunnels(b).len()), (3, 3), "an agent that starts leaves them");
    let _ = vmirror(a, &["release", "vm"]).done();
    goes_on();
    assert_eq!((tunnels(a), state(b, "vm")), (vec![], "forwarded".to_owned()));
    let _ = vmirror(b, &["release", "vm"]).done();
    assert_eq!(tunnels(b), [""; 0]);
    goes_on();
    let frames = heartbeats.stop();
    eprintln!("{frames:?}");
    assert_eq!(frames.repeated, 0, "{frames:?}");
    guest.sound_since(&before);
}

#[test]
fn a_guest_that_is_released_is_in_the_network_of_its_new_host() {
    let Some((pair, guest, nic)) = scene() else { return };
    let (a, b) = (pair.a(), pair.b());
    let before = guest.status();
    allow(b);
    pair.refused(a, &["release", "vm"]).is("not-forwarded", &["vm"]);
    let report = pair.migrate("vm", a, b, &["--forward"]);
    report_adds_up(&report, &guest);
    a.remove_tap(TAP).unwrap();

    // Who cannot tell the other host changes nothing, unless that is meant.
    b.stop_agent().unwrap();
    pair.refused(a, &["release", "vm"]).is("no-agent", &["still forwarded", "--force"]);
    assert_eq!(tunnels(a).len(), 1);
    b.start_agent().unwrap();

    let _ = vmirror(a, &["release", "vm"]).done();
    assert_eq!((tunnels(a), tunnels(b)), (vec![], vec![]));
    assert_eq!(b.inventory().unwrap().links[TAP], "tun in br0, up");
    let shown = vmirror(b, &["show", "vm", "--json"]).done();
    assert_eq!(shown.json()["network_of"], serde_json::Value::Null);
    pair.refused(a, &["show", "vm"]).is("unknown-vm", &["vm"]);
    // It is found there now.
    assert!(
        b.command("ip").args(["address", "add", "10.88.0.2/24", "dev", "br0"]).status().unwrap().success()
    );
    let address = SocketAddrV4::new(nic.address, guest::service::ECHO_PORT).into();
    let connected = b.on_network(|| TcpStream::connect_timeout(&address, Duration::from_secs(20))).unwrap();
    drop(connected.unwrap());
    guest.sane_since(&before);
}

#[test]
fn a_source_agent_that_is_killed_after_the_hand_over_forwards_all_the_same() {
    let Some((pair, guest, nic)) = scene() else { return };
    let (a, b) = (pair.a(), pair.b());
    let before = guest.status();
    allow(b);
    let client = pair.client().unwrap();
    let echo = client.echo(nic.address, CONNECTIONS).unwrap();
    let (migration, destination) = pair.handed_over_with("vm", &["--forward"]);
    a.kill_agent().unwrap();
    drop(migration.ended());
    drop(destination);
    a.start_agent().unwrap();
    until("it runs there", || pair.runs_on("vm", b));
    until("the source has let go", || state(a, "vm") == "forwarded");
    a.remove_tap(TAP).unwrap();
    let bytes = echo.report().bytes;
    until("connections go on", || echo.report().bytes > bytes + 200_000);
    // Somebody makes its bridge anew, or takes it out of there.
    let tunnel = tunnels(a).remove(0);
    assert!(a.command("ip").args(["link", "set", &tunnel, "nomaster", "down"]).status().unwrap().success());
    until("it is put right", || a.inventory().unwrap().links[&tunnel] == "vxlan in br0, up");
    let bytes = echo.report().bytes;
    until("connections go on", || echo.report().bytes > bytes + 200_000);
    unbroken(&echo.stop());
    let _ = vmirror(a, &["release", "vm"]).done();
    assert_eq!((tunnels(a), tunnels(b)), (vec![], vec![]));
    guest.sane_since(&before);
}

#[test]
fn nothing_is_left_of_tunnels_when_a_migration_is_cancelled_or_the_agent_is_killed() {
    let Some((pair, guest, _)) = scene() else { return };
    let (a, b) = (pair.a(), pair.b());
    let before = guest.status();
    allow(b);
    let _mirror = pair.mirror("vm", a, b, &["--forward"]);
    assert_eq!((tunnels(a).len(), tunnels(b).len()), (1, 2));
    let _ = vmirror(a, &["cancel", "vm"]).done();
    until("nothing is left", || tunnels(a).is_empty() && tunnels(b).is_empty());

    let _mirror = pair.mirror("vm", a, b, &["--forward"]);
    a.kill_agent().unwrap();
    a.start_agent().unwrap();
    until("nothing is left", || tunnels(a).is_empty() && tunnels(b).is_empty());
    assert_eq!(state(a, "vm"), "running");
    guest.sane_since(&before);
}
