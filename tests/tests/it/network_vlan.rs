//! A guest with two cards on two bridges, one of them in a VLAN, has them so at its new place.

use end_to_end::{Pair, report_adds_up};
use testbed::guest_spec::{GuestSpec, Nic};
use testbed::{Host, root_or_skip};

const TAPS: [&str; 2] = ["tap0", "tap1"];
const BRIDGE: &str = "br1";

fn run(host: &Host, program: &str, arguments: &[&str]) -> String {
    let done = host.command(program).args(arguments).output().unwrap();
    assert!(done.status.success(), "{}: {program} {arguments:?}: {done:?}", host.name());
    String::from_utf8(done.stdout).unwrap()
}

/// Another bridge on a host, which peers may have it use. Whether it looks at VLAN tags.
fn add_bridge(host: &Host) -> bool {
    run(host, "ip", &["link", "add", BRIDGE, "type", "bridge"]);
    run(host, "ip", &["link", "set", BRIDGE, "up"]);
    let filtering = ["link", "set", BRIDGE, "type", "bridge", "vlan_filtering", "1"];
    let looks_at_tags = host.command("ip").args(filtering).output().unwrap().status.success();
    if !looks_at_tags {
        eprintln!("skipped in part: the kernel's bridges do not look at VLAN tags");
    }
    let allow = |config: &mut toml::Table| {
        let bridges = config["allow"].as_table_mut().unwrap()["bridges"].as_array_mut().unwrap();
        bridges.push(BRIDGE.into());
    };
    host.stop_agent().unwrap();
    host.configure(allow).unwrap();
    host.start_agent().unwrap();
    looks_at_tags
}

#[test]
fn cards_on_two_bridges_and_in_a_vlan_are_so_at_the_new_place() {
    if !root_or_skip("namespaces and taps") {
        return;
    }
    let pair = Pair::start();
    let (a, b) = (pair.a(), pair.b());
    let vlans = add_bridge(a);
    a.add_tap(TAPS[0]).unwrap();
    run(a, "ip", &["tuntap", "add", "dev", TAPS[1], "mode", "tap"]);
    run(a, "ip", &["link", "set", TAPS[1], "master", BRIDGE, "up"]);
    if vlans {
        run(a, "bridge", &["vlan", "del", "dev", TAPS[1], "vid", "1"]);
        run(a, "bridge", &["vlan", "add", "dev", TAPS[1], "vid", "7", "pvid", "untagged"]);
        run(a, "bridge", &["vlan", "add", "dev", TAPS[1], "vid", "9"]);
    }
    run(a, "bridge", &["link", "set", "dev", TAPS[1], "isolated", "on", "learning", "off"]);
    let extra = [
        "-netdev",
        "tap,id=second,ifname=tap1,script=no,downscript=no",
        "-device",
        "virtio-net-pci,netdev=second,mac=52:54:00:88:01:0a",
    ];
    let spec = GuestSpec {
        nic: Some(Nic::new(TAPS[0], 10)),
        fill_mib: 16,
        extra: extra.map(str::to_owned).to_vec(),
        ..pair.spec("vm", 128)
    };
    let guest = pair.run(a, "vm", &spec);
    let before = guest.status();

    let refused = || pair.migration_refused("vm", &[]);
    refused().begins("bridge-not-allowed", &[BRIDGE, "host-b"]);
    let _ = add_bridge(b);
    if vlans {
        run(b, "ip", &["link", "set", BRIDGE, "type", "bridge", "vlan_filtering", "0"]);
        refused().is("vlan-filtering", &[BRIDGE, "host-b", "vlan_filtering"]);
        run(b, "ip", &["link", "set", BRIDGE, "type", "bridge", "vlan_filtering", "1"]);
    }
    run(b, "ip", &["link", "set", BRIDGE, "mtu", "1400"]);
    refused().is("mtu-too-small", &[BRIDGE, "host-b", "1400", "1500"]);
    run(b, "ip", &["link", "set", BRIDGE, "mtu", "1500"]);
    // A name that another interface has.
    run(b, "ip", &["link", "add", TAPS[1], "type", "bridge"]);
    refused().is("interface-taken", &[TAPS[1], "host-b"]);
    run(b, "ip", &["link", "delete", TAPS[1]]);

    let report = pair.migrate("vm", a, b, &[]);
    report_adds_up(&report, &guest);
    let links = b.inventory().unwrap().links;
    assert_eq!(links[TAPS[0]], "tun in br0, up");
    assert_eq!(links[TAPS[1]], "tun in br1, up");
    if vlans {
        let there: Vec<Vec<String>> = run(b, "bridge", &["vlan", "show", "dev", TAPS[1]])
            .lines()
            .skip(1)
            .map(|line| line.replace(TAPS[1], "").split_whitespace().map(str::to_owned).collect())
            .collect();
        assert_eq!(there, [vec!["7", "PVID", "Egress", "Untagged"], vec!["9"]]);
    }
    let port = run(b, "bridge", &["-d", "link", "show", "dev", TAPS[1]]);
    for setting in ["isolated on", "learning off", "flood on"] {
        assert!(port.contains(setting), "{setting}: {port}");
    }
    assert!(run(b, "bridge", &["-d", "link", "show", "dev", TAPS[0]]).contains("isolated off"));
    // The first card is in the network as ever.
    assert_eq!(pair.client().unwrap().status(Nic::new(TAPS[0], 10).address).unwrap().boot_id, before.boot_id);
    guest.sound_since(&before);
}
