//! Two hosts whose agents run.

use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use session::Report;
use testbed::guest_spec::{GuestSpec, Nic, Ram};
use testbed::{AgentOptions, Client, Host, Inventory, Programs, RunningGuest, Testbed};

use crate::{Guest, PATIENCE, Said};

/// Two hosts whose agents run: in namespaces where this process may make them, else on loopback.
#[derive(Debug)]
pub struct Pair {
    testbed: Testbed,
    empty: [Inventory; 2],
    /// What its machines are started with.
    qemu: PathBuf,
}

impl Pair {
    /// A pair with the programs that are found.
    ///
    /// # Panics
    /// If it cannot be made.
    #[must_use]
    pub fn start() -> Pair {
        Pair::start_with(&Programs::find())
    }

    /// A pair with these programs.
    ///
    /// # Panics
    /// If it cannot be made.
    #[must_use]
    pub fn start_with(programs: &Programs) -> Pair {
        let root = testbed::root_or_skip("namespaces: the hosts of this test are on loopback");
        let testbed = if root { Testbed::with(programs) } else { Testbed::rootless_with(programs) }.unwrap();
        Pair { qemu: programs.qemu.clone(), ..Pair::of(testbed) }
    }

    /// A pair whose machines are of QEMU 10, where there is one; if not, says on standard error that this test is skipped.
    ///
    /// # Panics
    /// If it cannot be made.
    #[must_use]
    pub fn of_qemu_10_or_skip(test: &str) -> Option<Pair> {
        let qemu = Programs::qemu_10_or_skip(test)?;
        Some(Pair::start_with(&Programs { qemu, ..Programs::find() }))
    }

    /// Starts the agents of a testbed that was made, and perhaps configured, by the test.
    ///
    /// # Panics
    /// If they do not start.
    #[must_use]
    pub fn of(testbed: Testbed) -> Pair {
        Pair::with_agents(testbed, &AgentOptions::default())
    }

    /// A pair each of which has storage of its own at [`Host::local_dir`].
    ///
    /// # Panics
    /// If it cannot be made.
    #[must_use]
    pub fn with_local_disks() -> Pair {
        Pair::with_agents(Testbed::new().unwrap(), &crate::local())
    }

    fn with_agents(testbed: Testbed, options: &AgentOptions) -> Pair {
        for host in testbed.hosts() {
            host.start_agent_with(options).unwrap();
        }
        Pair::with_running_agents(testbed)
    }

    /// Takes over a testbed whose agents run, and hold nothing.
    ///
    /// # Panics
    /// If it cannot be told what they hold.
    #[must_use]
    pub fn with_running_agents(testbed: Testbed) -> Pair {
        let empty = testbed.hosts().each_ref().map(|host| host.inventory().unwrap());
        Pair { testbed, empty, qemu: Programs::find().qemu }
    }

    /// The QEMU that its machines are started with.
    #[must_use]
    pub fn qemu_program(&self) -> &Path {
        &self.qemu
    }

    /// Host A.
    #[must_use]
    pub fn a(&self) -> &Host {
        self.testbed.a()
    }

    /// Host B.
    #[must_use]
    pub fn b(&self) -> &Host {
        self.testbed.b()
    }

    /// The client host; none without root.
    #[must_use]
    pub fn client(&self) -> Option<&Client> {
        self.testbed.client()
    }

    /// The testbed, for faults of its links.
    #[must_use]
    pub fn testbed(&self) -> &Testbed {
        &self.testbed
    }

    /// The specification of a guest of that name, with that much memory in MiB of which three eighths are filled and checked (its kernel needs 60 MiB), on the pair's
    /// QEMU.
    ///
    /// # Panics
    /// If the set-up is missing.
    #[must_use]
    pub fn spec(&self, name: &str, memory_mib: u64) -> GuestSpec {
        GuestSpec {
            memory_mib,
            fill_mib: memory_mib * 3 / 8,
            qemu: self.qemu.clone(),
            ..GuestSpec::new(self.a().serial(name)).unwrap()
        }
    }

    /// Starts a guest on host A by hand, whose QEMU is given the queues of its card by descriptor, and has the agent adopt it.
    ///
    /// # Panics
    /// If it does not get there.
    #[track_caller]
    pub fn adopt_with(&self, name: &str, nic: &Nic, queues: Vec<OwnedFd>) -> (RunningGuest, Guest) {
        let a = self.a();
        let descriptors = queues.iter().map(|queue| queue.as_raw_fd()).collect();
        let qmp = a.directory().join("own.qmp");
        let spec = GuestSpec {
            nic: Some(Nic { descriptors, ..nic.clone() }),
            ram: Ram::File(a.ram_dir().join("own")),
            qmp: Some(qmp.clone()),
            fill_mib: 16,
            rate: 100,
            ..self.spec(name, 128)
        };
        let mut started = a.boot_with(&spec, queues).unwrap();
        started.wait_ready(PATIENCE).unwrap();
        let guest = Guest::ready(name, &spec);
        let _ = vmirror(a, &["adopt", name, "--qmp", qmp.to_str().unwrap()]).done();
        (started, guest)
    }

    /// Runs a guest under the agent of a host, and waits until it is ready.
    ///
    /// # Panics
    /// If it does not get there.
    #[must_use]
    #[track_caller]
    pub fn run(&self, host: &Host, name: &str, spec: &GuestSpec) -> Guest {
        let line = spec.command_line();
        let mut arguments = vec!["run", name, "--json", "--"];
        arguments.extend(line.iter().map(String::as_str));
        let said = vmirror(host, &arguments).done();
        assert_eq!(said.json()["state"], "running", "{said:?}");
        Guest::ready(name, spec)
    }

    /// Migrates a machine from one host to the other; it must complete.
    ///
    /// # Panics
    /// If it does not.
    #[track_caller]
    pub fn migrate(&self, name: &str, from: &Host, to: &Host, options: &[&str]) -> Report {
        let said = self.try_migrate(name, from, to, options);
        assert_eq!(said.code, Some(0), "{said:?}\n{}", self.logs());
        said.report()
    }

    /// Migrates a machine from one host to the other, whatever comes of it; waits for the end.
    ///
    /// # Panics
    /// If `vmirror` cannot be started.
    pub fn try_migrate(&self, name: &str, from: &Host, to: &Host, options: &[&str]) -> Said {
        let address = to.listen().to_string();
        vmirror(from, &[&["migrate", name, "--to", &address, "--json"], options].concat())
    }

    /// Puts up a standing mirror and waits until it is in sync.
    ///
    /// # Panics
    /// If it does not get there.
    #[track_caller]
    pub fn mirror(&self, name: &str, from: &Host, to: &Host, options: &[&str]) -> Said {
        let address = to.listen().to_string();
        vmirror(from, &[&["mirror", name, "--to", &address, "--json", "--detach"], options].concat()).done()
    }

    /// Whether the machine is listed as running on a host.
    ///
    /// # Panics
    /// If the list cannot be had.
    #[must_use]
    pub fn runs_on(&self, name: &str, host: &Host) -> bool {
        self.show(name, host).is_some_and(|vm| vm["state"] == "running")
    }

    /// The machine as a host lists it; none where it does not, or has nothing of it but images.
    ///
    /// # Panics
    /// If the list cannot be had.
    #[must_use]
    pub fn show(&self, name: &str, host: &Host) -> Option<Value> {
        self.listed(name, host).filter(|vm| vm["state"] != "left")
    }

    /// The same, of a machine that has left and whose images are kept on the host; none where none are.
    ///
    /// # Panics
    /// If the list cannot be had.
    #[must_use]
    pub fn left(&self, name: &str, host: &Host) -> Option<Value> {
        self.listed(name, host).filter(|vm| vm["state"] == "left")
    }

    fn listed(&self, name: &str, host: &Host) -> Option<Value> {
        let list = vmirror(host, &["list", "--json"]).done().json();
        list.as_array().unwrap().iter().find(|vm| vm["name"] == name).cloned()
    }

    /// Asserts that a host holds nothing but its agent: no process, file, socket, interface, descriptor or byte of guest RAM.
    ///
    /// # Panics
    /// If it still does after a while.
    #[track_caller]
    pub fn holds_nothing(&self, host: &Host) {
        self.holds(host, self.empty(host));
    }

    /// What a host held when it held nothing but its agent.
    #[must_use]
    pub fn empty(&self, host: &Host) -> &Inventory {
        &self.empty[usize::from(host.name() == self.b().name())]
    }

    /// Asserts that a host holds exactly that, at the latest after a while.
    ///
    /// # Panics
    /// If it does not.
    #[track_caller]
    pub fn holds(&self, host: &Host, expected: &Inventory) {
        if let Err(difference) = host.settle(expected, Duration::from_secs(30)).unwrap() {
            panic!("{}: {difference}\n{}", host.name(), self.logs());
        }
    }

    /// The ends of both agents' logs, for a failing assertion.
    #[must_use]
    pub fn logs(&self) -> String {
        self.testbed.hosts().each_ref().map(log_of).concat()
    }
}

/// What the agent of a host said last.
pub(crate) fn log_of(host: &Host) -> String {
    let text = std::fs::read_to_string(host.agent_log()).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    format!("{}:\n{}\n", host.name(), lines[lines.len().saturating_sub(25)..].join("\n"))
}

/// Runs `vmirror` on a host, to its end.
///
/// # Panics
/// If it cannot be started.
pub fn vmirror(host: &Host, arguments: &[&str]) -> Said {
    host.vmirror(arguments).unwrap().into()
}

/// Waits until something holds.
///
/// # Panics
/// If it never does.
#[track_caller]
pub fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < PATIENCE, "waited {PATIENCE:?} until {what}");
        thread::sleep(Duration::from_millis(50));
    }
}
