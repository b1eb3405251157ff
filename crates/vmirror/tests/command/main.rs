//! The command as a user meets it: exit codes, messages, what is on which stream. With a real agent where one is
//! needed, on a unix socket and the loopback interface.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod full_disk;
mod machine;
mod many;
mod site;
mod unclear;

use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use serde_json::{Value, json};

use crate::site::{Agent, Site};

const PROGRAM: &str = env!("CARGO_BIN_EXE_vmirror");

fn vmirror(arguments: &[&str]) -> Output {
    Command::new(PROGRAM).args(arguments).env_remove("VMIRROR_AGENT").output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Runs it where it must be refused, and returns what it said on stderr.
fn refused(arguments: &[&str]) -> String {
    let output = vmirror(arguments);
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {}", text(&output.stderr));
    assert_eq!(text(&output.stdout), "", "{arguments:?}");
    let line = text(&output.stderr);
    assert!(line.starts_with("error: ") && line.lines().count() == 1, "{arguments:?}: {line}");
    line
}

#[test]
fn without_an_agent_every_command_names_the_socket_and_says_how_to_start_one() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("api.sock");
    let socket = socket.to_str().unwrap();
    for arguments in [
        &["list"][..],
        &["show", "web1"],
        &["stop", "web1"],
        &["run", "web1", "--", "qemu-system-x86_64"],
        &["migrate", "web1", "--to", "b:7600"],
        &["status"],
        &["events"],
        &["history"],
        &["report", "0b9e"],
    ] {
        let (before, after) = arguments.split_at(1);
        let line = refused(&[before, &["--agent", socket], after].concat());
        assert!(line.contains(&format!("no agent is running: {socket} does not exist")), "{line}");
        assert!(line.contains("vmirror agent --config FILE"), "{line}");
    }
    drop(std::os::unix::net::UnixListener::bind(socket).unwrap());
    assert!(refused(&["list", "--agent", socket]).contains("nobody answers at"), "a stale socket");
}

#[test]
fn with_json_an_error_is_the_one_document_on_stdout() {
    let output = vmirror(&["list", "--json", "--agent", "/nonexistent/api.sock"]);
    assert_eq!(output.status.code(), Some(2));
    let error: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(error["error"]["kind"], "agent-not-running");
    assert!(error["error"]["hint"].as_str().unwrap().contains("vmirror agent"));
    let usage = vmirror(&["--json", "migrate", "web1"]);
    assert_eq!(usage.status.code(), Some(2));
    assert_eq!(serde_json::from_slice::<Value>(&usage.stdout).unwrap()["error"]["kind"], "usage");
}

#[test]
fn bad_usage_is_refused_before_anything_is_asked() {
    let to = |more: &[&'static str]| refused(&[&["migrate", "web1", "--to", "b:7600"], more].concat());
    assert!(to(&["--downtime", "soon"]).contains("invalid value 'soon' for '--downtime <TIME>'"));
    assert!(to(&["--downtime", "50"]).contains("invalid value '50' for '--downtime <TIME>'"));
    assert!(to(&["--bandwidth", "much"]).contains("\"much\" is not a rate such as 500MiB/s"));
    assert!(to(&["--streams", "0"]).contains("--streams"));
    assert!(
        to(&["--downtime", "3s", "--max-downtime", "1s"])
            .contains("--max-downtime 1s is below --downtime 3s")
    );
    assert!(to(&["--timeout", "1ms"]).contains("--timeout"));
    assert!(to(&["--disks", "copy"]).contains("possible values: auto, mirror, shared"));
    assert!(to(&["--on-diverge", "hope"]).contains("--on-diverge"));
    assert!(refused(&["show", "../etc"]).contains("\"../etc\" cannot name a VM"));
    assert!(refused(&["report", "no-id"]).contains("an id has digits"));
    assert!(refused(&["fly"]).contains("unrecognized subcommand 'fly'"));
}

#[test]
fn help_and_version_are_on_stdout_and_no_error() {
    for arguments in [&["--help"][..], &["--version"], &["migrate", "--help"]] {
        let output = vmirror(arguments);
        assert!(output.status.success());
        assert!(text(&output.stdout).contains("vmirror"), "{arguments:?}");
        assert_eq!(text(&output.stderr), "");
    }
}

#[test]
fn a_configuration_that_cannot_be_used_is_refused_by_file_line_and_key() {
    let site = Site::new();
    let file = site.path("bad.toml");
    let config = |text: &str| {
        std::fs::write(&file, text).unwrap();
        refused(&["agent", "--config", file.to_str().unwrap()])
    };
    let good = std::fs::read_to_string(site.path("agent.toml")).unwrap();
    assert!(
        config(&good.replace("ram_dir", "ram_directory"))
            .contains("bad.toml:6: unknown key \"ram_directory\"")
    );
    assert!(
        config(&format!("{good}[metrics]\nlisten = \"127.0.0.1:1\"\n"))
            .contains("not yet available in this version")
    );
    assert!(config(&good.replace("name = \"host-a\"\n", "")).contains("name is missing; add it"));
    assert!(
        config(&good.replace("host-a\"\nlisten", "host-b\"\nlisten"))
            .contains("this agent is to be \"host-b\"")
    );
    assert!(config(&good.replace("ca.pem", "no.pem")).contains("no.pem"));
    assert!(config(&good.replace("ram_dir = \".\"", "ram_dir = \"/nonexistent\"")).contains("/nonexistent"));
    assert!(refused(&["agent", "--config", "/nonexistent.toml"]).contains("/nonexistent.toml"));
}

#[test]
fn certificates_are_made_with_words_or_json_and_never_overwritten() {
    let directory = tempfile::tempdir().unwrap();
    let dir = directory.path().to_str().unwrap();
    let made = vmirror(&["cert", "init", "--dir", dir, "--json"]);
    assert!(made.status.success());
    let made: Value = serde_json::from_slice(&made.stdout).unwrap();
    assert_eq!(made, json!({"certificate": format!("{dir}/ca.pem"), "key": format!("{dir}/ca-key.pem")}));
    let key = std::fs::read(directory.path().join("ca-key.pem")).unwrap();
    assert!(refused(&["cert", "init", "--dir", dir]).contains("ca"));
    assert_eq!(std::fs::read(directory.path().join("ca-key.pem")).unwrap(), key);
    let issue =
        vmirror(&["cert", "issue", "--dir", dir, "--name", "host-a", "--address", "10.9.0.2", "--quiet"]);
    assert!(issue.status.success() && issue.stdout.is_empty());
    assert!(Path::new(dir).join("host-a-key.pem").exists());
}

#[test]
fn an_agent_without_machines_answers_in_words_and_in_json_and_ends_at_sigterm() {
    let mut agent = Agent::start();
    for (arguments, words, document) in [
        (&["list"][..], "no VMs here", json!([])),
        (&["status"], "nothing is being migrated", json!([])),
        (&["history"], "no migration has ended here yet", json!([])),
    ] {
        let output = agent.ask(arguments);
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        assert!(text(&output.stdout).contains(words), "{arguments:?}: {}", text(&output.stdout));
        let output = agent.ask(&[arguments, &["--json"]].concat());
        assert_eq!(serde_json::from_slice::<Value>(&output.stdout).unwrap(), document);
        assert_eq!(text(&output.stderr), "");
    }
    let output = agent.ask(&["events"]);
    assert!(output.status.success() && output.stdout.is_empty());

    for arguments in [
        &["show", "web9"][..],
        &["stop", "web9"],
        &["status", "web9"],
        &["switch", "web9"],
        &["cancel", "web9"],
        &["verify", "web9"],
        &["resolve", "web9", "--give-up"],
        &["check", "web9", "--to", "127.0.0.1:7600"],
        &["migrate", "web9", "--to", "127.0.0.1:7600"],
        &["mirror", "web9", "--to", "127.0.0.1:7600"],
    ] {
        let output = agent.ask(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        let line = text(&output.stderr);
        assert!(
            line.contains("error: no VM is called \"web9\"; there are none; start one with `vmirror run`"),
            "{line}"
        );
    }
    let output = agent.ask(&["report", "0b9e"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(
        text(&output.stderr)
            .contains("no migration has an id that begins with \"0b9e\"; see `vmirror history`")
    );

    let config = agent.site.path("agent.toml");
    assert!(
        refused(&["agent", "--config", config.to_str().unwrap()]).contains(&agent.process.id().to_string())
    );

    assert_eq!(agent.terminate(), Some(0));
    assert!(!agent.site.path("api.sock").exists());
}

#[test]
fn a_service_manager_is_told_when_the_agent_is_ready_and_when_it_goes() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("notify");
    let socket = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let told = || {
        let mut bytes = [0; 512];
        let length = socket.recv(&mut bytes).unwrap();
        text(&bytes[..length]).trim().to_owned()
    };
    let mut agent = Agent::start_by(&["env", &format!("NOTIFY_SOCKET={}", path.display())], Site::new());
    assert_eq!(told(), "READY=1");
    assert_eq!(agent.terminate(), Some(0));
    assert_eq!(told(), "STOPPING=1");
}
