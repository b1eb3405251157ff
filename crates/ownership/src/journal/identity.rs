//! Which state directory this is: a random name that is made once, so that one that is empty, or another's, is known as such.

use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use uuid::Uuid;

use super::error::JournalError;

/// The identity of a state directory, made where there is none yet. Where it cannot be read or written, as on a full disk, one that
/// nobody has heard of and nobody will hear of again: what the agent says of copies then counts for nothing, and the rest goes on.
pub(super) fn of(state_dir: &Path) -> Uuid {
    kept(state_dir).unwrap_or_else(|error| {
        tracing::error!(
            error = finding::chain(&error),
            "state_dir has no identity: no source will believe what is said here of copies"
        );
        Uuid::new_v4()
    })
}

fn kept(state_dir: &Path) -> Result<Uuid, JournalError> {
    let path = state_dir.join("identity");
    let failed = |action| {
        let path = path.clone();
        move |source| JournalError::Io { action, path, source }
    };
    match std::fs::read_to_string(&path) {
        Ok(text) => text.trim().parse().map_err(|_| JournalError::Corrupt(path.clone())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let identity = Uuid::new_v4();
            // It has its name only when it is whole: a crash in between leaves none, and another is made.
            let new = state_dir.join("identity.new");
            let mut options = std::fs::File::options();
            let file = options.write(true).create(true).truncate(true).mode(0o600).open(&new);
            let made = file.and_then(|mut file| {
                writeln!(file, "{identity}")?;
                file.sync_all()?;
                std::fs::rename(&new, &path)?;
                std::fs::File::open(state_dir)?.sync_all()
            });
            made.map_err(failed("create"))?;
            Ok(identity)
        }
        Err(e) => Err(failed("read")(e)),
    }
}
