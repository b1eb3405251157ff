//! The disk below an agent's state directory fails at the moment at which it counts.

use std::time::Duration;

use end_to_end::{Pair, until, vmirror};
use session::points;
use testbed::{AgentOptions, BadDisk, Shim, Testbed, fault};

#[test]
fn a_machine_that_was_seen_to_run_is_known_to_have_run_when_the_disk_is_well_again() {
    let testbed = Testbed::new().unwrap();
    let [a, b] = testbed.hosts();
    a.start_agent().unwrap();
    let held = b.directory().join("points");
    std::fs::create_dir(&held).unwrap();
    let shim = Shim::new(b.directory(), &b.state_dir()).unwrap();
    let directory = (points::DIRECTORY.to_owned(), held.display().to_string());
    let environment = [shim.environment(), &[directory]].concat();
    b.start_agent_with(&AgentOptions { environment, ..AgentOptions::default() }).unwrap();
    let pair = Pair::with_running_agents(testbed);
    let (a, b) = (pair.a(), pair.b());
    let guest = pair.run(a, "vm", &pair.spec("vm", 128));
    let before = guest.status();

    // It runs, and that cannot be put on record.
    std::fs::write(held.join("resumed"), "").unwrap();
    let migration = pair.begin("vm", a, b, &[]);
    until("it runs at the destination", || held.join("resumed.reached").exists());
    shim.set_disk(BadDisk::FailsToSync).unwrap();
    std::fs::remove_file(held.join("resumed.reached")).unwrap();
    let _ = migration.ended().done();
    assert!(pair.runs_on("vm", b), "{}", pair.logs());
    guest.sound_since(&before);

    // Once it has ended only this agent knows that it has run; that is not lost before it is written, nor told as if it were not so.
    fault::kill(pair.qemu(b).unwrap());
    until("it has ended", || pair.show("vm", b).is_some_and(|vm| vm["state"] == "unreachable"));
    std::thread::sleep(Duration::from_secs(3));
    assert!(pair.show("vm", b).is_some(), "nothing of it is forgotten while nothing can be written");
    shim.set_disk(BadDisk::Sound).unwrap();
    until("it is known to have run", || pair.show("vm", b).is_none());
    assert!(!vmirror(b, &["list"]).done().stdout.contains("was not seen to run"), "{}", pair.logs());
    pair.holds_nothing(b);
}
