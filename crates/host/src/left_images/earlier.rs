//! The two records of earlier versions: `remnants.json`, of what is in images, and `kept-images.json`, of those that are locked. What
//! is in them is added to the one record, and they are removed when it has that.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::Deserialize;

use super::{Image, Kept, Left, OnRecord, Remnant};
use crate::fence::holder::Holder;
use crate::state_file::{StateFile, Unknown};
use crate::which_file::WhichFile;
use ownership::VmName;

const REMNANTS: &str = "remnants.json";
const KEPT: &str = "kept-images.json";

#[derive(Debug, Deserialize)]
struct EarlierRemnant {
    vm: VmName,
    path: PathBuf,
    left: Left,
    at: SystemTime,
    #[serde(default)]
    file: Option<WhichFile>,
    #[serde(default)]
    written: Option<(u64, SystemTime)>,
}

#[derive(Debug, Deserialize)]
struct EarlierKept {
    vm: VmName,
    path: PathBuf,
    to: String,
    at: SystemTime,
    file: Option<WhichFile>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Locked {
    images: Vec<EarlierKept>,
    holders: Vec<Holder>,
}

/// What is in them.
pub(super) struct Earlier {
    files: [StateFile; 2],
    remnants: Vec<EarlierRemnant>,
    locked: Locked,
}

pub(super) fn read(state_dir: &Path) -> Earlier {
    let (remnants_file, remnants) = StateFile::open(state_dir.join(REMNANTS));
    let (kept_file, locked) = StateFile::open(state_dir.join(KEPT));
    Earlier { files: [remnants_file, kept_file], remnants, locked }
}

impl Earlier {
    /// As if this were in them; none where either is not understood.
    #[cfg(fuzzing)]
    pub(super) fn of(remnants: &[u8], locked: &[u8]) -> Option<Earlier> {
        let files = [StateFile::nowhere(), StateFile::nowhere()];
        let (remnants, locked) =
            (serde_json::from_slice(remnants).ok()?, serde_json::from_slice(locked).ok()?);
        Some(Earlier { files, remnants, locked })
    }

    /// One that cannot be read says what is not known now: the record that takes its place is not written before it is read.
    pub(super) fn is_unread(&self) -> bool {
        self.files.iter().any(StateFile::is_unread)
    }

    pub(super) fn unknown(&self) -> impl Iterator<Item = &Unknown> {
        self.files.iter().filter_map(StateFile::unknown)
    }

    pub(super) fn is_there(&self) -> bool {
        self.files.iter().any(|file| file.path().exists())
    }

    /// Adding what was added before changes nothing.
    pub(super) fn add_to(&self, now: &mut OnRecord) {
        for EarlierRemnant { vm, path, left, at, file, written } in &self.remnants {
            let remnant = Remnant { left: *left, at: *at, written: *written, complete: None };
            image(now, vm, path, file.as_ref()).remnant.get_or_insert(remnant);
        }
        for EarlierKept { vm, path, to, at, file } in &self.locked.images {
            let image = image(now, vm, path, file.as_ref());
            // Of two that each say whose it is: nobody else has written it since.
            image.vm.clone_from(vm);
            image.kept.get_or_insert(Kept { to: Some(to.clone()), at: *at });
        }
        for holder in &self.locked.holders {
            if !now.holders.contains(holder) {
                now.holders.push(holder.clone());
            }
        }
    }

    pub(super) fn remove(&self) {
        for file in &self.files {
            match std::fs::remove_file(file.path()) {
                Err(e) if e.kind() != ErrorKind::NotFound => {
                    tracing::warn!(file = %file.path().display(), error = %e, "cannot be removed");
                }
                _ => {}
            }
        }
    }
}

fn image<'a>(now: &'a mut OnRecord, vm: &VmName, path: &Path, file: Option<&WhichFile>) -> &'a mut Image {
    let is_it = |image: &Image| image.path == path && image.file.as_ref() == file;
    let place = now.images.iter().position(is_it).unwrap_or_else(|| {
        let (vm, path, file) = (vm.clone(), path.to_owned(), file.cloned());
        now.images.push(Image { vm, path, file, remnant: None, kept: None });
        now.images.len() - 1
    });
    &mut now.images[place]
}
