//! A machine whose QEMU runs as another user than the agent must move like any other, and run as nobody but whom the operator of its
//! destination names.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use end_to_end::{Pair, image, local, until, vmirror};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use session::report::DiskMode;
use testbed::disk::{self, Format};
use testbed::guest_spec::{GuestSpec, Nic, TestDisk, Work};
use testbed::{AgentOptions, Host, Programs, Testbed, root_or_skip};

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
        // As root's only, whatever this machine has.
        let (tun, device) = (tun(host), Path::new("/dev/net/tun"));
        let number = fs::metadata(device).unwrap().rdev();
        mknodat(CWD, &tun, FileType::CharacterDevice, Mode::RUSR | Mode::WUSR, number).unwrap();
        let bound = vec![(tun, device.to_owned())];
        host.start_agent_with(&AgentOptions { bound, ..local() }).unwrap();
    }
    Pair::with_running_agents(testbed)
}

/// What a host has as `/dev/net/tun`.
fn tun(host: &Host) -> PathBuf {
    host.directory().join("tun")
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

#[test]
fn a_tap_a_qcow2_image_and_memory_that_is_still_missing_are_that_users_too() {
    if !root_or_skip("QEMUs of several users") {
        return;
    }
    let pair = pair();
    let (a, b) = (pair.a(), pair.b());
    a.add_tap("tap0").unwrap();
    let nic = Nic::new("tap0", 10);
    let path = image(a, "disk.qcow2");
    disk::create(&path, Format::Qcow2, 32 << 20).unwrap();
    let roles = vec![Work::Journal { rate: 20 }.within(1)];
    let disk = TestDisk { roles, ..TestDisk::new(a.local_dir().join("disk.qcow2"), Format::Qcow2, "qcow2") };
    let spec = GuestSpec { nic: Some(nic.clone()), disks: vec![disk], ..pair.spec("vm", 128) };
    let spec = pair.outrun_by(spec);
    // Its console goes on in the same file there.
    fs::write(&spec.serial, "").unwrap();
    chown(&spec.serial, Some(NOBODY), Some(NOBODY)).unwrap();
    let guest = pair.run(a, "vm", &spec);
    let before = guest.status();
    // Everybody may open it where udev has made it.
    let said = vmirror(a, &["check", "vm", "--to", &b.listen().to_string()]);
    let words = "user 65534:65534, as whom host-b runs QEMU, cannot open /dev/net/tun";
    assert!(said.stdout.contains(words) && said.stdout.contains("[user-permission]"), "{said:?}");
    fs::set_permissions(tun(b), Permissions::from_mode(0o666)).unwrap();
    assert_eq!(pair.check("vm"), Vec::<String>::new());
    let report = pair.migrate("vm", a, b, &["--on-diverge", "post-copy"]);
    assert!(report.post_copy.is_some_and(|supplied| supplied.pages > 0), "it lacked nothing");
    assert_eq!(report.disks[0].mode, DiskMode::Mirrored);
    let nobody = [NOBODY.to_string().as_str()].repeat(4).join(" ");
    assert_eq!(runs_as(&pair, b).0, nobody);
    let there = fs::metadata(image(b, "disk.qcow2")).unwrap();
    assert_eq!((there.uid(), there.gid(), there.mode() & 0o777), (NOBODY, NOBODY, 0o600));
    let tap = b.command("ip").args(["tuntap", "list", "dev", "tap0"]).output().unwrap();
    let tap = String::from_utf8(tap.stdout).unwrap();
    assert!(tap.contains(&format!("user {NOBODY}")), "{tap:?}");
    let client = pair.client().unwrap();
    let heartbeats = client.heartbeats(nic.address, 100).unwrap();
    until("it can be reached", || heartbeats.report().received > 20);
    guest.sound_since(&before);
    // Made by hand, and left to whoever made it.
    a.remove_tap("tap0").unwrap();
    pair.holds_nothing(a);
}
