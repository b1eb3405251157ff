//! What an operator adds to the network's way of following a guest: hooks, and a firewall that knows its connections.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use end_to_end::{Pair, report_adds_up, until, vmirror};
use serde_json::Value;
use testbed::guest_spec::{GuestSpec, Nic};
use testbed::{Host, root_or_skip};

const TAP: &str = "tap0";
const HOOKS: [&str; 4] = ["network-prepare", "network-up", "network-redirect", "network-down"];

/// Hooks of a host that write down what they are told, and end like that.
fn hook(host: &Host, name: &str, code: i32) -> PathBuf {
    hook_that_takes(host, name, 0, code)
}

/// The same, so many seconds later.
fn hook_that_takes(host: &Host, name: &str, seconds: u32, code: i32) -> PathBuf {
    let directory = host.directory().join("hooks");
    fs::create_dir_all(&directory).unwrap();
    let (hook, log) = (directory.join(name), host.directory().join("hooks.log"));
    let script = format!(
        "#!/bin/sh\ncat >> {0}\necho >> {0}\necho said by {name} >&2\nsleep {seconds}\nexit {code}\n",
        log.display()
    );
    fs::write(&hook, script).unwrap();
    fs::set_permissions(&hook, fs::Permissions::from_mode(0o755)).unwrap();
    directory
}

/// What the hooks of a host were told since it was last asked.
fn told(host: &Host) -> Vec<Value> {
    let log = host.directory().join("hooks.log");
    let text = fs::read_to_string(&log).unwrap_or_default();
    let _ = fs::remove_file(&log);
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn names(told: &[Value]) -> Vec<&str> {
    told.iter().map(|told| told["hook"].as_str().unwrap()).collect()
}

fn with_hooks(pair: &Pair) {
    for host in [pair.a(), pair.b()] {
        for name in HOOKS {
            hook(host, name, 0);
        }
        let directory = host.directory().join("hooks").display().to_string();
        let configure = |config: &mut toml::Table| {
            config.insert(
                "hooks".to_owned(),
                toml::Table::from_iter([("directory".to_owned(), directory.into())]).into(),
            );
        };
        host.stop_agent().unwrap();
        host.configure(configure).unwrap();
        host.start_agent().unwrap();
    }
}

#[test]
fn hooks_run_in_their_order_and_stop_what_they_are_to_stop() {
    if !root_or_skip("namespaces and taps") {
        return;
    }
    let pair = Pair::start();
    with_hooks(&pair);
    let (a, b) = (pair.a(), pair.b());
    a.add_tap(TAP).unwrap();
    let nic = Nic::new(TAP, 10);
    let spec = GuestSpec { nic: Some(nic.clone()), fill_mib: 16, rate: 100, ..pair.spec("vm", 128) };
    let guest = pair.run(a, "vm", &spec);

    assert!(pair.check("vm").is_empty());
    let rehearsed = told(b);
    assert_eq!(rehearsed[0]["hook"], "network-prepare");
    assert!(rehearsed.iter().all(|told| told["rehearsal"] == true), "{rehearsed:?}");

    // One that fails before anything begins refuses it, and what was made is undone.
    hook(b, "network-prepare", 3);
    assert_eq!(pair.check("vm"), ["hook-failed"]);
    let refusal = pair.migration_refused("vm", &[]);
    refusal.is("hook-failed", &["network-prepare", "host-b", "said by network-prepare"]);
    hook(b, "network-prepare", 0);
    let _ = told(b);

    // Nor does anything begin where a later one could not be started.
    let up = b.directory().join("hooks/network-up");
    fs::set_permissions(&up, fs::Permissions::from_mode(0o644)).unwrap();
    pair.migration_refused("vm", &[]).is("hook-failed", &["network-up", "not executable"]);
    assert!(told(b).is_empty());

    // One that fails within the pause leaves the guest where it was.
    hook(b, "network-up", 4);
    let said = pair.try_migrate("vm", a, b, &[]);
    assert_eq!(said.code, Some(1), "{said:?}");
    assert_eq!(said.report().error.unwrap().finding.kind, "hook-failed");
    guest.runs_on();
    assert_eq!(names(&told(b)), ["network-prepare", "network-up", "network-down"]);
    hook(b, "network-up", 0);

    // One that fails once the guest has moved is told of.
    hook(b, "network-redirect", 5);
    let report = pair.migrate("vm", a, b, &[]);
    report_adds_up(&report, &guest);
    assert_eq!(report.network.problems.len(), 1, "{:?}", report.network);
    assert_eq!(report.network.problems[0].kind, "hook-failed");
    let there = told(b);
    assert_eq!(names(&there), ["network-prepare", "network-up", "network-redirect"]);
    for told in &there {
        assert_eq!((&told["vm"], &told["side"]), (&"vm".into(), &"destination".into()), "{told}");
        let interface = &told["interfaces"][0];
        assert_eq!(
            (&interface["ifname"], &interface["mac"]),
            (&TAP.into(), &nic.mac.as_str().into()),
            "{told}"
        );
        assert_eq!(interface["bridge"], "br0", "{told}");
    }
    let here = told(a);
    // One that takes longer than the machine is watched is told of too, and goes on.
    hook_that_takes(a, "network-redirect", 20, 0);
    let deadline = |config: &mut toml::Table| {
        config["hooks"].as_table_mut().unwrap().insert("deadline".to_owned(), "1m".into());
    };
    a.stop_agent().unwrap();
    a.configure(deadline).unwrap();
    a.start_agent().unwrap();
    let report = pair.migrate("vm", b, a, &[]);
    let slow: Vec<&str> = report.network.problems.iter().map(|problem| problem.kind.as_str()).collect();
    assert_eq!(slow, ["hook-slow"]);

    assert_eq!(names(&here), ["network-down"]);
    assert_eq!((&here[0]["side"], &here[0]["peer"]), (&"source".into(), &"host-b".into()));
}

/// Lets a host's firewall keep account of what passes its bridge, and pass on nothing but what belongs to a connection that it knows
/// from its beginning.
fn firewall(host: &Host) {
    let run = |program: &str, arguments: &[&str]| {
        let done = host.command(program).args(arguments).output().unwrap();
        assert!(done.status.success(), "{program} {arguments:?}: {done:?}");
    };
    run("sysctl", &["-qw", "net.bridge.bridge-nf-call-iptables=1"]);
    // One that is not known from its beginning is not taken for one.
    run("sysctl", &["-qw", "net.netfilter.nf_conntrack_tcp_loose=0"]);
    let rules = "table inet strict { chain forward { type filter hook forward priority 0; policy accept; \
                 meta l4proto tcp ct state established,related accept; \
                 tcp flags & (syn | ack) == syn accept; meta l4proto tcp drop; }; }";
    run("nft", &[rules]);
}

fn carries(host: &Host, conntrack: bool) {
    let configure = |config: &mut toml::Table| {
        let network = toml::Table::from_iter([("conntrack".to_owned(), conntrack.into())]);
        config.insert("network".to_owned(), network.into());
    };
    host.stop_agent().unwrap();
    host.configure(configure).unwrap();
    host.start_agent().unwrap();
}

#[test]
fn connections_survive_a_stateful_firewall_that_is_told_of_them_and_no_other() {
    if !root_or_skip("namespaces and taps") {
        return;
    }
    let pair = Pair::start();
    let (a, b) = (pair.a(), pair.b());
    if !Path::new("/proc/sys/net/bridge/bridge-nf-call-iptables").exists() {
        eprintln!("skipped: the kernel's bridges know no firewall");
        return;
    }
    for host in [a, b] {
        firewall(host);
    }
    a.add_tap(TAP).unwrap();
    let nic = Nic::new(TAP, 10);
    let spec = GuestSpec { nic: Some(nic.clone()), fill_mib: 16, rate: 100, ..pair.spec("vm", 128) };
    let guest = pair.run(a, "vm", &spec);
    let client = pair.client().unwrap();
    let mut hosts = [a, b];
    for told in [true, false] {
        carries(hosts[0], told);
        carries(hosts[1], told);
        let connection = client.connection(nic.address).unwrap();
        assert!(answers(&connection), "before it moves");
        // What a guest is known by is learned from what it tells its neighbours.
        let forgotten = client.command("ip").args(["neigh", "flush", "all"]).status().unwrap();
        assert!(forgotten.success());
        let migration = pair.mirror("vm", hosts[0], hosts[1], &[]).json();
        assert_eq!(migration["in_sync"], true);
        assert!(answers(&connection), "while it is mirrored");
        let report = vmirror(hosts[0], &["switch", "vm", "--json"]).done().report();
        report_adds_up(&report, &guest);
        eprintln!("{:?}", report.network);
        assert_eq!(report.network.flows_carried > 0, told, "{:?}", report.network);
        until("the guest is listed there", || pair.runs_on("vm", hosts[1]));
        assert_eq!(answers(&connection), told, "after it has moved");
        if hosts[0].inventory().unwrap().links.contains_key(TAP) {
            hosts[0].remove_tap(TAP).unwrap();
        }
        hosts.reverse();
    }
}

/// Whether what is said on a connection comes back.
fn answers(mut connection: &std::net::TcpStream) -> bool {
    use std::io::{Read as _, Write as _};
    connection.set_read_timeout(Some(std::time::Duration::from_secs(3))).unwrap();
    let mut heard = [0; 100];
    connection.write_all(&[7; 100]).is_ok() && connection.read_exact(&mut heard).is_ok() && heard == [7; 100]
}

#[test]
fn a_guest_that_comes_home_while_the_host_that_it_left_still_hears_of_it_arrives() {
    if !root_or_skip("namespaces and taps") {
        return;
    }
    let pair = Pair::start();
    let (a, b) = (pair.a(), pair.b());
    // The source waits for what becomes of this, and its part in the migration is over long before.
    let directory = hook_that_takes(b, "network-redirect", 6, 0);
    b.stop_agent().unwrap();
    b.configure(|config| {
        let hooks =
            toml::Table::from_iter([("directory".to_owned(), directory.display().to_string().into())]);
        config.insert("hooks".to_owned(), hooks.into());
    })
    .unwrap();
    b.start_agent().unwrap();
    a.add_tap(TAP).unwrap();
    let nic = Nic::new(TAP, 10);
    let spec = GuestSpec { nic: Some(nic), fill_mib: 48, rate: 100, ..pair.spec("vm", 128) };
    let guest = pair.run(a, "vm", &spec);
    let before = guest.status();

    let there = pair.begin("vm", a, b, &[]);
    until("the guest runs there", || pair.runs_on("vm", b));
    let record = a.state_dir().join("vms/vm.journal");
    until("nothing of it is left here", || !record.exists());
    let home = pair.begin("vm", b, a, &["--bandwidth", "2MiB/s"]);
    home.reaches("synchronize");
    assert!(!there.has_ended(), "the way there has ended before the way home began");
    report_adds_up(&there.ended().done().report(), &guest);
    // What arrives is not what has left.
    assert!(!home.has_ended() && record.exists(), "{}", pair.logs());
    let to = a.listen().to_string();
    let _ = vmirror(b, &["migrate", "vm", "--to", &to, "--bandwidth", "unlimited"]).done();
    report_adds_up(&home.ended().done().report(), &guest);
    assert!(pair.runs_on("vm", a) && pair.show("vm", b).is_none());
    guest.sound_since(&before);
}
