//! A real QEMU under a real agent. Its guest is nothing but firmware, which is all that is needed here.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::site::{Agent, Site};
use crate::text;

/// The QEMU to test with, or why there is none.
pub(crate) fn qemu() -> Option<String> {
    let qemu = std::env::var("QEMU").unwrap_or_else(|_| "qemu-system-x86_64".to_owned());
    let runs = Command::new(&qemu)
        .arg("--version")
        .stdout(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if !runs {
        eprintln!("SKIPPED: {qemu} cannot be run");
    }
    runs.then_some(qemu)
}

/// Ends a QEMU that outlives its agent, however the test ends.
pub(crate) struct Ends(pub(crate) Vec<String>);

impl Drop for Ends {
    fn drop(&mut self) {
        for pid in &self.0 {
            // Most have ended already.
            let _ = Command::new("kill").args(["-KILL", pid]).stderr(Stdio::null()).status();
        }
    }
}

struct Reaped(Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

const MACHINE: [&str; 9] =
    ["-machine", "q35", "-accel", "tcg", "-m", "64", "-nodefaults", "-display", "none"];

pub(crate) fn run(agent: &Agent, qemu: &str, name: &str) -> String {
    let arguments = [&["run", name, "--", qemu][..], &MACHINE].concat();
    let output = agent.ask(&arguments);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let pid = agent.json(&["show", name])["pid"].as_u64().unwrap().to_string();
    assert!(
        text(&output.stdout).contains(&format!("{name} is running (process {pid})")),
        "{}",
        text(&output.stdout)
    );
    pid
}

/// What agents make for machines, by name.
pub(crate) fn made(site: &Site) -> Vec<String> {
    let files = |dir: &str| std::fs::read_dir(site.path(dir)).unwrap().map(|file| file.unwrap().file_name());
    let all = files("run").chain(files("."));
    let mut all: Vec<_> = all.map(|name| name.to_string_lossy().into_owned()).collect();
    all.retain(|name| name.contains("web1"));
    all
}

pub(crate) fn until(what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_machine_outlives_its_agent_and_leaves_nothing_behind() {
    let Some(qemu) = qemu() else { return };
    let mut agent = Agent::start();
    let site = agent.site.clone();
    let pid = run(&agent, &qemu, "web1");
    let _ends = Ends(vec![pid.clone()]);
    assert!(!made(&site).is_empty());
    let taken = agent.ask(&["run", "web1", "--", &qemu, "-m", "64"]);
    assert_eq!(taken.status.code(), Some(2));
    assert!(text(&taken.stderr).contains("a VM called \"web1\" is here already; choose another name"));
    assert_eq!(agent.terminate(), Some(0));

    let agent = Agent::start_at(site.clone());
    let found = agent.json(&["show", "web1"]);
    assert_eq!((&found["pid"], &found["state"]), (&json!(pid.parse::<u64>().unwrap()), &json!("running")));
    let off = agent.ask(&["stop", "web1", "--force"]);
    assert!(off.status.success(), "{}", text(&off.stderr));
    assert_eq!(agent.json(&["list"]), json!([]));
    assert_eq!(made(&site), Vec::<String>::new());
}

#[test]
fn a_machine_whose_qemu_dies_is_off_the_list_and_cleaned_up_after() {
    let Some(qemu) = qemu() else { return };
    let agent = Agent::start();
    let pid = run(&agent, &qemu, "web1");
    drop(Ends(vec![pid]));
    until("it is off the list", || agent.json(&["list"]) == json!([]));
    assert_eq!(made(&agent.site), Vec::<String>::new());
    let events = text(&agent.ask(&["events"]).stdout);
    assert!(events.contains("web1  started\n") && events.contains("web1  ended by itself\n"), "{events}");
}

#[test]
fn a_machine_whose_qemu_dies_while_it_is_checked_is_cleaned_up_after() {
    let Some(qemu) = qemu() else { return };
    let agent = Agent::start();
    let pid = run(&agent, &qemu, "web1");
    // An agent that takes the connection and says nothing: the check lasts for as long as this likes.
    let elsewhere = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = elsewhere.local_addr().unwrap().to_string();
    let check = Command::new(crate::PROGRAM)
        .args(["check", "web1", "--to", &address])
        .env("VMIRROR_AGENT", agent.site.path("api.sock"))
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut check = Reaped(check);
    let under_way = elsewhere.accept().unwrap();
    drop(Ends(vec![pid]));
    until("its monitor is seen to have closed", || {
        agent.json(&["show", "web1"])["state"] == json!("unreachable")
    });
    assert!(!made(&agent.site).is_empty(), "it is looked after when the check is over");
    drop((under_way, elsewhere));
    assert!(!check.0.wait().unwrap().success());
    until("it is off the list", || agent.json(&["list"]) == json!([]));
    assert_eq!(made(&agent.site), Vec::<String>::new());
}

#[test]
fn a_command_line_that_qemu_refuses_leaves_nothing_and_says_what_qemu_said() {
    let Some(qemu) = qemu() else { return };
    let agent = Agent::start();
    let output = agent.ask(&["run", "web1", "--", &qemu, "-m", "64", "-no-such-option"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("-no-such-option: invalid option"), "{}", text(&output.stderr));
    assert_eq!(made(&agent.site), Vec::<String>::new());
    assert_eq!(agent.json(&["list"]), json!([]));
}

#[test]
fn a_migration_to_where_no_agent_listens_is_refused_with_a_report_and_the_machine_runs_on() {
    let Some(qemu) = qemu() else { return };
    let agent = Agent::start();
    let _ends = Ends(vec![run(&agent, &qemu, "web1")]);
    // Port 9 is discard; nobody has listened there for decades.
    let output = agent.ask(&["migrate", "web1", "--to", "127.0.0.1:9", "--json"]);
    assert_eq!(output.status.code(), Some(2), "{}", text(&output.stderr));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&report["outcome"], &report["error"]["stage"]), (&json!("failed"), &json!("refused")));
    assert!(text(&output.stderr).contains("no agent listens there"), "{}", text(&output.stderr));
    let id = report["id"].as_str().unwrap();
    assert_eq!(agent.json(&["report", &id[..8]]), report);
    let page = agent.site.path("report.html");
    assert!(agent.ask(&["report", id, "--html", page.to_str().unwrap()]).status.success());
    assert!(std::fs::read_to_string(page).unwrap().contains("web1 was not moved"));
    assert_eq!(agent.json(&["history"])[0]["id"], report["id"]);
    assert_eq!(agent.json(&["show", "web1"])["state"], json!("running"));
    assert!(agent.ask(&["stop", "web1", "--force"]).status.success());
}
