//! Network namespaces for one test, and what is done in them.

use std::fs::File;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::fd::AsFd as _;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// A network namespace, removed when dropped.
pub(crate) struct Namespace {
    name: String,
}

impl Namespace {
    /// A new one with its loopback up; its links are made by name in the namespaces that they join.
    pub(crate) fn new() -> Namespace {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let namespace = Namespace { name: format!("vmct{}-{number}", std::process::id()) };
        run(&format!("ip netns add {}", namespace.name));
        namespace.run("ip link set lo up");
        namespace
    }

    /// Runs a command of words in it.
    pub(crate) fn run(&self, command: &str) {
        run(&format!("ip netns exec {} {command}", self.name));
    }

    /// The same, for what it says.
    pub(crate) fn output(&self, command: &str) -> String {
        run(&format!("ip netns exec {} {command}", self.name))
    }

    /// Has nft run a script in it.
    pub(crate) fn nft(&self, script: &str) {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), script).unwrap();
        self.run(&format!("nft -f {}", file.path().display()));
    }

    /// Joins two by a link: the names and addresses of its ends.
    pub(crate) fn link(&self, name: &str, other: &Namespace, other_name: &str) {
        let (here, there) = (&self.name, &other.name);
        run(&format!("ip -n {here} link add name {name} type veth peer name {other_name} netns {there}"));
        self.run(&format!("ip link set dev {name} up"));
        other.run(&format!("ip link set dev {other_name} up"));
    }

    /// Does something on a thread in it: what is opened there stays in it.
    pub(crate) fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let entered = || {
            let namespace = File::open(format!("/run/netns/{}", self.name)).unwrap();
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            work()
        };
        std::thread::scope(|scope| scope.spawn(entered).join())
            .unwrap_or_else(|e| std::panic::resume_unwind(e))
    }

    /// The same with what is asynchronous.
    pub(crate) fn block_on<T: Send>(&self, work: impl Future<Output = T> + Send) -> T {
        self.within(|| {
            tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
        })
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

fn run(command: &str) -> String {
    let mut words = command.split_whitespace();
    let output = Command::new(words.next().unwrap()).args(words).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Whether namespaces can be made here; says so aloud where not.
pub(crate) fn available(test: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    let nft = Command::new("nft").arg("--version").output().is_ok();
    if !root || !nft {
        eprintln!("SKIPPED {test}: needs root and nft");
    }
    root && nft
}
