//! No other user of a host may read or write anything that an agent, a QEMU or a storage daemon of it makes, before, during and after a
//! migration: also where the directories were there before and everybody may enter them.

use std::fs::{self, File, Permissions};
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;

use end_to_end::{Pair, image, local, until, vmirror, write_noise};
use testbed::disk::{self, Format};
use testbed::guest_spec::{GuestSpec, TestDisk, Work};
use testbed::{Host, Testbed, files_below, root_or_skip};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 32 * MIB;

/// All that is in a host's directories.
fn made(host: &Host) -> Vec<PathBuf> {
    [host.state_dir(), host.run_dir(), host.ram_dir().to_owned(), host.disk_dir()]
        .iter()
        .flat_map(|at| files_below(at))
        .collect()
}

/// Asserts that nobody else can open any of it, and that there are files, or sockets, of these names.
fn closed(host: &Host, when: &str, names: &[&str]) {
    let all = made(host);
    let open: Vec<String> = all
        .iter()
        .filter_map(|file| Some((file, fs::symlink_metadata(file).ok().filter(|found| !found.is_symlink())?)))
        .map(|(file, found)| (file, found.mode() & 0o7777))
        .filter(|(_, mode)| mode & 0o077 != 0)
        .map(|(file, mode)| format!("{mode:04o} {}", file.display()))
        .collect();
    assert!(open.is_empty(), "{when}, at {}: {open:#?}", host.name());
    for name in names {
        assert!(
            all.iter().any(|file| file.ends_with(name)),
            "{when}, at {}: no {name} in {all:#?}",
            host.name()
        );
    }
}

#[test]
fn nothing_that_is_made_for_a_guest_or_an_agent_is_open_to_other_users() {
    if !root_or_skip("nothing_that_is_made_for_a_guest_or_an_agent_is_open_to_other_users") {
        return;
    }
    let testbed = Testbed::new().unwrap();
    for host in testbed.hosts() {
        for directory in [host.state_dir(), host.run_dir(), host.ram_dir().to_owned(), host.disk_dir()] {
            fs::set_permissions(directory, Permissions::from_mode(0o777)).unwrap();
        }
        // What an earlier version has made is closed, too.
        for earlier in ["agent.lock", "history.db"] {
            fs::write(host.state_dir().join(earlier), "").unwrap();
        }
        host.start_agent_with(&local()).unwrap();
    }
    let pair = Pair::with_running_agents(testbed);
    let (a, b) = (pair.a(), pair.b());
    let disks = [("disk.raw", Format::Raw), ("disk.qcow2", Format::Qcow2)].map(|(name, format)| {
        let path = image(a, name);
        disk::create(&path, format, SIZE).unwrap();
        // The user's own.
        fs::set_permissions(path, Permissions::from_mode(0o600)).unwrap();
        let roles = vec![Work::Journal { rate: 20 }.within(1)];
        TestDisk {
            roles,
            ..TestDisk::new(a.local_dir().join(name), format, name.split('.').next_back().unwrap())
        }
    });
    write_noise(&image(a, "disk.raw"), 8 * MIB, 16 * MIB);
    let spec = GuestSpec { fill_mib: 16, rate: 100, disks: disks.to_vec(), ..pair.spec("vm", 128) };
    let guest = pair.run(a, "vm", &spec);
    let state = ["agent.lock", "identity", "history.db"];
    let here = ["vms/vm.journal", "logs/vm.log", "vm.qmp", "vm.pid", "vmirror-vm@pc.ram", "api.sock"];
    // Not every QEMU has something to say, and of one that has said nothing no log is kept.
    let mut log = File::options().append(true).open(a.state_dir().join("logs/vm.log")).unwrap();
    log.write_all(b"said by the test\n").unwrap();
    closed(a, "a guest runs", &[&state[..], &here].concat());
    closed(b, "nothing runs", &state);

    let there = ["disk.raw", "disk.qcow2", "vm.storage/qmp", "vm.storage/nbd", "vm.storage/log"];
    let _ = pair.mirror("vm", a, b, &[]);
    closed(a, "it is mirrored", &[&here[..], &["vm.d/disk0", "vm.d/disk1"]].concat());
    let arrived = ["vms/vm.journal", "logs/vm.log", "vm.d/qmp", "vm.d/pid", "vmirror-vm@pc.ram"];
    closed(b, "it is mirrored", &[&arrived[..], &there].concat());
    let _ = vmirror(a, &["cancel", "vm"]).done();
    until("the copy is gone", || pair.show("vm", b).is_none() && !b.run_dir().join("vm.d").exists());
    closed(a, "the mirror has ended", &["history.db-wal", "history.db-shm"]);
    closed(b, "the mirror has ended", &["left-images.json", "disk.raw"]);

    let before = guest.status();
    let _ = pair.migrate("vm", a, b, &[]);
    guest.sound_since(&before);
    closed(a, "it has left", &["left-images.json", "logs/vm.log-ended"]);
    closed(b, "it has arrived", &arrived);
}
