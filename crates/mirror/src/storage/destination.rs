//! The destination's side of disks: receives, checks, writes, records; and compares again.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{RecvTimeoutError, Sender, bounded};

use super::codec::{self, Entry, TableError};
use super::image::Image;
use super::layout::{BLOCK_SIZE, BlockIndex, DiskLayout};
use super::ledgers::new_ledgers;
use crate::hash::{ContentHash, Secret};
use crate::ledger::{Ledgers, Sum};

/// Between slices of the rolling audit: 64 KiB each, so about 6 MiB/s.
const TICK: Duration = Duration::from_millis(10);
/// However busy the mirror is, one slice in so many ticks is looked at.
const PATIENCE: u32 = 20;
/// So many bytes of a stream may not be on stable storage: what is left of them at the pause is waited for.
const SYNC: usize = 32 << 20;
/// How much is read at a time where all of a disk is.
const READ: usize = 1 << 20;

/// What was found wrong with a block; it has been struck from the ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wrong {
    /// The block.
    pub block: BlockIndex,
    /// It is not what the source says it should be by now. While the guest runs that may be because the guest has written it since.
    pub checked: bool,
}

/// Why the copy of a disk cannot be kept up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StorageError {
    /// The peer does not keep to the protocol.
    #[error("the data stream carries what it must not")]
    Table(#[from] TableError),
    /// Blocks come for a machine without disks to be mirrored.
    #[error("the data stream carries blocks of disks, of which there are none")]
    NoDisks,
    /// An image cannot be read or written.
    #[error("the image of disk {disk} cannot be {action}")]
    Image {
        /// Number of the disk.
        disk: usize,
        /// What was tried: `written`, `read`, ….
        action: &'static str,
        /// How it failed.
        #[source]
        source: io::Error,
    },
}

struct Shared {
    layout: DiskLayout,
    secret: Secret,
    ledgers: Ledgers<BlockIndex>,
    /// Empty once the images have been given back.
    images: RwLock<Vec<Box<dyn Image>>>,
    audited: AtomicU64,
    busy: AtomicBool,
    /// The first failure to put something on stable storage, and of which disk: the system tells it once, and the next attempt says
    /// that all is well.
    lost: Mutex<Option<(usize, Arc<io::Error>)>>,
    /// One after the other: who finds nothing more to be put on stable storage must know what became of what was.
    syncing: Mutex<()>,
}

/// The destination's side of the disks of one mirror.
pub struct StorageDestination {
    shared: Arc<Shared>,
    sync: Sender<()>,
    stop: Option<Sender<()>>,
    threads: Vec<JoinHandle<()>>,
}

impl StorageDestination {
    /// Begins to keep copies of disks. `zero` says which images are known to be all zero; of the others nothing is known until
    /// [`Contents::read_back`]. `wrong` is called from the audit's thread, with the block's ledger locked.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn start(
        layout: DiskLayout,
        secret: Secret,
        images: Vec<Box<dyn Image>>,
        zero: &[bool],
        wrong: impl Fn(Wrong) + Send + 'static,
    ) -> io::Result<StorageDestination> {
        let shared = Arc::new(Shared {
            ledgers: new_ledgers(&layout, &secret, zero),
            layout,
            secret,
            images: RwLock::new(images),
            audited: AtomicU64::new(0),
            busy: AtomicBool::new(false),
            lost: Mutex::default(),
            syncing: Mutex::default(),
        });
        let (stop, stopped) = bounded::<()>(0);
        let (sync, syncs) = bounded::<()>(1);
        let audited = Arc::clone(&shared);
        let audit = std::thread::Builder::new().name("disk-audit".into()).spawn(move || {
            let _ = rustix::process::nice(10);
            let blocks: Vec<BlockIndex> = audited.layout.blocks().collect();
            let (mut next, mut waited) = (0, 0);
            while stopped.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout) {
                waited += 1;
                let busy = audited.busy.swap(false, Ordering::Relaxed);
                if (busy && waited < PATIENCE) || blocks.is_empty() {
                    continue;
                }
                waited = 0;
                // A block that cannot be read now is left to the next pass; a full audit reports it.
                let _ = audited.audit(blocks[next], &wrong);
                next = (next + 1) % blocks.len();
            }
        })?;
        let synced = Arc::clone(&shared);
        let syncing = std::thread::Builder::new().name("disk-sync".into()).spawn(move || {
            while syncs.recv().is_ok() {
                // Told to whoever writes next.
                let _ = synced.sync();
            }
        })?;
        Ok(StorageDestination { shared, sync, stop: Some(stop), threads: vec![audit, syncing] })
    }

    /// The receiving end of one stream.
    #[must_use]
    pub(crate) fn stream(&self, stream: u16) -> BlockReceiver {
        BlockReceiver {
            shared: Arc::clone(&self.shared),
            sync: self.sync.clone(),
            stream,
            entries: Vec::new(),
            unsynced: 0,
        }
    }

    /// For reading images that were there before.
    #[must_use]
    pub fn contents(&self) -> Contents {
        Contents(Arc::clone(&self.shared))
    }

    /// Blocks compared by the audit so far.
    #[must_use]
    pub fn audited(&self) -> u64 {
        self.shared.audited.load(Ordering::Relaxed)
    }

    /// Reads all copies back and compares them with the ledger, now. Returns how many blocks were compared. Blocks until done.
    ///
    /// # Errors
    /// [`StorageError::Image`]
    pub fn audit(&self, mut wrong: impl FnMut(Wrong)) -> Result<u64, StorageError> {
        let mut compared = 0;
        for block in self.shared.layout.blocks() {
            compared += u64::from(self.shared.audit(block, &mut wrong)?);
        }
        Ok(compared)
    }

    /// Puts everything on stable storage. Blocks.
    ///
    /// # Errors
    /// [`StorageError::Image`]
    pub fn sync(&self) -> Result<(), StorageError> {
        self.shared.sync()
    }

    /// The ledger sums, by stream.
    #[must_use]
    pub fn sums(&self) -> Vec<Sum> {
        (0..self.shared.layout.streams()).map(|stream| self.shared.ledgers.lock(stream).sum()).collect()
    }

    /// Ends the upkeep, and closes the images. The streams must have ended, or been aborted.
    pub fn finish(mut self) {
        self.end();
        self.shared.images.write().unwrap_or_else(PoisonError::into_inner).clear();
    }

    fn end(&mut self) {
        self.stop = None;
        let (none, _) = bounded(0);
        self.sync = none;
        for thread in self.threads.drain(..) {
            // The thread that syncs ends when the streams' receivers have let go of it too.
            if thread.thread().name() == Some("disk-audit") {
                let _ = thread.join();
            }
        }
    }
}

/// What images hold that were there before.
pub struct Contents(Arc<Shared>);

impl Contents {
    /// Reads all of an image that was there before, and records what it holds. `tell` is given the hashes, in order, so many blocks at
    /// a time. Blocks.
    ///
    /// # Errors
    /// [`StorageError::Image`]
    pub fn read_back(
        &self,
        disk: usize,
        mut tell: impl FnMut(u64, &[ContentHash]),
    ) -> Result<(), StorageError> {
        let shared = &self.0;
        let images = shared.images();
        let (described, image) = (&shared.layout.disks()[disk], &images[disk]);
        let unreadable = |source| StorageError::Image { disk, action: "read", source };
        let mut buffer = vec![0; READ];
        let mut hashes = Vec::new();
        let mut at = 0;
        while at < described.size {
            let length = (described.size - at).min(READ as u64);
            let content = &mut buffer[..length as usize];
            match image.next_data(at, at + length).map_err(unreadable)? {
                Some(_) => image.read(at, content).map_err(unreadable)?,
                None => content.fill(0),
            }
            hashes.clear();
            hashes.extend(content.chunks(BLOCK_SIZE).map(|block| shared.secret.hash_block(block)));
            let first = at / BLOCK_SIZE as u64;
            for (block, hash) in (described.blocks.start + first..).map(BlockIndex).zip(&hashes) {
                shared.ledgers.lock(shared.layout.stream_of(block)).record(block, *hash);
            }
            tell(first, &hashes);
            at += length;
        }
        Ok(())
    }
}

impl Drop for StorageDestination {
    fn drop(&mut self) {
        self.end();
    }
}

impl Shared {
    fn images(&self) -> std::sync::RwLockReadGuard<'_, Vec<Box<dyn Image>>> {
        self.images.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn sync(&self) -> Result<(), StorageError> {
        let _alone = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
        for (disk, image) in self.images().iter().enumerate() {
            if let Err(error) = image.sync() {
                let mut lost = self.lost.lock().unwrap_or_else(PoisonError::into_inner);
                lost.get_or_insert((disk, Arc::new(error)));
            }
        }
        self.is_kept()
    }

    /// Whether everything that was put on stable storage is there.
    fn is_kept(&self) -> Result<(), StorageError> {
        match &*self.lost.lock().unwrap_or_else(PoisonError::into_inner) {
            Some((disk, error)) => Err(StorageError::Image {
                disk: *disk,
                action: "put on stable storage",
                source: io::Error::new(error.kind(), Arc::clone(error)),
            }),
            None => Ok(()),
        }
    }

    /// Reads a block back. The ledger is locked meanwhile: nobody writes the block between the two.
    fn audit(&self, block: BlockIndex, mut wrong: impl FnMut(Wrong)) -> Result<bool, StorageError> {
        let Some(place) = self.layout.locate(block) else { return Ok(false) };
        let mut ledger = self.ledgers.lock(self.layout.stream_of(block));
        let Some(known) = ledger.get(block) else { return Ok(false) };
        let images = self.images();
        let Some(image) = images.get(place.disk) else { return Ok(false) };
        let found = self.read(image.as_ref(), place.disk, place.offset, place.length)?;
        self.audited.fetch_add(1, Ordering::Relaxed);
        if found != known {
            ledger.forget(block);
            wrong(Wrong { block, checked: false });
        }
        Ok(true)
    }

    fn read(
        &self,
        image: &dyn Image,
        disk: usize,
        offset: u64,
        length: usize,
    ) -> Result<ContentHash, StorageError> {
        let unreadable = |source| StorageError::Image { disk, action: "read", source };
        if image.next_data(offset, offset + length as u64).map_err(unreadable)?.is_none() {
            return Ok(self.secret.zero_block());
        }
        let mut content = vec![0; length];
        image.read(offset, &mut content).map_err(unreadable)?;
        Ok(self.secret.hash_block(&content))
    }
}

/// Applies blocks that come on one stream.
pub(crate) struct BlockReceiver {
    shared: Arc<Shared>,
    sync: Sender<()>,
    stream: u16,
    entries: Vec<Entry>,
    /// Bytes that were written since they were last put on stable storage.
    unsynced: usize,
}

impl BlockReceiver {
    /// Understands a table. Returns the bytes of payload that it describes.
    pub(crate) fn table(&mut self, table: &[u8]) -> Result<usize, TableError> {
        codec::decode_table(table, &self.shared.layout, self.stream, &mut self.entries)
    }

    /// The sum of this stream's ledger of disks.
    pub(crate) fn sum(&self) -> Sum {
        self.shared.ledgers.lock(self.stream).sum()
    }

    /// What came before is put on stable storage, on another thread.
    pub(crate) fn sync(&self) {
        // If one is under way and another waits, that one comes after everything that has come by now.
        let _ = self.sync.try_send(());
    }

    /// Checks and writes what the last table said. Neighbouring whole blocks are written in one call. `wrong` is called with the
    /// ledger locked.
    pub(crate) fn apply(&mut self, payload: &[u8], mut wrong: impl FnMut(Wrong)) -> Result<(), StorageError> {
        self.unsynced += payload.len();
        if self.unsynced >= SYNC {
            self.unsynced = 0;
            self.sync();
        }
        self.shared.is_kept()?;
        let Shared { layout, secret, ledgers, .. } = &*self.shared;
        self.shared.busy.store(true, Ordering::Relaxed);
        let images = self.shared.images();
        let mut ledger = ledgers.lock(self.stream);
        let unwritable = |disk| move |source| StorageError::Image { disk, action: "written", source };
        // Neighbouring whole blocks: disk, offset, where in the payload.
        let mut run: Option<(usize, u64, std::ops::Range<usize>)> = None;
        let write = |run: Option<(usize, u64, std::ops::Range<usize>)>| match run {
            Some((disk, offset, range)) => {
                images[disk].write(offset, &payload[range]).map_err(unwritable(disk))
            }
            None => Ok(()),
        };
        let mut at = 0;
        for entry in &self.entries {
            let end = at + entry.payload();
            match *entry {
                Entry::Whole { block, hash, .. } => {
                    let Some(place) = layout.locate(block) else { continue };
                    match &mut run {
                        Some((disk, offset, range))
                            if *disk == place.disk
                                && *offset + range.len() as u64 == place.offset
                                && range.end == at =>
                        {
                            range.end = end;
                        }
                        _ => write(run.replace((place.disk, place.offset, at..end)))?,
                    }
                    if secret.hash_block(&payload[at..end]) == hash {
                        ledger.record(block, hash);
                    } else {
                        ledger.forget(block);
                        wrong(Wrong { block, checked: false });
                    }
                }
                Entry::Part { block, offset, fingerprint, .. } => {
                    write(run.take())?;
                    let Some(place) = layout.locate(block) else { continue };
                    let (disk, position) = (place.disk, place.offset + offset as u64);
                    images[disk].write(position, &payload[at..end]).map_err(unwritable(disk))?;
                    ledger.forget(block);
                    if secret.fingerprint(&payload[at..end]) != fingerprint {
                        wrong(Wrong { block, checked: false });
                    }
                }
                Entry::Zero { block, count } => {
                    write(run.take())?;
                    for block in (block.0..block.0 + count).map(BlockIndex) {
                        let Some(place) = layout.locate(block) else { continue };
                        let zeroed = images[place.disk].zero(place.offset, place.length as u64);
                        zeroed.map_err(unwritable(place.disk))?;
                        ledger.record(block, secret.zero_block());
                    }
                }
                Entry::Check { block, hash } => {
                    write(run.take())?;
                    let Some(place) = layout.locate(block) else { continue };
                    let image = images[place.disk].as_ref();
                    if self.shared.read(image, place.disk, place.offset, place.length)? == hash {
                        ledger.record(block, hash);
                    } else {
                        ledger.forget(block);
                        wrong(Wrong { block, checked: true });
                    }
                }
            }
            at = end;
        }
        write(run)
    }
}
