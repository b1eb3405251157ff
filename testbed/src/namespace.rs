//! A named network namespace.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::Command;
use std::thread;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::TestbedError;
use crate::tool::run;

/// Where `ip netns` keeps them.
pub(crate) const DIRECTORY: &str = "/run/netns";

/// A network namespace, removed when dropped.
#[derive(Debug)]
pub(crate) struct Namespace {
    name: String,
}

impl Namespace {
    /// Makes a namespace with loopback up and without IPv6, whose own traffic would only disturb what is measured.
    pub(crate) fn new(name: String) -> Result<Self, TestbedError> {
        run("ip", &["netns", "add", &name])?;
        let namespace = Self { name };
        namespace.ip(&["link", "set", "lo", "up"])?;
        namespace.set("net/ipv6/conf/default/disable_ipv6", "1")?;
        Ok(namespace)
    }

    /// Sets a parameter of the kernel's inside.
    pub(crate) fn set(&self, parameter: &str, value: &str) -> Result<(), TestbedError> {
        let path = format!("/proc/sys/{parameter}");
        self.enter(|| fs::write(&path, value))?.map_err(TestbedError::file(&path))
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Runs `ip` inside.
    pub(crate) fn ip(&self, arguments: &[&str]) -> Result<String, TestbedError> {
        run("ip", &[&["-n", &self.name], arguments].concat())
    }

    /// Runs `tc` inside.
    pub(crate) fn tc(&self, arguments: &[&str]) -> Result<String, TestbedError> {
        run("tc", &[&["-n", &self.name], arguments].concat())
    }

    /// Has `nft` follow those rules inside.
    pub(crate) fn nft(&self, rules: &str) -> Result<(), TestbedError> {
        run("ip", &["netns", "exec", &self.name, "nft", rules]).map(drop)
    }

    /// A command that will run inside, with its own view of /sys. The program replaces `ip`, so its pid is the child's.
    pub(crate) fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name]).arg(program);
        command
    }

    /// Runs a function on a thread inside. Sockets it makes stay there.
    pub(crate) fn enter<T: Send>(&self, inside: impl FnOnce() -> T + Send) -> Result<T, TestbedError> {
        let path = self.path();
        let file = File::open(&path).map_err(TestbedError::file(&path))?;
        thread::scope(|scope| {
            let thread = scope.spawn(|| {
                move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))?;
                Ok::<T, rustix::io::Errno>(inside())
            });
            match thread.join() {
                Ok(result) => result.map_err(|errno| TestbedError::file(path)(errno.into())),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// The processes inside.
    pub(crate) fn processes(&self) -> Vec<i32> {
        processes_in(&self.name)
    }

    fn path(&self) -> PathBuf {
        PathBuf::from(DIRECTORY).join(&self.name)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Err(error) = run("ip", &["netns", "delete", &self.name]) {
            eprintln!("testbed: {error}");
        }
    }
}

/// The processes in the namespace of that name; none where it does not exist.
pub(crate) fn processes_in(name: &str) -> Vec<i32> {
    let Ok(wanted) = fs::metadata(PathBuf::from(DIRECTORY).join(name)) else { return Vec::new() };
    crate::inventory::pids()
        .filter(|pid| {
            fs::metadata(format!("/proc/{pid}/ns/net"))
                .is_ok_and(|found| found.ino() == wanted.ino() && found.dev() == wanted.dev())
        })
        .collect()
}
