//! Processes that have the files of locked images open too, so that no end of an agent lets anybody open them: one for each
//! machine. They are on record before they are there.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::Fence;
use super::holder::Holder;
use super::table::State;
use crate::deadlines::KILL_GRACE;
use finding::chain;
use ownership::VmName;
use ownership::journal::blocking;

/// The program that holds locks, and its arguments before the machine's name and the state directory: it waits for ever.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keeper {
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<String>,
}

impl Keeper {
    /// The machine that a process of this program and state directory holds locks of, by its command line.
    pub(super) fn holds_for(&self, line: &[u8], state_dir: &Path) -> Option<VmName> {
        let line = std::str::from_utf8(line).ok()?;
        let words: Vec<&str> = line.strip_suffix('\0')?.split('\0').skip(1).collect();
        let (own, [vm, of]) = words.split_at_checked(self.arguments.len())? else { return None };
        (own == self.arguments && Path::new(of) == state_dir).then(|| vm.parse().ok())?
    }
}

impl Fence {
    /// Has the locks of a machine outlive the agent.
    pub async fn post(&self, vm: &VmName) {
        let turn = self.table.turn(vm);
        let _posting = turn.posting.lock().await;
        if let Some((files, images)) = blocking(|| self.unheld(vm)) {
            self.start(vm, files, images).await;
        }
    }

    /// Has another process than there is hold the locks of a machine: it shares those of this agent.
    pub(super) async fn post_another(&self, vm: &VmName) {
        let turn = self.table.turn(vm);
        let _posting = turn.posting.lock().await;
        let (files, images) = self.table.state().held(vm);
        if !images.is_empty() {
            self.start(vm, files, images).await;
        }
    }

    /// Starts one that has these files, and ends those that it stands in for.
    async fn start(&self, vm: &VmName, files: Vec<OwnedFd>, images: Vec<PathBuf>) {
        let Some(keeper) = &self.keeper else { return };
        let mut command = Command::new(&keeper.program);
        command.args(&keeper.arguments).arg(vm.as_ref()).arg(self.left.state_dir());
        let started = qemu::keep_open(command, files, |process| {
            let (vm, process, images) = (vm.clone(), process.clone(), images.clone());
            self.left.change_holders(|holders| holders.push(Holder { vm, process, images }));
        });
        match started.await {
            // It holds nothing that was let go of meanwhile, as that is the same lock.
            Ok(process) => {
                // What could not be locked here may be by an earlier one.
                let has_more = |holder: &Holder| {
                    let more = |image: &PathBuf| !images.contains(image) && self.table.is_wanted(vm, image);
                    holder.images.iter().any(more)
                };
                self.end(vm, |holder| holder.process != process && !has_more(holder)).await;
            }
            Err(error) => {
                tracing::error!(vm = %vm, error = chain(&error), "images are kept locked for as long as this agent runs only");
                // One that was put on record never became the program.
                self.end(vm, |holder| !holder.process.look().runs()).await;
            }
        }
    }

    /// The files that a process should hold for a machine, and their names; none where one does.
    fn unheld(&self, vm: &VmName) -> Option<(Vec<OwnedFd>, Vec<PathBuf>)> {
        let (files, images) = {
            let mut state = self.table.state();
            state.guarded.insert(vm.clone());
            state.held(vm)
        };
        // It may have what could not be locked here, and nothing that is not to be locked any more.
        let holds = |holder: &&Holder| {
            holder.vm == *vm
                && images.iter().all(|image| holder.images.contains(image))
                && holder.images.iter().all(|image| self.table.is_wanted(vm, image))
                && holder.process.look().runs()
        };
        let is_held = self.left.holders().iter().any(|holder| holds(&holder));
        (!images.is_empty() && !is_held).then_some((files, images))
    }

    /// Has every lock that is to outlive the agent held, and no other.
    pub(super) async fn post_all(&self) {
        let vms: HashSet<VmName> = {
            let state = self.table.state();
            let kept = self.left.to_be_locked().into_iter().map(|kept| kept.vm);
            kept.filter(|vm| !state.lent.contains(vm)).chain(state.guarded.iter().cloned()).collect()
        };
        for vm in &vms {
            self.post(vm).await;
        }
        self.relieve_idle().await;
    }

    /// Ends processes that hold nothing any more that is to be locked: an image that cannot be locked here may be by them alone.
    pub(super) async fn relieve_idle(&self) {
        let is_idle =
            |holder: &Holder| !holder.images.iter().any(|image| self.table.is_wanted(&holder.vm, image));
        {
            let mut state = self.table.state();
            let vms = state.vms();
            state.guarded.retain(|vm| vms.contains(vm));
        }
        let mut idle = self.left.holders();
        blocking(|| idle.retain(is_idle));
        for vm in idle.into_iter().map(|holder| holder.vm).collect::<HashSet<_>>() {
            let turn = self.table.turn(&vm);
            let _posting = turn.posting.lock().await;
            self.end(&vm, is_idle).await;
        }
    }

    /// Ends what holds the locks of a machine.
    pub(crate) async fn relieve(&self, vm: &VmName) {
        if !self.left.holders().iter().any(|holder| holder.vm == *vm) {
            return;
        }
        let turn = self.table.turn(vm);
        let _posting = turn.posting.lock().await;
        self.end(vm, |_| true).await;
    }

    async fn end(&self, vm: &VmName, meant: impl Fn(&Holder) -> bool) {
        let mut theirs = self.left.holders();
        blocking(|| theirs.retain(|holder| holder.vm == *vm && meant(holder)));
        for holder in &theirs {
            let _ = holder.process.kill();
            if !holder.process.wait_for_end(KILL_GRACE).await {
                let pid = holder.process.pid;
                tracing::error!(vm = %vm, pid, "the process that keeps the VM's images locked does not end");
            }
        }
        if !theirs.is_empty() {
            self.left.change_holders(|holders| holders.retain(|holder| !theirs.contains(holder)));
        }
    }
}

impl State {
    /// The files that are locked of a machine, for another process, and their names.
    fn held(&self, vm: &VmName) -> (Vec<OwnedFd>, Vec<PathBuf>) {
        let (mut files, mut images) = (Vec::new(), Vec::new());
        for (file, path) in self.files_of(vm) {
            match file {
                Ok(file) => files.push(file.into()),
                Err(error) => tracing::error!(vm = %vm, %error, "a lock cannot be passed on"),
            }
            images.push(path);
        }
        (files, images)
    }
}
