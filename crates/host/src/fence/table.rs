//! What is locked, and why what is to be is not: a table whose lock is held for moments only, and each machine's turn, in which its images
//! are opened, locked, looked at and let go of.

use std::collections::{HashMap, HashSet};
use std::fs::{File, Metadata};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use qemu::{ImageLockError, KeepOut, Spec};

use super::{Keeper, Seen};
use crate::images;
use crate::left_images::{LeftImages, ToBeLocked};
use crate::same_file::same_file;
use crate::vm::Record;
use crate::which_file::WhichFile;
use finding::chain;
use ownership::{Ownership, VmName};

/// What tells an open file from every other one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FileId {
    Device(u64),
    Inode(u64, u64),
}

impl FileId {
    /// Of the file that a path leads to.
    pub(super) fn of(path: &Path) -> Option<FileId> {
        std::fs::metadata(path).ok().map(|file| FileId::from(&file))
    }
}

impl From<&Metadata> for FileId {
    fn from(file: &Metadata) -> FileId {
        match file.file_type().is_block_device() {
            true => FileId::Device(file.rdev()),
            false => FileId::Inode(file.dev(), file.ino()),
        }
    }
}

/// An image that is locked.
#[derive(Debug)]
pub(super) struct Locked {
    pub(super) vm: VmName,
    pub(super) path: PathBuf,
    pub(super) file: FileId,
    /// Shared only in the machine's turn: who has taken it out of the table then has let go of it.
    pub(super) lock: Arc<KeepOut>,
}

impl Locked {
    /// Locks an image that is known by `path`, as what another path leads to.
    pub(super) fn take(vm: &VmName, path: &Path, through: &Path) -> Result<Locked, ImageLockError> {
        let lock = KeepOut::take(through)?;
        let failed = |source| ImageLockError::System { path: path.to_owned(), source };
        let file = FileId::from(&lock.file().metadata().map_err(failed)?);
        Ok(Locked { vm: vm.clone(), path: path.to_owned(), file, lock: Arc::new(lock) })
    }
}

#[derive(Debug, Default)]
pub(super) struct State {
    locks: Vec<Locked>,
    /// Why images are not locked as they should be; found out anew by each agent.
    pub(super) problems: HashMap<PathBuf, String>,
    /// Machines whose locks are to outlive the agent.
    pub(super) guarded: HashSet<VmName>,
    /// Machines whose images are written here, for their return or by whom a person has started.
    pub(super) lent: HashSet<VmName>,
    /// What machines of this host write, by the records that there were.
    pub(super) used: HashSet<PathBuf>,
    /// Machines whose images somebody looks at.
    pub(super) looked_at: HashSet<VmName>,
    /// What was found then, and not told yet.
    seen: Vec<Seen>,
}

/// One machine's turn: of two who do something about it one waits, beside all others.
#[derive(Debug, Default)]
pub(super) struct Turn {
    images: Mutex<()>,
    /// Held by who starts or ends a process that holds locks.
    pub(super) posting: tokio::sync::Mutex<()>,
}

impl Turn {
    /// Held by who opens, locks, looks at or lets go of images, which may never come to its end.
    pub(super) fn images(&self) -> MutexGuard<'_, ()> {
        self.images.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is locked.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) left: Arc<LeftImages>,
    state: Mutex<State>,
    turns: Mutex<HashMap<VmName, Arc<Turn>>>,
}

impl Table {
    /// Nothing is.
    pub(super) fn new(left: Arc<LeftImages>) -> Table {
        Table { left, state: Mutex::default(), turns: Mutex::default() }
    }

    /// Nobody who has this asks the file system for anything.
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        // What is half done after a panic is put right by the next look.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The turn of a machine.
    pub(super) fn turn(&self, vm: &VmName) -> Arc<Turn> {
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        turns.retain(|_, turn| Arc::strong_count(turn) > 1);
        Arc::clone(turns.entry(vm.clone()).or_default())
    }

    /// Locks what is to be locked when an agent starts.
    pub(super) fn take_up(&self, records: &[Record], keeper: Option<&Keeper>) {
        let own = |record: &&Record| record.ownership == Ownership::Owner;
        let specs = records.iter().filter(own).filter_map(|record| Spec::parse(&record.argv).ok());
        let used: HashSet<PathBuf> = specs.flat_map(|spec| images::written(&spec)).collect();
        // It has come back, or was started here, and the last agent had no time to say so.
        self.left.taken(used.iter().map(PathBuf::as_path));
        self.state().used = used;
        for record in records {
            let images: Vec<PathBuf> = match &record.ownership {
                Ownership::HandedOver { .. } => record.left_behind.clone(),
                Ownership::Incoming { ready: true, .. } => {
                    record.made.images.iter().map(|image| image.path.clone()).collect()
                }
                Ownership::Incoming { ready: false, .. } | Ownership::Owner => Vec::new(),
            };
            // Its record was not readable for a while.
            self.left.explained(&record.name, &images);
            let turn = self.turn(&record.name);
            let _turn = turn.images();
            for path in images {
                self.lock(&record.name, &path);
                self.state().guarded.insert(record.name.clone());
            }
        }
        for kept in self.left.to_be_locked() {
            let turn = self.turn(&kept.vm);
            let _turn = turn.images();
            if let Some(problem) = self.lock_kept(&kept) {
                tracing::error!(vm = %kept.vm, image = %kept.path.display(), "an image that was to be kept locked {problem}");
            }
        }
        self.go_on_with_holders(keeper);
    }

    /// Locks an image, in its machine's turn.
    pub(super) fn lock(&self, vm: &VmName, path: &Path) {
        if self.state().find(|locked| locked.path == path).is_some() {
            return;
        }
        match Locked::take(vm, path, path) {
            Ok(locked) => {
                let spare = self.state().add(locked);
                drop(spare);
            }
            Err(error) => {
                tracing::error!(vm = %vm, error = chain(&error), "an image cannot be kept from being opened");
            }
        }
    }

    /// Locks an image that is kept, if it is not, in its machine's turn, and says what is not as it should be.
    pub(super) fn lock_kept(&self, kept: &ToBeLocked) -> Option<String> {
        let there = self.state().find(|locked| locked.path == kept.path);
        let problem = match there {
            Some(lock) => opened(&lock),
            None if kept.file.is_some() && WhichFile::of(&kept.path) != kept.file => {
                Some("is not there, or another file is in its place".to_owned())
            }
            None => match Locked::take(&kept.vm, &kept.path, &kept.path) {
                Ok(locked) => {
                    let problem = opened(&locked.lock);
                    let spare = {
                        let mut state = self.state();
                        if self.is_kept(kept) { state.add(locked) } else { Some(locked) }
                    };
                    drop(spare);
                    problem
                }
                Err(error) => Some(format!("cannot be locked: {}", chain(&error))),
            },
        };
        let mut state = self.state();
        // A person, or a machine's start, may have been quicker.
        if self.is_kept(kept) {
            state.is_wrong(&kept.path, problem.as_deref());
        }
        problem
    }

    fn is_kept(&self, kept: &ToBeLocked) -> bool {
        self.left.to_be_locked().contains(kept)
    }

    /// Looks whether the images of a machine are as they should be, however long that takes.
    pub(super) fn look_at(&self, vm: &VmName) {
        {
            let turn = self.turn(vm);
            let _turn = turn.images();
            let kept = self.left.to_be_locked().into_iter().filter(|kept| kept.vm == *vm);
            kept.for_each(|kept| self.look_at_image(kept));
        }
        self.state().looked_at.remove(vm);
    }

    fn look_at_image(&self, kept: ToBeLocked) {
        let (is_lent, before) = {
            let state = self.state();
            (state.lent.contains(&kept.vm), state.problems.get(&kept.path).cloned())
        };
        if !is_lent && let Some(problem) = self.lock_kept(&kept).filter(|now| before.as_ref() != Some(now)) {
            self.state().seen.push(Seen::Problem(kept.vm.clone(), kept.path.clone(), problem));
        }
        // Of a file that is not locked that cannot be told, and it is kept.
        let lock = self.state().find(|locked| locked.path == kept.path);
        let has_no_name = |file: &Metadata| file.is_file() && file.nlink() == 0;
        if lock.is_some_and(|lock| lock.file().metadata().is_ok_and(|file| has_no_name(&file))) {
            let locks = self.state().take_out(|locked| locked.path == kept.path);
            drop(locks);
            self.left.removed(&kept);
            let mut state = self.state();
            state.problems.remove(&kept.path);
            state.seen.push(Seen::Removed(kept.vm, kept.path));
        }
    }

    /// What is news, with what has not been answered until now.
    pub(super) fn seen(&self) -> Vec<Seen> {
        let mut state = self.state();
        for kept in self.left.to_be_locked() {
            let unanswered = "cannot be looked at: its storage does not answer";
            if state.looked_at.contains(&kept.vm)
                && !state.problems.contains_key(&kept.path)
                && state.find(|locked| locked.path == kept.path).is_none()
            {
                state.is_wrong(&kept.path, Some(unanswered));
                state.seen.push(Seen::Problem(kept.vm, kept.path, unanswered.to_owned()));
            }
        }
        std::mem::take(&mut state.seen)
    }

    /// Whether somebody looks at any images.
    #[cfg(test)]
    pub(super) fn is_looked_at(&self) -> bool {
        !self.state().looked_at.is_empty()
    }

    /// Whether an image of a machine is locked, or to be.
    pub(super) fn is_wanted(&self, vm: &VmName, image: &Path) -> bool {
        let (mut paths, is_lent) = {
            let state = self.state();
            let theirs = state.locks.iter().filter(|locked| locked.vm == *vm);
            (theirs.map(|locked| locked.path.clone()).collect::<Vec<_>>(), state.lent.contains(vm))
        };
        if !is_lent {
            let kept = self.left.to_be_locked().into_iter().filter(|kept| kept.vm == *vm);
            paths.extend(kept.map(|kept| kept.path));
        }
        paths.iter().any(|path| same_file(path, image))
    }
}

impl State {
    /// The lock of the first image of which this holds.
    pub(super) fn find(&self, is_it: impl Fn(&Locked) -> bool) -> Option<Arc<KeepOut>> {
        self.locks.iter().find(|locked| is_it(locked)).map(|locked| Arc::clone(&locked.lock))
    }

    /// The name by which an image is known that is locked.
    pub(super) fn path_of(&self, file: FileId) -> Option<PathBuf> {
        self.locks.iter().find(|locked| locked.file == file).map(|locked| locked.path.clone())
    }

    /// The machine of the first image of which this holds.
    pub(super) fn vm_of(&self, is_it: impl Fn(&Locked) -> bool) -> Option<VmName> {
        self.locks.iter().find(|locked| is_it(locked)).map(|locked| locked.vm.clone())
    }

    /// All locks of a machine.
    pub(super) fn locks_of(&self, vm: &VmName) -> Vec<Arc<KeepOut>> {
        let theirs = self.locks.iter().filter(|locked| locked.vm == *vm);
        theirs.map(|locked| Arc::clone(&locked.lock)).collect()
    }

    /// The files that are locked of a machine, for another process, and their names.
    pub(super) fn files_of(&self, vm: &VmName) -> Vec<(std::io::Result<File>, PathBuf)> {
        let theirs = self.locks.iter().filter(|locked| locked.vm == *vm);
        theirs.map(|locked| (locked.lock.file().try_clone(), locked.path.clone())).collect()
    }

    /// Machines of which something is locked.
    pub(super) fn vms(&self) -> HashSet<VmName> {
        self.locks.iter().map(|locked| locked.vm.clone()).collect()
    }

    /// Images that are locked, or of which something is not as it should be.
    pub(super) fn paths(&self) -> HashSet<PathBuf> {
        let locked = self.locks.iter().map(|locked| locked.path.clone());
        locked.chain(self.problems.keys().cloned()).collect()
    }

    /// Enters a lock, unless there is one of that image: then it is given back, to be dropped by who does not have this.
    #[must_use]
    pub(super) fn add(&mut self, locked: Locked) -> Option<Locked> {
        if self.locks.iter().any(|there| there.path == locked.path) {
            return Some(locked);
        }
        self.locks.push(locked);
        None
    }

    /// Takes out all of which this holds. They are let go of when they are dropped, which asks their file system.
    #[must_use]
    pub(super) fn take_out(&mut self, is_it: impl Fn(&Locked) -> bool) -> Vec<Locked> {
        let (out, stay) = std::mem::take(&mut self.locks).into_iter().partition(|locked| is_it(locked));
        self.locks = stay;
        out
    }

    /// What is wrong with an image, if anything is.
    pub(super) fn is_wrong(&mut self, path: &Path, why: Option<&str>) {
        match why {
            Some(why) => drop(self.problems.insert(path.to_owned(), why.to_owned())),
            None => drop(self.problems.remove(path)),
        }
    }
}

/// What stands against a lock that should be the only one.
pub(super) fn opened(lock: &KeepOut) -> Option<String> {
    match lock.is_written() {
        Ok(false) => None,
        Ok(true) => {
            Some("is open for writing in another process: a second copy of the VM may run here".to_owned())
        }
        Err(e) => Some(format!("cannot be looked at: {e}")),
    }
}
