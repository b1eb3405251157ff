//! A machine whose QEMU runs as another user than the agent must move like any other, and run as nobody but whom the operator of its
//! destination names.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::Path;
use std::process::{Child, Stdio};

use end_to_end::{Pair, local, until, vmirror};
use session::report::DiskMode;
use testbed::{Host, Programs, Testbed, root_or_skip};

/// A user and group that own nothing.
const NOBODY: u32 = 65534;

/// Two hosts of root's agents, in whose directories other users find their way. Host B runs what comes there as nobody.
fn pair() -> Pair {
    let testbed = Testbed::new().unwrap();
    let pass = |path: &Path, mode| fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    pass(testbed.directory(), 0o755);
    for host in testbed.hosts() {
        for directory in [host.directory(), &host.disk_dir(), &host.local_dir(), &host.shared_dir()] {
            pass(directory, 0o755);
        }
        pass(host.ram_dir(), 0o711);
        pass(host.serial("x").parent().unwrap(), 0o777);
    }
    testbed
        .b()
        .configure(|config| {
            let allow = config["allow"].as_table_mut().unwrap();
            allow.insert("user".to_owned(), format!("{NOBODY}:{NOBODY}").into());
        })
        .unwrap();
    for host in testbed.hosts() {
        host.start_agent_with(&local()).unwrap();
    }
    Pair::with_running_agents(testbed)
}

/// Starts a QEMU as nobody, with a disk, memory and sockets that are nobody's, where the host's own disks are seen as its agent sees them.
fn start(host: &Host) -> Child {
    let theirs = host.shared_dir().join("theirs");
    fs::create_dir(&theirs).unwrap();
    let ram = host.ram_dir().join("theirs");
    fs::write(&ram, "").unwrap();
    let image = host.disk_dir().join("vm.raw");
    fs::write(&image, (0..8 << 20).map(|at: u32| (at >> 12) as u8).collect::<Vec<u8>>()).unwrap();
    for path in [&theirs, &ram, &image] {
        chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
        let mode = if path.is_dir() { 0o700 } else { 0o600 };
        fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }
    let bound =
        format!("mount --bind {} {} && exec \"$@\"", host.disk_dir().display(), host.local_dir().display());
    let mut command = host.command("unshare");
    command.args(["--mount", "sh", "-c", &bound, "sh", "setpriv", "--clear-groups"]);
    command.args([format!("--reuid={NOBODY}"), format!("--regid={NOBODY}")]).arg(Programs::find().qemu);
    let memory = format!("memory-backend-file,id=ram,size=32M,share=on,mem-path={}", ram.display());
    command.args(["-accel", "tcg", "-m", "32", "-nodefaults", "-display", "none", "-object", &memory]);
    command.args(["-machine", "pc,memory-backend=ram"]);
    command.args(["-qmp", &format!("unix:{},server=on,wait=off", theirs.join("qmp").display())]);
    command.args(["-monitor", &format!("unix:{},server=on,wait=off", theirs.join("monitor").display())]);
    let drive = format!("file={},format=raw,if=virtio", host.local_dir().join("vm.raw").display());
    command.args(["-drive", &drive]).stdout(Stdio::null()).spawn().unwrap()
}

/// As whom the QEMU of a machine runs on a host: real, effective, saved, for files; and its groups.
fn runs_as(pair: &Pair, host: &Host) -> (String, String) {
    let pid = pair.qemu(host).unwrap();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = |key: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap();
        line.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    (line("Uid:"), line("Groups:"))
}

#[test]
fn a_machine_of_another_user_moves_and_runs_as_whom_its_destination_allows() {
    if !root_or_skip("QEMUs of several users") {
        return;
    }
    let pair = pair();
    let (a, b) = (pair.a(), pair.b());
    let mut theirs = start(a);
    let qmp = a.shared_dir().join("theirs/qmp");
    let adopt = ["adopt", "vm", "--qmp", qmp.to_str().unwrap()];
    until("it is adopted", || vmirror(a, &adopt).code == Some(0));
    assert_eq!(pair.check("vm"), Vec::<String>::new());
    let report = pair.migrate("vm", a, b, &[]);
    assert_eq!(report.disks[0].mode, DiskMode::Mirrored);
    until("the source's QEMU has ended", || theirs.try_wait().unwrap().is_some());
    let nobody = [NOBODY.to_string().as_str()].repeat(4).join(" ");
    assert_eq!(runs_as(&pair, b), (nobody.clone(), String::new()));
    let there = fs::metadata(b.disk_dir().join("vm.raw")).unwrap();
    assert_eq!((there.uid(), there.gid(), there.mode() & 0o777), (NOBODY, NOBODY, 0o600));
    assert_eq!(
        fs::read(a.disk_dir().join("vm.raw")).unwrap(),
        fs::read(b.disk_dir().join("vm.raw")).unwrap()
    );
    // Nobody else gets at where agent and QEMU meet.
    let own = fs::metadata(b.run_dir().join("vm.d")).unwrap();
    assert_eq!((own.uid(), own.mode() & 0o777), (NOBODY, 0o700));
    pair.holds_nothing(a);

    // From another user's QEMU back to one of the agent's own, and there again: what it has left there is made its own.
    let _ = pair.migrate("vm", b, a, &[]);
    assert_eq!(runs_as(&pair, a).0, "0 0 0 0");
    pair.holds_nothing(b);
    let _ = pair.migrate("vm", a, b, &[]);
    assert_eq!(runs_as(&pair, b), (nobody, String::new()));
    let _ = vmirror(b, &["stop", "vm", "--force"]).done();
    pair.holds_nothing(b);
}

#[test]
fn what_that_user_could_not_open_is_told_before_anything_is_copied() {
    if !root_or_skip("QEMUs of several users") {
        return;
    }
    let pair = pair();
    let (a, b) = (pair.a(), pair.b());
    let image = a.shared_dir().join("roots.raw");
    fs::write(&image, vec![0; 1 << 20]).unwrap();
    fs::set_permissions(&image, Permissions::from_mode(0o600)).unwrap();
    let outputs = a.shared_dir().join("roots.log");
    pair.run_tiny(
        a,
        "vm",
        &[
            "-drive",
            &format!("file={},format=raw,if=virtio", image.display()),
            "-serial",
            &format!("file:{}", outputs.display()),
        ],
    );
    let said = vmirror(a, &["check", "vm", "--to", &b.listen().to_string()]);
    assert_eq!(said.code, Some(2), "{said:?}");
    for path in [&image, &outputs] {
        let words = format!("user 65534:65534, as whom host-b runs QEMU, cannot write {}", path.display());
        assert!(said.stdout.contains(&words) && said.stdout.contains("[user-permission]"), "{said:?}");
    }
    for path in [&image, &outputs] {
        chown(path, Some(NOBODY), None).unwrap();
    }
    assert_eq!(pair.check("vm"), Vec::<String>::new());
    let _ = pair.migrate("vm", a, b, &[]);
    assert!(pair.runs_on("vm", b));
}
