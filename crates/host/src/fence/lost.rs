//! What processes that hold locks have open, as it is seen from outside: what is on record of them, or of why, may be lost.

use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use qemu::Process;

use super::Keeper;
use super::holder::Holder;
use super::table::{FileId, Locked, Table, opened};
use crate::which_file::WhichFile;
use finding::chain;
use ownership::VmName;

/// A file that a process has open.
#[derive(Debug)]
struct Open {
    /// Leads to this very file, whatever its name is by now.
    through: PathBuf,
    /// Its name now; of one that was removed, nobody's.
    path: PathBuf,
    file: WhichFile,
    removed: bool,
}

fn opened_by(process: &Process) -> io::Result<Vec<Open>> {
    let mut open = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{}/fd", process.pid))? {
        let through = entry?.path();
        if !is_passed_on(process, &through)? {
            continue;
        }
        let found = std::fs::metadata(&through)?;
        if !found.is_file() && !found.file_type().is_block_device() {
            continue;
        }
        let path = std::fs::read_link(&through)?;
        let file = WhichFile::of(&through).ok_or(io::ErrorKind::NotFound)?;
        open.push(Open { through, path, file, removed: found.is_file() && found.nlink() == 0 });
    }
    // Another process may have its id by now.
    if process.look().runs() { Ok(open) } else { Err(io::ErrorKind::NotFound.into()) }
}

/// Whether a descriptor was handed to a process: what it opens itself, as every program does when it starts, it passes on to none.
pub(super) fn is_passed_on(process: &Process, descriptor: &Path) -> io::Result<bool> {
    let number = descriptor.file_name().unwrap_or_default();
    let info = Path::new(&format!("/proc/{}/fdinfo", process.pid)).join(number);
    let info = match std::fs::read_to_string(info) {
        // Closed already.
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
        info => info?,
    };
    let flags =
        info.lines().find_map(|line| i32::from_str_radix(line.strip_prefix("flags:")?.trim(), 8).ok());
    Ok(flags.is_some_and(|flags| flags & libc::O_CLOEXEC == 0))
}

impl Table {
    /// Goes on with what earlier agents have left: nothing that is locked is let go of because a record of it cannot be read, is lost, or
    /// says another place.
    pub(super) fn go_on_with_holders(&self, keeper: Option<&Keeper>) {
        let before = self.left.holders();
        let mut holders = before.clone();
        holders.retain(|holder| !holder.process.look().is_gone());
        if let Some(keeper) = keeper {
            for lost in lost(keeper, self.left.state_dir(), &holders) {
                tracing::warn!(vm = %lost.vm, pid = lost.process.pid, "a process that keeps images locked is not on record: it is gone on with");
                holders.push(lost);
            }
        }
        for holder in &mut holders {
            let vm = &holder.vm;
            match opened_by(&holder.process) {
                Ok(open) => {
                    let names = &holder.images;
                    let turn = self.turn(vm);
                    let _turn = turn.images();
                    let go_on = |open: &Open| self.go_on_with(vm, open, names);
                    holder.images = open.iter().map(go_on).collect();
                }
                Err(error) => {
                    let pid = holder.process.pid;
                    tracing::error!(vm = %vm, pid, %error, "what a process keeps locked cannot be seen: it is left to that");
                    for image in &holder.images {
                        if !self.is_wanted(vm, image) {
                            self.left.keep_found(vm, image, WhichFile::of(image));
                        }
                    }
                }
            }
        }
        self.left.change_holders(|now| {
            // Storage may not have answered for a while: some may have ended since, and others begun.
            let is_in = |list: &[Holder], one: &Holder| list.iter().any(|other| other.process == one.process);
            holders.retain(|holder| !is_in(&before, holder) || is_in(now, holder));
            now.retain(|holder| !is_in(&before, holder) && !is_in(&holders, holder));
            now.extend(holders);
        });
    }

    /// Has a file locked that a process has, which knows it by one of these names. Returns by what name it is known here.
    fn go_on_with(&self, vm: &VmName, open: &Open, names: &[PathBuf]) -> PathBuf {
        if open.removed {
            return open.path.clone();
        }
        if let Some(path) = FileId::of(&open.through).and_then(|file| self.state().path_of(file)) {
            return path;
        }
        let lock = Locked::take(vm, &open.path, &open.through);
        let is_it = |path: &PathBuf| WhichFile::of(path).as_ref() == Some(&open.file);
        let used = self.state().used.clone();
        let is_used = used.iter().any(is_it);
        if lock.as_ref().is_ok_and(|locked| locked.lock.is_written().unwrap_or(false)) && is_used {
            // A machine of this host has it again.
            return open.path.clone();
        }
        let to_be_locked = self.left.to_be_locked();
        let kept = to_be_locked.iter().find(|kept| kept.vm == *vm && kept.file.as_ref() == Some(&open.file));
        let named = || names.iter().find(|name| is_it(name)).unwrap_or(&open.path);
        let path = kept.map_or_else(named, |kept| &kept.path).clone();
        if kept.is_none() && is_used {
            // It was locked while its QEMU did not take it: for as long as the machine is here and has not got it.
            self.state().guarded.insert(vm.clone());
        } else if kept.is_none() {
            tracing::warn!(vm = %vm, image = %path.display(), "is kept locked, and nothing on record says why: it stays locked");
            self.left.keep_found(vm, &path, Some(open.file.clone()));
        }
        let problem = match lock {
            Ok(locked) => {
                let problem = opened(&locked.lock);
                let spare = self.state().add(Locked { path: path.clone(), ..locked });
                drop(spare);
                problem
            }
            Err(error) => Some(format!("cannot be locked: {}", chain(&error))),
        };
        self.state().is_wrong(&path, problem.as_deref());
        path
    }
}

/// Processes of this state directory that are not on record. They say whose they are; and another agent's, in a container of its own, may
/// say the same, but has its files elsewhere.
fn lost(keeper: &Keeper, state_dir: &Path, known: &[Holder]) -> Vec<Holder> {
    let user = rustix::process::geteuid().as_raw();
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let holder = |pid: u32| {
        let vm = keeper.holds_for(&std::fs::read(format!("/proc/{pid}/cmdline")).ok()?, state_dir)?;
        if std::fs::metadata(format!("/proc/{pid}")).ok()?.uid() != user {
            return None;
        }
        let process = Process::of_pid(pid, Path::new("")).ok()?;
        if known.iter().any(|known| known.process == process) {
            return None;
        }
        let open = opened_by(&process).ok()?;
        let seen = |open: &Open| open.removed || WhichFile::of(&open.path).as_ref() == Some(&open.file);
        (!open.is_empty() && open.iter().all(seen)).then_some(Holder { vm, process, images: Vec::new() })
    };
    pids.filter_map(holder).collect()
}
