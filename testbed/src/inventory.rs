//! Everything a host holds, comparable: for tests that nothing is left behind.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::name::{self, MARK};

/// What a host holds at one moment.
///
/// Without process ids, descriptors' numbers and ports chosen by the kernel, so two inventories are equal when the host holds as much
/// of everything. The agent's state directory is not in it: history and journals are there to stay.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inventory {
    /// How many processes of each program run.
    pub processes: BTreeMap<String, usize>,
    /// Files, directories and sockets in the run and RAM directories.
    pub files: BTreeSet<PathBuf>,
    /// Network links: name, with kind, bridge and state.
    pub links: BTreeMap<String, String>,
    /// TCP sockets of the processes: how many listen at each address, how many are connected.
    pub sockets: BTreeMap<String, usize>,
    /// Descriptors of kinds that would keep something alive: userfaultfd, pidfd, tap devices, memfd, deleted files.
    pub descriptors: BTreeMap<String, usize>,
    /// Bytes of guest RAM in use, deleted files that are still open included where the host has a file system of its own.
    pub ram_bytes: u64,
}

/// Two inventories that are not equal: what one has and the other has not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference(Vec<String>);

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("; "))
    }
}

impl std::error::Error for Difference {}

impl Inventory {
    pub(crate) fn take(
        processes: &[i32],
        directories: &[&Path],
        ram_dir: &Path,
        links: BTreeMap<String, String>,
    ) -> Self {
        let mut inventory = Self { links, ram_bytes: ram_bytes(ram_dir), ..Self::default() };
        let sockets = processes.first().map(|pid| tcp_sockets(*pid)).unwrap_or_default();
        for pid in processes {
            let Some(program) = program(*pid) else { continue };
            if holds_locks(*pid) {
                continue;
            }
            *inventory.processes.entry(program).or_default() += 1;
            for target in descriptors(*pid) {
                if let Some(socket) = socket_inode(&target).and_then(|inode| sockets.get(&inode)) {
                    *inventory.sockets.entry(socket.clone()).or_default() += 1;
                } else if let Some(kind) = telling(&target) {
                    *inventory.descriptors.entry(kind).or_default() += 1;
                }
            }
        }
        for directory in directories {
            walk(directory, &mut |path| {
                inventory.files.insert(path);
            });
        }
        inventory
    }

    /// Compares with a later inventory.
    ///
    /// # Errors
    /// Everything that has come or gone.
    pub fn difference(&self, later: &Self) -> Result<(), Difference> {
        let mut found = Vec::new();
        compare("process", &self.processes, &later.processes, &mut found);
        compare("link", &self.links, &later.links, &mut found);
        compare("socket", &self.sockets, &later.sockets, &mut found);
        compare("descriptor", &self.descriptors, &later.descriptors, &mut found);
        for file in self.files.symmetric_difference(&later.files) {
            let verb = if later.files.contains(file) { "appeared" } else { "vanished" };
            found.push(format!("file {} {verb}", file.display()));
        }
        if self.ram_bytes != later.ram_bytes {
            found.push(format!("RAM in use: {} bytes, was {}", later.ram_bytes, self.ram_bytes));
        }
        if found.is_empty() { Ok(()) } else { Err(Difference(found)) }
    }
}

fn compare<V: PartialEq + fmt::Debug>(
    what: &str,
    before: &BTreeMap<String, V>,
    after: &BTreeMap<String, V>,
    found: &mut Vec<String>,
) {
    let names: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    for name in names {
        match (before.get(name), after.get(name)) {
            (before, after) if before == after => {}
            (None, Some(after)) => found.push(format!("{what} {name} appeared: {after:?}")),
            (Some(before), None) => found.push(format!("{what} {name} vanished: {before:?}")),
            (before, after) => found.push(format!("{what} {name}: {after:?}, was {before:?}")),
        }
    }
}

/// All processes of the machine.
pub(crate) fn pids() -> impl Iterator<Item = i32> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// The processes that a testbed started, directly or not, with the name of the host they are on.
pub(crate) fn marked() -> impl Iterator<Item = (i32, String)> {
    pids().filter(|pid| pid.cast_unsigned() != std::process::id()).filter_map(|pid| Some((pid, mark(pid)?)))
}

/// The host that a process was started on, directly or not; none where it is no testbed's.
pub(crate) fn mark(pid: i32) -> Option<String> {
    let prefix = format!("{MARK}={}", name::PREFIX);
    let environment = fs::read(format!("/proc/{pid}/environ")).ok()?;
    let entry = environment.split(|byte| *byte == 0).find(|entry| entry.starts_with(prefix.as_bytes()))?;
    Some(String::from_utf8_lossy(&entry[MARK.len() + 1..]).into_owned())
}

/// Names, kinds, bridges and states from `ip -j -d link`.
pub(crate) fn links(json: &str) -> BTreeMap<String, String> {
    let links: Vec<serde_json::Value> = serde_json::from_str(json).unwrap_or_default();
    let describe = |link: &serde_json::Value| {
        let text = |value: &serde_json::Value| value.as_str().unwrap_or("-").to_owned();
        let (kind, bridge) = (text(&link["linkinfo"]["info_kind"]), text(&link["master"]));
        // What was asked for, not the operational state, which changes by itself.
        let up = link["flags"].as_array().is_some_and(|flags| flags.iter().any(|flag| flag == "UP"));
        (text(&link["ifname"]), format!("{kind} in {bridge}, {}", if up { "up" } else { "down" }))
    };
    links.iter().map(describe).collect()
}

fn program(pid: i32) -> Option<String> {
    let program = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
    Some(program.file_name()?.to_string_lossy().into_owned())
}

/// Whether it is what keeps the images of a guest that has left locked: that is there to stay.
fn holds_locks(pid: i32) -> bool {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    line.split(|byte| *byte == 0).nth(1) == Some(b"hold-locks")
}

fn descriptors(pid: i32) -> Vec<String> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| Some(fs::read_link(entry.path()).ok()?.to_string_lossy().into_owned()))
        .collect()
}

fn socket_inode(target: &str) -> Option<u64> {
    target.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

/// The kind of a descriptor that keeps something alive.
fn telling(target: &str) -> Option<String> {
    let kinds =
        ["[userfaultfd]", "[pidfd]", "pidfd:", "/dev/net/tun", "/memfd:", "/dev/kvm", "kvm-vm", " (deleted)"];
    kinds
        .into_iter()
        .find(|kind| target.contains(kind))
        .map(|kind| kind.trim_matches([' ', ':', '/']).to_owned())
}

/// The TCP sockets of a process's network by inode: where they listen, or that they are connected.
fn tcp_sockets(pid: i32) -> HashMap<u64, String> {
    let tables = ["tcp", "tcp6"]
        .map(|table| fs::read_to_string(format!("/proc/{pid}/net/{table}")).unwrap_or_default());
    tables.iter().flat_map(|table| table.lines().skip(1)).filter_map(tcp_socket).collect()
}

/// A line of `/proc/net/tcp`: number, local address, remote address, state, …, inode as the tenth word.
fn tcp_socket(line: &str) -> Option<(u64, String)> {
    let words: Vec<&str> = line.split_ascii_whitespace().collect();
    let (local, state, inode) = (words.get(1)?, words.get(3)?, words.get(9)?.parse().ok()?);
    // include/net/tcp_states.h
    let what = match *state {
        "0A" => format!("listening at {local}"),
        "01" => "connected".to_owned(),
        state => format!("in state {state}"),
    };
    Some((inode, what))
}

fn ram_bytes(directory: &Path) -> u64 {
    let own_file_system = directory.parent().is_some_and(|parent| {
        let device = |path: &Path| fs::metadata(path).map(|metadata| metadata.dev()).ok();
        device(parent) != device(directory)
    });
    if own_file_system && let Ok(room) = rustix::fs::statvfs(directory) {
        return (room.f_blocks - room.f_bfree) * room.f_frsize;
    }
    let mut bytes = 0;
    walk(directory, &mut |path| {
        // st_blocks counts in units of 512 bytes whatever the file system.
        bytes += fs::symlink_metadata(path).map(|metadata| metadata.blocks() * 512).unwrap_or(0);
    });
    bytes
}

/// Everything below a directory that is not a directory itself, in order of the names.
pub fn files_below(directory: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    walk(directory, &mut |path| {
        if fs::symlink_metadata(&path).is_ok_and(|found| !found.is_dir()) {
            files.push(path);
        }
    });
    files.sort();
    files
}

fn walk(directory: &Path, visit: &mut impl FnMut(PathBuf)) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            walk(&path, visit);
        }
        visit(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    fn of_this_process(directory: &Path) -> Inventory {
        Inventory::take(&[std::process::id().cast_signed()], &[directory], directory, BTreeMap::new())
    }

    #[test]
    fn what_appears_is_named_and_what_goes_is_forgotten() {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let before = of_this_process(directory.path());
        let path = directory.path().join("ram");
        fs::write(&path, vec![1; 8192]).unwrap();
        let text = before.difference(&of_this_process(directory.path())).unwrap_err().to_string();
        assert!(text.contains("ram appeared"), "{text}");
        assert!(text.contains("RAM in use: 8192 bytes, was 0"), "{text}");
        fs::remove_file(&path).unwrap();
        let later = of_this_process(directory.path());
        assert_eq!((before.files, before.ram_bytes), (later.files, later.ram_bytes));
    }

    #[test]
    fn a_listening_socket_is_seen() {
        let directory = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let place = format!("listening at 0100007F:{:04X}", listener.local_addr().unwrap().port());
        assert_eq!(of_this_process(directory.path()).sockets.get(&place), Some(&1));
        drop(listener);
        assert_eq!(of_this_process(directory.path()).sockets.get(&place), None);
    }

    #[test]
    fn links_are_described() {
        let json = r#"[{"ifname":"lo","flags":["LOOPBACK"],"linkinfo":{}},
                       {"ifname":"tap0","flags":["BROADCAST","UP"],"master":"br0","linkinfo":{"info_kind":"tun"}}]"#;
        let links = links(json);
        assert_eq!(links["tap0"], "tun in br0, up");
        assert_eq!(links["lo"], "- in -, down");
    }

    #[test]
    fn descriptors_that_keep_things_alive_are_told_from_others() {
        assert_eq!(telling("anon_inode:[userfaultfd]").as_deref(), Some("[userfaultfd]"));
        assert_eq!(telling("/memfd:ram (deleted)").as_deref(), Some("memfd"));
        assert_eq!(telling("/dev/null"), None);
    }
}
