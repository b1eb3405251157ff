//! What is remembered of hand-overs to this host whose machines are not here any more: one small file for each, until its source has
//! said that it keeps nothing of the machine.
//!
//! Nothing is forgotten by time: a clock can be wrong, and a source can be away for long.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::error::JournalError;
use crate::{Departed, Mark};

/// Bytes that a mark is read to.
const LONGEST: u64 = 4096;

/// The two directories of marks.
#[derive(Debug)]
pub(super) struct Marks {
    /// Machines that ran here.
    ran: PathBuf,
    /// Copies that were complete and never ran.
    never_ran: PathBuf,
}

impl Marks {
    /// Their directories are made where they are not there yet. One that cannot be, as on a full disk, keeps marks from being made, and
    /// no agent down.
    pub(super) fn open(state_dir: &Path) -> Marks {
        let marks = Marks { ran: state_dir.join("departed"), never_ran: state_dir.join("withdrawn") };
        for directory in [&marks.ran, &marks.never_ran] {
            if let Err(error) = std::fs::create_dir_all(directory) {
                tracing::error!(directory = %directory.display(), %error, "cannot be made");
            }
        }
        marks
    }

    /// Makes one. It is durable when this returns.
    pub(super) fn make(&self, session: Uuid, mark: Mark, departed: Departed) -> Result<(), JournalError> {
        let (directory, content) = match mark {
            Mark::Ran => (&self.ran, serde_json::to_vec(&departed).unwrap_or_default()),
            Mark::NeverRan => (&self.never_ran, Vec::new()),
        };
        let path = directory.join(session.to_string());
        std::fs::create_dir_all(directory).map_err(failed("create", directory))?;
        let mut options = File::options();
        let file = options.write(true).create(true).truncate(true).mode(0o600).open(&path);
        let made = file.and_then(|mut file| {
            file.write_all(&content)?;
            file.sync_all()?;
            File::open(directory)?.sync_all()
        });
        made.map_err(failed("create", &path))
    }

    /// # Errors
    /// What the system says: not to be able to see a mark is not to have none.
    pub(super) fn of(&self, session: Uuid) -> Result<Option<Mark>, JournalError> {
        for (directory, mark) in [(&self.ran, Mark::Ran), (&self.never_ran, Mark::NeverRan)] {
            let path = directory.join(session.to_string());
            if path.try_exists().map_err(failed("look for", &path))? {
                return Ok(Some(mark));
            }
        }
        Ok(None)
    }

    /// What is remembered of a machine that ran here. A mark without content, as of a crash or of an earlier version, says no more
    /// than that it did.
    pub(super) fn departed(&self, session: Uuid) -> Result<Option<Departed>, JournalError> {
        let path = self.ran.join(session.to_string());
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(failed("read", &path)(e)),
        };
        let mut content = Vec::new();
        file.take(LONGEST).read_to_end(&mut content).map_err(failed("read", &path))?;
        Ok(Some(serde_json::from_slice(&content).unwrap_or_default()))
    }

    /// Nobody asks about it any more. One that stays does no harm.
    pub(super) fn forget(&self, session: Uuid) {
        for directory in [&self.ran, &self.never_ran] {
            let _ = std::fs::remove_file(directory.join(session.to_string()));
        }
    }
}

fn failed<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> JournalError + 'a {
    move |source| JournalError::Io { action, path: path.to_owned(), source }
}
