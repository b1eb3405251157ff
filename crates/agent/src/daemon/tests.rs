use host::Record;
use serde_json::json;

use super::*;
use crate::api::tests::config;
use crate::api::types::VmState;

/// A copy from host-b that is complete, and whose QEMU nobody looks for.
fn ready_copy() -> Record {
    let session = "5e5510a0-0000-4000-8000-000000000001";
    serde_json::from_value(json!({
        "name": "web1",
        "generation": 3,
        "ownership": { "incoming": { "session": session, "from": "host-b", "ready": true } },
        "origin": "arrived",
        "arrived_by": session,
        "arrived_from": "host-b",
        "resuming": false,
        "process": null,
        "argv": [],
        "qmp_socket": "/nonexistent.qmp",
        "memory": 0,
        "made": { "files": [], "taps": [] },
    }))
    .unwrap()
}

#[tokio::test]
async fn a_copy_is_looked_after_though_the_handling_of_its_source_has_failed() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(config(directory.path())).await.unwrap();
    let vms = daemon.vms().clone();
    vms.host().journal.claim(ready_copy()).unwrap();
    assert!(vms.views().await.is_empty());
    served(&vms, "host-b", async { panic!("a defect, made for this test") }).await;
    let views = vms.views().await;
    assert_eq!((views[0].name.as_str(), views[0].state), ("web1", VmState::Uncertain));
    daemon.run(std::future::ready(())).await;
}

#[tokio::test]
async fn a_copy_is_not_in_doubt_because_of_another_connection_of_its_source() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(config(directory.path())).await.unwrap();
    let vms = daemon.vms().clone();
    vms.host().journal.claim(ready_copy()).unwrap();
    served(&vms, "host-b", async { None }).await;
    served(&vms, "host-b", async { Some("web2".parse().unwrap()) }).await;
    assert!(vms.views().await.is_empty());
    served(&vms, "host-b", async { Some("web1".parse().unwrap()) }).await;
    assert_eq!(vms.views().await[0].state, VmState::Uncertain);
    daemon.run(std::future::ready(())).await;
}

#[tokio::test]
async fn a_peer_with_too_many_connections_is_turned_away_and_another_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(config(directory.path())).await.unwrap();
    let address = daemon.link().to_string();
    let peer = |name: &str| {
        let files = link::certificates::issue(directory.path(), name, &[]).unwrap();
        let identity =
            Identity::load(&directory.path().join("ca.pem"), &files.certificate, &files.key).unwrap();
        Endpoint::new(&identity, Deadlines::default()).unwrap()
    };
    let (many, other) = (peer("host-b"), peer("host-c"));
    let (end, ended) = tokio::sync::oneshot::channel::<()>();
    let running = tokio::spawn(daemon.run(async { drop(ended.await) }));
    // None of them says anything, which they may for ten seconds.
    let mut silent = Vec::new();
    for _ in 0..PerPeer::MOST {
        silent.push(many.connect(&address).await.unwrap());
    }
    let (_sender, mut one_more) = many.connect(&address).await.unwrap().split();
    let turned_away = one_more.receive::<()>().await.unwrap_err().to_string();
    assert!(turned_away.contains("too many connections"), "{turned_away}");
    let (_other_sender, mut of_another) = other.connect(&address).await.unwrap().split();
    let heard = tokio::time::timeout(Duration::from_millis(100), of_another.receive::<()>()).await;
    assert!(heard.is_err(), "{heard:?}");
    drop(end);
    running.await.unwrap();
}

#[test]
fn a_connection_that_has_ended_is_not_counted() {
    let peers = PerPeer::default();
    let all: Vec<Counted> = (0..PerPeer::MOST).map(|_| peers.count("a").unwrap()).collect();
    assert!(peers.count("a").is_none() && peers.count("b").is_some());
    drop(all);
    assert!(peers.count("a").is_some());
    assert!(peers.lock().is_empty());
}
