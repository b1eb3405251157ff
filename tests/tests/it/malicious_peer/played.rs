//! A source that is played: a migration is recorded up to its end, and said again by the test, as often as it likes and up to where it
//! likes. So a lie follows on everything that is true, and costs no guest that runs.

use std::fs;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use std::io::Write as _;

use super::liar::{Lies, Say, before, endpoint, resident};
use end_to_end::{Guest, PATIENCE, Pair, image, until, vmirror};
use link::{Bandwidth, ControlReceiver, ControlSender, DataSender, Endpoint};
use protocol::wire::{
    Belongs, Commit, Known, Neighbour, Nothing, Owner, Reply, Request, Reserve, Resume, Sums, ToDestination,
    ToSource,
};
use testbed::guest_spec::GuestSpec;
use testbed::root_or_skip;
use uuid::Uuid;

/// The most that the destination's agent may ever take.
const MOST_MIB: u64 = 500;
/// Longest part of a file.
const PART: usize = 256 << 10;
/// What a machine boots from.
const BOOT_FILES: [&str; 2] = ["vmlinuz", "initrd"];

/// All that a source has said in a migration up to its Load.
struct Recording {
    reserve: Reserve,
    /// How its devices were said.
    devices: Vec<Request>,
    /// Its only stream.
    data: Vec<u8>,
    load: Sums,
}

impl Recording {
    /// Of a migration that is cancelled instead of loaded.
    fn of(pair: &Pair) -> Recording {
        let (said, carried) = (Arc::<Mutex<Vec<Request>>>::default(), Arc::<Mutex<Vec<u8>>>::default());
        let (says, carries) = (Arc::clone(&said), Arc::clone(&carried));
        let lies = Lies {
            requests: Box::new(move |request| {
                says.lock().unwrap().push(request.clone());
                let cancel = || Request::Cancel(Commit::default());
                vec![Say::Request(if matches!(request, Request::Load(_)) { cancel() } else { request })]
            }),
            data: Box::new(move |_, bytes| {
                carries.lock().unwrap().extend_from_slice(bytes);
                bytes.to_vec()
            }),
            ..Lies::default()
        };
        let migrated = before(pair, lies, |address| {
            vmirror(pair.a(), &["migrate", "vm", "--to", address, "--json", "--streams", "1"])
        });
        let told = migrated.report().error.unwrap().finding.message;
        assert_eq!(told, "host-b: the destination said Cancelled instead of being ready", "{}", pair.logs());
        let said = std::mem::take(&mut *said.lock().unwrap());
        let (mut reserve, mut load, mut devices) = (None, None, Vec::new());
        for request in said {
            match request {
                Request::Reserve(first) => reserve = Some(first),
                Request::Load(sums) => load = Some(sums),
                device @ (Request::HoldDevices(_) | Request::DeviceState(_)) => devices.push(device),
                _ => {}
            }
        }
        let data = std::mem::take(&mut *carried.lock().unwrap());
        Recording { reserve: reserve.unwrap(), devices, data, load: load.unwrap() }
    }
}

/// The agent that is lied to, and what is known of the migration that is said to it again.
struct Stage<'a> {
    pair: &'a Pair,
    as_a: Endpoint,
    recording: Recording,
}

/// A session of a source that is played.
struct Played {
    session: Uuid,
    sender: ControlSender,
    receiver: ControlReceiver,
    /// Kept open.
    _data: Option<DataSender>,
}

impl Played {
    async fn say(&mut self, request: Request) {
        self.sender.send(&ToDestination { request: Some(request) }).await.unwrap();
    }

    async fn say_all(&mut self, requests: Vec<Request>) {
        for request in requests {
            // Whoever has heard enough has closed.
            if self.sender.send(&ToDestination { request: Some(request) }).await.is_err() {
                return;
            }
        }
    }

    /// What is said next that is not only said on the way.
    async fn hear(&mut self) -> Reply {
        loop {
            let heard = tokio::time::timeout(PATIENCE, self.receiver.receive::<ToSource>()).await;
            match heard.expect("something is answered").unwrap().reply.unwrap() {
                Reply::Working(_) | Reply::Holds(_) => {}
                reply => return reply,
            }
        }
    }

    /// That it failed, and why.
    async fn hears_failed(&mut self) -> String {
        loop {
            match self.hear().await {
                Reply::Failed(failed) => return failed.findings[0].message.clone(),
                Reply::Audited(_) | Reply::PostCopyReady(_) => {}
                other => panic!("said {other}"),
            }
        }
    }

    fn commit(&self, name: &str, generation: u64) -> Commit {
        Commit { session: self.session.as_bytes().to_vec(), name: name.to_owned(), generation }
    }
}

impl Stage<'_> {
    async fn connected(&self, session: Uuid) -> Played {
        let to = self.pair.b().listen().to_string();
        let (sender, receiver) = self.as_a.connect(&to).await.unwrap().split();
        Played { session, sender, receiver, _data: None }
    }

    /// Says Reserve.
    async fn begins(&self, change: impl FnOnce(&mut Reserve)) -> Played {
        let mut played = self.connected(Uuid::new_v4()).await;
        let mut reserve =
            Reserve { session: played.session.as_bytes().to_vec(), ..self.recording.reserve.clone() };
        change(&mut reserve);
        played.say(Request::Reserve(reserve)).await;
        played
    }

    /// Is asked for the files that the machine boots from.
    async fn is_to_ship(&self) -> Played {
        let mut played = self.begins(|_| {}).await;
        let reply = played.hear().await;
        assert!(matches!(&reply, Reply::Lacking(lacking) if lacking.paths.len() == 2), "{reply}");
        played
    }

    /// Has everything set aside.
    async fn is_reserved(&self, change: impl FnOnce(&mut Reserve)) -> Played {
        let mut played = self.begins(change).await;
        let reply = played.hear().await;
        assert!(matches!(reply, Reply::Reserved(_)), "{reply:?}\n{}", self.pair.logs());
        played
    }

    /// Has its copy complete.
    async fn is_ready(&self) -> Played {
        let mut played = self.is_reserved(|_| {}).await;
        let Recording { devices, data, load, .. } = &self.recording;
        let to = self.pair.b().listen().to_string();
        let mut stream = self.as_a.open_data(&to, played.session, 0, Bandwidth::new(None)).unwrap();
        stream.write_all(data).and_then(|()| stream.flush()).unwrap();
        played._data = Some(stream);
        played.say_all(devices.clone()).await;
        loop {
            match played.hear().await {
                Reply::Barrier(sums) if sums.barrier == load.barrier => break,
                Reply::Barrier(_) => {}
                other => panic!("said {other:?}"),
            }
        }
        played.say(Request::Load(load.clone())).await;
        let reply = played.hear().await;
        assert!(matches!(reply, Reply::Ready(_)), "{reply:?}\n{}", self.pair.logs());
        played
    }

    /// What is answered to this, the first message of a connection.
    async fn answer_to(&self, request: Request) -> Reply {
        let mut played = self.connected(Uuid::nil()).await;
        played.say(request).await;
        played.hear().await
    }

    /// Asserts that a session has failed for that, and nothing of it is left.
    async fn has_failed(&self, name: &str, mut played: Played, why: &str) {
        let told = played.hears_failed().await;
        assert!(told.contains(why), "{name}: {told}");
        drop(played);
        self.is_gone(name);
        eprintln!("{name}: {told}");
    }

    fn is_gone(&self, name: &str) {
        let b = self.pair.b();
        until("nothing is left of the copy", || self.pair.show("vm", b).is_none());
        assert!(!b.run_dir().join("vm.d").exists() && !b.run_dir().join("vm.missing").exists(), "{name}");
    }

    /// Lies about files that the machine boots from, while one says nothing any more in the middle of a file.
    async fn lies_of_files(&self) -> Played {
        let size = usize::try_from(self.recording.reserve.boot_files[0].size).unwrap();
        let part = |bytes| Request::FilePart(vec![1; bytes]);
        let whole = || [vec![part(PART); size / PART], vec![part(size % PART)]].concat();
        let mut silent = self.is_to_ship().await;
        silent.say(part(PART)).await;
        until("it has a part of a file", || unfinished(self.pair) == 1);
        let lies = [
            (
                "devices in a file",
                vec![part(PART), Request::HoldDevices(Nothing {})],
                "sent HoldDevices out of order",
            ),
            (
                "a hand-over in a file",
                vec![part(PART), Request::Commit(silent.commit("vm", 1))],
                "sent Commit out of order",
            ),
            ("a part beyond a file", vec![part(PART); size / PART + 1], "sends more of a file than there is"),
            ("another file", whole(), "it is not what the source has"),
        ];
        for (name, says, why) in lies {
            let mut played = self.is_to_ship().await;
            played.say_all(says).await;
            self.has_failed(name, played, why).await;
            // That of the silent one.
            until("what came of the file is gone", || unfinished(self.pair) == 1);
        }
        let mut played = self.is_to_ship().await;
        played.say_all(vec![part(PART), Request::Cancel(Commit::default())]).await;
        assert!(matches!(played.hear().await, Reply::Cancelled(_)));
        until("what came of the file is gone", || unfinished(self.pair) == 1);
        silent
    }

    /// Lies before there is a copy.
    async fn lies_while_it_is_copied(&self) {
        let mut played = self.begins(|_| {}).await;
        played.say(Request::HoldDevices(Nothing {})).await;
        self.has_failed("devices while it reserves", played, "sent HoldDevices out of order").await;

        let mut played = self.is_reserved(|_| {}).await;
        played.say(Request::Release(Nothing {})).await;
        self.has_failed("that all is given back, too early", played, "sent Release out of order").await;

        let mut played = self.is_reserved(|_| {}).await;
        let resume = Resume { commit: Some(played.commit("vm", 1)), secret: vec![1; 192] };
        // Of another connection it is no more than that.
        let reply = self.answer_to(Request::Resume(resume.clone())).await;
        assert!(
            matches!(&reply, Reply::Failed(failed) if failed.findings[0].message.contains("was not handed over")),
            "{reply:?}"
        );
        played.say(Request::Resume(resume)).await;
        self.has_failed("the rest of what is not complete", played, "sent Resume out of order").await;

        let mut played = self.is_reserved(|_| {}).await;
        played.say(Request::PostCopy(Nothing {})).await;
        self.has_failed("a post-copy that was not announced", played, "sent PostCopy out of order").await;

        let mut played = self.is_reserved(|reserve| reserve.post_copy = true).await;
        played.say_all(vec![Request::PostCopy(Nothing {}); 2]).await;
        self.has_failed("a post-copy again and again", played, "sent PostCopy out of order").await;

        let mut played = self.is_reserved(|_| {}).await;
        let words = [vec![Request::HoldDevices(Nothing {}); 1000], vec![Request::Audit(Nothing {}); 50]];
        played.say_all(words.concat()).await;
        played.say(Request::Load(self.recording.load.clone())).await;
        self.has_failed("audits of nothing without number", played, "not equal to the original").await;
    }

    /// Lies about a copy that is complete, which only what the protocol says may end, or make this host's.
    async fn lies_of_a_copy_that_is_ready(&self) {
        let pair = self.pair;
        let generation = self.recording.reserve.generation + 1;
        let mut played = self.is_ready().await;
        let (right, other) = (played.commit("vm", generation), played.commit("other", generation));
        let resume = Resume { commit: Some(right.clone()), secret: vec![1; 192] };
        played
            .say_all(vec![
                Request::HoldDevices(Nothing {}),
                Request::DeviceState(vec![0; PART]),
                Request::Audit(Nothing {}),
                Request::Load(self.recording.load.clone()),
                Request::PostCopy(Nothing {}),
                Request::FilePart(vec![1; PART]),
                Request::Resume(resume.clone()),
                Request::Release(Nothing {}),
                Request::EndForwarding(right.clone()),
                Request::Released(right.clone()),
                Request::Commit(played.commit("vm", generation - 1)),
                Request::Commit(played.commit("vm", generation + 1)),
                Request::Commit(Commit { session: vec![7; 16], ..right.clone() }),
            ])
            .await;
        let neighbour = |number: usize| Neighbour {
            netdev: format!("net{number}\n"),
            mac: "of nobody".to_owned(),
            addresses: vec!["999.0.0.1".to_owned(); 60],
        };
        let known = Known { neighbours: (0..200).map(neighbour).collect(), flows: None };
        played.say_all(vec![Request::Known(known); 200]).await;
        // Of other machines than its own nobody is told anything, and of its own what is true.
        for (name, request, why) in [
            ("the rest of what was not handed over", Request::Resume(resume), "was not handed over"),
            ("a hand-over of another's VM", Request::Commit(other.clone()), "knows nothing of that copy"),
            ("the end of another's VM", Request::Cancel(other.clone()), "knows nothing of that copy"),
            ("a network that it has not", Request::EndForwarding(right.clone()), "in another host's network"),
            (
                "the network of another's VM",
                Request::EndForwarding(other.clone()),
                "in another host's network",
            ),
            ("a hand-over of an earlier copy", Request::Commit(played.commit("vm", generation - 1)), ""),
        ] {
            let reply = self.answer_to(request).await;
            let Reply::Failed(failed) = reply else { panic!("{name}: {reply:?}") };
            let told = &failed.findings[0].message;
            assert!(told.contains(why), "{name}: {told}");
            eprintln!("{name}: {told}");
        }
        let whose = self.answer_to(Request::Whose(other.clone())).await;
        assert_eq!(whose, Reply::Belongs(Belongs { owner: Owner::Unknown.into() }));
        let listed = pair.show("vm", pair.b()).unwrap();
        assert!(listed["state"] != "running" && pair.runs_on("other", pair.b()), "{listed}\n{}", pair.logs());

        // By the right words for this copy, with another's name, nothing becomes of either.
        played.say(Request::Commit(other)).await;
        let told = played.hears_failed().await;
        assert!(told.contains("knows nothing of that copy"), "{told}");
        drop(played);
        let listed = pair.show("vm", pair.b()).unwrap();
        assert!(listed["state"] != "running" && pair.runs_on("other", pair.b()), "{listed}\n{}", pair.logs());
        let cancelled = self.answer_to(Request::Cancel(right.clone())).await;
        assert!(matches!(cancelled, Reply::Cancelled(_)), "{cancelled:?}");
        self.is_gone("a copy that was ready");
        let late = self.answer_to(Request::Commit(right)).await;
        assert!(matches!(late, Reply::Failed(_)), "{late:?}");

        // Who says no end of words without meaning is not heard any more, and its copy waits on.
        let mut played = self.is_ready().await;
        played.say_all(vec![Request::Audit(Nothing {}); 17]).await;
        let told = played.hears_failed().await;
        assert!(told.contains("the source sent Audit again and again"), "{told}");
        let right = played.commit("vm", generation);
        drop(played);
        assert!(pair.show("vm", pair.b()).is_some(), "{}", pair.logs());
        let cancelled = self.answer_to(Request::Cancel(right)).await;
        assert!(matches!(cancelled, Reply::Cancelled(_)), "{cancelled:?}");
        self.is_gone("a copy whose source said too much");
    }
}

/// Files at the destination that are not whole.
fn unfinished(pair: &Pair) -> usize {
    fs::read_dir(pair.b().disk_dir())
        .unwrap()
        .filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().starts_with(".vmirror-file-"))
        .count()
}

/// A guest on each host: the one whose migration is recorded, which boots from files that only its host has, and the one that must not
/// notice.
fn guests(pair: &Pair) -> (Guest, Guest) {
    let spec = |name| GuestSpec { fill_mib: 16, rate: 100, ..pair.spec(name, 96) };
    let own = spec("vm");
    for (from, name) in [&own.kernel, &own.initramfs].into_iter().zip(BOOT_FILES) {
        fs::copy(from, image(pair.a(), name)).unwrap();
    }
    let [kernel, initramfs] = BOOT_FILES.map(|name| pair.a().local_dir().join(name));
    let own = GuestSpec { kernel, initramfs, ..own };
    (pair.run(pair.a(), "vm", &own), pair.run(pair.b(), "other", &spec("other")))
}

#[test]
fn a_source_that_lies_of_files_audits_and_a_ready_copy_changes_nothing_here() {
    if !root_or_skip("hosts with storage of their own") {
        return;
    }
    let pair = Pair::with_local_disks();
    let (guest, other) = guests(&pair);
    let (first, others) = (guest.status(), other.status());
    let agent = pair.b().agent_pid().unwrap();
    let held = pair.b().inventory().unwrap();
    let recording = Recording::of(&pair);
    let stage = Stage { pair: &pair, as_a: endpoint(&pair, pair.a()), recording };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let lie = || {
        runtime.block_on(async {
            let silent = stage.lies_of_files().await;
            for name in BOOT_FILES {
                fs::copy(image(pair.a(), name), image(pair.b(), name)).unwrap();
            }
            stage.lies_while_it_is_copied().await;
            stage.lies_of_a_copy_that_is_ready().await;
            // All the time one has said nothing, and nobody has waited for it.
            assert_eq!(unfinished(&pair), 1);
            drop(silent);
        });
        // Its connection ends with its tasks.
        runtime.shutdown_timeout(Duration::from_secs(10));
    };
    pair.a().on_network(lie).unwrap();
    until("what came of the file of the silent one is gone", || unfinished(&pair) == 0);
    pair.holds_but_for_growth(pair.b(), &held);
    assert_eq!(pair.b().agent_pid(), Some(agent));
    let (most, now) = resident(agent);
    assert!(most < MOST_MIB, "the agent took {most} MiB, and has {now} now");
    let log = fs::read_to_string(pair.b().agent_log()).unwrap();
    for said in
        ["sends more of a file than there is", "sent PostCopy out of order", "sent Audit again and again"]
    {
        let line = log.lines().find(|line| line.contains(said)).unwrap_or_else(|| panic!("{said}: {log}"));
        assert!(line.contains("host-a"), "{line}");
    }
    assert!(log.len() < 4 << 20, "{} bytes of log", log.len());
    other.sound_since(&others);
    pair.migrate("vm", pair.a(), pair.b(), &[]);
    guest.sound_since(&first);
}
