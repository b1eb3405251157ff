//! A guest on a macvtap, which a QEMU can only be given by descriptor, has one like it at its new place.

use std::fs::File;
use std::os::fd::OwnedFd;

use end_to_end::{Guest, Pair, report_adds_up, unbroken, until, vmirror};
use serde_json::Value;
use testbed::guest_spec::Nic;
use testbed::{Host, Inventory, RunningGuest, root_or_skip};

const MACVTAP: &str = "macvtap0";
const LOWER: &str = "lower0";
const UP: &str = "macvtap in -, up";
const DOWN: &str = "macvtap in -, down";

fn run(host: &Host, program: &str, arguments: &[&str]) -> String {
    let done = host.command(program).args(arguments).output().unwrap();
    assert!(done.status.success(), "{}: {program} {arguments:?}: {done:?}", host.name());
    String::from_utf8(done.stdout).unwrap()
}

fn ip(host: &Host, arguments: &str) {
    let _ = run(host, "ip", &arguments.split(' ').collect::<Vec<_>>());
}

/// What `ip` says of an interface.
fn link(host: &Host, name: &str) -> Value {
    let said: Value = serde_json::from_str(&run(host, "ip", &["-j", "-d", "link", "show", name])).unwrap();
    said[0].clone()
}

/// An interface that leads into the guests' network, as a card of the host's would.
fn add_lower(host: &Host) {
    ip(host, &format!("link add {LOWER} type veth peer name in-bridge"));
    ip(host, "link set in-bridge master br0 up");
    ip(host, &format!("link set {LOWER} up"));
}

/// Lets peers have macvtaps on that interface.
fn allow(host: &Host) {
    host.stop_agent().unwrap();
    let allowed = |config: &mut toml::Table| {
        let table = config["allow"].as_table_mut().unwrap();
        table.insert("macvtap".to_owned(), toml::Value::Array(vec![LOWER.into()]));
    };
    host.configure(allowed).unwrap();
    host.start_agent().unwrap();
}

/// Opens queues of the macvtap on a host, as whoever starts a QEMU by hand does.
fn open(host: &Host, queues: usize) -> Vec<OwnedFd> {
    let number = run(host, "sh", &["-c", &format!("cat /sys/class/net/{MACVTAP}/tap*/dev")]);
    let (major, minor) = number.trim().split_once(':').unwrap();
    // The file in /dev may be of another test's network.
    let device = host.directory().join("queue");
    let _ = run(host, "mknod", &[device.to_str().unwrap(), "c", major, minor]);
    let open = |_| File::options().read(true).write(true).open(&device).unwrap().into();
    (0..queues).map(open).collect()
}

struct Scene {
    pair: Pair,
    nic: Nic,
    guest: Guest,
    started: RunningGuest,
}

impl Scene {
    /// A guest on a macvtap that was made, and whose QEMU was started, by hand; and adopted.
    fn new(mode: &str, queues: usize) -> Option<Scene> {
        if !root_or_skip("namespaces and macvtaps") {
            return None;
        }
        let pair = Pair::start();
        let a = pair.a();
        add_lower(a);
        let nic = Nic::new(MACVTAP, 10);
        ip(a, &format!("link add link {LOWER} name {MACVTAP} type macvtap mode {mode}"));
        ip(a, &format!("link set {MACVTAP} address {} mtu 1400 up", nic.mac));
        let (started, guest) = pair.adopt_with("vm", &nic, open(a, queues));
        Some(Scene { pair, nic, guest, started })
    }

    fn is_reachable(&self) {
        let status = self.pair.client().unwrap().status(self.nic.address).unwrap();
        assert_eq!(status.boot_id, self.guest.status().boot_id);
    }

    /// The guest runs on this host and has its macvtap there.
    fn is_on(&self, host: &Host, mode: &str) {
        let there = link(host, MACVTAP);
        assert_eq!(host.inventory().unwrap().links[MACVTAP], UP);
        assert_eq!(
            (&there["link"], &there["address"], &there["mtu"], &there["linkinfo"]["info_data"]["mode"]),
            (&LOWER.into(), &self.nic.mac.as_str().into(), &1400.into(), &mode.into()),
            "{there}"
        );
        let behind = self.pair.testbed().behind(&self.nic.mac).unwrap();
        assert_eq!(behind.map(Host::name), Some(host.name()), "where the switch has learned it to be");
        self.is_reachable();
    }
}

#[test]
fn a_macvtap_is_made_alike_at_the_new_place_and_left_down_at_the_old() {
    let Some(mut scene) = Scene::new("bridge", 2) else { return };
    scene.is_reachable();
    scene.is_on(scene.pair.a(), "bridge");
    let before = scene.guest.status();
    let pair = &scene.pair;
    let (a, b) = (pair.a(), pair.b());

    let refused = || pair.migration_refused("vm", &[]);
    refused().is("lower-not-allowed", &[LOWER, "host-b", "[allow] macvtap"]);
    allow(b);
    refused().is("lower-missing", &[LOWER, "host-b"]);
    add_lower(b);
    ip(b, &format!("link set {LOWER} mtu 1300"));
    refused().is("mtu-too-small", &[LOWER, "host-b", "1300", "1400"]);
    ip(b, &format!("link set {LOWER} mtu 1500"));
    ip(b, &format!("link set {LOWER} master br0"));
    refused().is("lower-taken", &[LOWER, "host-b", "br0"]);
    ip(b, &format!("link set {LOWER} nomaster"));
    ip(b, &format!("link add link {LOWER} name {MACVTAP} type macvtap mode vepa"));
    refused().is("interface-taken", &[MACVTAP, "host-b"]);
    ip(b, &format!("link delete {MACVTAP}"));
    ip(b, &format!("link add link {LOWER} name other address {} type macvlan mode bridge", scene.nic.mac));
    ip(b, "link set other up");
    refused().is("interface-taken", &["other", &scene.nic.mac, LOWER]);
    ip(b, "link delete other");
    let empty: Inventory = b.inventory().unwrap();

    // One that does not come leaves nothing.
    let (migration, stopped) = pair.switching_over("vm");
    assert_eq!(b.inventory().unwrap().links[MACVTAP], DOWN);
    testbed::fault::kill(pair.qemu(b).unwrap());
    drop(stopped);
    assert_eq!(migration.ended().code, Some(1));
    pair.holds(b, &empty);
    until("the guest is reachable", || pair.client().unwrap().status(scene.nic.address).is_ok());
    scene.is_on(a, "bridge");

    let echo = pair.client().unwrap().echo(scene.nic.address, 4).unwrap();
    report_adds_up(&pair.migrate("vm", a, b, &[]), &scene.guest);
    until("the source's QEMU has ended", || scene.started.exit_status().is_some());
    scene.is_on(b, "bridge");
    assert_eq!(a.inventory().unwrap().links[MACVTAP], DOWN, "made by hand, and nobody's");
    let queues = run(b, "sh", &["-c", "tr '\\0' ' ' </proc/$0/cmdline", &pair.qemu(b).unwrap().to_string()]);
    assert!(queues.contains("fds="), "{queues}");

    // It goes on from what is on record, and moves back to what was left.
    b.kill_agent().unwrap();
    b.start_agent().unwrap();
    allow(a);
    report_adds_up(&pair.migrate("vm", b, a, &[]), &scene.guest);
    scene.is_on(a, "bridge");
    pair.holds(b, &empty);
    let bytes = echo.report().bytes;
    until("connections go on", || echo.report().bytes > bytes + 50_000);
    unbroken(&echo.stop());
    scene.guest.sound_since(&before);
}

#[test]
fn the_interface_below_has_the_address_of_a_guest_only_when_the_guest_is_there() {
    let Some(scene) = Scene::new("passthru", 1) else { return };
    let pair = &scene.pair;
    let (a, b) = (pair.a(), pair.b());
    add_lower(b);
    allow(b);
    let empty = b.inventory().unwrap();
    let own = link(b, LOWER)["address"].clone();
    let _ = pair.mirror("vm", a, b, &[]);
    assert_eq!(b.inventory().unwrap().links[MACVTAP], DOWN);
    assert_eq!(link(b, LOWER)["address"], own);
    scene.is_reachable();
    let _ = vmirror(a, &["switch", "vm"]).done();
    scene.is_on(b, "passthru");
    assert_eq!(link(b, LOWER)["address"], scene.nic.mac.as_str());
    let _ = vmirror(b, &["stop", "vm", "--force"]).done();
    pair.holds(b, &empty);
    assert_eq!(link(b, LOWER)["address"], own);
}
