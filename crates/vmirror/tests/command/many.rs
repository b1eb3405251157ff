//! An agent with many machines. Their QEMUs are stand-ins that speak just enough QMP, ten to a process.

use std::io::{BufRead as _, BufReader, Lines, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use host::{Journal, Record};
use serde_json::{Value, json};

use crate::site::{Agent, Site};

/// Says to this program, run once more, that it is a stand-in, and where its sockets are to be.
const SOCKETS: &str = "VMIRROR_TEST_SOCKETS";
/// Machines of one stand-in.
const EACH: usize = 10;

/// No test of its own: the stand-in, when [`SOCKETS`] says so.
#[test]
fn stand_in() {
    let Some(directory) = std::env::var_os(SOCKETS) else { return };
    let listening = (0..EACH).map(|number| {
        let socket = Path::new(&directory).join(format!("{}-{number}.qmp", std::process::id()));
        let listener = UnixListener::bind(socket).unwrap();
        std::thread::spawn(move || listener.incoming().for_each(|client| answer(&client.unwrap())))
    });
    let listening: Vec<_> = listening.collect();
    println!("\nlistening");
    listening.into_iter().for_each(|thread| thread.join().unwrap());
}

/// Answers one client until it goes.
fn answer(client: &UnixStream) {
    let version = json!({"qemu": {"major": 9, "minor": 0, "micro": 0}, "package": ""});
    let say = |document: Value| {
        let mut client = client;
        writeln!(client, "{document}").is_ok()
    };
    if !say(json!({"QMP": {"version": version, "capabilities": []}})) {
        return;
    }
    for line in BufReader::new(client).lines().map_while(Result::ok) {
        let asked: Value = serde_json::from_str(&line).unwrap();
        let answer = match asked["execute"].as_str().unwrap() {
            "query-status" => json!({"status": "running", "running": true, "singlestep": false}),
            "query-block-jobs"
            | "query-jobs"
            | "query-block-exports"
            | "query-named-block-nodes"
            | "query-block" => {
                json!([])
            }
            _ => json!({}),
        };
        if !say(json!({"return": answer, "id": asked["id"]})) {
            return;
        }
    }
}

/// Ended with its value. What it prints has a reader for as long: the harness prints when a test takes long, and ends where it cannot.
struct StandIn {
    child: Child,
    _output: Lines<BufReader<ChildStdout>>,
}

impl StandIn {
    fn start(sockets: &Path) -> StandIn {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "many::stand_in", "--nocapture"])
            .env(SOCKETS, sockets)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.by_ref().map_while(Result::ok).any(|line| line == "listening"));
        StandIn { child, _output: lines }
    }

    /// Has it hang, as a QEMU that waits for dead storage does.
    fn hang(&self) {
        assert!(
            Command::new("kill").args(["-STOP", &self.child.id().to_string()]).status().unwrap().success()
        );
    }

    /// The records of its machines, as an agent has left them.
    fn records(&self, sockets: &Path) -> Vec<Record> {
        let pid = self.child.id();
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let after_name = &stat[stat.rfind(')').unwrap() + 2..];
        let start_time: u64 = after_name.split(' ').nth(19).unwrap().parse().unwrap();
        let record = |number: usize| {
            let socket = sockets.join(format!("{pid}-{number}.qmp"));
            let name = format!("vm-{pid}-{number}");
            let ram = format!(
                "memory-backend-file,id=pc.ram,size=2G,share=on,mem-path=/dev/shm/vmirror-{name}@pc.ram"
            );
            serde_json::from_value(json!({
                "name": name,
                "generation": 0,
                "ownership": "owner",
                "origin": "run",
                "arrived_by": null,
                "resuming": false,
                "process": {"pid": pid, "start_time": start_time, "boot": boot.trim(), "qmp_socket": socket},
                "argv": [
                    "qemu-system-x86_64", "-accel", "kvm", "-machine", "q35,memory-backend=pc.ram", "-object", ram, "-m", "2G",
                    "-smp", "4", "-display", "none", "-nic", "none",
                    "-drive", format!("file=/var/lib/vms/{name}.img,if=virtio,format=raw"),
                    "-qmp", format!("unix:{},server=on,wait=off", socket.display()),
                ],
                "qmp_socket": socket,
                "memory": 2_u64 << 30,
                "made": {"files": [], "taps": []},
            }))
            .unwrap()
        };
        (0..EACH).map(record).collect()
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A site whose agent has left so many machines.
fn site_with(machines: usize) -> (Site, Vec<StandIn>) {
    let site = Site::new();
    let sockets = site.path("");
    let journal = Journal::open(&site.path("state")).unwrap();
    let all = (0..machines / EACH).map(|_| {
        let stand_in = StandIn::start(&sockets);
        stand_in.records(&sockets).into_iter().for_each(|record| journal.claim(record).unwrap());
        stand_in
    });
    let all = all.collect();
    (site, all)
}

fn in_state(list: &Value, state: &str) -> usize {
    list.as_array().unwrap().iter().filter(|vm| vm["state"] == json!(state)).count()
}

/// Lists that are timed, and how long apart: nothing that was heard for one is of use for the next.
const LISTS: usize = 9;
const APART: Duration = Duration::from_millis(1500);

/// How long a list takes, and the CPU time of the agent's in it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Listed {
    takes: Duration,
    cpu: Duration,
}

/// How long it took until an agent had found its machines again, and how long a list takes then, of which nothing is known from before, and
/// one right after it: the median, and the mean of the CPU time.
#[derive(Debug)]
struct Times {
    found: Duration,
    first: Listed,
    next: Listed,
}

/// Starts an agent for so many machines, of which some hang, and has so many lists timed when it has found all others.
fn found_again(machines: usize, hanging: usize, timed: usize) -> Times {
    let (site, stand_ins) = site_with(machines);
    // They are found in the order of their names, so those that hang are in the middle of it.
    stand_ins[stand_ins.len() / 2..][..hanging / EACH].iter().for_each(StandIn::hang);
    let begin = Instant::now();
    let agent = Agent::start_serving(site);
    let is_whole = |list: &Value| {
        assert_eq!(list.as_array().unwrap().len(), machines, "each is known from the first moment on");
        in_state(list, "running") == machines - hanging
    };
    let found = loop {
        let list = agent.json(&["list"]);
        if is_whole(&list) {
            assert_eq!(in_state(&list, "recovering") + in_state(&list, "unreachable"), hanging);
            break begin.elapsed();
        }
        assert!(begin.elapsed() < Duration::from_secs(30), "{} run", in_state(&list, "running"));
    };
    let pid = agent.process.id();
    let listed = || {
        let (before, begin) = (cpu(pid), Instant::now());
        let output = agent.ask(&["list", "--json"]);
        let (takes, after) = (begin.elapsed(), cpu(pid));
        assert!(is_whole(&serde_json::from_slice(&output.stdout).unwrap()));
        Listed { takes, cpu: after - before }
    };
    let lists = (0..timed).map(|_| {
        std::thread::sleep(APART);
        (listed(), listed())
    });
    let (first, next): (Vec<Listed>, Vec<Listed>) = lists.unzip();
    let of_all = |mut lists: Vec<Listed>| {
        lists.sort();
        let takes = lists.get(lists.len() / 2).map_or(Duration::ZERO, |list| list.takes);
        // One is too short for the clock, and all of them are not.
        let cpu = lists.iter().map(|list| list.cpu).sum::<Duration>() / lists.len().max(1) as u32;
        Listed { takes, cpu }
    };
    Times { found, first: of_all(first), next: of_all(next) }
}

/// CPU time of a process, with what threads of it took that have ended: in hundredths of a second, as the kernel has it there.
fn cpu(pid: u32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let after_name = &stat[stat.rfind(')').unwrap() + 2..];
    let ticks = after_name.split(' ').skip(11).take(2).map(|ticks| ticks.parse::<u64>().unwrap());
    Duration::from_millis(10 * ticks.sum::<u64>())
}

#[test]
fn machines_that_hang_keep_no_other_from_being_found() {
    // One after the other they would take 3 s each.
    found_again(60, 20, 0);
}

#[test]
#[ignore = "1,000 machines, which have records of 512 MiB"]
fn a_thousand_machines_are_found_and_listed() {
    for hanging in [0, 100] {
        let Times { found, first, next } = found_again(1000, hanging, LISTS);
        println!(
            "1,000 machines, of which {hanging} hang: the others {found:.2?} after the agent's start; a list takes {:.1?}, of which the agent \
             works {:.1?}; one right after it {:.1?}, and {:.1?}",
            first.takes, first.cpu, next.takes, next.cpu
        );
    }
}

#[test]
fn machines_for_which_there_are_no_descriptors_are_not_forgotten() {
    let (site, _stand_ins) = site_with(60);
    // One descriptor for each record, and not one more for each monitor.
    let limited = ["sh", "-c", "ulimit -n 100 && exec \"$@\"", "sh"];
    let mut agent = Agent::start_by(&limited, site.clone());
    assert_eq!(agent.terminate(), Some(0));
    let agent = Agent::start_at(site);
    assert_eq!(in_state(&agent.json(&["list"]), "running"), 60);
}
