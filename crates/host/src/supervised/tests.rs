use std::path::PathBuf;

use super::*;

const QEMU: u32 = 700;
const AGENT: u32 = 50;

/// A host of files.
struct Made(tempfile::TempDir);

impl Made {
    fn new() -> Made {
        let made = Made(tempfile::tempdir().unwrap());
        made.process(1, 0, "systemd", &["/sbin/init"], "0::/init.scope");
        made.process(AGENT, 1, "vmirror", &["vmirror", "agent"], "0::/system.slice/vmirror.service");
        made.file("etc/systemd/system/vmirror.service", "[Service]\nRestart=on-failure\n");
        made
    }

    fn root(&self) -> &Path {
        self.0.path()
    }

    fn file(&self, path: &str, text: &str) {
        let path: PathBuf = self.root().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    fn process(&self, pid: u32, parent: u32, name: &str, line: &[&str], cgroup: &str) {
        self.file(&format!("proc/{pid}/stat"), &format!("{pid} ({name}) S {parent} 1 1 0"));
        self.file(&format!("proc/{pid}/comm"), &format!("{name}\n"));
        self.file(&format!("proc/{pid}/cmdline"), &format!("{}\0", line.join("\0")));
        self.file(&format!("proc/{pid}/cgroup"), &format!("{cgroup}\n"));
    }

    /// QEMU as the child of a process that is there, in that cgroup.
    fn qemu(&self, parent: u32, cgroup: &str) -> Option<Supervisor> {
        self.process(QEMU, parent, "qemu-system-x86", &["qemu-system-x86_64"], cgroup);
        find(self.root(), QEMU, &[], AGENT)
    }
}

#[test]
fn a_unit_that_restarts_is_found_by_the_cgroup_and_its_files() {
    let made = Made::new();
    let v2 = "0::/system.slice/web1.service";
    made.file("usr/lib/systemd/system/web1.service", "[Unit]\nRestart=no\n[Service]\nRestart = always\n");
    let found = made.qemu(1, v2).unwrap();
    assert!(
        found.certain && found.what.contains("web1.service") && found.what.contains("Restart=always"),
        "{found:?}"
    );
    let v1 = "12:cpu:/system.slice\n1:name=systemd:/system.slice/web1.service/below\n0::/";
    assert!(made.qemu(1, v1).unwrap().certain);

    // The last word is that of the drop-in whose name comes last, in the directory that comes first.
    made.file("usr/lib/systemd/system/web1.service.d/20-more.conf", "[Service]\nRestart=on-failure\n");
    assert!(made.qemu(1, v2).unwrap().what.contains("on-failure"));
    made.file("etc/systemd/system/web1.service.d/20-more.conf", "[Service]\nRestart=no\n");
    assert_eq!(made.qemu(1, v2), None);
    // A template, of which this is one.
    made.file("etc/systemd/system/vm@.service", "[Service]\nRestart=on-success\n");
    assert!(
        made.qemu(1, "0::/system.slice/system-vm.slice/vm@db.service").unwrap().what.contains("on-success")
    );
    // One that is masked.
    std::os::unix::fs::symlink("/dev/null", made.root().join("etc/systemd/system/vm@db.service")).unwrap();
    assert_eq!(made.qemu(1, "0::/system.slice/system-vm.slice/vm@db.service"), None);
    // One of a user's manager; and one that nothing is known of.
    made.file("run/user/1000/systemd/transient/mine.service", "[Service]\nRestart=always\n");
    let users = "0::/user.slice/user-1000.slice/user@1000.service/app.slice/mine.service";
    assert!(made.qemu(1, users).unwrap().certain);
    let unknown = made.qemu(1, "0::/system.slice/odd.service").unwrap();
    assert!(!unknown.certain && unknown.what.contains("cannot be read"), "{unknown:?}");
}

#[test]
fn what_is_to_be_done_about_a_unit_has_effect_wherever_its_file_is() {
    for (file, cgroup) in [
        ("etc/systemd/system/web1.service", "0::/system.slice/web1.service"),
        ("run/systemd/transient/run-u7.service", "0::/system.slice/run-u7.service"),
        ("usr/lib/systemd/system/vm@.service", "0::/system.slice/system-vm.slice/vm@db.service"),
        (
            "run/user/1000/systemd/transient/mine.service",
            "0::/user.slice/user-1000.slice/user@1000.service/app.slice/mine.service",
        ),
        (
            "etc/systemd/user/own.service",
            "0::/user.slice/user-1000.slice/user@1000.service/app.slice/own.service",
        ),
    ] {
        let made = Made::new();
        made.file(file, "[Service]\nRestart=always\n");
        // Whoever says so with `systemctl edit`, or has.
        made.file(&format!("{}.d/override.conf", file), "[Service]\nRestart=on-failure\n");
        let Supervisor { remedy, certain, .. } = made.qemu(1, cgroup).unwrap();
        assert!(certain && remedy.contains("daemon-reload") && !remedy.contains("mask"), "{remedy}");
        let is_users = cgroup.contains("user@1000");
        assert_eq!(remedy.contains("systemctl --user --machine=1000@ daemon-reload"), is_users, "{remedy}");
        let (_, rest) = remedy.split_once("printf '").unwrap();
        let (text, rest) = rest.split_once("' > '/").unwrap();
        let (place, _) = rest.split_once('\'').unwrap();
        made.file(place, &text.replace("\\n", "\n"));
        assert_eq!(made.qemu(1, cgroup), None, "{file}: {remedy}");
    }
}

/// What operators are told.
const OPERATIONS: &str = include_str!("../../../../docs/operations.md");

#[test]
fn the_documentation_says_of_a_unit_what_the_agent_says() {
    let row = OPERATIONS.lines().find(|line| line.starts_with("| a systemd unit with `Restart=`")).unwrap();
    let remedy = {
        let made = Made::new();
        made.file("etc/systemd/system/UNIT.service", "[Service]\nRestart=always\n");
        made.qemu(1, "0::/system.slice/UNIT.service").unwrap().remedy
    };
    let command = remedy.split('`').nth(1).unwrap();
    assert!(row.contains(command), "{command}");
    assert!(!OPERATIONS.contains("mask --runtime"), "it has no effect on units in /etc");
}

#[test]
fn no_unit_in_the_documentation_stops_its_machine_with_the_agent() {
    let blocks = OPERATIONS.split("```ini\n").skip(1).filter_map(|rest| rest.split("```").next());
    let of_machines: Vec<&str> = blocks.filter(|block| block.contains("vmirror.service")).collect();
    assert!(!of_machines.is_empty());
    for block in of_machines {
        // Each of these passes a stop, or a restart, of the agent on.
        for key in ["Requires", "Requisite", "BindsTo", "PartOf", "StopPropagatedFrom"] {
            assert!(!block.contains(&format!("{key}=")), "{block}");
        }
        for line in [
            "After=vmirror.service",
            "Wants=vmirror.service",
            "ExecCondition=/usr/bin/systemctl is-active --quiet vmirror.service",
        ] {
            assert!(block.lines().any(|is| is == line), "{line} is not in:\n{block}");
        }
    }
}

#[test]
fn what_the_agent_or_a_person_has_started_has_no_supervisor() {
    let made = Made::new();
    assert_eq!(made.qemu(AGENT, "0::/system.slice/vmirror.service"), None);
    // Started by an agent that has ended since.
    assert_eq!(made.qemu(1, "0::/system.slice/vmirror.service"), None);
    let session = "0::/user.slice/user-0.slice/session-1.scope";
    made.process(60, 1, "bash", &["-bash"], session);
    assert_eq!(made.qemu(60, session), None);
    made.process(61, 60, "sudo", &["sudo", "qemu"], session);
    assert_eq!(made.qemu(61, session), None);
    made.process(62, 60, "sh", &["sh", "/start"], session);
    made.file("start", "#!/bin/sh\nip link set tap0 up\nqemu-system-x86_64 \"$@\"\n");
    assert_eq!(made.qemu(62, session), None);
}

#[test]
fn processes_that_start_again_what_has_ended_are_found_behind_what_they_use_for_it() {
    let made = Made::new();
    let session = "0::/user.slice/user-0.slice/session-1.scope";
    for (name, words) in [
        ("runsv", "sv once"),
        ("s6-supervise", "s6-svc -o"),
        ("supervise", "svc -o"),
        ("supervisord", "autorestart"),
        ("supervise-daemo", "start-stop-daemon"),
    ] {
        made.process(60, 1, name, &[name], session);
        made.process(61, 60, "sudo", &["sudo", "-u", "vm"], session);
        let found = made.qemu(61, session).unwrap();
        assert!(found.certain && found.remedy.contains(words), "{found:?}");
    }
    made.process(60, 1, "bash", &["bash", "-ec", "while :; do qemu; done"], session);
    assert!(made.qemu(60, session).unwrap().what.contains("a loop of a shell (process 60)"));
    made.process(60, 1, "sh", &["/bin/sh", "/usr/local/bin/keep", "web1"], session);
    made.file("usr/local/bin/keep", "#!/bin/sh\nuntil false; do qemu; done\n");
    assert!(made.qemu(60, session).unwrap().certain);
    // A script that names its shell itself has its own name, as a process.
    made.process(60, 1, "keep.sh", &["/bin/sh", "./keep.sh"], session);
    made.file("proc/60/cwd/keep.sh", "#!/bin/sh\nwhile :; do qemu; sleep 1; done\n");
    assert!(made.qemu(60, session).unwrap().certain, "by what its command line begins with");
    made.process(60, 1, "keep.sh", &["keep", "./keep.sh"], session);
    std::os::unix::fs::symlink("/usr/bin/dash", made.root().join("proc/60/exe")).unwrap();
    assert!(made.qemu(60, session).unwrap().certain, "by the file of its program");
    made.file("proc/60/cwd/keep.sh", "#!/bin/sh\nqemu\n");
    assert_eq!(made.qemu(60, session), None);
    std::fs::remove_file(made.root().join("proc/60/exe")).unwrap();
    made.process(60, 1, "containerd-shim", &["containerd-shim-runc-v2"], "0::/");
    assert!(made.qemu(60, "0::/").unwrap().remedy.contains("docker update --restart=no"));
    made.process(60, 1, "python3", &["python3", "keeper.py"], session);
    let may = made.qemu(60, session).unwrap();
    assert!(!may.certain && may.what.contains("python3 (process 60)"), "{may:?}");
}

#[test]
fn managers_of_machines_show_in_the_command_line() {
    let made = Made::new();
    let argv = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let proxmox = argv("/usr/bin/kvm -id 100 -qmp unix:/var/run/qemu-server/100.qmp,server=on");
    assert!(!managed(made.root(), &proxmox).unwrap().certain);
    made.file("etc/pve/ha/resources.cfg", "vm: 1000\n\tstate started\n\nvm: 100\n\tstate started\n");
    let found = managed(made.root(), &proxmox).unwrap();
    assert!(found.certain && found.remedy.contains("ha-manager remove vm:100"), "{found:?}");
    let libvirt = argv("qemu-system-x86_64 -mon chardev=/var/lib/libvirt/qemu/domain-1-web1/monitor.sock");
    assert!(managed(made.root(), &libvirt).unwrap().what.contains("libvirt"));
}

#[test]
fn a_disk_counts_as_one_that_a_second_copy_fails_at_only_as_long_as_it_is_locked() {
    let place = tempfile::tempdir().unwrap();
    let disk = place.path().join("disk");
    std::fs::write(&disk, b"").unwrap();
    let drive = format!("file={},format=raw,if=virtio", disk.display());
    let argv = ["qemu-system-x86_64", "-drive", &drive].map(str::to_owned);
    let spec = Spec::parse(&argv).unwrap();
    let fenced = || is_fenced(&spec, false);
    // As of a QEMU with locking=off, or on a file system without locks.
    assert!(!fenced());
    let lock = qemu::ImageLock::take(&disk).unwrap();
    assert!(fenced());
    drop(lock);
    assert!(!fenced());
}

#[test]
fn only_where_nothing_else_keeps_a_second_copy_from_running_is_it_refused() {
    let supervisor =
        |certain| Supervisor { what: "unit web1.service".to_owned(), certain, remedy: "mask it".to_owned() };
    for (certain, fenced, accepted, refused) in [
        (true, false, false, true),
        (true, false, true, false),
        (true, true, false, false),
        (false, false, false, false),
    ] {
        let said = said(&supervisor(certain), "web1", fenced, accepted);
        assert_eq!(said.refused, refused, "{said:?}");
        assert_eq!(said.finding.kind, "supervised");
        assert_eq!(said.finding.hint.contains("--accept-supervisor"), refused, "{said:?}");
        assert!(said.finding.message.contains(if certain {
            "is started again"
        } else {
            "may be started again"
        }));
    }
}
