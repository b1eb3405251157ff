//! The API over its real socket, with a whole agent behind it.

use std::path::Path;
use std::time::Duration;

use ownership::VmName;
use reqwest::{Client, Method, StatusCode};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::api::refusal::Refusal;
use crate::api::types::{Doubt, ErrorBody, EventKind};
use crate::error::AgentError;
use crate::sessions::tests::report;
use crate::vms::Vms;
use crate::{Config, Daemon, LockError, StartError};

/// An agent that runs in this process until it is dropped or told to end.
struct Agent {
    directory: TempDir,
    http: Client,
    vms: Vms,
    end: Option<oneshot::Sender<()>>,
    running: JoinHandle<()>,
}

pub(crate) fn config(directory: &Path) -> Config {
    if !directory.join("ca.pem").exists() {
        link::certificates::init(directory).unwrap();
        link::certificates::issue(directory, "host-a", &["127.0.0.1".to_owned()]).unwrap();
    }
    let text = r#"
        name = "host-a"
        listen = "127.0.0.1:0"
        api = "api.sock"
        state_dir = "state"
        run_dir = "run"
        ram_dir = "."
        tls = { ca = "ca.pem", cert = "host-a.pem", key = "host-a-key.pem" }
    "#;
    Config::parse(&directory.join("agent.toml"), text).unwrap()
}

async fn agent() -> Agent {
    agent_in(tempfile::tempdir().unwrap()).await
}

async fn agent_in(directory: TempDir) -> Agent {
    let daemon = Daemon::start(config(directory.path())).await.unwrap();
    let vms = daemon.vms().clone();
    let (end, ended) = oneshot::channel();
    let running = tokio::spawn(daemon.run(async move {
        // Dropped or sent: both end it.
        let _ = ended.await;
    }));
    let http = Client::builder().unix_socket(directory.path().join("api.sock")).build().unwrap();
    Agent { directory, http, vms, end: Some(end), running }
}

impl Agent {
    async fn ask(&self, method: Method, path: &str, body: Option<Value>) -> (StatusCode, Value) {
        let mut request = self.http.request(method, format!("http://agent{path}"));
        if let Some(body) = body {
            request = request.json(&body);
        }
        let response = request.send().await.unwrap();
        (response.status(), response.json().await.unwrap())
    }

    async fn refused(&self, method: Method, path: &str, body: Option<Value>) -> (u16, String, String) {
        let (status, body) = self.ask(method, path, body).await;
        let error = serde_json::from_value::<ErrorBody>(body).unwrap().error;
        assert!(!error.hint.is_empty(), "{path}: no hint");
        (status.as_u16(), error.kind, error.message)
    }

    async fn end(mut self) -> TempDir {
        self.end.take();
        tokio::time::timeout(Duration::from_secs(20), self.running).await.unwrap().unwrap();
        self.directory
    }
}

#[tokio::test]
async fn an_agent_says_who_it_is() {
    let agent = agent().await;
    let (status, who) = agent.ask(Method::GET, "/v1/agent", None).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!((&who["name"], &who["vms"], &who["sessions"]), (&json!("host-a"), &json!(0), &json!(0)));
    assert!(who["link"].as_str().unwrap().starts_with("127.0.0.1:"), "{who}");
    assert_eq!(agent.ask(Method::GET, "/v1/vms", None).await.1, json!([]));
    assert_eq!(agent.ask(Method::GET, "/v1/sessions", None).await.1, json!([]));
    agent.end().await;
}

#[tokio::test]
async fn a_history_that_cannot_be_used_keeps_no_agent_down() {
    for (damage, words) in [
        ("this is no database, and never was one; it is some text in its place", "not a database"),
        ("", "schema 99"),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("state/history.db");
        std::fs::create_dir(directory.path().join("state")).unwrap();
        if damage.is_empty() {
            let newer = rusqlite::Connection::open(&file).unwrap();
            newer.pragma_update(None, "user_version", 99).unwrap();
        } else {
            std::fs::write(&file, damage).unwrap();
        }
        let before = std::fs::read(&file).unwrap();
        let agent = agent_in(directory).await;
        let (status, who) = agent.ask(Method::GET, "/v1/agent", None).await;
        assert_eq!((status, &who["problems"][0]["kind"]), (StatusCode::OK, &json!("history-off")));
        let refused = agent.refused(Method::GET, "/v1/history", None).await;
        assert_eq!((refused.0, &*refused.1), (503, "history-off"));
        assert!(refused.2.contains("the history is off") && refused.2.contains(words), "{}", refused.2);
        assert_eq!(agent.refused(Method::GET, "/v1/history/0b9e", None).await.1, "history-off");
        assert_eq!(agent.ask(Method::GET, "/v1/vms", None).await.1, json!([]));
        let directory = agent.end().await;
        assert_eq!(
            std::fs::read(directory.path().join("state/history.db")).unwrap(),
            before,
            "left as it is"
        );
    }
    let agent = agent().await;
    assert_eq!(agent.ask(Method::GET, "/v1/agent", None).await.1.get("problems"), None);
    agent.end().await;
}

#[tokio::test]
async fn what_is_not_known_of_machines_that_have_left_is_told() {
    for (file, kind) in [
        ("left-images.json", "left-images-unreadable"),
        ("remnants.json", "left-images-unreadable"),
        ("kept-images.json", "left-images-unreadable"),
        ("forwards.json", "forwards-unreadable"),
    ] {
        let mut directory = tempfile::tempdir().unwrap();
        let state = directory.path().join("state");
        std::fs::create_dir(&state).unwrap();
        // Nothing reads a directory, root or not.
        std::fs::create_dir(state.join(file)).unwrap();
        for words in ["cannot be read", "cannot be understood", "could not be understood"] {
            let agent = agent_in(directory).await;
            let told = agent.ask(Method::GET, "/v1/agent", None).await.1["problems"].clone();
            let told = told.as_array().cloned().unwrap_or_default();
            let [only] = &told[..] else { panic!("{file}, {words}: {told:?}") };
            let message = only["message"].as_str().unwrap();
            assert!(only["kind"] == kind && message.contains(words) && message.contains(file), "{only}");
            directory = agent.end().await;
            let file = directory.path().join("state").join(file);
            if file.is_dir() {
                std::fs::remove_dir(&file).unwrap();
                std::fs::write(&file, "of another time").unwrap();
            }
        }
    }
}

#[tokio::test]
async fn every_refusal_has_its_status_and_kind_and_says_what_to_do() {
    let agent = agent().await;
    let to = || Some(json!({"to": "127.0.0.1:7600"}));
    let post = Method::POST;
    for (method, path, body, status, kind, words) in [
        (Method::GET, "/v1/vms/web9", None, 404, "unknown-vm", "no VM is called \"web9\"; there are none"),
        (Method::GET, "/v1/vms/-x", None, 400, "bad-name", "\"-x\" cannot name a VM"),
        (post.clone(), "/v1/vms/web9/migrate", to(), 404, "unknown-vm", "web9"),
        (post.clone(), "/v1/vms/web9/check", to(), 404, "unknown-vm", "web9"),
        (post.clone(), "/v1/vms/web9/mirror", Some(json!({"to": "b"})), 400, "bad-address", "\"b\""),
        (
            post.clone(),
            "/v1/vms/web9/migrate",
            Some(json!({"to": "b:1", "fast": true})),
            400,
            "bad-request",
            "fast",
        ),
        (
            post.clone(),
            "/v1/vms/web9/migrate",
            Some(json!({"to": "b:1", "options": {"downtime": "2s"}})),
            400,
            "bad-option",
            "--max-downtime 1s is below --downtime 2s",
        ),
        (post.clone(), "/v1/vms/web9/switch", None, 404, "unknown-vm", "web9"),
        (post.clone(), "/v1/vms/web9/verify", None, 404, "unknown-vm", "web9"),
        (post.clone(), "/v1/vms/web9/cancel", None, 404, "unknown-vm", "web9"),
        (post.clone(), "/v1/vms/web9/stop", Some(json!({})), 404, "unknown-vm", "web9"),
        (
            post.clone(),
            "/v1/vms/web9/resolve",
            Some(json!({"decision": "run-here"})),
            404,
            "unknown-vm",
            "web9",
        ),
        (
            post.clone(),
            "/v1/vms/web9/resolve",
            Some(json!({"decision": "maybe"})),
            400,
            "bad-request",
            "maybe",
        ),
        (
            post.clone(),
            "/v1/vms/web9/bandwidth",
            Some(json!({"bandwidth": 1})),
            400,
            "bad-option",
            "--bandwidth",
        ),
        (
            post.clone(),
            "/v1/vms/web9/adopt",
            Some(json!({"qmp": "q"})),
            400,
            "bad-request",
            "q is not an absolute",
        ),
        (
            post.clone(),
            "/v1/vms",
            Some(json!({"name": "a/b", "argv": [], "directory": "/"})),
            400,
            "bad-request",
            "a/b",
        ),
        (post, "/v1/vms", None, 400, "bad-request", "EOF"),
        (Method::GET, "/v1/sessions/x", None, 400, "bad-request", "UUID"),
        (
            Method::GET,
            "/v1/sessions/00000000-0000-4000-8000-000000000000/events",
            None,
            404,
            "unknown-migration",
            "00000000-0000-4000-8000-000000000000",
        ),
        (Method::GET, "/v1/history/abc", None, 404, "unknown-migration", "\"abc\""),
        (Method::GET, "/v1/history?limit=x", None, 400, "bad-request", "limit"),
        (Method::GET, "/v2/vms", None, 404, "no-such-path", "/v2/vms"),
        (Method::DELETE, "/v1/vms", None, 405, "no-such-method", "DELETE"),
    ] {
        let answer = agent.refused(method.clone(), path, body).await;
        assert_eq!((answer.0, answer.1.as_str()), (status, kind), "{method} {path}: {}", answer.2);
        assert!(answer.2.contains(words), "{method} {path}: {}", answer.2);
    }
    agent.end().await;
}

#[test]
fn conflicts_are_409_and_say_how_to_go_on() {
    let vm = || "web1".to_owned();
    let doubt = Doubt::Received { session: uuid::Uuid::nil(), from: "host-b".to_owned() };
    for (error, kind) in [
        (AgentError::NameTaken(vm()), "name-taken"),
        (AgentError::InSession { vm: vm(), to: "b:1".to_owned() }, "in-migration"),
        (AgentError::Held { vm: vm(), doing: "stopped" }, "busy"),
        (AgentError::NoSession { vm: vm(), last: String::new() }, "no-mirror"),
        (AgentError::SessionEnded(vm()), "migration-ended"),
        (AgentError::Uncertain { vm: vm(), doubt }, "uncertain"),
        (AgentError::HandingOver(vm()), "handing-over"),
        (AgentError::NotUncertain(vm()), "not-uncertain"),
    ] {
        let (status, detail) = Refusal::from(error).into_parts();
        assert_eq!((status, detail.kind.as_str()), (StatusCode::CONFLICT, kind));
        assert!(!detail.hint.is_empty(), "{kind}");
    }
}

#[tokio::test]
async fn the_history_is_there_again_after_a_restart() {
    let agent = agent().await;
    let id = "0b9e5b0c-6d1f-4c4e-9f57-0d3b8f6b1a11";
    let report = report(id);
    agent.vms.history().add(&report).unwrap();
    let agent = agent_in(agent.end().await).await;
    let (_, list) = agent.ask(Method::GET, "/v1/history?vm=web1&limit=5", None).await;
    assert_eq!((&list[0]["id"], &list[0]["outcome"]), (&json!(id), &json!("completed")));
    assert_eq!(agent.ask(Method::GET, "/v1/history?vm=db", None).await.1, json!([]));
    let (_, whole) = agent.ask(Method::GET, "/v1/history/0b9e", None).await;
    assert_eq!(whole, serde_json::to_value(&report).unwrap());
    let (_, session) = agent.ask(Method::GET, &format!("/v1/sessions/{id}"), None).await;
    assert_eq!((&session["state"], &session["report"]["id"]), (&json!("ended"), &json!(id)));
    let stream = agent.http.get(format!("http://agent/v1/sessions/{id}/events")).send().await.unwrap();
    let stream = stream.text().await.unwrap();
    assert!(stream.starts_with("event: report\ndata: {") && stream.ends_with("\n\n"), "{stream}");
    agent.end().await;
}

#[tokio::test]
async fn events_that_were_are_sent_and_those_to_come_are_waited_for_until_the_agent_ends() {
    let agent = agent().await;
    agent.vms.events().tell(Some("web1"), EventKind::VmPaused);
    agent.vms.events().tell(Some("web1"), EventKind::VmResumed);
    let kept = agent.http.get("http://agent/v1/events?follow=false&after=1").send().await.unwrap();
    let kept = kept.text().await.unwrap();
    assert!(kept.contains("id: 2") && !kept.contains("id: 1\n"), "{kept}");
    assert!(kept.contains("\"vm\":\"web1\",\"event\":\"vm-resumed\""), "{kept}");

    let following = agent.http.get("http://agent/v1/events").send().await.unwrap();
    agent.vms.events().tell(None, EventKind::VmPanicked);
    let all = tokio::spawn(following.text());
    agent.end().await;
    let all = all.await.unwrap().unwrap();
    assert_eq!(all.matches("event: event").count(), 3, "{all}");
}

#[tokio::test]
async fn a_second_agent_on_the_same_directories_is_refused_and_the_first_not_disturbed() {
    let agent = agent().await;
    let second = Daemon::start(config(agent.directory.path())).await.unwrap_err();
    assert!(matches!(second, StartError::Lock(LockError::Held { .. })), "{second}");
    let elsewhere =
        Config { state_dir: agent.directory.path().join("other"), ..config(agent.directory.path()) };
    let same_socket = Daemon::start(elsewhere).await.unwrap_err();
    assert!(matches!(same_socket, StartError::Lock(LockError::Held { .. })), "{same_socket}");
    assert_eq!(agent.ask(Method::GET, "/v1/agent", None).await.0, StatusCode::OK);
    let directory = agent.end().await;
    assert!(!directory.path().join("api.sock").exists(), "the socket goes with the agent");
}

#[tokio::test]
async fn an_agent_does_not_start_under_another_name_than_its_certificate_s() {
    let directory = tempfile::tempdir().unwrap();
    let other = Config { name: "host-b".to_owned(), ..config(directory.path()) };
    let error = Daemon::start(other).await.unwrap_err().to_string();
    assert!(error.contains("is of \"host-a\", and this agent is to be \"host-b\""), "{error}");
}

#[tokio::test]
async fn nothing_begins_once_the_agent_is_going_down() {
    let agent = agent().await;
    let vms = agent.vms.clone();
    agent.end().await;
    let name: VmName = "web1".parse().unwrap();
    let error = vms
        .run(name, &["qemu-system-x86_64".to_owned()], std::path::Path::new("/"), false)
        .await
        .unwrap_err();
    assert!(matches!(error, AgentError::ShuttingDown), "{error}");
}
