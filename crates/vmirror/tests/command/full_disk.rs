//! An agent whose `state_dir` is on a disk without room, and whose `log_dir` cannot be made: it comes up, and looks after its machines.

use std::process::Command;

use serde_json::json;

use crate::machine::{Ends, qemu, run};
use crate::site::Agent;
use crate::text;

#[test]
fn an_agent_without_room_for_its_state_comes_up_and_has_its_machines() {
    let Some(qemu) = qemu() else { return };
    let starter = |state: &str| {
        // What was there is there, and then there is no room for one byte more.
        let script = format!(
            "mkdir {state}.full && mount -t tmpfs -o size=2m none {state}.full && cp --sparse=never -a {state}/. {state}.full && \
             rm -r {state}.full/logs && : >{state}.full/logs && \
             {{ dd if=/dev/zero of={state}.full/rest bs=4k 2>&- ; mount --move {state}.full {state} && exec \"$@\"; }}"
        );
        ["unshare", "--mount", "--propagation", "private", "--", "sh", "-c", &script, "sh"].map(str::to_owned)
    };
    let probe = tempfile::tempdir().unwrap();
    std::fs::create_dir(probe.path().join("state")).unwrap();
    let probe = starter(probe.path().join("state").to_str().unwrap());
    if !Command::new(&probe[0]).args(&probe[1..]).arg("true").output().unwrap().status.success() {
        eprintln!("SKIPPED: no mount namespace can be made");
        return;
    }
    let mut agent = Agent::start();
    let site = agent.site.clone();
    let pid = run(&agent, &qemu, "web1");
    let _ends = Ends(vec![pid.clone()]);
    assert_eq!(agent.terminate(), Some(0));

    let starter = starter(site.path("state").to_str().unwrap());
    let starter: Vec<&str> = starter.iter().map(String::as_str).collect();
    let mut agent = Agent::start_by(&starter, site.clone());
    let found = agent.json(&["show", "web1"]);
    assert_eq!((&found["state"], &found["pid"]), (&json!("running"), &json!(pid.parse::<u64>().unwrap())));
    let history = agent.ask(&["history"]);
    assert_eq!(history.status.code(), Some(1));
    let why = text(&history.stderr);
    assert!(why.contains("the history is off") && why.contains("restart the agent"), "{why}");
    let no_room = agent.ask(&["run", "web2", "--", &qemu, "-m", "64", "-nodefaults", "-display", "none"]);
    assert!(!no_room.status.success());
    assert_eq!(agent.terminate(), Some(0));

    let agent = Agent::start_at(site);
    assert_eq!(agent.json(&["history"]), json!([]), "with room there is a history again");
    assert!(agent.ask(&["stop", "web1", "--force"]).status.success());
}
