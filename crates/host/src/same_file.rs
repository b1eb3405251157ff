//! Whether two paths lead to the same file, which is asked of others' files too: one whose storage does not answer keeps nobody waiting.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

/// How long it may take to find out where a path leads.
const LEADS: Duration = Duration::from_secs(5);

/// Whether two paths lead to the same file; not where that cannot be told.
pub(crate) fn same_file(one: &Path, other: &Path) -> bool {
    one == other || leads_to(one).is_some_and(|one| leads_to(other) == Some(one))
}

/// Where a path leads. None as well where its storage does not answer: one thread waits for that, and nobody else a second time.
fn leads_to(path: &Path) -> Option<PathBuf> {
    static UNANSWERED: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());
    let unanswered = || UNANSWERED.lock().unwrap_or_else(PoisonError::into_inner);
    if unanswered().contains(path) {
        return None;
    }
    let (tell, told) = mpsc::channel();
    let asked = path.to_owned();
    let asks = move || {
        let leads = std::fs::canonicalize(&asked).ok();
        let mut unanswered = unanswered();
        if tell.send(leads).is_err() {
            unanswered.remove(&asked);
        }
    };
    if thread::Builder::new().name("leads-to".to_owned()).spawn(asks).is_err() {
        return std::fs::canonicalize(path).ok();
    }
    if let Ok(leads) = told.recv_timeout(LEADS) {
        return leads;
    }
    let mut unanswered = unanswered();
    told.try_recv().unwrap_or_else(|_| {
        tracing::warn!(path = %path.display(), "it cannot be told where this leads: its storage does not answer");
        unanswered.insert(path.to_owned());
        drop(told);
        None
    })
}

/// Those paths that lead to some of these images.
pub(crate) fn among(images: &[&Path], paths: impl IntoIterator<Item = PathBuf>) -> BTreeSet<PathBuf> {
    let mut theirs: Option<BTreeSet<PathBuf>> = None;
    let mut is_one = |path: &PathBuf| {
        images.contains(&path.as_path()) || {
            let theirs =
                theirs.get_or_insert_with(|| images.iter().filter_map(|image| leads_to(image)).collect());
            leads_to(path).is_some_and(|path| theirs.contains(&path))
        }
    };
    paths.into_iter().filter(|path| is_one(path)).collect()
}
