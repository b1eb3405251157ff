//! Whether a live QEMU has open what is about to be removed as the remains of a machine that has ended. By a state directory that was
//! set back a machine has ended that runs here under another process id, from files of the same names.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use crate::host::Host;
use crate::paths::Paths;
use crate::vm::Record;
use finding::Finding;

/// A process, and what it has of a machine.
#[derive(Debug, PartialEq, Eq)]
struct Holder {
    pid: u32,
    has: PathBuf,
}

/// Who has something of a machine that has ended, if anybody.
pub(super) fn by_another(host: &Host, record: &Record) -> Option<Finding> {
    let ended = |process: &qemu::Process| process.look().is_gone();
    if !record.process.as_ref().is_none_or(ended) {
        return None;
    }
    let own = Paths::of(host, &record.name).own;
    let in_own = fs::read_dir(&own).into_iter().flatten().flatten().map(|entry| entry.path());
    let remains: Vec<PathBuf> = record.made.files.iter().cloned().chain(in_own).collect();
    let program = record.argv.first().map(PathBuf::from);
    let holder = holder(&remains, program.as_deref())?;
    let socket = [own.join("qmp"), record.qmp_socket.clone()].into_iter().find(|socket| socket.exists());
    Some(finding(record, &holder, socket))
}

fn finding(record: &Record, Holder { pid, has }: &Holder, socket: Option<PathBuf>) -> Finding {
    let name = &record.name;
    let socket = socket.map_or_else(|| "SOCKET".to_owned(), |socket| socket.display().to_string());
    Finding::new(
        "in-use",
        format!(
            "the QEMU of {name} that is on record has ended, and process {pid} has {} open: state_dir was set back, or {name} was started \
             by somebody else; nothing of it is removed",
            has.display()
        ),
        format!(
            "if process {pid} runs {name}, and no other host does, stop this agent, move {name}.journal out of state_dir/vms, start the \
             agent, and say `vmirror adopt {name} --qmp {socket}`; else end it, and the agent removes the rest"
        ),
    )
}

fn holder(remains: &[PathBuf], program: Option<&Path>) -> Option<Holder> {
    let mut files = HashMap::new();
    for path in remains {
        let Ok(meta) = fs::symlink_metadata(path) else { continue };
        if meta.file_type().is_socket() {
            let another = |pid: &u32| *pid != std::process::id() && is_qemu(*pid, program);
            if let Some(pid) = listener(path).filter(another) {
                return Some(Holder { pid, has: path.clone() });
            }
        } else if meta.is_file() {
            files.insert((meta.dev(), meta.ino()), path);
        }
    }
    if files.is_empty() {
        return None;
    }
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| *pid != std::process::id() && is_qemu(*pid, program)).find_map(|pid| {
        let open = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        let mut open = open.filter_map(|fd| fs::metadata(fd.path()).ok());
        open.find_map(|file| files.get(&(file.dev(), file.ino())))
            .map(|path| Holder { pid, has: (*path).clone() })
    })
}

/// Others may be given a machine's memory as a descriptor, and keep it for a while.
fn is_qemu(pid: u32, program: Option<&Path>) -> bool {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let first = line.split(|byte| *byte == 0).next().unwrap_or_default();
    let first = String::from_utf8_lossy(first).into_owned();
    let Some(name) = Path::new(&first).file_name() else { return false };
    program.and_then(Path::file_name) == Some(name)
        || name.to_str().is_some_and(|name| name.starts_with("qemu-system") || name.ends_with("kvm"))
}

/// Who listens at a socket. One that was left by a process that has ended refuses.
fn listener(path: &Path) -> Option<u32> {
    let stream = UnixStream::connect(path).ok()?;
    let peer = rustix::net::sockopt::socket_peercred(&stream).ok()?;
    u32::try_from(peer.pid.as_raw_nonzero().get()).ok()
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::process::{Child, Command, Stdio};

    use super::*;

    /// A process that has a file open by its standard input.
    struct Opener(Child);

    impl Opener {
        fn new(file: &Path) -> Opener {
            let stdin = Stdio::from(fs::File::open(file).unwrap());
            Opener(Command::new("sleep").arg("600").stdin(stdin).spawn().unwrap())
        }
    }

    impl Drop for Opener {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn what_a_live_qemu_has_open_is_found_by_the_file_and_not_by_its_name() {
        let place = tempfile::tempdir().unwrap();
        let at = |name: &str| place.path().join(name);
        fs::write(at("ram"), "").unwrap();
        let remains = [at("missing"), at("ram")];
        let looked = |program: &str| holder(&remains, Some(Path::new(program)));
        assert_eq!(looked("/usr/bin/sleep"), None);
        let opener = Opener::new(&at("ram"));
        until_it_runs(&opener);
        assert_eq!(looked("/usr/bin/sleep"), Some(Holder { pid: opener.0.id(), has: at("ram") }));
        assert_eq!(looked("/usr/bin/qemu-system-x86_64"), None, "it is no QEMU");
        // Another file of that name is not what it has.
        fs::rename(at("ram"), at("moved")).unwrap();
        fs::write(at("ram"), "").unwrap();
        assert_eq!(looked("/usr/bin/sleep"), None);
    }

    fn until_it_runs(opener: &Opener) {
        while !is_qemu(opener.0.id(), Some(Path::new("sleep"))) {
            std::thread::yield_now();
        }
    }

    #[test]
    fn sockets_of_our_own_and_dead_ones_are_in_nobodys_use() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("socket");
        let ours = UnixListener::bind(&path).unwrap();
        assert_eq!(listener(&path), Some(std::process::id()));
        assert_eq!(holder(std::slice::from_ref(&path), None), None);
        drop(ours);
        assert_eq!(listener(&path), None);
        assert_eq!(holder(&[path], None), None);
    }
}
