use std::fs;

use proptest::prelude::*;

use super::make::Plan;
use super::read::limits_of;
use super::*;

const PID: u32 = 100;

/// A host whose cgroups are directories and files.
struct FakeHost(tempfile::TempDir);

impl FakeHost {
    /// One with these mounts: type, options, and name of the directory.
    fn new(mounts: &[(&str, &str, &str)]) -> FakeHost {
        let host = FakeHost(tempfile::tempdir().unwrap());
        let mut lines = String::new();
        for (kind, options, directory) in mounts {
            let mount = host.path(directory);
            fs::create_dir_all(&mount).unwrap();
            lines += &format!("31 23 0:28 / {} rw,relatime - {kind} {kind} rw,{options}\n", mount.display());
        }
        host.write("proc/self/mountinfo", &lines);
        host
    }

    fn v2() -> FakeHost {
        let host = FakeHost::new(&[("cgroup2", "nsdelegate", "cgroup")]);
        host.write("cgroup/cgroup.controllers", "cpuset cpu io memory pids\n");
        host.write("cgroup/cgroup.subtree_control", "cpu\n");
        host
    }

    fn v1() -> FakeHost {
        FakeHost::new(&[
            ("cgroup", "cpu,cpuacct", "cgroup/cpu"),
            ("cgroup", "memory", "cgroup/memory"),
            ("cgroup2", "", "cgroup/unified"),
        ])
    }

    fn path(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.path(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
    }

    /// Puts a thread of a process into a cgroup of version 2.
    fn thread(&self, pid: u32, thread: u32, cgroup: &str) {
        self.write(&format!("proc/{pid}/task/{thread}/cgroup"), &format!("0::/{cgroup}\n"));
        fs::create_dir_all(self.path(&format!("proc/{thread}"))).unwrap();
        let list = format!("cgroup/{cgroup}/cgroup.threads");
        let there = fs::read_to_string(self.path(&list)).unwrap_or_default();
        self.write(&list, &format!("{there}{thread}\n"));
    }

    fn limits(&self) -> Limits {
        limits_of(&self.path("proc"), PID, &[]).unwrap()
    }

    fn plan(&self, limits: Limits) -> Result<Plan, CgroupError> {
        let parent = "vms.slice/vmirror".parse().unwrap();
        Plan::in_proc(&self.path("proc"), limits, &parent, "web1")
    }
}

fn quota(time: u64, period: u64) -> Option<Quota> {
    Some(Quota { time, period })
}

const ALL: Limits = Limits {
    quota: Some(Quota { time: 150_000, period: 50_000 }),
    weight: Some(CpuWeight::V2(300)),
    memory_max: Some(1 << 30),
    memory_high: Some(1 << 29),
};

#[test]
fn what_is_set_for_the_process_alone_is_read_and_the_tightest_counts() {
    let host = FakeHost::v2();
    for (cgroup, max, weight, memory) in [
        ("vms.slice", "10000 100000", "77", "4096"),
        ("vms.slice/vm.scope", "200000 100000", "500", "2147483648"),
        ("vms.slice/vm.scope/inner", "500000 500000", "100", "4294967296"),
    ] {
        host.write(&format!("cgroup/{cgroup}/cgroup.threads"), "");
        host.write(&format!("cgroup/{cgroup}/cpu.max"), &format!("{max}\n"));
        host.write(&format!("cgroup/{cgroup}/cpu.weight"), &format!("{weight}\n"));
        host.write(&format!("cgroup/{cgroup}/memory.max"), &format!("{memory}\n"));
        host.write(&format!("cgroup/{cgroup}/memory.high"), "max\n");
    }
    host.thread(PID, PID, "vms.slice/vm.scope/inner");
    host.thread(PID, 101, "vms.slice/vm.scope/inner");
    // Another machine, in the same slice.
    host.thread(200, 200, "vms.slice/other.scope");
    let expected = Limits {
        quota: quota(500_000, 500_000),
        weight: Some(CpuWeight::V2(500)),
        memory_max: Some(2 << 30),
        memory_high: None,
    };
    assert_eq!(host.limits(), expected);
    // The slice is the host's, also when there is nobody else in it.
    fs::remove_dir_all(host.path("proc/200")).unwrap();
    let made = [host.path("cgroup/vms.slice/vm.scope")];
    assert_eq!(limits_of(&host.path("proc"), PID, &made).unwrap(), expected);
    assert_eq!(host.limits(), Limits { quota: quota(10_000, 100_000), memory_max: Some(4096), ..expected });
}

#[test]
fn limits_that_are_shared_are_not_the_processs() {
    let host = FakeHost::v2();
    host.write("cgroup/agent.service/cpu.max", "50000 100000\n");
    host.thread(PID, PID, "agent.service");
    host.thread(7, 7, "agent.service");
    assert!(host.limits().are_none());
    // One whose process id is of another namespace.
    let host = FakeHost::v2();
    host.write("cgroup/vm.scope/cpu.max", "50000 100000\n");
    host.thread(PID, PID, "vm.scope");
    assert_eq!(host.limits().quota, quota(50_000, 100_000));
    host.write("cgroup/vm.scope/below/cgroup.threads", "0\n");
    assert!(host.limits().are_none());
}

#[test]
fn limits_of_a_part_of_the_threads_are_not_the_processs() {
    let host = FakeHost::v2();
    host.write("cgroup/vm.scope/cpu.max", "400000 100000\n");
    host.write("cgroup/vm.scope/emulator/cpu.max", "10000 100000\n");
    host.write("cgroup/vm.scope/cgroup.threads", "");
    host.thread(PID, PID, "vm.scope/emulator");
    host.thread(PID, 101, "vm.scope/vcpu0");
    assert_eq!(host.limits().quota, quota(400_000, 100_000));
}

#[test]
fn nothing_set_or_nothing_to_be_seen_is_no_limit() {
    let host = FakeHost::v2();
    host.thread(PID, PID, "vm.scope");
    assert!(host.limits().are_none(), "no controller is at work there");
    host.write("cgroup/vm.scope/cpu.max", "max 100000\n");
    host.write("cgroup/vm.scope/cpu.weight", "100\n");
    host.write("cgroup/vm.scope/memory.max", "max\n");
    assert!(host.limits().are_none());
    let host = FakeHost::new(&[]);
    host.thread(PID, PID, "vm.scope");
    assert!(host.limits().are_none(), "nothing is mounted");
    host.write("proc/self/mountinfo", "31 23 0:28 /elsewhere /x rw - cgroup rw rw,cpu\n");
    assert!(host.limits().are_none(), "the part that it is in is not mounted");
}

#[test]
fn what_is_not_understood_is_told() {
    let host = FakeHost::v2();
    host.thread(PID, PID, "vm.scope");
    host.write("cgroup/vm.scope/memory.max", "many\n");
    let error = limits_of(&host.path("proc"), PID, &[]).unwrap_err();
    assert!(
        error.to_string().contains("vm.scope/memory.max") && error.to_string().contains("many"),
        "{error}"
    );
}

#[test]
fn version_1_has_its_own_names_and_numbers() {
    let host = FakeHost::v1();
    host.write(
        &format!("proc/{PID}/task/{PID}/cgroup"),
        "4:memory:/vm\n1:cpuacct,cpu:/vms/vm\n9:name=systemd:/\n0::/\n",
    );
    host.write("cgroup/cpu/vms/vm/tasks", "100\n");
    host.write("cgroup/cpu/vms/vm/cpu.cfs_quota_us", "150000\n");
    host.write("cgroup/cpu/vms/vm/cpu.cfs_period_us", "50000\n");
    host.write("cgroup/cpu/vms/vm/cpu.shares", "3072\n");
    host.write("cgroup/cpu/vms/tasks", "");
    host.write("cgroup/cpu/vms/cpu.cfs_quota_us", "-1\n");
    host.write("cgroup/cpu/vms/cpu.cfs_period_us", "100000\n");
    host.write("cgroup/memory/vm/memory.limit_in_bytes", "1073741824\n");
    let expected = Limits { weight: Some(CpuWeight::V1(3072)), memory_high: None, ..ALL };
    assert_eq!(host.limits(), expected);
    host.write("cgroup/memory/vm/memory.limit_in_bytes", "9223372036854771712\n");
    assert_eq!(host.limits(), Limits { memory_max: None, ..expected });
}

#[test]
fn they_are_made_in_version_2_with_their_controllers_at_work() {
    let host = FakeHost::v2();
    host.write("cgroup/vms.slice/cgroup.subtree_control", "");
    host.write("cgroup/vms.slice/vmirror/cgroup.subtree_control", "cpu memory\n");
    let plan = host.plan(ALL).unwrap();
    let directories = plan.directories();
    assert_eq!(directories, [host.path("cgroup/vms.slice/vmirror/vmirror-web1")]);
    fs::create_dir(&directories[0]).unwrap();
    plan.make().unwrap();
    assert_eq!(host.read("cgroup/cgroup.subtree_control"), "+memory");
    assert_eq!(host.read("cgroup/vms.slice/cgroup.subtree_control"), "+memory");
    assert_eq!(host.read("cgroup/vms.slice/vmirror/cgroup.subtree_control"), "cpu memory\n");
    let set = |file: &str| host.read(&format!("cgroup/vms.slice/vmirror/vmirror-web1/{file}"));
    assert_eq!(set("cpu.max"), "150000 50000");
    assert_eq!(set("cpu.weight"), "300");
    assert_eq!(set("memory.max"), "1073741824");
    assert_eq!(set("memory.high"), "536870912");
    make::enter(&directories, PID).unwrap();
    assert_eq!(set("cgroup.procs"), "100");
}

#[test]
fn they_are_made_in_each_hierarchy_of_version_1_that_they_need() {
    let host = FakeHost::v1();
    let error = host.plan(ALL).unwrap_err();
    assert!(matches!(error, CgroupError::NoHigh(high) if high == 1 << 29), "{error}");
    let limits = Limits { memory_high: None, ..ALL };
    let plan = host.plan(limits).unwrap();
    let [cpu, memory] =
        ["cpu", "memory"].map(|name| host.path(&format!("cgroup/{name}/vms.slice/vmirror/vmirror-web1")));
    assert_eq!(plan.directories(), [cpu.clone(), memory]);
    plan.make().unwrap();
    let set = |file: &str| host.read(&format!("cgroup/{file}"));
    assert_eq!(set("cpu/vms.slice/vmirror/vmirror-web1/cpu.cfs_quota_us"), "150000");
    assert_eq!(set("cpu/vms.slice/vmirror/vmirror-web1/cpu.cfs_period_us"), "50000");
    assert_eq!(set("cpu/vms.slice/vmirror/vmirror-web1/cpu.shares"), "3072");
    assert_eq!(set("memory/vms.slice/vmirror/vmirror-web1/memory.limit_in_bytes"), "1073741824");
    let only_cpu = host.plan(Limits { memory_max: None, ..limits }).unwrap();
    assert_eq!(only_cpu.directories(), [cpu]);
}

#[test]
fn what_is_in_the_way_is_told() {
    let host = FakeHost::v2();
    host.write("cgroup/cgroup.controllers", "memory\n");
    let error = host.plan(ALL).unwrap_err();
    assert!(matches!(error, CgroupError::NoController { controller: "cpu" }), "{error}");
    // No controllers can be enabled where there is no list of them.
    let host = FakeHost::v2();
    let error = host.plan(ALL).unwrap().make().unwrap_err();
    assert!(matches!(error, CgroupError::Read { .. }), "{error}");
}

#[tokio::test]
async fn what_is_removed_may_have_gone() {
    let host = FakeHost::new(&[("cgroup2", "", "cgroup/vm")]);
    let cgroup = host.path("cgroup/vm");
    make::remove(&cgroup).await.unwrap();
    assert!(!cgroup.exists());
    make::remove(&cgroup).await.unwrap();
}

/// On the cgroups of this machine, of whichever version.
#[tokio::test]
async fn the_kernel_keeps_what_is_made_and_says_it_again() {
    let proc = Path::new(PROC);
    let Some(cpu) = hierarchy::Hierarchy::of(Controller::Cpu, proc).unwrap() else {
        eprintln!("skipped: no cgroups with a CPU controller");
        return;
    };
    let parent: CgroupParent = format!("vmirror-unit-{}", std::process::id()).parse().unwrap();
    let version_1 = cpu.version == hierarchy::Version::V1;
    let weight = if version_1 { CpuWeight::V1(3072) } else { CpuWeight::V2(300) };
    let limits = Limits { weight: Some(weight), memory_high: ALL.memory_high.filter(|_| !version_1), ..ALL };
    let plan = Plan::new(limits, &parent, "web1").unwrap();
    match plan.make() {
        Err(e) if e.hint().contains("as root") => {
            eprintln!("skipped: {}", e);
            return;
        }
        made => made.unwrap(),
    }
    let directories = plan.directories();
    let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
    make::enter(&directories, child.id()).unwrap();
    let read = limits_of(proc, child.id(), &directories);
    child.kill().unwrap();
    child.wait().unwrap();
    for directory in &directories {
        make::remove(directory).await.unwrap();
        make::remove(directory.parent().unwrap()).await.unwrap();
    }
    assert_eq!(read.unwrap(), limits);
}

#[test]
fn a_parent_is_a_path_from_the_root_of_all() {
    for bad in ["", "/", "/machine.slice", "..", "a/../b", "./a", "a\nb"] {
        assert_eq!(bad.parse::<CgroupParent>(), Err(BadCgroup(bad.to_owned())), "{bad:?}");
    }
    for good in ["machine.slice", "a/b", "a.service/vms"] {
        assert_eq!(good.parse::<CgroupParent>().unwrap().as_ref(), Path::new(good));
    }
}

#[test]
fn the_default_of_one_version_is_that_of_the_other() {
    assert_eq!(CpuWeight::V1(DEFAULT_SHARES).weight(), DEFAULT_WEIGHT);
    assert_eq!(CpuWeight::V2(DEFAULT_WEIGHT).shares(), DEFAULT_SHARES);
    assert_eq!(CpuWeight::V1(*SHARES.start()).weight(), *WEIGHTS.start());
    assert_eq!(CpuWeight::V1(*SHARES.end()).weight(), *WEIGHTS.end());
}

proptest! {
    #[test]
    fn a_weight_comes_back_through_version_1(weight in WEIGHTS) {
        let shares = CpuWeight::V2(weight).shares();
        prop_assert!(SHARES.contains(&shares));
        prop_assert_eq!(CpuWeight::V1(shares).weight(), weight);
    }

    #[test]
    fn shares_become_a_weight_that_is_one(shares in SHARES) {
        prop_assert!(WEIGHTS.contains(&CpuWeight::V1(shares).weight()));
    }

    #[test]
    fn the_tighter_quota_allows_no_more_than_either(a in (1u64..1 << 40, 1u64..1 << 20), b in (1u64..1 << 40, 1u64..1 << 20)) {
        let [a, b] = [a, b].map(|(time, period)| Quota { time, period });
        let both = a.tighter(b);
        let part = |quota: Quota| quota.time as f64 / quota.period as f64;
        prop_assert!(part(both) <= part(a) && part(both) <= part(b));
        prop_assert!(both == a || both == b);
    }
}
