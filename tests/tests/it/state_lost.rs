//! What is left of a machine on a host whose agent has lost its state directory: it runs on when a person does what the documentation says.

use std::fs;

use end_to_end::{Pair, image, local, until, vmirror};
use serde_json::json;
use session::points::{DIRECTORY, Point};
use testbed::disk::{self, Format};
use testbed::guest_spec::{GuestSpec, Io, Pattern, TestDisk, Work};
use testbed::{Monitor, Testbed, root_or_skip};

const SIZE: u64 = 32 << 20;

#[test]
fn a_complete_copy_that_nobody_has_on_record_runs_on_and_its_source_lets_go() {
    if !root_or_skip("hosts with storage of their own") {
        return;
    }
    let points = std::env::temp_dir().join(format!("vmirror-state-lost-{}", std::process::id()));
    fs::create_dir_all(&points).unwrap();
    let mut options = local();
    options.environment.push((DIRECTORY.to_owned(), points.display().to_string()));
    let held = points.join(Point::HandedOver.name());
    fs::write(&held, "").unwrap();
    let testbed = Testbed::new().unwrap();
    testbed.hosts().iter().for_each(|host| host.start_agent_with(&options).unwrap());
    let pair = Pair::with_running_agents(testbed);
    let (a, b) = (pair.a(), pair.b());
    disk::create(&image(a, "vm"), Format::Raw, SIZE).unwrap();
    let work = Work::Blocks { pattern: Pattern::Random, io: Io::Direct, rate: 50, depth: 1, check_rate: 20 };
    let path = a.local_dir().join("vm");
    let disk = TestDisk { roles: vec![work.within(8)], ..TestDisk::new(path, Format::Raw, "vm") };
    let guest = pair.run(a, "vm", &GuestSpec { disks: vec![disk], ..pair.spec("vm", 128) });
    let before = guest.status();

    let migration = pair.begin("vm", a, b, &["--max-downtime", "60s"]);
    until("it is handed over", || points.join("handed-over.reached").exists());
    let is_held = || {
        let holds = |pid: &i32| fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        b.processes().iter().any(|pid| holds(pid).contains("hold-locks"))
    };
    until("a process keeps the copy's images", is_held);
    b.kill_agent().unwrap();
    a.kill_agent().unwrap();
    let _ = migration.ended();
    fs::remove_dir_all(b.state_dir()).unwrap();
    b.start_agent_with(&local()).unwrap();

    // Word by word: "A QEMU that is to run on".
    let socket = b.run_dir().join("vm.d/qmp");
    assert_eq!(
        Monitor::connect(&socket).unwrap().execute("query-status", json!({})).unwrap()["status"],
        "paused"
    );
    assert!(pair.left("vm", b).is_some(), "{}", pair.logs());
    let _ = vmirror(b, &["forget-images", "vm"]).done();
    {
        let mut qmp = Monitor::connect(&socket).unwrap();
        let _ = qmp.execute("cont", json!({})).unwrap();
        assert_eq!(qmp.execute("query-status", json!({})).unwrap()["status"], "running");
    }
    let _ = vmirror(b, &["adopt", "vm", "--qmp", socket.to_str().unwrap()]).done();
    assert!(pair.runs_on("vm", b), "{}", pair.logs());
    let _ = guest.runs_on();

    a.start_agent_with(&local()).unwrap();
    until("it is in doubt there", || pair.show("vm", a).is_some_and(|vm| vm["state"] == "uncertain"));
    let _ = vmirror(a, &["resolve", "vm", "--give-up", "--force"]).done();
    assert!(pair.runs_on("vm", b) && pair.show("vm", a).is_none(), "{}", pair.logs());
    let _ = guest.sound_since(&before);
    fs::remove_dir_all(points).unwrap();
}
