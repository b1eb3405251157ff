//! Every migration that this host was the source of, kept in SQLite.
//!
//! The full report is kept as the JSON that `vmirror report --json` prints, beside the few columns that a list
//! needs. The newest [`KEPT`] migrations stay, for as long as their reports take no more than [`ROOM`] together; older ones are removed as
//! new ones come.

use std::fs::{OpenOptions, Permissions};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use finding::Finding;
use rusqlite::types::Type;
use rusqlite::{Connection, Row, params};
use session::Report;

use crate::api::types::HistoryEntry;
use crate::error::chain;

/// Who may read the history: its owner. It has names and addresses of the whole site.
const PRIVATE: u32 = 0o600;

/// How many migrations are kept.
pub const KEPT: u32 = 10_000;

/// Bytes of reports that are kept: a mirror that stood for months has some hundred KiB of rounds. The newest report is kept whatever it
/// takes.
pub const ROOM: u64 = 256 << 20;

/// Most migrations that are removed when one is added: what an earlier version has let grow is taken down in steps, as a report is added
/// while others wait.
const AT_ONCE: u32 = 64;

/// What brings a database from each schema version to the next. Entries are never changed, only added: the
/// number of entries is the version, kept in the database as `user_version`.
const SCHEMA: [&str; 1] = ["
    CREATE TABLE migration (
        n                INTEGER PRIMARY KEY AUTOINCREMENT,
        id               TEXT NOT NULL UNIQUE,
        vm               TEXT NOT NULL,
        source           TEXT NOT NULL,
        destination      TEXT NOT NULL,
        started_unix_ms  INTEGER NOT NULL,
        outcome          TEXT NOT NULL,
        error            TEXT,
        total_ms         REAL NOT NULL,
        downtime_ms      REAL NOT NULL,
        wire_bytes       INTEGER NOT NULL,
        report           TEXT NOT NULL
    ) STRICT;
    CREATE INDEX migration_of_vm ON migration (vm, n);
"];

/// What to do about a history that is off.
pub(crate) const OFF: &str = "move history.db out of state_dir, or make room there, and restart the agent; VMs, and migrations of them, do \
                              without it";

/// The history. Clones are handles to the same database; calls block for as long as SQLite needs, which is
/// a few milliseconds.
#[derive(Debug, Clone)]
pub struct History {
    store: Arc<Store>,
    kept: u32,
    room: u64,
}

#[derive(Debug)]
enum Store {
    Open(Mutex<Connection>),
    /// Nothing is kept, for this reason.
    Off(String),
}

/// Why the history cannot be used, or has no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HistoryError {
    /// The database cannot be opened.
    #[error("cannot open the history {}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: rusqlite::Error,
    },
    /// The database comes from a later version of this program.
    #[error("the history {} has schema {found}, and this version knows up to {known}", path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its schema version.
        found: usize,
        /// The latest this program knows.
        known: usize,
    },
    /// Nothing is kept: the database could not be opened when the agent started.
    #[error("the history is off: {0}")]
    Off(String),
    /// A query failed.
    #[error("the history cannot be read or written")]
    Sqlite(#[from] rusqlite::Error),
    /// A report cannot be put into JSON, or read from it.
    #[error("the report of migration {id} is damaged")]
    Damaged {
        /// Identity of the migration.
        id: String,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
    /// No migration has this identity.
    #[error("no migration has an id that begins with {0:?}")]
    Unknown(String),
    /// Several begin like this.
    #[error("several migrations have an id that begins with {prefix:?}: {}", ids.join(", "))]
    Ambiguous {
        /// What was asked for.
        prefix: String,
        /// Some of those it fits.
        ids: Vec<String>,
    },
}

impl History {
    /// Opens the history; where that fails there is none until the agent is started anew. No machine depends on it, so its database,
    /// damaged, of a later version or on a full disk, keeps no agent from starting.
    #[must_use]
    pub fn open_or_off(path: &Path) -> History {
        History::open(path).unwrap_or_else(|error| {
            let why = chain(&error);
            tracing::error!(why, "the history is off: no report of a migration is kept");
            History { store: Arc::new(Store::Off(why)), kept: 0, room: 0 }
        })
    }

    /// Why there is none.
    #[must_use]
    pub fn problem(&self) -> Option<Finding> {
        match &*self.store {
            Store::Open(_) => None,
            Store::Off(why) => {
                Some(Finding::new("history-off", HistoryError::Off(why.clone()).to_string(), OFF))
            }
        }
    }

    /// Opens the history, making it where there is none.
    ///
    /// # Errors
    /// [`HistoryError::Open`] when the file cannot be used, [`HistoryError::Newer`] when a later version wrote it.
    pub fn open(path: &Path) -> Result<History, HistoryError> {
        History::keeping(path, KEPT, ROOM)
    }

    fn keeping(path: &Path, kept: u32, room: u64) -> Result<History, HistoryError> {
        let opened = |source| HistoryError::Open { path: path.to_owned(), source };
        private(path);
        let mut connection = Connection::open(path).map_err(opened)?;
        connection.busy_timeout(Duration::from_secs(5)).map_err(opened)?;
        let found: i64 =
            connection.pragma_query_value(None, "user_version", |row| row.get(0)).map_err(opened)?;
        let found = usize::try_from(found).unwrap_or(usize::MAX);
        if found > SCHEMA.len() {
            return Err(HistoryError::Newer { path: path.to_owned(), found, known: SCHEMA.len() });
        }
        connection.pragma_update(None, "journal_mode", "WAL").map_err(opened)?;
        // In WAL mode NORMAL may lose the newest rows in a power cut; a report is worth one fsync.
        connection.pragma_update(None, "synchronous", "FULL").map_err(opened)?;
        for (version, step) in SCHEMA.iter().enumerate().skip(found) {
            let transaction = connection.transaction().map_err(opened)?;
            transaction.execute_batch(step).map_err(opened)?;
            transaction
                .pragma_update(None, "user_version", i64::try_from(version + 1).unwrap_or(i64::MAX))
                .map_err(opened)?;
            transaction.commit().map_err(opened)?;
        }
        Ok(History { store: Arc::new(Store::Open(Mutex::new(connection))), kept, room })
    }

    /// Adds a migration that has ended; one that is there already is replaced, for an uncertain one is settled later.
    ///
    /// # Errors
    /// [`HistoryError::Sqlite`] when it cannot be written.
    pub fn add(&self, report: &Report) -> Result<(), HistoryError> {
        let json = serde_json::to_string(report)
            .map_err(|source| HistoryError::Damaged { id: report.id.clone(), source })?;
        let connection = self.lock()?;
        connection.execute(
            "INSERT INTO migration
                (id, vm, source, destination, started_unix_ms, outcome, error, total_ms, downtime_ms, wire_bytes, report)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)
             ON CONFLICT (id) DO UPDATE SET outcome = ?6, error = ?7, total_ms = ?8, downtime_ms = ?9,
                wire_bytes = ?10, report = ?11",
            params![
                report.id,
                report.vm,
                report.source,
                report.destination,
                i64::try_from(report.started_unix_ms).unwrap_or(i64::MAX),
                outcome_name(report.outcome),
                report.error.as_ref().map(|failure| failure.finding.message.as_str()),
                report.total_ms,
                report.downtime_ms,
                i64::try_from(report.wire_bytes()).unwrap_or(i64::MAX),
                json,
            ],
        )?;
        // Of a text SQLite knows its bytes without reading it.
        connection.execute(
            "DELETE FROM migration WHERE n IN (
                SELECT n FROM (
                    SELECT n, row_number() OVER newer AS place, sum(octet_length(report)) OVER newer AS bytes
                    FROM migration WINDOW newer AS (ORDER BY n DESC)
                ) WHERE place > 1 AND (place > ?1 OR bytes > ?2) ORDER BY n LIMIT ?3)",
            params![self.kept, i64::try_from(self.room).unwrap_or(i64::MAX), AT_ONCE],
        )?;
        Ok(())
    }

    /// The newest migrations, newest first: at most `limit`, of one machine where `vm` names it.
    ///
    /// # Errors
    /// [`HistoryError::Sqlite`].
    pub fn list(&self, vm: Option<&str>, limit: u32) -> Result<Vec<HistoryEntry>, HistoryError> {
        let connection = self.lock()?;
        let mut statement = connection.prepare_cached(
            "SELECT id, vm, source, destination, started_unix_ms, outcome, error, total_ms, downtime_ms, wire_bytes
             FROM migration WHERE ?1 IS NULL OR vm = ?1 ORDER BY n DESC LIMIT ?2",
        )?;
        let entries = statement.query_map(params![vm, limit], entry)?.collect::<Result<_, _>>()?;
        Ok(entries)
    }

    /// The report of the migration whose id is `id` or begins with it.
    ///
    /// # Errors
    /// [`HistoryError::Unknown`] and [`HistoryError::Ambiguous`] when not exactly one fits.
    pub fn report(&self, id: &str) -> Result<Report, HistoryError> {
        let connection = self.lock()?;
        // `substr` and not LIKE: the prefix comes from outside and must not be a pattern.
        let mut statement = connection.prepare_cached(
            "SELECT id, report FROM migration WHERE substr(id, 1, ?2) = ?1 ORDER BY n DESC LIMIT 5",
        )?;
        let length = i64::try_from(id.chars().count()).unwrap_or(i64::MAX);
        let rows = statement.query_map(params![id, length], |row| Ok((row.get(0)?, row.get(1)?)))?;
        let mut found = rows.collect::<Result<Vec<(String, String)>, _>>()?;
        match found.len() {
            1 => {
                let (id, json) = found.remove(0);
                serde_json::from_str(&json).map_err(|source| HistoryError::Damaged { id, source })
            }
            0 => Err(HistoryError::Unknown(id.to_owned())),
            _ => Err(HistoryError::Ambiguous {
                prefix: id.to_owned(),
                ids: found.into_iter().map(|(id, _)| id).collect(),
            }),
        }
    }

    /// How many migrations are kept now.
    ///
    /// # Errors
    /// [`HistoryError::Sqlite`].
    pub fn len(&self) -> Result<u64, HistoryError> {
        let count: i64 = self.lock()?.query_row("SELECT count(*) FROM migration", [], |row| row.get(0))?;
        Ok(u64::try_from(count).unwrap_or(0))
    }

    /// Whether there is none.
    ///
    /// # Errors
    /// [`HistoryError::Sqlite`].
    pub fn is_empty(&self) -> Result<bool, HistoryError> {
        Ok(self.len()? == 0)
    }

    fn lock(&self) -> Result<MutexGuard<'_, Connection>, HistoryError> {
        match &*self.store {
            // SQLite's own state survives a panic between two statements: each is a transaction.
            Store::Open(connection) => Ok(connection.lock().unwrap_or_else(PoisonError::into_inner)),
            Store::Off(why) => Err(HistoryError::Off(why.clone())),
        }
    }
}

/// Makes the database one that nobody else can open; SQLite gives what it makes beside it the same mode. Where that fails, SQLite says
/// what is wrong.
fn private(path: &Path) {
    let mut open = OpenOptions::new();
    let _ = open.create(true).append(true).mode(PRIVATE).open(path);
    for beside in ["", "-wal", "-shm"] {
        let mut file = path.as_os_str().to_owned();
        file.push(beside);
        let _ = std::fs::set_permissions(file, Permissions::from_mode(PRIVATE));
    }
}

/// The name of an outcome in reports and messages.
fn outcome_name(outcome: session::Outcome) -> &'static str {
    match outcome {
        session::Outcome::Completed => "completed",
        session::Outcome::Failed => "failed",
        session::Outcome::Cancelled => "cancelled",
        session::Outcome::Uncertain => "uncertain",
    }
}

fn entry(row: &Row<'_>) -> rusqlite::Result<HistoryEntry> {
    let outcome: String = row.get(5)?;
    let outcome = serde_json::from_value(serde_json::Value::String(outcome))
        .map_err(|error| rusqlite::Error::FromSqlConversionFailure(5, Type::Text, Box::new(error)))?;
    let unsigned = |column| row.get::<_, i64>(column).map(|n| u64::try_from(n).unwrap_or(0));
    Ok(HistoryEntry {
        id: row.get(0)?,
        vm: row.get(1)?,
        source: row.get(2)?,
        destination: row.get(3)?,
        started_unix_ms: unsigned(4)?,
        outcome,
        error: row.get(6)?,
        total_ms: row.get(7)?,
        downtime_ms: row.get(8)?,
        wire_bytes: unsigned(9)?,
    })
}

#[cfg(test)]
mod tests;
