//! Two hosts in this process, the link between them, and a QEMU: for unit tests of what moves a machine. No program has this in it.

#![expect(clippy::unwrap_used, reason = "used by tests only")]

use std::ops::Deref;
use std::path::Path;
use std::sync::Arc;

use link::{Control, Deadlines, Endpoint, Identity, Incoming, Listener, Peer, certificates};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixListener;

use host::Fence;
use host::Forwards;
use host::Hooks;
use host::Journal;
use host::LeftImages;
use host::Lingering;
use host::Logs;
use host::PostCopyMemory;
use host::{Allow, Firewall, Host};
use ownership::Supplied;
use uuid::Uuid;

/// `host-a`, and `host-b`, which listens.
pub struct Hosts {
    /// One that only connects.
    pub a: Linked,
    /// The one that listens.
    pub b: Linked,
    /// Where both have what is theirs.
    pub directory: TempDir,
    listener: Listener,
}

/// A host, and its end of the link. Nothing is missing of the memory of any machine on it.
#[derive(Debug, Clone)]
pub struct Linked {
    /// What it is by itself.
    pub host: Host,
    /// Its end of the link.
    pub endpoint: Endpoint,
}

impl Deref for Linked {
    type Target = Host;

    fn deref(&self) -> &Host {
        &self.host
    }
}

#[derive(Debug)]
struct NothingMissing;

impl PostCopyMemory for NothingMissing {
    fn supplied(&self, _: Uuid) -> Option<Supplied> {
        None
    }

    fn end(&self, _: Uuid) {}
}

impl Hosts {
    /// Both, with nothing on them.
    pub async fn new() -> Hosts {
        let directory = tempfile::tempdir().unwrap();
        certificates::init(directory.path()).unwrap();
        let [a, b] = ["host-a", "host-b"].map(|name| host(directory.path(), name));
        let listener = Listener::bind(&b.endpoint, "127.0.0.1:0").await.unwrap();
        Hosts { a, b, directory, listener }
    }

    /// Of host B.
    pub fn address(&self) -> String {
        self.listener.local_addr().to_string()
    }

    /// What connects to host B.
    pub async fn accept(&self) -> (Control, Peer) {
        match self.listener.accept().await.unwrap() {
            Incoming::Control(control, peer) => (control, peer),
            Incoming::Data(..) => panic!("a data stream"),
        }
    }
}

fn host(directory: &Path, name: &str) -> Linked {
    let files = certificates::issue(directory, name, &["127.0.0.1".to_owned()]).unwrap();
    let identity = Identity::load(&directory.join("ca.pem"), &files.certificate, &files.key).unwrap();
    let own = directory.join(name);
    std::fs::create_dir(&own).unwrap();
    let left = Arc::new(LeftImages::open(&own));
    let host = Host {
        name: name.to_owned(),
        journal: Arc::new(Journal::open(&own).unwrap()),
        run_dir: own.clone(),
        logs: Logs::new(&own, 1 << 20),
        ram_dir: own.clone(),
        allow: Allow::default(),
        hooks: Hooks::default(),
        firewall: Firewall::default(),
        trust_seccomp: false,
        guest_addresses: Arc::default(),
        post_copy_memory: Arc::new(NothingMissing),
        lingering: Lingering::default(),
        recovering: host::Recovering::default(),
        ram_files: Arc::default(),
        fence: Arc::new(Fence::new(Arc::clone(&left), &[], None)),
        left,
        forwards: Arc::new(Forwards::open(&own)),
        forward_port: 4789,
    };
    Linked { host, endpoint: Endpoint::new(&identity, Deadlines::default()).unwrap() }
}

/// What a QEMU says when it is told something, its answer last; with no answer it ends.
pub type Says = fn(&str) -> Vec<Value>;

/// A QEMU that says so.
pub fn qemu(socket: &Path, says: Says) {
    let listener = UnixListener::bind(socket).unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (read, mut write) = stream.into_split();
            let mut say = async |what: Value| write.write_all(format!("{what}\n").as_bytes()).await.unwrap();
            say(json!({"QMP": {"version": {"qemu": {}}, "capabilities": []}})).await;
            let mut lines = BufReader::new(read).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                let request: Value = serde_json::from_str(&line).unwrap();
                let told = match request["execute"].as_str().unwrap() {
                    "qmp_capabilities" => vec![json!({"return": {}})],
                    command => says(command),
                };
                let answers = told.iter().any(|what| what.get("event").is_none());
                for mut what in told {
                    if what.get("event").is_none() {
                        what["id"] = request["id"].clone();
                    }
                    say(what).await;
                }
                if !answers {
                    return;
                }
            }
        }
    });
}
