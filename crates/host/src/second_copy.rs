//! A process on this host that may be a machine which has left, started once more: it has the machine's disks, memory, MAC address or
//! pid file.

use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use qemu::spec::Disk;
use qemu::{Process, Spec};

use crate::vm::Record;

/// What tells a machine from others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Marks {
    /// What it writes.
    disks: Vec<PathBuf>,
    macs: Vec<String>,
    /// Files that no other machine has.
    files: Vec<(&'static str, PathBuf)>,
}

/// A process that has some of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Second {
    /// The process.
    pub process: Process,
    /// What it has, in words.
    pub has: Vec<String>,
}

impl Marks {
    /// Of a machine; none where it has nothing that tells it.
    #[must_use]
    pub fn of(record: &Record) -> Option<Marks> {
        Marks::of_argv(&record.argv)
    }

    /// The same, of what has this command line.
    #[must_use]
    pub fn of_argv(argv: &[String]) -> Option<Marks> {
        let spec = Spec::parse(argv).ok()?;
        let marks = Marks::in_spec(&spec);
        (marks != Marks { disks: Vec::new(), macs: Vec::new(), files: Vec::new() }).then_some(marks)
    }

    fn in_spec(spec: &Spec) -> Marks {
        let written = spec.disks().into_iter().filter(Disk::is_written);
        let backends = spec.ram_backends();
        let ram = backends.iter().filter_map(|backend| Some(("RAM file", backend.named_file()?.to_owned())));
        let pid_file = spec.pid_file().map(|file| ("pid file", file.to_owned()));
        Marks {
            disks: written.filter_map(|disk| disk.host_path().map(Path::to_owned)).collect(),
            macs: spec.nics().into_iter().filter_map(|nic| nic.mac).map(|mac| mac.to_lowercase()).collect(),
            files: ram.chain(pid_file).collect(),
        }
    }

    /// Looks for processes of QEMU that have some of it, but for these. One that waits for a migration is a copy that somebody else
    /// looks after.
    #[must_use]
    pub fn look(&self, but: &[u32]) -> Vec<Second> {
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        pids.filter(|pid| !but.contains(pid)).filter_map(|pid| self.in_process(pid)).collect()
    }

    fn in_process(&self, pid: u32) -> Option<Second> {
        let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let words: Vec<String> = line
            .split(|byte| *byte == 0)
            .map(|word| String::from_utf8_lossy(word).into_owned())
            .filter(|word| !word.is_empty())
            .collect();
        let program = Path::new(words.first()?).file_name()?.to_str()?.to_owned();
        if !(program.starts_with("qemu") || program == "kvm") || words.iter().any(|word| word == "-incoming")
        {
            return None;
        }
        let theirs = Marks::in_spec(&Spec::parse(&words).ok()?);
        // As that process sees them: it may be in a container.
        let root = PathBuf::from(format!("/proc/{pid}/root"));
        let seen = |path: &Path| root.join(path.strip_prefix("/").unwrap_or(path));
        let same = |path: &Path, other: &Path| id(path).is_some_and(|file| id(&seen(other)) == Some(file));
        let beside = |path: &Path, other: &Path| {
            let names = path.file_name() == other.file_name();
            names && path.parent().zip(other.parent()).is_some_and(|(path, other)| same(path, other))
        };
        let mut has = Vec::new();
        for disk in self.disks.iter().filter(|disk| theirs.disks.iter().any(|other| same(disk, other))) {
            has.push(format!("disk {}", disk.display()));
        }
        for (what, file) in &self.files {
            if theirs.files.iter().any(|(kind, other)| kind == what && beside(file, other)) {
                has.push(format!("{what} {}", file.display()));
            }
        }
        // An address is nobody else's in this network only.
        if id(Path::new("/proc/self/ns/net")) == id(&PathBuf::from(format!("/proc/{pid}/ns/net"))) {
            has.extend(
                self.macs
                    .iter()
                    .filter(|mac| theirs.macs.contains(mac))
                    .map(|mac| format!("MAC address {mac}")),
            );
        }
        let process = Process::of_pid(pid, Path::new("")).ok()?;
        (!has.is_empty()).then_some(Second { process, has })
    }
}

fn id(path: &Path) -> Option<(u64, u64)> {
    fs::metadata(path).ok().map(|file: Metadata| (file.dev(), file.ino()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt as _;
    use std::process::{Child, Command};

    use super::*;

    /// A process that says that it is QEMU, with this command line.
    struct Fake(Child);

    impl Fake {
        fn new(arguments: &[&str]) -> Fake {
            let mut command = Command::new("sh");
            command.arg0("qemu-system-x86_64").args(["-c", "read line", "-enable-kvm"]);
            let fake = Fake(command.args(arguments).stdin(std::process::Stdio::piped()).spawn().unwrap());
            // A process has no command line yet for a moment in which it is already the new program.
            while fs::read(format!("/proc/{}/cmdline", fake.0.id())).unwrap().is_empty() {
                std::thread::yield_now();
            }
            fake
        }
    }

    impl Drop for Fake {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn who_has_what_only_one_machine_has_is_found_and_others_are_not() {
        let place = tempfile::tempdir().unwrap();
        let at = |name: &str| place.path().join(name).display().to_string();
        std::fs::write(at("disk"), b"").unwrap();
        std::fs::write(at("other"), b"").unwrap();
        std::os::unix::fs::symlink(at("disk"), at("link")).unwrap();
        let line = |words: &[&str]| {
            let words = ["qemu-system-x86_64"].iter().chain(words).map(|word| (*word).to_owned());
            Marks::in_spec(&Spec::parse(&words.collect::<Vec<_>>()).unwrap())
        };
        let (pid, drive) = (at("pid"), format!("file={},format=raw", at("disk")));
        let card = ["-netdev", "tap,id=n,ifname=t0", "-device", "virtio-net,netdev=n,mac=52:54:00:AB:00:01"];
        let marks = line(&[&["-drive", &drive, "-pidfile", &pid], &card[..]].concat());
        let found = |arguments: &[&str]| {
            let fake = Fake::new(arguments);
            let found = marks.in_process(fake.0.id()).map(|second| second.has);
            assert!(marks.look(&[fake.0.id()]).iter().all(|second| second.process.pid != fake.0.id()));
            found
        };
        let linked = format!("file={},format=raw", at("link"));
        assert_eq!(found(&["-drive", &linked]), Some(vec![format!("disk {}", at("disk"))]));
        assert_eq!(found(&["-pidfile", &pid]), Some(vec![format!("pid file {pid}")]));
        let lower = ["-netdev", "tap,id=x,ifname=t9", "-device", "e1000,netdev=x,mac=52:54:00:ab:00:01"];
        assert_eq!(found(&lower), Some(vec!["MAC address 52:54:00:ab:00:01".to_owned()]));
        let others = format!("file={},format=raw", at("other"));
        assert_eq!(found(&["-drive", &others]), None);
        assert_eq!(found(&["-drive", &format!("{drive},readonly=on")]), None, "reading is no second copy");
        assert_eq!(found(&["-drive", &format!("{drive},snapshot=on")]), None, "nor is what is thrown away");
        assert_eq!(found(&["-snapshot", "-drive", &drive]), None);
        assert_eq!(found(&["-drive", &drive, "-incoming", "defer"]), None);
    }
}
