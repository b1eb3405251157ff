//! Images that machines have left on this host: one record of whose each is, whether what is in it is a remnant, and until when it is
//! kept locked.
//!
//! A *remnant* is the copy of an attempt that did not come to its end, or the disk of a machine that has moved away: when the machine
//! comes, or comes again, only what differs from it travels. One that was made for an attempt that failed is removed after a while; all
//! others were somebody's before, and are never removed. One that somebody has written to since is that somebody's.
//!
//! A *kept* image is one of a machine that has left, locked for as long as nobody says otherwise: [`Fence`](crate::Fence) has the locks.
//!
//! Both are told of an image in one step, so that no crash leaves one without the other.
//!
//! Images may stand on storage that does not answer, for ever: they are looked at before what is known is locked, for all to whom others'
//! images are of interest too.

mod earlier;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use qemu::Spec;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::fence::holder::Holder;
use crate::images;
use crate::same_file::{among, same_file};
use crate::state_file::{StateFile, Unknown};
use crate::vm::Journal;
use crate::which_file::WhichFile;
use finding::Finding;
use ownership::VmName;

/// How long an image of an attempt that failed is there for the next one.
const THERE: Duration = Duration::from_secs(24 * 3600);
const FILE: &str = "left-images.json";

/// Why there is a remnant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Left {
    /// It was made for a migration to here that did not come to its end.
    Unfinished,
    /// It was there before: a disk of a machine that has moved away, or one that was to be overwritten.
    Behind,
}

/// An image, for as long as there is something to say of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Image {
    /// The machine that has left it.
    vm: VmName,
    path: PathBuf,
    /// Which file it was: another one in its place is somebody else's. None on record: nobody knows any more.
    file: Option<WhichFile>,
    remnant: Option<Remnant>,
    kept: Option<Kept>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Remnant {
    left: Left,
    at: SystemTime,
    /// Its length and when it was last written, of a file.
    written: Option<(u64, SystemTime)>,
    /// The migration by which it was complete, of a machine that its source was not heard to have: it may be all that there is of its
    /// disks, and is removed by people only.
    #[serde(default)]
    complete: Option<Uuid>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Kept {
    /// Name of the agent that has the machine; none where it is only known that the image was locked.
    to: Option<String>,
    at: SystemTime,
}

/// A machine that has left, looked for on this host for a while.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watched {
    /// The machine.
    pub vm: VmName,
    /// Name of the agent that it was handed over to.
    pub to: String,
    /// Its command line.
    pub argv: Vec<String>,
}

/// An image that is to be locked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ToBeLocked {
    pub(crate) vm: VmName,
    pub(crate) path: PathBuf,
    pub(crate) file: Option<WhichFile>,
    /// Name of the agent that has the machine, if that is known, and since when it is.
    pub(crate) to: Option<String>,
    pub(crate) at: SystemTime,
}

/// What is on record.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct OnRecord {
    images: Vec<Image>,
    holders: Vec<Holder>,
    watched: Vec<Watched>,
    /// What may start machines here again that have left, or are to.
    starters: BTreeMap<VmName, Finding>,
}

#[derive(Debug)]
struct Known {
    now: OnRecord,
    /// It could not be put on record.
    unwritten: bool,
}

/// What machines have left on this host.
#[derive(Debug)]
pub struct LeftImages {
    file: StateFile,
    state_dir: PathBuf,
    /// Why it is not known what was on record.
    unknown: Vec<Unknown>,
    known: Mutex<Known>,
}

#[cfg(fuzzing)]
pub(crate) fn fuzz(record: &[u8], remnants: &[u8], kept: &[u8]) {
    let mut now: OnRecord = serde_json::from_slice(record).unwrap_or_default();
    let before = now.images.len();
    if let Some(earlier) = earlier::Earlier::of(remnants, kept) {
        earlier.add_to(&mut now);
        let once = now.clone();
        earlier.add_to(&mut now);
        assert_eq!(now, once, "adding what was added before changes nothing");
    }
    assert!(now.images.len() >= before);
    now.tidy();
    let locked = now.images.iter().filter_map(Image::to_be_locked).count();
    assert_eq!(locked, now.images.iter().filter(|image| image.kept.is_some()).count());
    // A time before 1970 cannot be written; what cannot be written is told.
    let Ok(again) = serde_json::to_vec_pretty(&now) else { return };
    assert_eq!(serde_json::from_slice::<OnRecord>(&again).expect("our own"), now);
}

/// The length of a file, and when it was last written; a block device tells neither.
fn written(path: &Path) -> Option<(u64, SystemTime)> {
    let file = std::fs::metadata(path).ok().filter(std::fs::Metadata::is_file)?;
    Some((file.len(), file.modified().ok()?))
}

/// An image as it is at a path now.
struct Found<'a> {
    path: &'a Path,
    file: Option<WhichFile>,
    written: Option<(u64, SystemTime)>,
}

impl Found<'_> {
    fn at(path: &Path) -> Found<'_> {
        Found { path, file: WhichFile::of(path), written: written(path) }
    }
}

impl Image {
    /// Whether the file is still the one that was left.
    fn is_there(&self) -> bool {
        self.file.is_some() && WhichFile::of(&self.path) == self.file
    }

    /// Whether it is a remnant that nobody has written to.
    fn is_remnant(&self) -> bool {
        let untouched = |remnant: &Remnant| written(&self.path) == remnant.written;
        self.remnant.as_ref().is_some_and(untouched) && self.is_there()
    }

    fn to_be_locked(&self) -> Option<ToBeLocked> {
        let Kept { to, at } = self.kept.clone()?;
        let (vm, path, file) = (self.vm.clone(), self.path.clone(), self.file.clone());
        Some(ToBeLocked { vm, path, file, to, at })
    }
}

impl OnRecord {
    /// What is said of the file that has this path now. Of others that had it nothing is a remnant any more.
    fn of(&mut self, vm: &VmName, found: &Found<'_>) -> &mut Image {
        let (path, file) = (found.path, found.file.clone());
        for other in self.images.iter_mut().filter(|image| image.path == path && image.file != file) {
            other.remnant = None;
        }
        let place =
            self.images.iter().position(|image| image.path == path && image.file == file).unwrap_or_else(
                || {
                    let (vm, path) = (vm.clone(), path.to_owned());
                    self.images.push(Image { vm, path, file, remnant: None, kept: None });
                    self.images.len() - 1
                },
            );
        &mut self.images[place]
    }

    fn tidy(&mut self) {
        self.images.retain(|image| image.remnant.is_some() || image.kept.is_some());
    }
}

impl LeftImages {
    /// Reads what is on record below the agent's state directory. What cannot be understood is as if there were nothing: images are
    /// then refused, and never overwritten.
    #[must_use]
    pub fn open(state_dir: &Path) -> LeftImages {
        let (mut file, mut now): (StateFile, OnRecord) = StateFile::open(state_dir.join(FILE));
        let earlier = earlier::read(state_dir);
        earlier.add_to(&mut now);
        if earlier.is_unread() {
            file.leave_alone();
        }
        let state_dir = std::fs::canonicalize(state_dir).unwrap_or_else(|_| state_dir.to_owned());
        let unknown = file.unknown().into_iter().chain(earlier.unknown()).cloned().collect();
        let left =
            LeftImages { file, state_dir, unknown, known: Mutex::new(Known { now, unwritten: false }) };
        if earlier.is_there() && left.write(&mut left.known()).is_ok() {
            earlier.remove();
        }
        left
    }

    /// What an operator is told where it is not known what was on record.
    #[must_use]
    pub fn problems(&self) -> Vec<Finding> {
        let told = |unknown: &Unknown| {
            unknown.finding(
                "left-images-unreadable",
                "which images VMs have left here is not known, and of those only what a process `hold-locks` has is kept locked",
                "see that nothing starts a VM that has left from its images here",
            )
        };
        self.unknown.iter().map(told).collect()
    }

    /// Whether an image is a remnant that this machine has left, as it was left.
    #[must_use]
    pub fn is_left_by(&self, vm: &VmName, path: &Path) -> bool {
        self.images(|image| image.vm == *vm && image.path == path).iter().any(Image::is_remnant)
    }

    /// The machine that has left a remnant, if one has, whatever the name of the file was: what is in it is older than what that machine
    /// has now, or only a part of it.
    #[must_use]
    pub fn left_by(&self, path: &Path) -> Option<VmName> {
        let (file, written) = (WhichFile::of(path)?, written(path));
        let is_it = |image: &&Image| {
            let untouched = |remnant: &Remnant| remnant.written == written;
            image.file.as_ref() == Some(&file) && image.remnant.as_ref().is_some_and(untouched)
        };
        let known = self.known();
        Some(known.now.images.iter().find(is_it)?.vm.clone())
    }

    /// The machine that has left an image here which is kept locked, and the agent that has that machine, if that is known.
    #[must_use]
    pub fn kept_of(&self, path: &Path) -> Option<(VmName, Option<String>)> {
        let file = WhichFile::of(path);
        let kept = self.images(|image| image.kept.is_some());
        let is_it = |image: &&Image| file.is_some() && image.file == file || same_file(&image.path, path);
        let image = kept.iter().find(is_it)?;
        Some((image.vm.clone(), image.kept.as_ref()?.to.clone()))
    }

    /// Remembers an image that a copy of a machine has left, which came to nothing.
    ///
    /// # Errors
    /// When that cannot be put on record: another agent would not know of it.
    pub(crate) fn leave(&self, vm: &VmName, path: &Path, left: Left) -> io::Result<()> {
        self.leave_as(vm, path, left, None)
    }

    /// The same of a copy that was complete, and of which the source has not said that it is worthless.
    ///
    /// # Errors
    /// As [`LeftImages::leave`].
    pub(crate) fn leave_complete(
        &self,
        vm: &VmName,
        path: &Path,
        left: Left,
        session: Uuid,
    ) -> io::Result<()> {
        self.leave_as(vm, path, left, Some(session))
    }

    fn leave_as(&self, vm: &VmName, path: &Path, left: Left, complete: Option<Uuid>) -> io::Result<()> {
        let found = Found::at(path);
        self.change(|now| {
            let image = now.of(vm, &found);
            if image.kept.is_some() && image.vm != *vm {
                // Locked for another machine, it was not written.
                return;
            }
            // What it was before, it still is: somebody's of before, or made here.
            let left = image.remnant.as_ref().map_or(left, |before| before.left);
            image.vm = vm.clone();
            image.remnant = Some(Remnant { left, at: SystemTime::now(), written: found.written, complete });
        })
    }

    /// The source of a copy says that it has the machine: what that copy has left is worth no more than what an attempt leaves that failed.
    pub fn source_has_it(&self, session: Uuid) {
        // What cannot be put on record is there for longer than need be.
        let _ = self.change(|now| {
            let remnants = now.images.iter_mut().filter_map(|image| image.remnant.as_mut());
            for remnant in remnants.filter(|remnant| remnant.complete == Some(session)) {
                remnant.complete = None;
            }
        });
    }

    /// Images here that a complete copy of a machine has left, of which nobody has said that they are worthless.
    #[must_use]
    pub fn complete_of(&self, vm: &VmName) -> Vec<PathBuf> {
        let is_complete =
            |image: &&Image| image.remnant.as_ref().is_some_and(|remnant| remnant.complete.is_some());
        let theirs = self.images(|image| image.vm == *vm);
        let theirs = theirs.iter().filter(is_complete).filter(|image| image.is_remnant());
        theirs.map(|image| image.path.clone()).collect()
    }

    /// Remembers the images of a machine that has left for good: what they are, and that they stay locked. Said again it is as it was.
    ///
    /// # Errors
    /// As [`LeftImages::leave`].
    pub(crate) fn keep(&self, vm: &VmName, to: &str, images: &[PathBuf]) -> io::Result<()> {
        let found: Vec<Found<'_>> = images.iter().map(|path| Found::at(path)).collect();
        self.change(|now| {
            let at = SystemTime::now();
            for found in &found {
                let others = |image: &&mut Image| image.path == found.path && image.vm != *vm;
                for other in now.images.iter_mut().filter(others) {
                    other.kept = None;
                }
                let image = now.of(vm, found);
                image.vm = vm.clone();
                let left = image.remnant.as_ref().map_or(Left::Behind, |before| before.left);
                let (written, before) = (found.written, image.remnant.take());
                let same = before.filter(|before| before.written == written);
                image.remnant = Some(same.unwrap_or(Remnant { left, at, written, complete: None }));
                let same = image.kept.take().filter(|kept| kept.to.as_deref() == Some(to));
                image.kept = Some(same.unwrap_or(Kept { to: Some(to.to_owned()), at }));
            }
        })
    }

    /// Remembers an image of a machine that is locked, though nothing says why.
    pub(crate) fn keep_found(&self, vm: &VmName, path: &Path, file: Option<WhichFile>) {
        let kept = Kept { to: None, at: SystemTime::now() };
        // What cannot be put on record is, with the next word; the process that has it locked stays until then.
        let _ = self.change(|now| {
            match now.images.iter_mut().find(|image| image.path == path && image.file == file) {
                Some(image) if image.kept.is_some() => {}
                Some(image) => {
                    image.vm = vm.clone();
                    image.kept = Some(kept);
                }
                None => {
                    let (vm, path) = (vm.clone(), path.to_owned());
                    now.images.push(Image { vm, path, file, remnant: None, kept: Some(kept) });
                }
            }
        });
    }

    /// A machine's record says what of these images was not known.
    pub(crate) fn explained(&self, vm: &VmName, images: &[PathBuf]) {
        let images: Vec<&Path> = images.iter().map(PathBuf::as_path).collect();
        let unknown =
            |image: &Image| image.vm == *vm && image.kept.as_ref().is_some_and(|kept| kept.to.is_none());
        let theirs = self.known_as(&images, unknown);
        let _ = self.change(|now| {
            for image in now.images.iter_mut().filter(|image| unknown(image) && theirs.contains(&image.path))
            {
                image.kept = None;
            }
        });
    }

    /// Remembers what was found that may start a machine here again when it has left, or that nothing was.
    pub fn may_start(&self, vm: &VmName, found: Option<&Finding>) {
        let _ = self.change(|now| match found {
            Some(found) => drop(now.starters.insert(vm.clone(), found.clone())),
            None => drop(now.starters.remove(vm)),
        });
    }

    /// What may start a machine here again that has left.
    #[must_use]
    pub fn starter_of(&self, vm: &VmName) -> Option<Finding> {
        self.known().now.starters.get(vm).cloned()
    }

    /// Has a machine that has left looked for by the next agent too, until it is said that it is not.
    pub fn watch(&self, watched: Watched) {
        let _ = self.change(|now| {
            now.watched.retain(|other| other.vm != watched.vm);
            now.watched.push(watched);
        });
    }

    /// It is not looked for any more.
    pub fn watch_no_more(&self, watched: &Watched) {
        let _ = self.change(|now| now.watched.retain(|other| other != watched));
    }

    /// Machines that are looked for.
    #[must_use]
    pub fn watched(&self) -> Vec<Watched> {
        self.known().now.watched.clone()
    }

    /// The agent's state directory, by its one name.
    pub(crate) fn state_dir(&self) -> &Path {
        &self.state_dir
    }

    /// Images are to be a machine's of this host: they are nobody's remnants, whatever becomes of that.
    pub(crate) fn no_remnants<'a>(&self, images: impl IntoIterator<Item = &'a Path>) {
        let images: Vec<&Path> = images.into_iter().collect();
        let theirs = self.known_as(&images, |_| true);
        // What cannot be put on record is, before the machine's record goes.
        let _ = self.change(|now| {
            for image in now.images.iter_mut().filter(|image| theirs.contains(&image.path)) {
                image.remnant = None;
            }
        });
    }

    /// Images are a machine's of this host: nothing is said of them any more.
    pub(crate) fn taken<'a>(&self, images: impl IntoIterator<Item = &'a Path>) {
        let images: Vec<&Path> = images.into_iter().collect();
        let theirs = self.known_as(&images, |_| true);
        // As above.
        let _ = self.change(|now| now.images.retain(|image| !theirs.contains(&image.path)));
    }

    /// Images of a machine are not to be kept any more. Returns which they were.
    pub(crate) fn keep_no_more(&self, vm: &VmName) -> Vec<PathBuf> {
        let mut paths = Vec::new();
        let _ = self.change(|now| {
            now.starters.remove(vm);
            for image in now.images.iter_mut().filter(|image| image.vm == *vm) {
                if image.kept.take().is_some() {
                    paths.push(image.path.clone());
                }
            }
        });
        paths
    }

    /// A kept image was removed.
    pub(crate) fn removed(&self, gone: &ToBeLocked) {
        let _ = self.change(|now| now.images.retain(|image| image.to_be_locked().as_ref() != Some(gone)));
    }

    /// Images that are to be locked.
    pub(crate) fn to_be_locked(&self) -> Vec<ToBeLocked> {
        self.known().now.images.iter().filter_map(Image::to_be_locked).collect()
    }

    /// Has what is known on record, if it is not: before what else says it goes.
    ///
    /// # Errors
    /// As [`LeftImages::leave`].
    pub(crate) fn settle(&self) -> io::Result<()> {
        let mut known = self.known();
        if known.unwritten { self.write(&mut known) } else { Ok(()) }
    }

    /// Processes that hold locks of images.
    pub(crate) fn holders(&self) -> Vec<Holder> {
        self.known().now.holders.clone()
    }

    pub(crate) fn change_holders(&self, change: impl FnOnce(&mut Vec<Holder>)) {
        let _ = self.change(|now| change(&mut now.holders));
    }

    /// Removes what was made here and has been there for long enough, but for what is in use again.
    pub fn expire(&self, journal: &Journal) {
        let records = journal.all();
        let made =
            records.iter().flat_map(|record| record.made.images.iter().map(|image| image.path.clone()));
        let specs = records.iter().filter_map(|record| Spec::parse(&record.argv).ok());
        let theirs = specs.flat_map(|spec| images::of(&spec)).map(|(path, _)| path);
        self.expire_older_than(THERE, &made.chain(theirs).collect::<Vec<_>>());
    }

    /// As if all of it had been there for long enough.
    #[cfg(test)]
    pub(crate) fn expire_now(&self) {
        std::thread::sleep(Duration::from_millis(2));
        self.expire_older_than(Duration::ZERO, &[]);
    }

    fn expire_older_than(&self, age: Duration, used: &[PathBuf]) {
        // Before anything is locked for it: what does not answer holds up who removes, and nobody else.
        let is_due = |image: &Image| {
            let remnant = image.remnant.as_ref();
            !image.is_there() || remnant.is_some_and(|remnant| remnant.at.elapsed().is_ok_and(|at| at > age))
        };
        let remnants = self.images(|image| image.remnant.is_some()).into_iter();
        let due: BTreeSet<PathBuf> = remnants.filter(is_due).map(|image| image.path).collect();
        // What is gone is found to be gone again.
        let _ = self.change(|now| {
            for image in now.images.iter_mut().filter(|image| due.contains(&image.path)) {
                let Some(remnant) = &image.remnant else { continue };
                let old = remnant.at.elapsed().is_ok_and(|elapsed| elapsed > age);
                let (path, vm) = (&image.path, &image.vm);
                // Where it cannot be told whether a QEMU has it open, one may have.
                let in_use = || used.contains(path) || qemu::in_use(path).unwrap_or(true);
                if image.is_there() {
                    let stays = remnant.left == Left::Behind || remnant.complete.is_some();
                    if stays || !old || in_use() {
                        continue;
                    }
                    if image.is_remnant() {
                        tracing::info!(image = %path.display(), %vm, "removing the image of an attempt that failed");
                        let _ = std::fs::remove_file(path);
                    }
                }
                image.remnant = None;
            }
        });
    }

    /// Those of which this holds.
    fn images(&self, wanted: impl Fn(&Image) -> bool) -> Vec<Image> {
        self.known().now.images.iter().filter(|image| wanted(image)).cloned().collect()
    }

    /// By which paths some of these are known, of those of which that holds.
    fn known_as(&self, images: &[&Path], of: impl Fn(&Image) -> bool) -> BTreeSet<PathBuf> {
        among(images, self.images(of).into_iter().map(|image| image.path))
    }

    /// Changes what is known, and puts it on record if that was a change.
    fn change(&self, change: impl FnOnce(&mut OnRecord)) -> io::Result<()> {
        let mut known = self.known();
        let mut now = known.now.clone();
        change(&mut now);
        now.tidy();
        if now == known.now && !known.unwritten {
            return Ok(());
        }
        known.now = now;
        self.write(&mut known)
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, known: &mut Known) -> io::Result<()> {
        known.unwritten = true;
        self.file.write(&known.now).inspect_err(|e| {
            tracing::error!(file = %self.file.path().display(), error = %e, "what VMs have left cannot be put on record");
        })?;
        known.unwritten = false;
        Ok(())
    }
}
