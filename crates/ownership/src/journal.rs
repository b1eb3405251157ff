//! The journal: which machines are this host's, kept so that a crash at any moment leaves the truth behind.
//!
//! One file for each machine, with two slots. A record is written whole into the slot that is not current and made
//! durable with one `fdatasync`; a slot that was being written when the power went fails its checksum, and the other
//! one holds. The files never grow, so nothing but their data has to reach the disk: the two writes that lie within the
//! downtime cost what one sector costs.
//!
//! A record is changed in its place, under a lock of its own that nobody else's machine waits for: whose the machine is by
//! `Journal::on` and nothing else, what else is on record by `Journal::amend`.

mod error;
#[cfg(fuzzing)]
pub(crate) mod fuzzing;
mod identity;
mod marks;
mod on_record;
mod slots;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::runtime::{Handle, RuntimeFlavor};
use uuid::Uuid;

use crate::{Departed, Effect, Event, Mark, Ownership, Standing, VmName};
pub use error::JournalError;
use marks::Marks;
pub use on_record::OnRecord;
use slots::Slots;

/// The records of all machines of one agent.
#[derive(Debug)]
pub struct Journal<R> {
    directory: PathBuf,
    identity: Uuid,
    marks: Marks,
    entries: Mutex<HashMap<VmName, Entry<R>>>,
    /// Names whose records cannot be read, and why.
    unreadable: Vec<(VmName, JournalError)>,
    /// One for each name that somebody has decided about since the start.
    deciding: Mutex<HashMap<VmName, Arc<tokio::sync::Mutex<()>>>>,
    promising: tokio::sync::Mutex<()>,
}

/// A name that is taken.
#[derive(Debug)]
enum Entry<R> {
    /// Its file is being made.
    Claimed,
    Here(Arc<Kept<R>>),
}

#[derive(Debug)]
struct Kept<R> {
    /// What is certain. Never held while something is written.
    record: Mutex<R>,
    /// Held by who changes it.
    file: Mutex<Paper>,
}

#[derive(Debug)]
struct Paper {
    slots: Slots,
    /// The last write has failed: a later start may find either record.
    unsettled: bool,
    removed: bool,
}

/// Which machine, on which side of which hand-over: what somebody who acts on a record takes it for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    name: VmName,
    arrived_by: Option<Uuid>,
    generation: u64,
    side: std::mem::Discriminant<Ownership>,
}

impl Claim {
    /// What a machine with this standing is taken for.
    #[must_use]
    pub fn of(name: &VmName, standing: &Standing) -> Claim {
        Claim {
            name: name.clone(),
            arrived_by: standing.arrived_by,
            generation: standing.generation,
            side: std::mem::discriminant(&standing.ownership),
        }
    }
}

fn claim_of(record: &impl OnRecord) -> Claim {
    Claim::of(record.name(), &record.standing())
}

impl<R: OnRecord> Journal<R> {
    /// Opens the journal below a state directory, and reads all records. One that cannot be read keeps its name from everybody, as it
    /// may say that the machine was given away, and nobody else's.
    ///
    /// # Errors
    /// [`JournalError`]. A record that cannot be read keeps no other from being read; it is not passed over, because it may say that
    /// a machine was given away: its name stays taken, see [`Journal::unreadable`].
    pub fn open(state_dir: &Path) -> Result<Journal<R>, JournalError> {
        let directory = state_dir.join("vms");
        let failed = |action, path: &Path| {
            let path = path.to_owned();
            move |source| JournalError::Io { action, path, source }
        };
        std::fs::create_dir_all(&directory).map_err(failed("create", &directory))?;
        let marks = Marks::open(state_dir);
        let identity = identity::of(state_dir);
        let (mut entries, mut unreadable) = (HashMap::new(), Vec::new());
        for found in std::fs::read_dir(&directory).map_err(failed("list", &directory))? {
            let path = found.map_err(failed("list", &directory))?.path();
            if path.extension().is_some_and(|extension| extension == "journal") {
                let name = path.file_stem().and_then(|stem| stem.to_str()?.parse::<VmName>().ok());
                match (Slots::load::<R>(&path), name) {
                    (Ok((slots, record)), Some(name)) if *record.name() == name => {
                        entries.insert(name, Entry::Here(Arc::new(Kept::new(record, slots))));
                    }
                    (Ok(_), Some(name)) => unreadable.push((name, JournalError::Corrupt(path))),
                    (Err(error), Some(name)) => unreadable.push((name, error)),
                    // No machine's: nothing of that name is ever made here.
                    (_, None) => tracing::error!(file = %path.display(), "is no machine's, and passed over"),
                }
            } else if path.extension().is_some_and(|extension| extension == "new") {
                // A crash while a record was first written: the name was never claimed.
                std::fs::remove_file(&path).map_err(failed("remove", &path))?;
            }
        }
        Ok(Journal {
            directory,
            identity,
            marks,
            entries: Mutex::new(entries),
            unreadable,
            deciding: Mutex::default(),
            promising: tokio::sync::Mutex::default(),
        })
    }

    /// Which state directory this is: random, made once.
    #[must_use]
    pub fn identity(&self) -> Uuid {
        self.identity
    }

    /// Names whose records cannot be read, and why. They stay taken, and their files as they are, for as long as this is open.
    #[must_use]
    pub fn unreadable(&self) -> &[(VmName, JournalError)] {
        &self.unreadable
    }

    fn entries(&self) -> MutexGuard<'_, HashMap<VmName, Entry<R>>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn kept(&self, name: &VmName) -> Option<Arc<Kept<R>>> {
        match self.entries().get(name)? {
            Entry::Claimed => None,
            Entry::Here(kept) => Some(Arc::clone(kept)),
        }
    }

    /// Keeps everybody else from deciding what becomes of a machine, as long as the answer is held. Whoever acts on what
    /// the record says holds it from the look to the end of the act.
    pub async fn decide(&self, name: &VmName) -> tokio::sync::OwnedMutexGuard<()> {
        let lock = {
            let mut deciding = self.deciding.lock().unwrap_or_else(PoisonError::into_inner);
            // Names come from peers: those that nobody decides about just now are not kept.
            deciding.retain(|_, lock| Arc::strong_count(lock) > 1);
            Arc::clone(deciding.entry(name.clone()).or_default())
        };
        lock.lock_owned().await
    }

    /// Keeps everybody else from promising this host's room, as long as the answer is held: from the look at what is
    /// free to the claim that takes it.
    pub async fn promise(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.promising.lock().await
    }

    fn path(&self, name: &VmName) -> PathBuf {
        self.directory.join(format!("{name}.journal"))
    }

    /// Takes a name for a new machine.
    ///
    /// # Errors
    /// [`JournalError::NameTaken`], [`JournalError::Unreadable`], or what the system said.
    pub fn claim(&self, record: R) -> Result<(), JournalError> {
        let name = record.name().clone();
        if self.unreadable.iter().any(|(unreadable, _)| *unreadable == name) {
            return Err(JournalError::Unreadable(name));
        }
        {
            let mut entries = self.entries();
            if entries.contains_key(&name) {
                return Err(JournalError::NameTaken(name));
            }
            entries.insert(name.clone(), Entry::Claimed);
        }
        let path = self.path(&name);
        let created = blocking(|| {
            let slots = Slots::create(&path, &record)?;
            let durable = File::open(&self.directory).and_then(|directory| directory.sync_all());
            durable.map_err(|source| {
                // Not claimed, so no later start may find it.
                let _ = std::fs::remove_file(&path);
                JournalError::Io { action: "make durable", path: path.clone(), source }
            })?;
            Ok(slots)
        });
        let mut entries = self.entries();
        match created {
            Ok(slots) => drop(entries.insert(name, Entry::Here(Arc::new(Kept::new(record, slots))))),
            Err(error) => {
                entries.remove(&name);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Something has happened to a machine: its record becomes what [`crate::on`] says, and is durable when this returns. What else
    /// is to be on record with it is changed by `also`. `record` becomes what is on record now.
    ///
    /// # Errors
    /// [`JournalError::Changed`] when the machine is not what the caller takes it for; nothing was done then. After
    /// [`JournalError::Io`] a later start may find either of the two records: see [`Journal::settle`].
    pub fn on(
        &self,
        record: &mut R,
        event: Event,
        also: impl FnOnce(&mut R),
    ) -> Result<Vec<Effect>, JournalError> {
        let (now, effects) = self.change(&claim_of(record), |now| {
            let step = crate::on(Some(&now.standing()), event);
            if let Some(standing) = step.standing {
                now.stand(standing);
            }
            also(now);
            step.effects
        })?;
        *record = now;
        Ok(effects)
    }

    /// Changes what is on record beside the machine's standing. It is durable when this returns, and `record` is what is on record now.
    ///
    /// # Errors
    /// As [`Journal::on`].
    pub fn amend(&self, record: &mut R, amend: impl FnOnce(&mut R)) -> Result<(), JournalError> {
        let (now, ()) = self.change(&claim_of(record), |now| {
            let standing = now.standing();
            amend(now);
            debug_assert_eq!(standing, now.standing(), "whose a machine is changes by events only");
            now.stand(standing);
        })?;
        *record = now;
        Ok(())
    }

    fn change<T>(&self, claim: &Claim, change: impl FnOnce(&mut R) -> T) -> Result<(R, T), JournalError> {
        let name = &claim.name;
        let kept = self.kept(name).ok_or_else(|| JournalError::Unknown(name.clone()))?;
        blocking(|| {
            let mut paper = kept.paper();
            if paper.removed {
                return Err(JournalError::Unknown(name.clone()));
            }
            let before = kept.record();
            if claim_of(&before) != *claim {
                return Err(JournalError::Changed(name.clone()));
            }
            let mut after = before.clone();
            let answer = change(&mut after);
            if after != before || paper.unsettled {
                self.write(&kept, &mut paper, &after)?;
            }
            Ok((after, answer))
        })
    }

    fn write(&self, kept: &Kept<R>, paper: &mut Paper, record: &R) -> Result<(), JournalError> {
        paper.unsettled = true;
        paper.slots.write(record, &self.path(record.name()))?;
        paper.unsettled = false;
        *kept.record.lock().unwrap_or_else(PoisonError::into_inner) = record.clone();
        Ok(())
    }

    /// Writes a record once more: after a write that has failed, only then is it certain which record a later start finds. Until then
    /// nobody may act on what it says.
    ///
    /// # Errors
    /// [`JournalError`], and it is still not certain.
    pub fn settle(&self, name: &VmName) -> Result<(), JournalError> {
        let kept = self.kept(name).ok_or_else(|| JournalError::Unknown(name.clone()))?;
        blocking(|| {
            let mut paper = kept.paper();
            if paper.removed {
                return Err(JournalError::Unknown(name.clone()));
            }
            let record = kept.record();
            self.write(&kept, &mut paper, &record)
        })
    }

    /// Whether a later start may find something else of a machine than what is certain here.
    #[must_use]
    pub fn is_unsettled(&self, name: &VmName) -> bool {
        self.kept(name).is_some_and(|kept| kept.paper().unsettled)
    }

    /// Forgets a machine. Nothing happens when there is none of the name.
    ///
    /// What is not forgotten, until its source has let go of it, is what `mark` says of the hand-over by which it came here.
    ///
    /// # Errors
    /// What the system said. The record then still stands.
    pub fn remove(&self, name: &VmName, mark: Option<Mark>) -> Result<(), JournalError> {
        let Some(kept) = self.kept(name) else { return Ok(()) };
        blocking(|| {
            let mut paper = kept.paper();
            if paper.removed {
                return Ok(());
            }
            let record = kept.record();
            let standing = record.standing();
            if let Some((session, mark)) = standing.arrived_by.zip(mark).filter(|_| !standing.released) {
                self.marks.make(session, mark, record.departed())?;
            }
            let path = self.path(name);
            match std::fs::remove_file(&path) {
                Ok(()) => {}
                // Removed by an attempt whose directory could not be made durable.
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(JournalError::Io { action: "remove", path, source }),
            }
            File::open(&self.directory)
                .and_then(|directory| directory.sync_all())
                .map_err(|source| JournalError::Io { action: "remove", path, source })?;
            paper.removed = true;
            self.entries().remove(name);
            Ok(())
        })
    }

    /// What is remembered of a hand-over to this host whose machine is not here any more.
    ///
    /// # Errors
    /// [`JournalError`] when that cannot be seen: it is then not known.
    pub fn mark(&self, session: Uuid) -> Result<Option<Mark>, JournalError> {
        self.marks.of(session)
    }

    /// What is remembered of a machine that ran here by this hand-over, and is not here any more.
    ///
    /// # Errors
    /// As [`Journal::mark`].
    pub fn departed(&self, session: Uuid) -> Result<Option<Departed>, JournalError> {
        self.marks.departed(session)
    }

    /// The source of this hand-over keeps nothing of the machine, and will not ask about it again.
    pub fn released(&self, session: Uuid) {
        let here = self.all().into_iter().find(|record| record.standing().arrived_by == Some(session));
        if let Some(mut record) = here
            && let Err(error) = self.on(&mut record, Event::Released { session }, |_| {})
        {
            // It is remembered for longer than need be.
            tracing::warn!(vm = %record.name(), error = finding::chain(&error), "the journal cannot be written");
        }
        self.marks.forget(session);
    }

    /// A machine's record.
    #[must_use]
    pub fn get(&self, name: &VmName) -> Option<R> {
        Some(self.kept(name)?.record())
    }

    /// What is wanted of a machine's record, and nothing else of it.
    pub fn of<T>(&self, name: &VmName, wanted: impl FnOnce(&R) -> T) -> Option<T> {
        let kept = self.kept(name)?;
        let record = kept.record.lock().unwrap_or_else(PoisonError::into_inner);
        Some(wanted(&record))
    }

    /// All records, by name.
    #[must_use]
    pub fn all(&self) -> Vec<R> {
        let kept = |entry: &Entry<R>| match entry {
            Entry::Claimed => None,
            Entry::Here(kept) => Some(Arc::clone(kept)),
        };
        let kept: Vec<Arc<Kept<R>>> = self.entries().values().filter_map(kept).collect();
        let mut records: Vec<R> = kept.iter().map(|kept| kept.record()).collect();
        records.sort_by(|a, b| a.name().cmp(b.name()));
        records
    }
}

impl<R: Clone> Kept<R> {
    fn new(record: R, slots: Slots) -> Kept<R> {
        let paper = Paper { slots, unsettled: false, removed: false };
        Kept { record: Mutex::new(record), file: Mutex::new(paper) }
    }

    fn record(&self) -> R {
        self.record.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn paper(&self) -> MutexGuard<'_, Paper> {
        self.file.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits for the disk, and lets others have the runtime's thread where there are more.
pub fn blocking<T>(work: impl FnOnce() -> T) -> T {
    match Handle::try_current().map(|handle| handle.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(work),
        _ => work(),
    }
}
