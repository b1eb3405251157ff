//! Images of machines that are not here, locked so that nothing here opens them for writing: whatever starts such a machine once
//! more, a supervisor or a person, fails at the lock instead of making a second copy.
//!
//! The locks are QEMU's own. They are taken while the QEMU that gives an image up still has its own, since theirs and ours do not
//! stand in each other's way, and let go of in the moment before a QEMU here is to open the image: who brings an image up to date for a
//! machine that comes back does so under them. A process that does nothing else
//! (`holders`) has the files open too, so that the locks outlive the agent; where there is none, the next agent takes them before it does
//! anything else, by what is on record. Such a process ends only when its images were forgotten, removed, or are a machine's of this host
//! again: one of which no record says why it is there is gone on with.

pub(crate) mod holder;
mod holders;
mod lost;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use qemu::{ImageLock, ImageLockError, KeepOut, QmpError, Spec};

use crate::images;
use crate::left_images::{LeftImages, ToBeLocked, among, same_file};
use crate::vm::Record;
use crate::which_file::WhichFile;
use finding::chain;
pub use holders::Keeper;
use ownership::{Ownership, VmName};

/// For how long, and how long apart, a QEMU that finds an image locked is told to run its machine once more. The guest is paused meanwhile.
const LOCKED_OUT: Duration = Duration::from_secs(2);
/// See [`LOCKED_OUT`].
const ONCE_MORE: Duration = Duration::from_millis(20);

/// Whether QEMU has found an image locked by another process.
fn is_locked_out(error: &QmpError) -> bool {
    matches!(error, QmpError::Refused { desc, .. } if desc.starts_with("Failed to get") && desc.contains("lock"))
}

#[derive(Debug)]
struct Locked {
    vm: VmName,
    path: PathBuf,
    lock: KeepOut,
}

#[derive(Debug, Default)]
struct State {
    locks: Vec<Locked>,
    /// Why images are not locked as they should be; found out anew by each agent.
    problems: HashMap<PathBuf, String>,
    /// Machines whose locks are to outlive the agent.
    guarded: HashSet<VmName>,
    /// Machines whose images are written here, for their return or by whom a person has started.
    lent: HashSet<VmName>,
    /// What machines of this host write, by the records that there were.
    used: HashSet<PathBuf>,
}

/// A machine that has left, and what of it is kept locked here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Left {
    /// The machine.
    pub vm: VmName,
    /// Name of the agent that it was handed over to; none where no record says so any more.
    pub to: Option<String>,
    /// When it was known that it runs there, or that nothing is known.
    pub at: SystemTime,
    /// Its images.
    pub images: Vec<KeptImage>,
}

/// One of its images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeptImage {
    /// Where it is.
    pub path: PathBuf,
    /// Why it is not kept from others as it should be.
    pub problem: Option<String>,
}

/// What a look at the images has found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seen {
    /// The image has been removed: nothing is kept of it any more.
    Removed(VmName, PathBuf),
    /// It is not kept from others as it should be.
    Problem(VmName, PathBuf, String),
}

/// The images that are locked on this host.
#[derive(Debug)]
pub struct Fence {
    /// Which images are to be locked.
    left: Arc<LeftImages>,
    keeper: Option<Keeper>,
    state: Mutex<State>,
    /// Held by who starts or ends a process that holds locks.
    posting: tokio::sync::Mutex<()>,
}

impl Fence {
    /// Locks what is to be locked, with the images of machines that `records` say were handed over or may not run yet. What cannot be
    /// locked is told in the log and in lists. Without a keeper no lock outlives this.
    #[must_use]
    pub fn new(left: Arc<LeftImages>, records: &[Record], keeper: Option<Keeper>) -> Fence {
        let state = Mutex::default();
        let fence = Fence { left, keeper, state, posting: tokio::sync::Mutex::default() };
        fence.take_up(records);
        fence
    }

    fn take_up(&self, records: &[Record]) {
        let own = |record: &&Record| record.ownership == Ownership::Owner;
        let specs = records.iter().filter(own).filter_map(|record| Spec::parse(&record.argv).ok());
        let used: HashSet<PathBuf> = specs.flat_map(|spec| images::written(&spec)).collect();
        let mut state = self.state();
        // It has come back, or was started here, and the last agent had no time to say so.
        self.left.taken(used.iter().map(PathBuf::as_path));
        state.used = used;
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
            for path in images {
                state.lock(&record.name, &path);
                state.guarded.insert(record.name.clone());
            }
        }
        for kept in self.left.to_be_locked() {
            if let Some(problem) = state.lock_kept(&kept) {
                tracing::error!(vm = %kept.vm, image = %kept.path.display(), "an image that was to be kept locked {problem}");
            }
        }
        self.go_on_with_holders(&mut state);
    }

    /// Keeps everybody from opening these images of a machine, whoever has them open now.
    pub fn hold<'a>(&self, vm: &VmName, images: impl IntoIterator<Item = &'a Path>) {
        let mut state = self.state();
        for image in images {
            state.lock(vm, image);
        }
    }

    /// A QEMU of this host is to open the images of a machine now. Returns which were locked.
    pub(crate) async fn let_go(&self, vm: &VmName) -> Vec<PathBuf> {
        let images = self.give_way(vm);
        self.relieve(vm).await;
        images
    }

    /// Has a QEMU of this host, by `resume`, take its images, which are free for just as long as it takes to do so. It tries again where
    /// somebody else was quicker, who may not last: whoever starts the machine once more fails for want of a tap or socket as well. Who
    /// has kept the images stays, without a lock, until it is relieved.
    ///
    /// # Errors
    /// What `resume` said last. The images are locked again.
    pub async fn hand_to<F: Future<Output = Result<(), QmpError>>>(
        &self,
        vm: &VmName,
        resume: impl Fn() -> F,
    ) -> Result<(), QmpError> {
        let has_own_locks = {
            let state = self.state();
            let mut theirs = state.locks.iter().filter(|locked| locked.vm == *vm);
            theirs.any(|locked| locked.lock.is_kept_by_others().unwrap_or(true))
        };
        if has_own_locks {
            // An earlier agent's process, whose locks are not let go of with these.
            self.relieve(vm).await;
        }
        let begun = Instant::now();
        let mut images = Vec::new();
        loop {
            // Whoever looks after images has locked them again meanwhile.
            images.extend(self.give_way(vm));
            match resume().await {
                Ok(()) => return Ok(()),
                Err(e) if begun.elapsed() < LOCKED_OUT && is_locked_out(&e) => {
                    tracing::warn!(vm = %vm, error = chain(&e), "another process has an image of the VM: QEMU is told to run it once more");
                    tokio::time::sleep(ONCE_MORE).await;
                }
                Err(e) => {
                    self.hold(vm, images.iter().map(PathBuf::as_path));
                    self.relieve(vm).await;
                    if !images.is_empty() {
                        self.post(vm).await;
                    }
                    return Err(e);
                }
            }
        }
    }

    fn give_way(&self, vm: &VmName) -> Vec<PathBuf> {
        let mut state = self.state();
        state.guarded.remove(vm);
        let (theirs, others): (Vec<Locked>, Vec<Locked>) =
            std::mem::take(&mut state.locks).into_iter().partition(|lock| lock.vm == *vm);
        state.locks = others;
        theirs.into_iter().map(|lock| lock.path).collect()
    }

    /// The machine comes back: who brings an image up to date locks it beside what keeps others out, which stays. None for an image that is
    /// not locked.
    ///
    /// # Errors
    /// As of [`ImageLock::beside`].
    pub async fn write(&self, vm: &VmName, image: &Path) -> Result<Option<ImageLock>, ImageLockError> {
        match self.write_beside(vm, image) {
            // An earlier agent's process has locks of its own beside these. One that shares these takes its place.
            Err(ImageLockError::InUse { .. })
                if self.left.holders().iter().any(|holder| holder.vm == *vm) =>
            {
                self.post_another(vm).await;
                self.write_beside(vm, image)
            }
            done => done,
        }
    }

    fn write_beside(&self, vm: &VmName, image: &Path) -> Result<Option<ImageLock>, ImageLockError> {
        let mut state = self.state();
        let kept = state.locks.iter().find(|locked| locked.vm == *vm && lost::is_open(&locked.lock, image));
        let Some(kept) = kept else { return Ok(None) };
        let lock = ImageLock::beside(image, &kept.lock)?;
        state.lent.insert(vm.clone());
        Ok(Some(lock))
    }

    /// A QEMU that a person starts is to have the images of a machine that has left.
    pub(crate) async fn lend(&self, vm: &VmName) {
        self.state().lent.insert(vm.clone());
        let _ = self.let_go(vm).await;
    }

    /// Nobody writes the images of a machine here any more, and it does not run here: those that were kept are, and no other.
    pub async fn take_again(&self, vm: &VmName) {
        let is_kept = {
            let mut state = self.state();
            state.lent.remove(vm);
            let mut kept = self.left.to_be_locked();
            kept.retain(|kept| kept.vm == *vm);
            state.locks.retain(|lock| lock.vm != *vm || kept.iter().any(|kept| kept.path == lock.path));
            for kept in &kept {
                let _ = state.lock_kept(kept);
            }
            if kept.is_empty() {
                state.guarded.remove(vm);
            }
            !kept.is_empty()
        };
        if is_kept {
            // One that is there may hold nothing any more: its locks were let go of for a QEMU, and those of now are others.
            self.post_another(vm).await;
        } else {
            self.relieve(vm).await;
        }
    }

    /// A machine has left for good: its images are remnants, and stay locked.
    ///
    /// # Errors
    /// When that cannot be put on record: another agent would not lock them. They are locked all the same.
    pub(crate) async fn keep(&self, vm: &VmName, to: &str, images: &[PathBuf]) -> io::Result<()> {
        if images.is_empty() {
            return Ok(());
        }
        let on_record = {
            let mut state = self.state();
            let on_record = self.left.keep(vm, to, images);
            for kept in self.left.to_be_locked().iter().filter(|kept| images.contains(&kept.path)) {
                let _ = state.lock_kept(kept);
            }
            on_record
        };
        self.post(vm).await;
        on_record
    }

    /// Images are a machine's of this host again: nothing keeps it from them, and nothing is said of them any more.
    pub fn taken<'a>(&self, images: impl IntoIterator<Item = &'a Path>) {
        let images: Vec<&Path> = images.into_iter().collect();
        let mut state = self.state();
        self.left.taken(images.iter().copied());
        state.locks.retain(|lock| !among(&images, &lock.path));
        state.problems.retain(|path, _| !among(&images, path));
        let vms: HashSet<VmName> = self.left.to_be_locked().into_iter().map(|kept| kept.vm).collect();
        state.lent.retain(|vm| vms.contains(vm));
    }

    /// A person says that the images of a machine are not to be kept any more. Returns which they were.
    pub async fn forget(&self, vm: &VmName) -> Vec<PathBuf> {
        let paths = {
            let mut state = self.state();
            let paths = self.left.keep_no_more(vm);
            state.locks.retain(|lock| !(lock.vm == *vm && paths.contains(&lock.path)));
            state.problems.retain(|path, _| !paths.contains(path));
            paths
        };
        self.relieve_idle().await;
        paths
    }

    /// Whether somebody has an image open for writing, or keeps others from that, who is not this. Of an image that is locked already
    /// it is not known whether somebody else keeps others from it too.
    ///
    /// # Errors
    /// What the system said.
    pub fn others_use(&self, image: &Path) -> std::io::Result<bool> {
        let state = self.state();
        match state.locks.iter().find(|locked| lost::is_open(&locked.lock, image)) {
            Some(locked) => locked.lock.is_written(),
            None => qemu::in_use(image),
        }
    }

    /// Machines that have left, with what is kept of them, by name.
    #[must_use]
    pub fn left(&self) -> Vec<Left> {
        let state = self.state();
        let mut left: BTreeMap<VmName, Left> = BTreeMap::new();
        for ToBeLocked { vm, path, to, at, .. } in self.left.to_be_locked() {
            let problem = state.problems.get(&path).cloned();
            let one = left.entry(vm.clone()).or_insert_with(|| Left { vm, to, at, images: Vec::new() });
            one.images.push(KeptImage { path, problem });
        }
        left.into_values().collect()
    }

    /// Looks whether the images are as they should be: locks what could not be locked before, and lets go of what was removed, which
    /// takes room for as long as it is open. Returns what is news.
    pub async fn look(&self) -> Vec<Seen> {
        let seen = self.look_at_images();
        self.post_all().await;
        seen
    }

    fn look_at_images(&self) -> Vec<Seen> {
        let mut state = self.state();
        let mut seen = Vec::new();
        for kept in self.left.to_be_locked() {
            if !state.lent.contains(&kept.vm) {
                let before = state.problems.get(&kept.path).cloned();
                let now = state.lock_kept(&kept);
                if let Some(problem) = now.filter(|now| before.as_ref() != Some(now)) {
                    seen.push(Seen::Problem(kept.vm.clone(), kept.path.clone(), problem));
                }
            }
            if state.is_removed(&kept) {
                state.locks.retain(|lock| lock.path != kept.path);
                state.problems.remove(&kept.path);
                self.left.removed(&kept);
                seen.push(Seen::Removed(kept.vm, kept.path));
            }
        }
        seen
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // What is half done after a panic is put right by the next look.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Fence {
    fn drop(&mut self) {
        // What others hold is theirs, as if this process had ended.
        self.state().locks.drain(..).for_each(|lock| lock.lock.pass_on());
    }
}

impl State {
    /// Whether an image of a machine is locked, or to be.
    fn is_wanted(&self, left: &LeftImages, vm: &VmName, image: &Path) -> bool {
        let locked = self.locks.iter().any(|locked| locked.vm == *vm && same_file(&locked.path, image));
        let to_be = |kept: &ToBeLocked| kept.vm == *vm && same_file(&kept.path, image);
        locked || !self.lent.contains(vm) && left.to_be_locked().iter().any(to_be)
    }

    fn lock(&mut self, vm: &VmName, path: &Path) {
        if self.locks.iter().any(|lock| lock.path == path) {
            return;
        }
        match KeepOut::take(path) {
            Ok(lock) => self.locks.push(Locked { vm: vm.clone(), path: path.to_owned(), lock }),
            Err(error) => {
                tracing::error!(vm = %vm, error = chain(&error), "an image cannot be kept from being opened");
            }
        }
    }

    /// Locks an image that is kept, if it is not, and says what is not as it should be.
    fn lock_kept(&mut self, kept: &ToBeLocked) -> Option<String> {
        let problem = match self.locks.iter().find(|lock| lock.path == kept.path) {
            Some(locked) => opened(&locked.lock),
            None if kept.file.is_some() && WhichFile::of(&kept.path) != kept.file => {
                Some("is not there, or another file is in its place".to_owned())
            }
            None => match KeepOut::take(&kept.path) {
                Ok(lock) => {
                    let problem = opened(&lock);
                    self.locks.push(Locked { vm: kept.vm.clone(), path: kept.path.clone(), lock });
                    problem
                }
                Err(error) => Some(format!("cannot be locked: {}", chain(&error))),
            },
        };
        match &problem {
            Some(why) => drop(self.problems.insert(kept.path.clone(), why.clone())),
            None => drop(self.problems.remove(&kept.path)),
        }
        problem
    }

    /// Whether a file has no name any more; of a file that is not locked that cannot be told, and it is kept.
    fn is_removed(&self, kept: &ToBeLocked) -> bool {
        let locked = self.locks.iter().find(|lock| lock.path == kept.path);
        locked.is_some_and(|locked| {
            locked.lock.file().metadata().is_ok_and(|file| file.is_file() && file.nlink() == 0)
        })
    }
}

/// What stands against a lock that should be the only one.
fn opened(lock: &KeepOut) -> Option<String> {
    match lock.is_written() {
        Ok(false) => None,
        Ok(true) => {
            Some("is open for writing in another process: a second copy of the VM may run here".to_owned())
        }
        Err(e) => Some(format!("cannot be looked at: {e}")),
    }
}

#[cfg(test)]
mod tests;
