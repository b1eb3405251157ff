//! A host: its directories, its agent, its guests.

mod agent;
mod limits;

use std::ffi::OsStr;
use std::fs;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::FdFlags;

use crate::fault;
use crate::inventory::{self, Difference, Inventory, files_below};
use crate::name::MARK;
use crate::namespace::Namespace;
use crate::programs::Programs;
use crate::running::{POLL, RunningGuest};
use crate::sweep;
use crate::tool::run;
use crate::wire::BRIDGE;
use crate::{GuestSpec, TestbedError};

/// How long killed processes may take to be gone.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);
/// Guest RAM a host has room for, where not limited further, in bytes.
const RAM: u64 = 16 << 30;

/// One host of a testbed.
#[derive(Debug)]
pub struct Host {
    mark: String,
    letter: String,
    name: String,
    place: Place,
    listen: SocketAddr,
    directory: PathBuf,
    ram_dir: PathBuf,
    /// Of both hosts.
    consoles: PathBuf,
    vmirror: Option<PathBuf>,
    agent: Mutex<Option<Child>>,
}

/// Where a host's processes run.
#[derive(Debug)]
pub(crate) enum Place {
    /// In a network of their own.
    Namespace(Arc<Namespace>),
    /// In the machine's.
    Loopback,
}

/// How an agent is started.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AgentOptions {
    /// As if the kernel had neither PAGEMAP_SCAN nor userfaultfd: see [`crate::old_kernel`].
    pub old_kernel: bool,
    /// As without `CAP_BPF`: nothing diverts frames that come for a guest while it moves.
    pub without_bpf: bool,
    /// More environment variables.
    pub environment: Vec<(String, String)>,
    /// Directories in whose place the agent, and what it starts, see empty ones of their own, as on a host that does not share
    /// that storage. `/proc/PID/root` of the agent leads to what it sees. A device that is hidden is there and cannot be
    /// opened, not even by root. Needs root.
    pub hidden: Vec<PathBuf>,
    /// The agent, and what it starts, see the host's own [`disk_dir`](Host::disk_dir) at [`local_dir`](Host::local_dir) too: the same
    /// place on both hosts, with storage of each host's own. Needs root.
    pub local: bool,
    /// What the agent, and what it starts, see at other places, as (what, where): a device as another host has it. Needs root.
    pub bound: Vec<(PathBuf, PathBuf)>,
}

/// Mounts an empty file system over every directory before the `--`, and every device where devices are not opened; then
/// becomes the program after it.
/// A directory followed by `at` and another one is mounted there.
const HIDE: &str = r#"while [ "$1" != -- ]; do
if [ "$2" = at ]; then mount --bind "$1" "$3" || exit; shift 3; continue; fi
if [ -d "$1" ]; then mount -t tmpfs hidden "$1"; else mount --bind "$1" "$1" && mount -o remount,bind,nodev "$1"; fi || exit
shift; done; shift; exec "$@""#;

impl Host {
    pub(crate) fn new(
        testbed: &str,
        letter: &str,
        directory: &Path,
        place: Place,
        listen: SocketAddr,
        programs: &Programs,
    ) -> Result<Self, TestbedError> {
        let mark = format!("{testbed}-{letter}");
        let host = Self {
            letter: letter.to_owned(),
            name: format!("host-{letter}"),
            place,
            listen,
            directory: directory.join(letter),
            ram_dir: Path::new("/dev/shm").join(&mark),
            consoles: Path::new("/dev/shm").join(format!("{testbed}-consoles")),
            mark,
            vmirror: programs.vmirror.clone(),
            agent: Mutex::new(None),
        };
        // From here on `Drop` of the host cleans up. Both hosts share these.
        for directory in [&host.shared_dir(), &host.local_dir(), &host.consoles] {
            fs::create_dir_all(directory).map_err(TestbedError::file(directory))?;
        }
        for directory in
            [host.directory.clone(), host.state_dir(), host.run_dir(), host.disk_dir(), host.ram_dir.clone()]
        {
            fs::create_dir(&directory).map_err(TestbedError::file(&directory))?;
        }
        if host.namespace().is_some() {
            let ram = host.ram_dir.to_string_lossy();
            run("mount", &["-t", "tmpfs", "-o", &format!("size={RAM},mode=700"), &host.mark, &ram])?;
        }
        host.write_config(&host.default_config(programs))?;
        Ok(host)
    }

    /// The host's name, in its configuration and its certificate: `host-a` or `host-b`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where its agent listens for other agents: what `--to` takes.
    pub fn listen(&self) -> SocketAddr {
        self.listen
    }

    pub(crate) fn letter(&self) -> &str {
        &self.letter
    }

    pub(crate) fn namespace(&self) -> Option<&Namespace> {
        match &self.place {
            Place::Namespace(namespace) => Some(namespace),
            Place::Loopback => None,
        }
    }

    /// The host's directory; the ones below and the agent's log are in it.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The agent's `state_dir`.
    pub fn state_dir(&self) -> PathBuf {
        self.directory.join("state")
    }

    /// The agent's `run_dir`.
    pub fn run_dir(&self) -> PathBuf {
        self.directory.join("run")
    }

    /// A directory of disk images that only this host has, and that its peers may have it use.
    pub fn disk_dir(&self) -> PathBuf {
        self.directory.join("disks")
    }

    /// A directory at the same place on both hosts, where an agent that is started [so](AgentOptions::local) has storage of its own.
    pub fn local_dir(&self) -> PathBuf {
        self.directory.with_file_name("local")
    }

    /// A directory that both hosts see at the same place, as storage shared between them.
    pub fn shared_dir(&self) -> PathBuf {
        self.directory.with_file_name("shared")
    }

    /// The agent's `ram_dir`: a file system of its own, except in a rootless testbed.
    pub fn ram_dir(&self) -> &Path {
        &self.ram_dir
    }

    /// The files below that, guest RAM all of them.
    pub fn ram_files(&self) -> Vec<PathBuf> {
        files_below(&self.ram_dir)
    }

    /// The agent's API socket.
    pub fn api(&self) -> PathBuf {
        self.run_dir().join("api.sock")
    }

    /// The agent's configuration file.
    pub fn config_path(&self) -> PathBuf {
        self.directory.join("agent.toml")
    }

    /// What the agent prints.
    pub fn agent_log(&self) -> PathBuf {
        self.directory.join("agent.log")
    }

    fn default_config(&self, programs: &Programs) -> toml::Table {
        let text = |path: &Path| toml::Value::String(path.to_string_lossy().into_owned());
        let texts = |paths: &[&Path]| toml::Value::Array(paths.iter().map(|path| text(path)).collect());
        let certificates = self.directory.with_file_name("certificates");
        let tls = toml::Table::from_iter([
            ("ca".to_owned(), text(&certificates.join("ca.pem"))),
            ("cert".to_owned(), text(&certificates.join(format!("{}.pem", self.name)))),
            ("key".to_owned(), text(&certificates.join(format!("{}-key.pem", self.name)))),
        ]);
        let unpacked = crate::programs::target().join("qemu-10/qemu-system-x86_64");
        let unpacked_binary = crate::programs::target().join("qemu-10/root/usr/bin/qemu-system-x86_64");
        // Only what exists: an agent may refuse a configuration that names a program that is not there.
        let qemu: Vec<&Path> = [programs.qemu.as_path(), &unpacked, &unpacked_binary]
            .into_iter()
            .filter(|path| path.is_file())
            .collect();
        // What a guest here is made of: disks, and what both hosts see; kernel and initramfs; a Debian userland.
        let [images, userland] = ["guest", "userland"].map(|name| crate::programs::target().join(name));
        // Beside a QEMU that was unpacked is its firmware.
        let firmware = [&unpacked, &programs.qemu].map(|qemu| qemu.with_file_name("root"));
        let mut disk_dirs = vec![self.disk_dir(), self.shared_dir(), self.local_dir(), images, userland];
        disk_dirs.extend(firmware.into_iter().filter(|directory| directory.is_dir()));
        // Consoles, which both hosts append to.
        let outputs = [self.consoles.clone(), self.directory.clone(), self.local_dir(), self.shared_dir()];
        // Sockets of the users of both hosts.
        let sockets = ["a", "b"].map(|host| self.directory.with_file_name(host));
        let bridges = if self.namespace().is_some() { vec![BRIDGE.into()] } else { Vec::new() };
        let allow = toml::Table::from_iter([
            ("peers".to_owned(), toml::Value::Array(vec!["host-a".into(), "host-b".into()])),
            ("disk_dirs".to_owned(), texts(&disk_dirs.iter().map(PathBuf::as_path).collect::<Vec<_>>())),
            ("bridges".to_owned(), toml::Value::Array(bridges)),
            ("output_dirs".to_owned(), texts(&outputs.each_ref().map(PathBuf::as_path))),
            ("socket_dirs".to_owned(), texts(&sockets.each_ref().map(PathBuf::as_path))),
            ("disk_drivers".to_owned(), toml::Value::Array(vec!["qed".into()])),
            ("arguments".to_owned(), toml::Value::Array(vec!["-netdev user".into()])),
            ("max_memory".to_owned(), "16GiB".into()),
            ("qemu".to_owned(), texts(&qemu)),
        ]);
        toml::Table::from_iter([
            ("name".to_owned(), toml::Value::String(self.name.clone())),
            ("listen".to_owned(), toml::Value::String(self.listen.to_string())),
            ("api".to_owned(), text(&self.api())),
            ("state_dir".to_owned(), text(&self.state_dir())),
            ("run_dir".to_owned(), text(&self.run_dir())),
            ("ram_dir".to_owned(), text(&self.ram_dir)),
            ("tls".to_owned(), toml::Value::Table(tls)),
            ("allow".to_owned(), toml::Value::Table(allow)),
        ])
    }

    /// Changes the agent's configuration file. An agent that runs already does not see it.
    ///
    /// # Errors
    /// Where the file cannot be read or written.
    pub fn configure(&self, change: impl FnOnce(&mut toml::Table)) -> Result<(), TestbedError> {
        let path = self.config_path();
        let text = fs::read_to_string(&path).map_err(TestbedError::file(&path))?;
        let invalid = |error| TestbedError::file(&path)(std::io::Error::other(error));
        let mut table: toml::Table =
            text.parse().map_err(|error: toml::de::Error| invalid(error.to_string()))?;
        change(&mut table);
        self.write_config(&table)
    }

    fn write_config(&self, table: &toml::Table) -> Result<(), TestbedError> {
        let path = self.config_path();
        fs::write(&path, table.to_string()).map_err(TestbedError::file(&path))
    }

    /// A command that will run on this host, with `VMIRROR_AGENT` set.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = match &self.place {
            Place::Namespace(namespace) => namespace.command(program),
            Place::Loopback => Command::new(program),
        };
        command.env(MARK, &self.mark).env("VMIRROR_AGENT", self.api()).stdin(Stdio::null());
        command
    }

    /// Runs a function on a thread in this host's network: sockets it makes belong there. In a rootless testbed, on the machine's.
    ///
    /// # Errors
    /// Where the network cannot be entered.
    pub fn on_network<T: Send>(&self, inside: impl FnOnce() -> T + Send) -> Result<T, TestbedError> {
        match self.namespace() {
            Some(namespace) => namespace.enter(inside),
            None => Ok(inside()),
        }
    }

    /// Runs `vmirror` with those arguments on this host, to its end.
    ///
    /// # Errors
    /// Where it cannot be started; its own failure is in the output.
    pub fn vmirror(&self, arguments: &[&str]) -> Result<Output, TestbedError> {
        let program = self.vmirror_program()?;
        let failed = |source| TestbedError::Start { program: program.display().to_string(), source };
        self.command(program).args(arguments).output().map_err(failed)
    }

    fn vmirror_program(&self) -> Result<&Path, TestbedError> {
        let missing = || TestbedError::NotSetUp { path: crate::programs::target().join("release/vmirror") };
        self.vmirror.as_deref().ok_or_else(missing)
    }

    /// Makes a tap device on this host, in its bridge and up.
    ///
    /// # Errors
    /// [`TestbedError::NotRoot`] in a rootless testbed, or what `ip` says.
    pub fn add_tap(&self, name: &str) -> Result<(), TestbedError> {
        let namespace = self.namespace().ok_or(TestbedError::NotRoot)?;
        namespace.ip(&["tuntap", "add", "dev", name, "mode", "tap"])?;
        namespace.ip(&["link", "set", name, "master", BRIDGE, "up"])?;
        Ok(())
    }

    /// Takes a tap device away.
    ///
    /// # Errors
    /// As [`Host::add_tap`].
    pub fn remove_tap(&self, name: &str) -> Result<(), TestbedError> {
        self.namespace().ok_or(TestbedError::NotRoot)?.ip(&["link", "delete", name])?;
        Ok(())
    }

    /// Where the serial console of the guest of that name goes, whichever host it runs on.
    ///
    /// QEMU appends to it, so after a migration one file has all that the guest ever said. It is in memory: QEMU's vCPU
    /// thread writes it, and a disk that is busy with something else would stop the guest for seconds.
    pub fn serial(&self, guest: &str) -> PathBuf {
        self.consoles.join(format!("{guest}.serial"))
    }

    pub(crate) fn consoles(&self) -> &Path {
        &self.consoles
    }

    /// Starts a guest by hand on this host, without its agent. It is killed when the result is dropped.
    ///
    /// # Errors
    /// Where QEMU cannot be started.
    pub fn boot(&self, spec: &GuestSpec) -> Result<RunningGuest, TestbedError> {
        let command_line = spec.command_line();
        let mut command = self.command(&command_line[0]);
        command.args(&command_line[1..]);
        RunningGuest::start(command, &spec.qemu, &spec.serial)
    }

    /// As [`Host::boot`], of a guest whose QEMU is given descriptors, under the numbers that they have here.
    ///
    /// # Errors
    /// Where QEMU cannot be started.
    pub fn boot_with(
        &self,
        spec: &GuestSpec,
        descriptors: Vec<OwnedFd>,
    ) -> Result<RunningGuest, TestbedError> {
        let command_line = spec.command_line();
        let mut command = self.command(&command_line[0]);
        command.args(&command_line[1..]);
        let hand_in = move || {
            let kept = |descriptor| Ok(rustix::io::fcntl_setfd(descriptor, FdFlags::empty())?);
            descriptors.iter().try_for_each(kept)
        };
        // SAFETY: between fork and exec only system calls are made, on descriptors that the closure owns; nothing is allocated.
        unsafe { command.pre_exec(hand_in) };
        RunningGuest::start(command, &spec.qemu, &spec.serial)
    }

    /// The processes of this host: everything in its network, and everything started from it.
    pub fn processes(&self) -> Vec<i32> {
        let marked = inventory::marked().filter(|(_, mark)| *mark == self.mark).map(|(pid, _)| pid);
        let inside = self.namespace().map(Namespace::processes).unwrap_or_default();
        let mut processes: Vec<i32> = marked.chain(inside).filter(|pid| !fault::is_zombie(*pid)).collect();
        processes.sort_unstable();
        processes.dedup();
        processes
    }

    /// Those of its processes whose program has this in its name. Quicker than to look at all of them.
    pub fn processes_of(&self, program: &str) -> Vec<i32> {
        let runs = |pid: &i32| {
            let path = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
            path.file_name().is_some_and(|name| name.to_string_lossy().contains(program))
        };
        let mut found: Vec<i32> = inventory::pids().filter(runs).filter(|pid| self.has(*pid)).collect();
        found.sort_unstable();
        found
    }

    /// Whether that process is one of this host's.
    fn has(&self, pid: i32) -> bool {
        !fault::is_zombie(pid) && inventory::mark(pid).is_some_and(|mark| mark == self.mark)
    }

    /// What the host holds right now.
    ///
    /// # Errors
    /// Where the links cannot be listed.
    pub fn inventory(&self) -> Result<Inventory, TestbedError> {
        let links = match self.namespace() {
            Some(namespace) => inventory::links(&namespace.ip(&["-j", "-d", "link"])?),
            None => Default::default(),
        };
        Ok(Inventory::take(&self.processes(), &[&self.run_dir(), &self.ram_dir], &self.ram_dir, links))
    }

    /// Waits until the host holds exactly that again: what is being released may take a moment.
    ///
    /// # Errors
    /// Where the inventory cannot be taken.
    pub fn settle(
        &self,
        expected: &Inventory,
        within: Duration,
    ) -> Result<Result<(), Difference>, TestbedError> {
        let start = Instant::now();
        loop {
            let difference = expected.difference(&self.inventory()?);
            if difference.is_ok() || start.elapsed() > within {
                return Ok(difference);
            }
            thread::sleep(POLL);
        }
    }

    /// Kills every process of the host and takes its RAM directory away.
    pub(crate) fn clear(&self) {
        if let Err(error) = self.kill_agent() {
            eprintln!("testbed: {error}");
        }
        let start = Instant::now();
        loop {
            let processes = self.processes();
            if processes.is_empty() {
                break;
            }
            if start.elapsed() > KILL_TIMEOUT {
                eprintln!("testbed: processes {processes:?} of {} do not die", self.mark);
                break;
            }
            processes.into_iter().for_each(fault::kill);
            thread::sleep(POLL);
        }
        sweep::remove(&self.ram_dir);
        sweep::unmount(&self.disk_dir());
        sweep::unmount(&self.state_dir());
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.clear();
    }
}
