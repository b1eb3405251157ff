use std::pin::pin;
use std::process::{Child, Command};

use link::{ControlReceiver, ControlSender};
use qemu::Process;
use serde_json::{Value, json};

use super::*;
use crate::network::Frames;
use crate::sender::Sender;
use crate::tail::PostCopies;
use host::Origin;
use ownership::Standing;
use protocol::wire::ToSource;
use testing::{Hosts, Says, qemu};

const SESSION: Uuid = Uuid::from_u128(7);

fn resumes() -> Value {
    json!({"event": "RESUME", "timestamp": {"seconds": 1, "microseconds": 0}})
}

fn refuses() -> Value {
    json!({"error": {"class": "GenericError", "desc": "no"}})
}

fn status(status: &str) -> Value {
    json!({"return": {"status": status, "running": status == "running"}})
}

/// A complete copy on host B, whose QEMU says so, and what host A has to say about it on a new connection.
struct Scene {
    hosts: Hosts,
    record: Record,
    source: Source,
    heard: ControlReceiver,
    _says: ControlSender,
    process: Child,
}

impl Scene {
    async fn new(says: Says) -> Scene {
        Scene::with(says, |_| {}).await
    }

    /// With such a process.
    async fn with(says: Says, process_is: impl FnOnce(&mut Process)) -> Scene {
        let hosts = Hosts::new().await;
        let qmp_socket = hosts.directory.path().join("qmp");
        qemu(&qmp_socket, says);
        let process = Command::new("sleep").arg("600").spawn().unwrap();
        let mut of_qemu = Process::of_pid(process.id(), &qmp_socket).unwrap();
        process_is(&mut of_qemu);
        let from = "host-a".to_owned();
        let standing = Standing {
            ownership: Ownership::Incoming { session: SESSION, from: from.clone(), ready: true },
            arrived_by: Some(SESSION),
            arrived_from: Some(from),
            has_run: false,
            ..Standing::own()
        };
        let record = Record {
            argv: vec!["qemu-system-x86_64".to_owned()],
            process: Some(of_qemu),
            qmp_socket,
            ..Record::new("web1".parse().unwrap(), standing, Origin::Arrived)
        };
        hosts.b.journal.claim(record.clone()).unwrap();
        let address = hosts.address();
        let (connected, (control, peer)) = tokio::join!(hosts.a.endpoint.connect(&address), hosts.accept());
        let (sender, receiver) = control.split();
        let source = Source {
            host: Arc::new(ReceivingHost { host: hosts.b.host.clone(), post_copies: PostCopies::default() }),
            peer,
            sender: Sender(Arc::new(tokio::sync::Mutex::new(sender))),
            receiver,
            attending: None,
            working: None,
            frames: Frames::default(),
            interfaces: None,
        };
        let (_says, heard) = connected.unwrap().split();
        Scene { hosts, record, source, heard, _says, process }
    }

    /// As the source says it that has handed the machine over.
    fn commit(&self) -> wire::Commit {
        wire::Commit {
            session: SESSION.as_bytes().to_vec(),
            name: self.record.name.to_string(),
            generation: self.record.generation + 1,
        }
    }

    /// Asks what became of the machine. Returns as what kind it failed.
    async fn settles(&mut self) -> String {
        let commit = self.commit();
        match self.source.settle(&commit, &|_: Vm| {}).await {
            Err(End::Failed(findings)) => findings[0].kind.clone(),
            other => panic!("{other:?}"),
        }
    }

    fn on_record(&self) -> Option<Record> {
        self.hosts.b.journal.get(&self.record.name)
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[tokio::test]
async fn of_a_qemu_that_may_have_run_the_guest_it_is_not_said_that_it_has_not() {
    let manners: [(&str, Says); 4] = [
        ("it ends when it is told to run it", |_| Vec::new()),
        ("it ends when it has begun to", |command| match command {
            "cont" => vec![resumes()],
            _ => Vec::new(),
        }),
        ("it refuses, and somebody else has it run", |command| match command {
            "cont" => vec![refuses()],
            _ => vec![status("running")],
        }),
        ("it refuses, and the guest has been elsewhere since", |command| match command {
            "cont" => vec![refuses()],
            _ => vec![status("postmigrate")],
        }),
    ];
    for (how, says) in manners {
        let mut scene = Scene::new(says).await;
        assert_eq!(scene.settles().await, "not-resumed", "{how}");
        let now = scene.on_record().unwrap_or_else(|| panic!("{how}, and it is forgotten"));
        assert!(now.standing().is_unseen(), "{how}: {now:?}");
        assert_eq!(scene.hosts.b.journal.mark(SESSION).unwrap(), None, "{how}");
        assert!(scene.process.try_wait().unwrap().is_none(), "{how}, and it is killed");
        // Nor when it is asked once more, or has been killed since while its monitor is open.
        assert_ne!(scene.settles().await, kind::NO_COPY, "{how}");
        scene.process.kill().unwrap();
        assert_ne!(scene.settles().await, kind::NO_COPY, "{how}, and it is killed");
    }
}

#[tokio::test]
async fn a_copy_that_its_qemu_refuses_to_run_is_ended_before_its_source_may_have_it_back() {
    let mut scene = Scene::new(|command| match command {
        "cont" => vec![refuses()],
        _ => vec![status("paused")],
    })
    .await;
    assert_eq!(scene.settles().await, kind::NO_COPY);
    assert!(scene.process.try_wait().unwrap().is_some(), "it was not killed");
    assert_eq!(scene.on_record(), None);
    assert_eq!(scene.hosts.b.journal.mark(SESSION).unwrap(), Some(Mark::NeverRan));
    assert_eq!(scene.settles().await, kind::NO_COPY, "asked once more");
}

#[tokio::test]
async fn a_qemu_that_says_too_late_that_it_has_run_the_guest_has_run_it() {
    let late = QmpError::Deadline { command: "cont", after: Duration::from_secs(30) };
    let scene = Scene::new(|command| match command {
        "cont" => vec![resumes(), json!({"return": {}})],
        _ => vec![status("paused")],
    })
    .await;
    let qmp = Qmp::connect(&scene.record.qmp_socket).await.unwrap();
    let mut events = qmp.events();
    assert!(never_ran(&qmp, &mut events, &late).await, "it was not told to");
    // What it does after the deadline.
    qmp.cont().await.unwrap();
    assert!(!never_ran(&qmp, &mut events, &late).await, "it told of a beginning");
    let (_, mut missed) = broadcast::channel(1);
    assert!(!never_ran(&qmp, &mut missed, &late).await, "it may have told of one, unheard");
}

#[tokio::test]
async fn a_copy_that_becomes_the_owner_while_it_is_to_be_thrown_away_is_not_said_to_be_gone() {
    let mut scene = Scene::new(|_| Vec::new()).await;
    let (commit, journal) = (scene.commit(), Arc::clone(&scene.hosts.b.journal));
    // Who follows the source's word on another connection.
    let deciding = journal.decide(&scene.record.name).await;
    {
        let mut withdrawn = pin!(scene.source.abandon(&commit));
        tokio::select! {
            biased;
            said = withdrawn.as_mut() => panic!("it did not wait: {said:?}"),
            () = std::future::ready(()) => {}
        }
        let from = "host-a".to_owned();
        let event = Event::Committed { session: SESSION, from, generation: commit.generation, mark: None };
        journal.on(&mut scene.record, event, |_| {}).unwrap();
        drop(deciding);
        withdrawn.await.unwrap();
    }
    let heard = scene.heard.receive::<ToSource>().await.unwrap().reply;
    assert!(matches!(heard, Some(Reply::Running(_))), "{heard:?}");
    assert_eq!(scene.on_record().unwrap().ownership, Ownership::Owner);
    assert!(scene.process.try_wait().unwrap().is_none(), "it is killed");
}

#[tokio::test]
async fn a_copy_that_is_not_wanted_is_gone_when_that_is_said() {
    let mut scene = Scene::new(|_| Vec::new()).await;
    let commit = scene.commit();
    let said = scene.source.abandon(&commit).await;
    assert!(matches!(said, Err(End::Cancelled)), "{said:?}");
    assert_eq!(scene.on_record(), None);
    assert!(scene.process.try_wait().unwrap().is_some(), "it was not killed");
    // Nor can anybody have it run any more.
    assert_eq!(scene.settles().await, kind::NO_COPY);
}

#[tokio::test]
async fn a_stranger_hears_of_a_machine_what_is_heard_of_one_that_nobody_knows() {
    let mut scene = Scene::new(|_| Vec::new()).await;
    let journal = Arc::clone(&scene.hosts.b.journal);
    let address = || "10.0.0.2:7600".to_owned();
    let handed = |to: &str| {
        let (session, to) = (SESSION, to.to_owned());
        Ownership::HandedOver { session, to, address: address(), keeper: None }
    };
    let offered =
        |to: &str| ownership::Outgoing { session: SESSION, to: Some(to.to_owned()), address: address() };
    for (name, standing) in [
        ("to-others", Standing { ownership: handed("host-c"), ..Standing::own() }),
        ("to-it", Standing { ownership: handed("host-a"), ..Standing::own() }),
        ("offered-others", Standing { outgoing: vec![offered("host-c")], ..Standing::own() }),
        ("offered-it", Standing { outgoing: vec![offered("host-a")], ..Standing::own() }),
        ("its-own", Standing::own()),
    ] {
        journal.claim(Record::new(name.parse().unwrap(), standing, Origin::Run)).unwrap();
    }
    // Host A asks. What waits here came from it, and is not its own to have.
    for (name, session, owner) in [
        ("nobody-knows", SESSION, wire::Owner::Unknown),
        ("to-others", SESSION, wire::Owner::Unknown),
        ("offered-others", SESSION, wire::Owner::Unknown),
        ("its-own", SESSION, wire::Owner::Unknown),
        ("web1", SESSION, wire::Owner::Unknown),
        ("to-it", Uuid::from_u128(8), wire::Owner::Unknown),
        ("offered-it", Uuid::from_u128(8), wire::Owner::Unknown),
        ("to-it", SESSION, wire::Owner::Yours),
        ("offered-it", SESSION, wire::Owner::Mine),
    ] {
        let commit =
            wire::Commit { session: session.as_bytes().to_vec(), name: name.to_owned(), generation: 2 };
        scene.source.whose(&commit).await.unwrap();
        let heard = scene.heard.receive::<ToSource>().await.unwrap().reply;
        // Not a bit more than that.
        assert_eq!(heard, Some(Reply::Belongs(wire::Belongs { owner: owner.into() })), "{name}");
    }
}

/// Keeps a process from ending that is killed: it stands still on its way out until this is dropped, as one does whose storage is dead.
/// Of use to the thread that made it only.
struct Lingers(libc::pid_t);

impl Lingers {
    fn of(process: &Child) -> Lingers {
        let pid = libc::pid_t::try_from(process.id()).unwrap();
        // SAFETY: it takes numbers, and traces a child of this very program.
        let traced = unsafe { libc::ptrace(libc::PTRACE_SEIZE, pid, 0, libc::PTRACE_O_TRACEEXIT) };
        assert_eq!(traced, 0, "{}", std::io::Error::last_os_error());
        Lingers(pid)
    }
}

impl Drop for Lingers {
    fn drop(&mut self) {
        // SAFETY: as above.
        unsafe { libc::ptrace(libc::PTRACE_DETACH, self.0, 0, 0) };
    }
}

impl Scene {
    /// The source does not want its copy, and nobody says that it is gone.
    async fn is_not_said_to_be_gone(&mut self, why: &str) {
        let commit = self.commit();
        // Neither at once nor when it is asked again.
        for _ in 0..2 {
            match self.source.abandon(&commit).await {
                Err(End::Failed(findings)) => {
                    assert_eq!(findings[0].kind, why);
                    assert!(
                        findings
                            .iter()
                            .all(|found| ![kind::NO_COPY, kind::UNKNOWN_COPY].contains(&&*found.kind))
                    );
                }
                other => panic!("{other:?}"),
            }
            let record = self.on_record().expect("its record is kept");
            assert!(matches!(record.ownership, Ownership::Incoming { session: SESSION, ready: true, .. }));
            assert!(record.qmp_socket.exists(), "its files are kept");
        }
    }
}

#[tokio::test]
async fn a_copy_whose_qemu_was_killed_and_does_not_end_is_not_said_to_be_gone_until_it_is() {
    let mut scene = Scene::new(|_| Vec::new()).await;
    let lingers = Lingers::of(&scene.process);
    scene.is_not_said_to_be_gone("process-lingers").await;
    drop(lingers);
    let commit = scene.commit();
    let said = scene.source.abandon(&commit).await;
    assert!(matches!(said, Err(End::Cancelled)), "{said:?}");
    assert_eq!(scene.on_record(), None);
    assert_eq!(scene.settles().await, kind::NO_COPY);
}

#[tokio::test]
async fn a_copy_of_whose_qemu_nobody_can_tell_whether_it_has_ended_is_not_said_to_be_gone() {
    let elsewhere = |process: &mut Process| process.namespace = process.namespace.map(|own| own + 1);
    let mut scene = Scene::with(|_| Vec::new(), elsewhere).await;
    assert!(scene.record.process.as_ref().is_some_and(|process| process.namespace.is_some()));
    scene.is_not_said_to_be_gone("process-unclear").await;
    assert!(scene.process.try_wait().unwrap().is_none(), "it may be another's");
}
