//! The testbed's agents: the real program, started and ended.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use testbed::{AgentOptions, Programs, Testbed, TestbedError, fault, root_or_skip};

/// Whether there is a vmirror to start: `make test` builds it first, a plain `cargo test` of the testbed alone may not have it.
fn built_or_skip(what: &str) -> bool {
    let built = Programs::find().vmirror.is_some();
    if !built {
        eprintln!("SKIPPED {what}: vmirror has not been built");
    }
    built
}

fn comes_and_goes(testbed: &Testbed) {
    for host in testbed.hosts() {
        let before = host.inventory().unwrap();
        host.start_agent().unwrap();
        let agent = host.agent_pid().unwrap();
        assert!(host.processes().contains(&agent));
        let list = host.vmirror(&["list", "--json"]).unwrap();
        assert!(list.status.success(), "{}", String::from_utf8_lossy(&list.stderr));
        let running = host.inventory().unwrap();
        assert!(running.sockets.keys().any(|socket| socket.starts_with("listening")), "{running:?}");
        assert!(host.stop_agent().unwrap().unwrap().success());
        assert_eq!(host.agent_pid(), None);

        host.start_agent().unwrap();
        assert!(!host.kill_agent().unwrap().unwrap().success());
        assert_eq!(fault::state(agent), None);
        // After a kill the next agent must be able to begin.
        host.start_agent().unwrap();
        host.stop_agent().unwrap();
        let after = host.inventory().unwrap();
        assert_eq!(
            (before.processes, before.sockets, before.ram_bytes),
            (after.processes, after.sockets, after.ram_bytes)
        );
    }
}

#[test]
fn agents_on_loopback_come_and_go() {
    if built_or_skip("agents_on_loopback_come_and_go") {
        comes_and_goes(&Testbed::rootless().unwrap());
    }
}

#[test]
fn agents_in_namespaces_come_and_go() {
    let name = "agents_in_namespaces_come_and_go";
    if built_or_skip(name) && root_or_skip(name) {
        comes_and_goes(&Testbed::new().unwrap());
    }
}

#[test]
fn an_agent_with_a_bad_configuration_is_reported_with_its_own_words() {
    if !built_or_skip("an_agent_with_a_bad_configuration_is_reported_with_its_own_words") {
        return;
    }
    let testbed = Testbed::rootless().unwrap();
    testbed.a().configure(|config| drop(config.insert("colour".into(), "blue".into()))).unwrap();
    let error = testbed.a().start_agent().unwrap_err();
    assert!(matches!(&error, TestbedError::Ended { last, .. } if last.contains("colour")), "{error}");
    assert_eq!(testbed.a().agent_pid(), None);
}

#[test]
fn an_agent_starts_on_an_old_kernel_and_can_be_held_up() {
    if !built_or_skip("an_agent_starts_on_an_old_kernel_and_can_be_held_up") {
        return;
    }
    let testbed = Testbed::rootless().unwrap();
    let host = testbed.a();
    host.start_agent_with(&AgentOptions { old_kernel: true, ..AgentOptions::default() }).unwrap();
    let paused = fault::pause(host.agent_pid().unwrap());
    drop(paused);
    assert!(host.vmirror(&["list"]).unwrap().status.success());
    host.settle(&host.inventory().unwrap(), Duration::from_secs(1)).unwrap().unwrap();
}
