//! Machines of which an agent cannot tell whether they run: none of them is given up.

use std::os::unix::fs::MetadataExt as _;
use std::process::Command;

use serde_json::json;

use crate::machine::{Ends, made, qemu, run, until};
use crate::site::Agent;
use crate::text;

#[test]
fn a_machine_is_not_forgotten_by_an_agent_that_cannot_read_which_boot_this_is() {
    let Some(qemu) = qemu() else { return };
    // As in a systemd unit with ProcSubset=pid.
    let hide = "mount -t tmpfs none /proc/sys/kernel/random && exec \"$@\"";
    let hidden = ["unshare", "--mount", "--", "sh", "-c", hide, "sh"];
    if !Command::new(hidden[0]).args(&hidden[1..]).arg("true").output().unwrap().status.success() {
        eprintln!("SKIPPED: no mount namespace can be made");
        return;
    }
    let mut agent = Agent::start();
    let site = agent.site.clone();
    let pid = run(&agent, &qemu, "web1");
    let _ends = Ends(vec![pid.clone()]);
    let before = made(&site);
    assert_eq!(agent.terminate(), Some(0));

    let mut agent = Agent::start_by(&hidden, site.clone());
    let found = agent.json(&["show", "web1"]);
    assert_eq!(
        (&found["state"], &found["pid"]),
        (&json!("unreachable"), &json!(pid.parse::<u64>().unwrap()))
    );
    let problem = found["problem"]["message"].as_str().unwrap();
    assert!(
        problem.contains("it cannot be told whether it runs") && problem.contains("boot_id"),
        "{problem}"
    );
    let list = text(&agent.ask(&["list"]).stdout);
    assert!(list.contains("unreachable") && list.contains("boot_id"), "{list}");
    assert_eq!(made(&site), before, "nothing of it is removed");
    assert_eq!(agent.terminate(), Some(0));

    let agent = Agent::start_at(site.clone());
    assert_eq!(agent.json(&["show", "web1"])["state"], json!("running"));
    assert!(agent.ask(&["stop", "web1", "--force"]).status.success());
    until("QEMU has ended", || !std::path::Path::new("/proc").join(&pid).exists());
    assert_eq!(made(&site), Vec::<String>::new());
}

#[test]
fn a_record_that_cannot_be_read_keeps_its_name_and_keeps_no_agent_down() {
    let Some(qemu) = qemu() else { return };
    let mut agent = Agent::start();
    let site = agent.site.clone();
    let _ends = Ends(vec![run(&agent, &qemu, "web1"), run(&agent, &qemu, "web2")]);
    assert_eq!(agent.terminate(), Some(0));
    let file = site.path("state/vms/web1.journal");
    let whole = std::fs::read(&file).unwrap();
    std::fs::write(&file, vec![7; whole.len()]).unwrap();
    let before = made(&site);

    let mut agent = Agent::start_at(site.clone());
    let states = agent.json(&["list"]);
    assert_eq!((&states[0]["state"], &states[1]["state"]), (&json!("unreadable"), &json!("running")));
    for words in [text(&agent.ask(&["list"]).stdout), text(&agent.ask(&["show", "web1"]).stdout)] {
        assert!(
            words.contains("the record of web1 cannot be read") && words.contains("Find out where it runs"),
            "{words}"
        );
    }
    for arguments in [
        &["run", "web1", "--", &qemu, "-m", "64"][..],
        &["stop", "web1", "--force"],
        &["migrate", "web1", "--to", "127.0.0.1:9"],
        &["resolve", "web1", "--give-up"],
    ] {
        assert_eq!(agent.ask(arguments).status.code(), Some(2), "{arguments:?}");
    }
    assert!(agent.ask(&["stop", "web2", "--force"]).status.success());
    assert_eq!(agent.terminate(), Some(0));
    assert_eq!(made(&site), before, "nothing of it is removed");
    assert_eq!(std::fs::metadata(&file).unwrap().size(), whole.len() as u64);

    std::fs::write(&file, whole).unwrap();
    let agent = Agent::start_at(site);
    assert_eq!(agent.json(&["show", "web1"])["state"], json!("running"));
    assert!(agent.ask(&["stop", "web1", "--force"]).status.success());
}
