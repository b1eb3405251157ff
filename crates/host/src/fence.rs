//! Images of machines that are not here, locked so that nothing here opens them for writing: whatever starts such a machine once
//! more, a supervisor or a person, fails at the lock instead of making a second copy.
//!
//! The locks are QEMU's own. They are taken while the QEMU that gives an image up still has its own, since theirs and ours do not
//! stand in each other's way, and let go of in the moment before a QEMU here is to open the image: who brings an image up to date for a
//! machine that comes back does so under them. A process that does nothing else
//! (`holders`) has the files open too, so that the locks outlive the agent; where there is none, the next agent takes them before it does
//! anything else, by what is on record. Such a process ends only when its images were forgotten, removed, or are a machine's of this host
//! again: one of which no record says why it is there is gone on with.
//!
//! A path may lead to storage that does not answer, for ever. So nothing asks the file system under a lock that others need: the table of
//! what is locked has one that is held for moments, and what is done about one machine's images has its turn, beside other machines'.

pub(crate) mod holder;
mod holders;
mod lost;
mod table;

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use qemu::{ImageLock, ImageLockError, QmpError};
use tokio::sync::oneshot;

use crate::left_images::{LeftImages, ToBeLocked};
use crate::same_file::among;
use crate::vm::Record;
use finding::chain;
pub use holders::Keeper;
use ownership::VmName;
use ownership::journal::blocking;
use table::{FileId, Locked, Table};

/// For how long, and how long apart, a QEMU that finds an image locked is told to run its machine once more. The guest is paused meanwhile.
const LOCKED_OUT: Duration = Duration::from_secs(2);
/// See [`LOCKED_OUT`].
const ONCE_MORE: Duration = Duration::from_millis(20);
/// For how long a start of the agent waits until everything is locked, and a look until everything has been looked at.
const UNANSWERED: Duration = Duration::from_secs(5);

/// Whether QEMU has found an image locked by another process.
fn is_locked_out(error: &QmpError) -> bool {
    matches!(error, QmpError::Refused { desc, .. } if desc.starts_with("Failed to get") && desc.contains("lock"))
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
    table: Arc<Table>,
}

impl Fence {
    /// Locks what is to be locked, with the images of machines that `records` say were handed over or may not run yet. What cannot be
    /// locked is told in the log and in lists; what stands on storage that does not answer is locked when that does. Without a keeper no
    /// lock outlives this.
    #[must_use]
    pub fn new(left: Arc<LeftImages>, records: &[Record], keeper: Option<Keeper>) -> Fence {
        let table = Arc::new(Table::new(Arc::clone(&left)));
        let (done, is_done) = mpsc::channel();
        let (taking, records, holds) = (Arc::clone(&table), records.to_vec(), keeper.clone());
        let begun = aside(move || {
            taking.take_up(&records, holds.as_ref());
            let _ = done.send(());
        });
        if !begun || blocking(|| is_done.recv_timeout(UNANSWERED)).is_err() {
            tracing::error!("not all images that are to be kept locked are so yet: storage does not answer");
        }
        Fence { left, keeper, table }
    }

    /// Keeps everybody from opening these images of a machine, whoever has them open now.
    pub fn hold<'a>(&self, vm: &VmName, images: impl IntoIterator<Item = &'a Path>) {
        let images: Vec<&Path> = images.into_iter().collect();
        blocking(|| {
            let turn = self.table.turn(vm);
            let _turn = turn.images();
            images.iter().for_each(|image| self.table.lock(vm, image));
        });
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
        let has_own_locks = || {
            let turn = self.table.turn(vm);
            let _turn = turn.images();
            let theirs = self.table.state().locks_of(vm);
            theirs.iter().any(|lock| lock.is_kept_by_others().unwrap_or(true))
        };
        if blocking(has_own_locks) {
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
        blocking(|| {
            let turn = self.table.turn(vm);
            let _turn = turn.images();
            let theirs = {
                let mut state = self.table.state();
                state.guarded.remove(vm);
                state.take_out(|locked| locked.vm == *vm)
            };
            theirs.into_iter().map(|locked| locked.path).collect()
        })
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
        blocking(|| {
            let turn = self.table.turn(vm);
            let _turn = turn.images();
            let Some(file) = FileId::of(image) else { return Ok(None) };
            let kept = self.table.state().find(|locked| locked.vm == *vm && locked.file == file);
            let Some(kept) = kept else { return Ok(None) };
            let lock = ImageLock::beside(image, &kept)?;
            self.table.state().lent.insert(vm.clone());
            Ok(Some(lock))
        })
    }

    /// A QEMU that a person starts is to have the images of a machine that has left.
    pub(crate) async fn lend(&self, vm: &VmName) {
        blocking(|| {
            let turn = self.table.turn(vm);
            let _turn = turn.images();
            self.table.state().lent.insert(vm.clone());
        });
        let _ = self.let_go(vm).await;
    }

    /// Nobody writes the images of a machine here any more, and it does not run here: those that were kept are, and no other.
    pub async fn take_again(&self, vm: &VmName) {
        let take = || {
            let turn = self.table.turn(vm);
            let _turn = turn.images();
            let mut kept = self.left.to_be_locked();
            kept.retain(|kept| kept.vm == *vm);
            let others = {
                let mut state = self.table.state();
                state.lent.remove(vm);
                let is_kept = |locked: &Locked| kept.iter().any(|kept| kept.path == locked.path);
                state.take_out(|locked| locked.vm == *vm && !is_kept(locked))
            };
            drop(others);
            for kept in &kept {
                let _ = self.table.lock_kept(kept);
            }
            if kept.is_empty() {
                self.table.state().guarded.remove(vm);
            }
            !kept.is_empty()
        };
        if blocking(take) {
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
        let keep = || {
            let turn = self.table.turn(vm);
            let _turn = turn.images();
            let on_record = self.left.keep(vm, to, images);
            for kept in self.left.to_be_locked().iter().filter(|kept| images.contains(&kept.path)) {
                let _ = self.table.lock_kept(kept);
            }
            on_record
        };
        let on_record = blocking(keep);
        self.post(vm).await;
        on_record
    }

    /// Images are a machine's of this host again: nothing keeps it from them, and nothing is said of them any more.
    pub fn taken<'a>(&self, images: impl IntoIterator<Item = &'a Path>) {
        let images: Vec<&Path> = images.into_iter().collect();
        blocking(|| {
            // First: what is not on record is not locked by who is just about to.
            self.left.taken(images.iter().copied());
            let paths = self.table.state().paths();
            let theirs = among(&images, paths);
            let vms: HashSet<VmName> = self.left.to_be_locked().into_iter().map(|kept| kept.vm).collect();
            let locks = {
                let mut state = self.table.state();
                state.problems.retain(|path, _| !theirs.contains(path));
                state.lent.retain(|vm| vms.contains(vm));
                state.take_out(|locked| theirs.contains(&locked.path))
            };
            drop(locks);
        });
    }

    /// A person says that the images of a machine are not to be kept any more. Returns which they were.
    pub async fn forget(&self, vm: &VmName) -> Vec<PathBuf> {
        let forget = || {
            // Not in its turn: of what does not answer a person can say so, too.
            let paths = self.left.keep_no_more(vm);
            let locks = {
                let mut state = self.table.state();
                state.problems.retain(|path, _| !paths.contains(path));
                state.take_out(|locked| locked.vm == *vm && paths.contains(&locked.path))
            };
            drop(locks);
            paths
        };
        let paths = blocking(forget);
        self.relieve_idle().await;
        paths
    }

    /// Whether somebody has an image open for writing, or keeps others from that, who is not this. Of an image that is locked already
    /// it is not known whether somebody else keeps others from it too.
    ///
    /// # Errors
    /// What the system said.
    pub fn others_use(&self, image: &Path) -> std::io::Result<bool> {
        blocking(|| {
            let file = FileId::of(image);
            let is_it = |locked: &Locked| file == Some(locked.file);
            let Some(vm) = self.table.state().vm_of(is_it) else { return qemu::in_use(image) };
            let turn = self.table.turn(&vm);
            let _turn = turn.images();
            let lock = self.table.state().find(is_it);
            lock.map_or_else(|| qemu::in_use(image), |lock| lock.is_written())
        })
    }

    /// Machines that have left, with what is kept of them, by name.
    #[must_use]
    pub fn left(&self) -> Vec<Left> {
        let state = self.table.state();
        let mut left: BTreeMap<VmName, Left> = BTreeMap::new();
        for ToBeLocked { vm, path, to, at, .. } in self.left.to_be_locked() {
            let problem = state.problems.get(&path).cloned();
            let one = left.entry(vm.clone()).or_insert_with(|| Left { vm, to, at, images: Vec::new() });
            one.images.push(KeptImage { path, problem });
        }
        left.into_values().collect()
    }

    /// Looks whether the images are as they should be: locks what could not be locked before, and lets go of what was removed, which
    /// takes room for as long as it is open. Returns what is news; what is found out later than the next is waited for, with that.
    pub async fn look(&self) -> Vec<Seen> {
        let vms: HashSet<VmName> = self.left.to_be_locked().into_iter().map(|kept| kept.vm).collect();
        let looks: Vec<_> = vms.iter().filter_map(|vm| self.begin_to_look(vm)).collect();
        let until = tokio::time::Instant::now() + UNANSWERED;
        for looked in looks {
            let _ = tokio::time::timeout_at(until, looked).await;
        }
        let seen = self.table.seen();
        self.post_all().await;
        seen
    }

    /// Has somebody look at the images of a machine, unless somebody still does.
    fn begin_to_look(&self, vm: &VmName) -> Option<oneshot::Receiver<()>> {
        if !self.table.state().looked_at.insert(vm.clone()) {
            return None;
        }
        let (done, is_done) = oneshot::channel();
        let (table, of) = (Arc::clone(&self.table), vm.clone());
        let begun = aside(move || {
            table.look_at(&of);
            let _ = done.send(());
        });
        if !begun {
            self.table.state().looked_at.remove(vm);
        }
        begun.then_some(is_done)
    }
}

impl Drop for Fence {
    fn drop(&mut self) {
        // What others hold is theirs, as if this process had ended.
        self.table.state().take_out(|_| true).iter().for_each(|locked| locked.lock.pass_on());
    }
}

/// Begins what may never come to its end. False where there is no thread for it.
fn aside(work: impl FnOnce() + Send + 'static) -> bool {
    let begun = thread::Builder::new().name("fence".to_owned()).spawn(work);
    begun
        .inspect_err(|error| tracing::error!(%error, "images that are to be kept locked cannot be looked at"))
        .is_ok()
}

#[cfg(test)]
mod tests;
