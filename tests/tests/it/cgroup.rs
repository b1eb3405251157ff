//! Limits of CPU and memory that a machine's process has go with it, and what was made for them goes when it does.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use end_to_end::{Pair, UnderWay, report_adds_up, until, vmirror};
use session::Outcome;
use testbed::guest_spec::{GuestSpec, Pattern};
use testbed::{Host, Testbed, fault, root_or_skip};

const TOP: &str = "/sys/fs/cgroup";
/// Version 2: the files of a cgroup that are set.
const FILES: [(&str, &str); 3] =
    [("cpu.max", "180000 60000"), ("cpu.weight", "300"), ("memory.max", "1073741824")];
/// Version 1: which controller, and the file.
const FILES_OF_VERSION_1: [(&str, &str, &str); 4] = [
    ("cpu", "cpu.cfs_period_us", "60000"),
    ("cpu", "cpu.cfs_quota_us", "180000"),
    ("cpu", "cpu.shares", "3072"),
    ("memory", "memory.limit_in_bytes", "1073741824"),
];
/// How long threads of a process that was killed may take to leave its cgroup.
const LEAVE: Duration = Duration::from_secs(10);

/// Cgroups of a test's own, removed when dropped. Declared before the testbed: its processes must have ended by then.
struct Cgroups {
    name: String,
    /// The top of each hierarchy.
    tops: Vec<PathBuf>,
}

impl Cgroups {
    /// None, and the test is skipped, where this machine has no cgroups with both controllers.
    fn or_skip(test: &str) -> Option<Cgroups> {
        if !root_or_skip("cgroups") {
            return None;
        }
        let name = format!("vmirror-test-{}-{test}", std::process::id());
        let top = Path::new(TOP);
        let version_1 = ["cpu", "memory"].map(|controller| top.join(controller));
        let controllers = fs::read_to_string(top.join("cgroup.controllers")).unwrap_or_default();
        let has = |controller| controllers.split_whitespace().any(|there| there == controller);
        let tops = if has("cpu") && has("memory") {
            fs::write(top.join("cgroup.subtree_control"), "+cpu +memory").unwrap();
            vec![top.to_owned()]
        } else if version_1.iter().all(|top| top.join("tasks").exists()) {
            version_1.to_vec()
        } else {
            eprintln!("skipped: {TOP} has no cgroups with the controllers cpu and memory");
            return None;
        };
        let cgroups = Cgroups { name, tops };
        for directory in cgroups.directories("") {
            fs::create_dir(&directory).unwrap();
            if !cgroups.version_1() {
                fs::write(directory.join("cgroup.subtree_control"), "+cpu +memory").unwrap();
            }
        }
        Some(cgroups)
    }

    fn version_1(&self) -> bool {
        self.tops.len() > 1
    }

    /// A cgroup of the test's, in each hierarchy.
    fn directories(&self, below: &str) -> Vec<PathBuf> {
        self.tops.iter().map(|top| top.join(&self.name).join(below)).collect()
    }

    /// The files to set, and their values, in a cgroup.
    fn files(&self, cgroup: &str) -> Vec<(PathBuf, &'static str)> {
        let top = Path::new(TOP);
        if self.version_1() {
            let path = |(controller, file, value)| {
                (top.join(controller).join(&self.name).join(cgroup).join(file), value)
            };
            FILES_OF_VERSION_1.map(path).to_vec()
        } else {
            FILES.map(|(file, value)| (top.join(&self.name).join(cgroup).join(file), value)).to_vec()
        }
    }

    /// Gives a process limits of its own, as its user would.
    fn limit(&self, pid: i32) {
        let directories = self.directories("own");
        directories.iter().for_each(|directory| fs::create_dir(directory).unwrap());
        for (file, value) in self.files("own") {
            fs::write(file, value).unwrap();
        }
        for directory in directories {
            fs::write(directory.join("cgroup.procs"), pid.to_string()).unwrap();
        }
    }

    /// Asserts that a cgroup has the same limits, and that process in it, and no other.
    #[track_caller]
    fn holds(&self, cgroup: &str, pid: i32) {
        for (file, value) in self.files(cgroup) {
            assert_eq!(fs::read_to_string(&file).unwrap().trim(), value, "{}", file.display());
        }
        for directory in self.directories(cgroup) {
            let processes = fs::read_to_string(directory.join("cgroup.procs")).unwrap();
            assert_eq!(processes.trim(), pid.to_string(), "{}", directory.display());
        }
    }

    /// Whether there is such a cgroup, in any hierarchy.
    fn exist(&self, cgroup: &str) -> bool {
        self.directories(cgroup).iter().any(|directory| directory.exists())
    }

    /// Lets a host make cgroups for machines that come to it.
    fn allow(&self, host: &Host, parent: &str) {
        let path = format!("{}/{parent}", self.name);
        let allow = |config: &mut toml::Table| {
            config["allow"].as_table_mut().unwrap().insert("cgroup".to_owned(), path.into());
        };
        host.stop_agent().unwrap();
        host.configure(allow).unwrap();
        host.start_agent().unwrap();
    }
}

impl Drop for Cgroups {
    fn drop(&mut self) {
        let start = Instant::now();
        for directory in self.directories("") {
            while let Err(error) = remove_all(&directory) {
                if start.elapsed() > LEAVE {
                    eprintln!("{} is left: {error}", directory.display());
                    break;
                }
                thread::sleep(Duration::from_millis(20));
            }
        }
    }
}

/// The files of a cgroup go with it, and only what is below it has to go before.
fn remove_all(directory: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            remove_all(&path)?;
        }
    }
    fs::remove_dir(directory)
}

/// Hosts that see the machine's cgroups: in a network namespace of `ip netns` there are none.
fn pair() -> Pair {
    Pair::of(Testbed::rootless().unwrap())
}

/// A guest that is not copied soon over a slow link.
fn busy(pair: &Pair) -> GuestSpec {
    GuestSpec { rate: 500, pattern: Pattern::Incompressible, ..pair.spec("vm", 128) }
}

fn begin<'a>(pair: &'a Pair) -> UnderWay<'a> {
    let migration = pair.begin("vm", pair.a(), pair.b(), &["--bandwidth", "1MiB/s"]);
    migration.reaches("synchronize");
    migration
}

#[test]
fn limits_go_with_a_guest_there_and_back() {
    let Some(cgroups) = Cgroups::or_skip("there-and-back") else { return };
    let pair = pair();
    let (a, b) = (pair.a(), pair.b());
    let guest = pair.run(a, "vm", &pair.spec("vm", 128));
    let before = guest.status();
    cgroups.limit(pair.qemu(a).unwrap());

    pair.migration_refused("vm", &[]).is("cgroup-not-allowed", &["host-b", "[allow] cgroup"]);
    assert_eq!(pair.check("vm"), ["cgroup-not-allowed"]);
    // A place where no cgroup can be made is told by a rehearsal as well.
    cgroups.allow(b, "cgroup.procs");
    pair.migration_refused("vm", &[]).is("cgroup", &["host-b", "cgroup.procs"]);
    assert_eq!(pair.check("vm"), ["cgroup"]);

    cgroups.allow(b, "b");
    assert_eq!(pair.check("vm"), [""; 0]);
    assert!(!cgroups.exist("b/vmirror-vm"), "a rehearsal gives back what it has made");
    let report = pair.migrate("vm", a, b, &[]);
    report_adds_up(&report, &guest);
    cgroups.holds("b/vmirror-vm", pair.qemu(b).unwrap());
    assert!(cgroups.exist("own"), "what its user made is its user's");

    // Back, to where the agent knows the guest's limits only from what was made of them.
    cgroups.allow(a, "a");
    let _ = pair.migrate("vm", b, a, &[]);
    cgroups.holds("a/vmirror-vm", pair.qemu(a).unwrap());
    until("the cgroup at host B is gone", || !cgroups.exist("b/vmirror-vm"));
    // An agent that is started anew leaves it, and removes it when the machine ends.
    a.kill_agent().unwrap();
    a.start_agent().unwrap();
    cgroups.holds("a/vmirror-vm", pair.qemu(a).unwrap());
    let _ = guest.sound_since(&before);
    let _ = vmirror(a, &["stop", "vm", "--force", "--json"]).done();
    assert!(!cgroups.exist("a/vmirror-vm"));
}

#[test]
fn no_cgroup_is_left_by_a_migration_that_fails() {
    let Some(cgroups) = Cgroups::or_skip("fails") else { return };
    let pair = pair();
    let (a, b) = (pair.a(), pair.b());
    let guest = pair.run(a, "vm", &busy(&pair));
    let before = guest.status();
    cgroups.limit(pair.qemu(a).unwrap());
    cgroups.allow(b, "b");
    let is_gone = |what: &str| {
        until(what, || !cgroups.exist("b/vmirror-vm"));
        guest.runs_on();
        cgroups.holds("own", pair.qemu(a).unwrap());
    };
    let there = || pair.qemu(b).unwrap();

    let migration = begin(&pair);
    cgroups.holds("b/vmirror-vm", there());
    let said = vmirror(a, &["cancel", "vm", "--json"]).done();
    assert_eq!(said.report().outcome, Outcome::Cancelled);
    let _ = migration.ended();
    is_gone("the cgroup of a copy that was cancelled is gone");

    let migration = begin(&pair);
    fault::kill(there());
    assert_eq!(migration.ended().report().outcome, Outcome::Failed);
    is_gone("the cgroup of a copy whose QEMU was killed is gone");

    let migration = begin(&pair);
    b.kill_agent().unwrap();
    assert_eq!(migration.ended().report().outcome, Outcome::Failed);
    assert!(cgroups.exist("b/vmirror-vm"), "there is nobody to remove it");
    b.start_agent().unwrap();
    is_gone("the cgroup of a copy whose agent was killed is gone");
    let _ = guest.sound_since(&before);
}
