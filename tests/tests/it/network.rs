//! Whoever talks to a guest must not be cut off when it moves.

use end_to_end::{Pair, report_adds_up, unbroken, until, vmirror};
use testbed::guest_spec::{GuestSpec, Nic};
use testbed::{Host, fault, root_or_skip};

const TAP: &str = "tap0";
const CONNECTIONS: usize = 8;
const HEARTBEATS_PER_SECOND: u32 = 1000;
/// Migrations while connected.
const HOPS: usize = 4;

/// The guest's interface on a host, in words; none where there is none.
fn tap(host: &Host) -> Option<String> {
    host.inventory().unwrap().links.remove(TAP)
}

#[test]
fn no_connection_breaks_and_no_byte_changes_when_the_guest_moves() {
    if !root_or_skip("no_connection_breaks_and_no_byte_changes_when_the_guest_moves") {
        return;
    }
    let pair = Pair::start();
    pair.a().add_tap(TAP).unwrap();
    let nic = Nic::new(TAP, 10);
    let address = nic.address;
    let spec = GuestSpec { nic: Some(nic), fill_mib: 64, rate: 500, ..pair.spec("vm", 256) };
    let guest = pair.run(pair.a(), "vm", &spec);
    let before = guest.status();
    let client = pair.client().unwrap();
    let heartbeats = client.heartbeats(address, HEARTBEATS_PER_SECOND).unwrap();
    let echo = client.echo(address, CONNECTIONS).unwrap();
    let goes_on = || {
        let (received, bytes) = (heartbeats.report().received, echo.report().bytes);
        until("traffic goes on", || {
            let (heartbeats, echo) = (heartbeats.report(), echo.report());
            assert_eq!((echo.mismatches, echo.broken.as_slice()), (0, &[][..]), "{echo:?}");
            heartbeats.received > received + 500 && echo.bytes > bytes + 50_000
        });
    };
    goes_on();

    let mut hosts = [pair.a(), pair.b()];
    for hop in 1..=HOPS {
        let [from, to] = hosts;
        let report = pair.migrate("vm", from, to, &[]);
        report_adds_up(&report, &guest);
        assert_eq!(tap(to).as_deref(), Some("tun in br0, up"), "at {}", to.name());
        if hop == 1 {
            // This one was made by hand, and is left to whoever made it.
            assert!(tap(from).is_some());
            from.remove_tap(TAP).unwrap();
        }
        assert_eq!(tap(from), None, "at {}", from.name());
        pair.holds_nothing(from);
        goes_on();
        let so_far = heartbeats.report();
        eprintln!(
            "hop {hop}: downtime {:.2} ms; {} frames forwarded, {} dropped; up to now longest gap {:.2?}, {} of {} heartbeats lost",
            report.downtime_ms,
            report.network.frames_forwarded,
            report.network.frames_dropped,
            so_far.longest_gap,
            so_far.lost,
            so_far.sent
        );
        hosts.reverse();
    }

    let (heartbeats, echo) = (heartbeats.stop(), echo.stop());
    eprintln!(
        "over {HOPS} migrations: longest gap {:.2?}, {} of {} heartbeats lost, {} out of order, {} repeated; longest TCP stall {:.2?}, {} bytes echoed",
        heartbeats.longest_gap,
        heartbeats.lost,
        heartbeats.sent,
        heartbeats.out_of_order,
        heartbeats.repeated,
        echo.longest_stall,
        echo.bytes
    );
    unbroken(&echo);
    guest.sound_since(&before);
}

#[test]
fn a_silent_guest_does_not_vanish_from_the_network_when_it_moves() {
    if !root_or_skip("a_silent_guest_does_not_vanish_from_the_network_when_it_moves") {
        return;
    }
    let pair = Pair::start();
    pair.a().add_tap(TAP).unwrap();
    let nic = Nic::new(TAP, 11);
    let address = nic.address;
    let spec = GuestSpec { nic: Some(nic), fill_mib: 16, ..pair.spec("vm", 256) };
    let guest = pair.run(pair.a(), "vm", &spec);
    let client = pair.client().unwrap();
    // The switch knows where the guest is, and forgets it only after five minutes.
    assert_eq!(client.status(address).unwrap().boot_id, guest.status().boot_id);
    for (from, to) in [(pair.a(), pair.b()), (pair.b(), pair.a())] {
        report_adds_up(&pair.migrate("vm", from, to, &[]), &guest);
        // It says nothing by itself: only its announcement can have told the switch. An answer takes ten seconds at most.
        assert_eq!(client.status(address).unwrap().boot_id, guest.status().boot_id);
    }
}

#[test]
fn a_tap_is_free_as_soon_as_the_copy_that_had_it_is_gone() {
    if !root_or_skip("namespaces and taps") {
        return;
    }
    let pair = Pair::start();
    let (a, b) = (pair.a(), pair.b());
    for host in [a, b] {
        host.add_tap(TAP).unwrap();
    }
    let nic = Nic::new(TAP, 12);
    let spec = GuestSpec { nic: Some(nic), fill_mib: 48, rate: 100, ..pair.spec("vm", 128) };
    let guest = pair.run(a, "vm", &spec);
    let before = guest.status();
    let migration = pair.begin("vm", a, b, &["--bandwidth", "2MiB/s"]);
    migration.reaches("synchronize");
    // The source does not hear of that, and stays connected.
    let source = fault::pause(a.agent_pid().unwrap());
    fault::kill(pair.qemu(b).unwrap());
    let record = b.state_dir().join("vms/vm.journal");
    until("the copy is gone", || !record.exists());
    let netdev = format!("tap,id=n,ifname={TAP},script=no,downscript=no");
    pair.run_tiny(b, "other", &["-netdev", &netdev, "-device", "virtio-net-pci,netdev=n,romfile="]);
    drop(source);
    assert_eq!(migration.ended().code, Some(1));
    let _ = vmirror(b, &["stop", "other", "--force"]).done();
    report_adds_up(&pair.migrate("vm", a, b, &[]), &guest);
    guest.sound_since(&before);
}
