//! A guest whose QEMU was given its tap by descriptor, as libvirt does, must not need a restart to move.

use std::os::fd::AsFd as _;

use end_to_end::{Pair, all_came_once, report_adds_up, unbroken, until};
use network::tap::OwnTap;
use testbed::guest_spec::Nic;
use testbed::root_or_skip;

const TAP: &str = "tap0";

#[test]
fn a_tap_that_was_handed_in_is_found_and_follows_the_guest() {
    if !root_or_skip("namespaces and taps") {
        return;
    }
    let pair = Pair::start();
    let (a, b) = (pair.a(), pair.b());
    let tap = a.on_network(OwnTap::make).unwrap().unwrap();
    let queue = tap.as_fd().try_clone_to_owned().unwrap();
    for change in [&["name", TAP][..], &["master", "br0", "up"]] {
        let named = if change[0] == "name" { tap.name() } else { TAP };
        let done = a.command("ip").args(["link", "set", named]).args(change).status().unwrap();
        assert!(done.success());
    }
    drop(tap);
    let nic = Nic::new(TAP, 10);
    let (mut started, guest) = pair.adopt_with("vm", &nic, vec![queue]);
    let before = guest.status();

    // What it is must survive the agent too.
    a.kill_agent().unwrap();
    a.start_agent().unwrap();
    let client = pair.client().unwrap();
    let heartbeats = client.heartbeats(nic.address, 1000).unwrap();
    let echo = client.echo(nic.address, 4).unwrap();
    until("frames come back", || heartbeats.report().received > 500);
    let moved = pair.migrate("vm", a, b, &[]);
    report_adds_up(&moved, &guest);
    assert!(moved.network.frames_forwarded > 0, "{:?}", moved.network);
    until("the source's QEMU has ended", || started.exit_status().is_some());
    // It was QEMU's alone.
    pair.holds_nothing(a);
    assert_eq!(b.inventory().unwrap().links[TAP], "tun in br0, up");
    let received = heartbeats.report().received;
    until("frames come back", || heartbeats.report().received > received + 500);

    // From now on it is a tap like any other.
    report_adds_up(&pair.migrate("vm", b, a, &[]), &guest);
    pair.holds_nothing(b);
    let (received, echoed) = (heartbeats.report().received, echo.report().bytes);
    until("frames come back", || heartbeats.report().received > received + 500);
    until("connections go on", || echo.report().bytes > echoed + 50_000);
    let (frames, echo) = (heartbeats.stop(), echo.stop());
    all_came_once(&frames);
    unbroken(&echo);
    guest.sound_since(&before);
}
