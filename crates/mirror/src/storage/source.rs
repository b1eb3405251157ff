//! The source's side of disks: takes what QEMU's copy job hands over, sends it, and settles what is not certain.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{RecvTimeoutError, Sender, bounded};
use nbd::server::{Export, Reply, Request, Server};

use super::image::Image;
use super::item::Answer;
use super::lane::Lane;
use super::layout::{BLOCK_SIZE, BlockIndex, DiskLayout};
use super::shared::{BATCH, Shared};
use crate::hash::{ContentHash, Secret};
use crate::ledger::Sum;
use crate::meeting;

/// Clients of a disk's socket that may wait to be accepted; all but one of them are turned away.
const BACKLOG: i32 = 8;
/// How often it is looked whether a stream has stopped.
const WATCH: Duration = Duration::from_millis(100);
/// How often blocks that are not certain are settled while the guest runs, and how many: 2 MiB in a second. Those of a busy journal are
/// written again and again, and a guest that writes around the page cache waits for whoever reads its file.
const SETTLE: Duration = Duration::from_secs(1);
const SETTLED: u64 = 32;
/// A disk at the source.
pub struct SourceDisk {
    /// Where QEMU's copy job connects to: a unix socket that is made there.
    pub socket: PathBuf,
    /// The export's name.
    pub export: String,
    /// The content as the guest has it.
    pub image: Box<dyn Image>,
}

/// What has been read of a disk, and what that took on the link.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskFlow {
    /// Bytes that were written to it or copied from it.
    pub raw_bytes: u64,
    /// Bytes written to the streams for that, before encryption.
    pub wire_bytes: u64,
}

/// What the proof of disks found: their frozen content against the ledger.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskProof {
    /// Blocks compared: all of them.
    pub blocks: u64,
    /// Blocks whose content is not what the destination was given.
    pub mismatches: u64,
}

/// The source's side of the disks of one mirror. Its methods block; call them off the async threads.
#[derive(Debug)]
pub struct StorageSource {
    shared: Arc<Shared>,
    servers: Mutex<Vec<Server>>,
    settler: Option<(Sender<()>, JoinHandle<()>)>,
}

impl StorageSource {
    /// Begins to serve the disks to QEMU's copy jobs. The lanes, one for each stream, are for whoever owns the streams.
    ///
    /// `zero` says of which disks the destination's copy is known to be all zero; of the others nothing is known.
    ///
    /// # Errors
    /// When a socket cannot be made, or no thread started.
    pub fn start(
        layout: DiskLayout,
        secret: Secret,
        disks: Vec<SourceDisk>,
        zero: &[bool],
    ) -> io::Result<(StorageSource, Vec<Lane>)> {
        let streams = layout.streams();
        let (wakes, woken): (Vec<_>, Vec<_>) = (0..streams).map(|_| bounded(1)).unzip();
        let (mut images, mut places) = (Vec::new(), Vec::new());
        for SourceDisk { socket, export, image } in disks {
            images.push(image);
            places.push((socket, export));
        }
        let shared = Arc::new(Shared::new(layout, secret, zero, images, wakes));
        let mut servers = Vec::new();
        for (disk, (socket, export)) in places.iter().enumerate() {
            let served = Arc::new(Served { shared: Arc::clone(&shared), disk });
            // Left behind by an agent that was killed; the name is this session's alone.
            let _ = std::fs::remove_file(socket);
            let listener = meeting::listen(socket, BACKLOG)?.into();
            servers.push(Server::listen(listener, socket, export, served)?);
        }
        let lanes =
            (0..).zip(woken).map(|(stream, woken)| Lane::new(Arc::clone(&shared), stream, woken)).collect();
        let (stop, stopped) = bounded::<()>(0);
        let settling = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("settle".into()).spawn(move || {
            let mut ticks = 0;
            while stopped.recv_timeout(WATCH) == Err(RecvTimeoutError::Timeout) {
                settling.watch();
                ticks += 1;
                if WATCH * ticks >= SETTLE {
                    ticks = 0;
                    settling.settle(SETTLED);
                }
            }
        })?;
        Ok((StorageSource { shared, servers: Mutex::new(servers), settler: Some((stop, thread)) }, lanes))
    }

    /// The layout of the disks.
    #[must_use]
    pub fn layout(&self) -> &DiskLayout {
        &self.shared.layout
    }

    /// What the destination already holds of a disk, by blocks from this one of it on: known before anything is sent, so what is
    /// equal need not be. False where there are no such blocks.
    #[must_use]
    pub fn holds(&self, disk: usize, first: u64, hashes: &[Option<ContentHash>]) -> bool {
        let Some(blocks) = self.shared.layout.disks().get(disk).map(|disk| disk.blocks.clone()) else {
            return false;
        };
        let start = blocks.start.saturating_add(first);
        if start.saturating_add(hashes.len() as u64) > blocks.end {
            return false;
        }
        for (block, hash) in (start..).map(BlockIndex).zip(hashes) {
            let mut ledger = self.shared.ledgers.lock(self.shared.layout.stream_of(block));
            match hash {
                Some(hash) => ledger.record(block, *hash),
                None => ledger.forget(block),
            }
        }
        true
    }

    /// All of a disk is to be read from its image and sent, as far as the destination does not have it: it is one that nobody writes.
    pub fn owe_disk(&self, disk: usize) {
        let mut queue = self.shared.queue();
        self.shared.layout.disks()[disk].blocks.clone().map(BlockIndex).for_each(|block| queue.owe(block));
    }

    /// All of a disk is to be compared when QEMU's copy jobs have gone over everything, but for what they write: they do not write what
    /// is in the image that the disk is based on.
    pub fn defer_disk(&self, disk: usize) {
        self.shared.queue().defer(disk);
    }

    /// Blocks of which it is not certain that the destination has them.
    #[must_use]
    pub fn uncertain(&self) -> u64 {
        self.shared.queue().uncertain()
    }

    /// The same for each disk, in bytes.
    #[must_use]
    pub fn uncertain_bytes(&self) -> Vec<u64> {
        let blocks = self.shared.queue().uncertain_by_disk();
        blocks.into_iter().map(|blocks| blocks * BLOCK_SIZE as u64).collect()
    }

    /// Lets a guest that writes faster than the link carries wait for all but that many bytes, from here on: what waits is what a
    /// pause begins with.
    pub fn hold_back(&self, bytes: usize) {
        let streams = usize::from(self.shared.layout.streams()).max(1);
        self.shared.queue().hold_back(bytes / streams);
    }

    /// Bytes that wait to be sent.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.shared.queue().waiting()
    }

    /// What has been read of a disk, and what it took on the link.
    #[must_use]
    pub fn flow(&self, disk: usize) -> DiskFlow {
        let (raw_bytes, wire_bytes) = self.shared.counted(disk);
        DiskFlow { raw_bytes, wire_bytes }
    }

    /// QEMU's copy jobs have gone over everything: what they have not written since they began is compared with what the destination
    /// had before.
    pub fn copied(&self) {
        self.shared.queue().owe_deferred();
    }

    /// Settles what is not certain. Of a guest that stands still nothing is uncertain afterwards; what was found is on its way with
    /// the next barrier.
    ///
    /// # Errors
    /// The number of the disk that cannot be read, and why.
    pub fn settle(&self) -> Result<(), (usize, io::Error)> {
        self.shared.settle(u64::MAX);
        self.readable()
    }

    fn readable(&self) -> Result<(), (usize, io::Error)> {
        self.shared.take_unreadable().map_or(Ok(()), Err)
    }

    /// As [`settle`](Self::settle), but so many blocks at most. Returns how many it was.
    ///
    /// # Errors
    /// As [`settle`](Self::settle).
    pub fn settle_some(&self, blocks: u64) -> Result<u64, (usize, io::Error)> {
        let settled = self.shared.settle(blocks);
        self.readable().map(|()| settled)
    }

    /// As [`settle`](Self::settle), but only as many blocks as may be wrong at the destination.
    ///
    /// # Errors
    /// As [`settle`](Self::settle).
    pub fn mend(&self) -> Result<(), (usize, io::Error)> {
        let owed = self.shared.queue().owed();
        self.shared.settle(owed);
        self.readable()
    }

    /// The destination has found that these blocks are not what they should be. False where there are no such blocks.
    #[must_use]
    pub fn repair(&self, blocks: &[BlockIndex]) -> bool {
        for &block in blocks {
            if self.shared.layout.locate(block).is_none() {
                return false;
            }
            self.shared.ledgers.lock(self.shared.layout.stream_of(block)).forget(block);
            self.shared.queue().owe(block);
        }
        true
    }

    /// The ledger sums, by stream.
    #[must_use]
    pub fn sums(&self) -> Vec<Sum> {
        (0..self.shared.layout.streams()).map(|stream| self.shared.ledgers.lock(stream).sum()).collect()
    }

    /// Compares all of the disks with the ledger while the guest runs. What differs was written a moment ago, or was missed: it is
    /// owed, and settled next. Returns how many blocks were compared.
    ///
    /// # Errors
    /// The number of the disk that cannot be read, and why.
    pub fn audit(&self) -> Result<u64, (usize, io::Error)> {
        let mut compared = 0;
        compare(&self.shared, &self.shared.images, |block, equal| {
            compared += 1;
            if !equal {
                self.shared.queue().owe(block);
            }
        })?;
        Ok(compared)
    }

    /// Compares all of the frozen disks with the ledger, reading them anew.
    ///
    /// # Errors
    /// The number of the disk that cannot be read, and why.
    pub fn prove(&self, images: &[Box<dyn Image>]) -> Result<DiskProof, (usize, io::Error)> {
        let mut proof = DiskProof::default();
        compare(&self.shared, images, |_, equal| {
            proof.blocks += 1;
            proof.mismatches += u64::from(!equal);
        })?;
        Ok(proof)
    }

    /// Ends the connections of QEMU's copy jobs, and their sockets: nothing is served or settled any more.
    pub fn end_serving(&self) {
        self.shared.end();
        let servers = std::mem::take(&mut *self.servers.lock().unwrap_or_else(PoisonError::into_inner));
        drop(servers);
    }

    /// Whether that was done, or a stream has ended: what is not certain stays so.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.shared.is_over() || self.shared.queue().is_closed()
    }
}

impl Drop for StorageSource {
    fn drop(&mut self) {
        self.shared.end();
        if let Some((stop, thread)) = self.settler.take() {
            drop(stop);
            let _ = thread.join();
        }
        for stream in 0..self.shared.layout.streams() {
            let gone = self.shared.queue().close(stream);
            drop(gone);
        }
        self.end_serving();
    }
}

/// Compares disks with the ledger, block by block.
fn compare(
    shared: &Shared,
    images: &[Box<dyn Image>],
    mut tell: impl FnMut(BlockIndex, bool),
) -> Result<(), (usize, io::Error)> {
    let mut buffer = vec![0; BATCH * BLOCK_SIZE];
    for (number, (disk, image)) in shared.layout.disks().iter().zip(images).enumerate() {
        let mut at = 0;
        while at < disk.size {
            let length = (disk.size - at).min(buffer.len() as u64);
            let data = image.next_data(at, at + length).map_err(|e| (number, e))?;
            let content = &mut buffer[..length as usize];
            match data {
                Some(_) => image.read(at, content).map_err(|e| (number, e))?,
                None => content.fill(0),
            }
            for (n, bytes) in content.chunks(BLOCK_SIZE).enumerate() {
                let block = shared.layout.block_at(number, at + (n * BLOCK_SIZE) as u64);
                let known = shared.ledgers.lock(shared.layout.stream_of(block)).get(block);
                // What is not known yet is being settled, and not wrong.
                tell(block, known.is_some_and(|known| known == shared.secret.hash_block(bytes)));
            }
            at += length;
        }
    }
    Ok(())
}

/// One disk, as QEMU's copy job sees it.
struct Served {
    shared: Arc<Shared>,
    disk: usize,
}

impl Export for Served {
    fn size(&self) -> u64 {
        self.shared.layout.disks()[self.disk].size
    }

    fn take(&self, request: Request, reply: Reply) {
        let durable = match &request {
            Request::Write { durable, .. }
            | Request::Zero { durable, .. }
            | Request::Trim { durable, .. } => *durable,
            Request::Read { .. } | Request::Flush => false,
        };
        // The copy is equal to the source's own content wherever it is complete, so that is what is read; QEMU's copy job itself
        // reads nothing.
        if let Request::Read { offset, length } = request {
            let mut data = reply.buffer(length as usize);
            let read = self.shared.images[self.disk].read(offset, &mut data);
            return reply.data(read.map(|()| data));
        }
        let answer = Answer::new(reply);
        let mut queue = self.shared.queue();
        let kept = match request {
            Request::Write { offset, data, .. } => {
                queue.write(self.disk, offset, data, Arc::clone(&answer));
                answer
            }
            Request::Zero { offset, length, .. } => {
                queue.zero(self.disk, offset, length.into(), Arc::clone(&answer));
                answer
            }
            Request::Trim { offset, length, .. } => {
                queue.trimmed(self.disk, offset, length.into());
                answer
            }
            Request::Flush => {
                queue.sync();
                answer
            }
            Request::Read { .. } => answer,
        };
        if durable {
            queue.sync();
        }
        self.shared.wake(&queue);
        drop(queue);
        // Answered here where nothing waits for it; never with the lock held.
        drop(kept);
    }
}
