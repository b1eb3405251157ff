//! A mirror of disks, source to destination over a socket: a client writes as QEMU's copy job does, first to the source's own image
//! and then to the server.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use compression::{Compression, Decoder, Encoding};
use proptest::prelude::*;

use super::destination::{BlockReceiver, StorageDestination, Wrong};
use super::image::{Image, RawImage, Room};
use super::layout::{BLOCK_SIZE, BlockIndex, DiskLayout};
use super::source::{SourceDisk, StorageSource};
use crate::hash::Secret;
use crate::ledger::Sum;
use crate::memory::codec::{self, Header};
use crate::memory::round::Flow;
use crate::memory::writer::FrameWriter;
use nbd::client::Client;

const SIZES: [u64; 2] = [(9 << 20) + 512, 3 << 20];

/// A link that can stand still.
struct Sink {
    socket: UnixStream,
    still: Arc<AtomicBool>,
}

impl io::Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        while self.still.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(5));
        }
        self.socket.write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Rig {
    directory: tempfile::TempDir,
    source: StorageSource,
    destination: StorageDestination,
    still: Arc<AtomicBool>,
    barriers: Vec<std::sync::mpsc::Sender<std::sync::mpsc::Sender<Sum>>>,
    wrong: Arc<Mutex<Vec<Wrong>>>,
    there: Receiver<(u16, Sum)>,
    threads: Vec<JoinHandle<()>>,
}

fn image(directory: &Path, name: &str, disk: usize) -> PathBuf {
    let path = directory.join(format!("{name}{disk}"));
    if !path.exists() {
        std::fs::File::create(&path).unwrap().set_len(SIZES[disk]).unwrap();
    }
    path
}

impl Rig {
    fn new(streams: u16) -> Rig {
        let directory = tempfile::tempdir().unwrap();
        let layout = DiskLayout::new(SIZES, streams).unwrap();
        let secret = Secret::random().unwrap();
        let source_disk = |disk| SourceDisk {
            socket: directory.path().join(format!("socket{disk}")),
            export: "disk".to_owned(),
            image: Box::new(RawImage::readable(&image(directory.path(), "source", disk), false).unwrap()),
        };
        let disks = (0..SIZES.len()).map(source_disk).collect();
        let (source, lanes) =
            StorageSource::start(layout.clone(), secret.clone(), disks, &[true; 2]).unwrap();
        let copy = |disk| {
            let path = image(directory.path(), "copy", disk);
            Box::new(RawImage::writable(&path, Room::Thin).unwrap()) as Box<dyn Image>
        };
        let wrong: Arc<Mutex<Vec<Wrong>>> = Arc::default();
        let told = Arc::clone(&wrong);
        let copies = (0..SIZES.len()).map(copy).collect();
        let destination = StorageDestination::start(layout, secret, copies, &[true; 2], move |found| {
            told.lock().unwrap().push(found);
        })
        .unwrap();
        let still: Arc<AtomicBool> = Arc::default();
        let (tell, there) = channel();
        let (mut threads, mut barriers) = (Vec::new(), Vec::new());
        for (stream, mut lane) in (0..).zip(lanes) {
            let (socket, mut other) = UnixStream::pair().unwrap();
            let sink = Sink { socket, still: Arc::clone(&still) };
            let (barrier, asked) = channel::<std::sync::mpsc::Sender<Sum>>();
            barriers.push(barrier);
            threads.push(std::thread::spawn(move || {
                let flow = Arc::new(Flow::default());
                let mut writer = FrameWriter::new((stream, streams), sink, Compression::Auto, flow);
                loop {
                    let _ = lane.woken().recv_timeout(Duration::from_millis(2));
                    lane.send_all(&mut writer).unwrap();
                    match asked.try_recv() {
                        Ok(reply) => {
                            lane.send_all(&mut writer).unwrap();
                            writer.barrier(1).unwrap();
                            reply.send(lane.sum()).unwrap();
                        }
                        Err(std::sync::mpsc::TryRecvError::Empty) => {}
                        Err(std::sync::mpsc::TryRecvError::Disconnected) => return,
                    }
                }
            }));
            let (mut blocks, tell, wrong) = (destination.stream(stream), tell.clone(), Arc::clone(&wrong));
            threads.push(std::thread::spawn(move || receive(&mut other, &mut blocks, stream, &tell, &wrong)));
        }
        Rig { directory, source, destination, still, barriers, wrong, there, threads }
    }

    /// Everything that was sent has been applied. Whether both ledgers are equal.
    fn barrier(&self) -> bool {
        let mut equal = true;
        for (stream, barrier) in (0..).zip(&self.barriers) {
            let (reply, answer) = channel();
            barrier.send(reply).unwrap();
            let here = answer.recv_timeout(Duration::from_secs(20)).unwrap();
            let there = self.there.recv_timeout(Duration::from_secs(20)).unwrap();
            equal &= there == (stream, here);
        }
        equal
    }

    /// Settles what is not certain, until nothing is.
    fn settle_all(&self) {
        let start = Instant::now();
        while self.source.uncertain() > 0 {
            assert!(start.elapsed() < Duration::from_secs(30), "what is not certain is not settled");
            self.source.settle().unwrap();
            assert!(self.barrier(), "the ledgers differ");
        }
    }

    fn is_equal(&self) -> bool {
        (0..SIZES.len()).all(|disk| {
            let read = |name| std::fs::read(image(self.directory.path(), name, disk)).unwrap();
            read("source") == read("copy")
        })
    }

    fn client(&self, disk: usize) -> Writer {
        let client = Client::connect(&self.directory.path().join(format!("socket{disk}")), "disk").unwrap();
        let image = RawImage::writable(&image(self.directory.path(), "source", disk), Room::Thin).unwrap();
        Writer { client, image }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.still.store(false, Ordering::Relaxed);
        self.barriers.clear();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn receive(
    source: &mut UnixStream,
    blocks: &mut BlockReceiver,
    stream: u16,
    tell: &std::sync::mpsc::Sender<(u16, Sum)>,
    wrong: &Mutex<Vec<Wrong>>,
) {
    let (mut table, mut payload, mut decoded, mut decoder) =
        (Vec::new(), Vec::new(), Vec::new(), Decoder::default());
    while let Some(head) = codec::read_header(source).unwrap() {
        match codec::decode_header(&head).unwrap() {
            Header::Blocks { entries, encoding, payload: length } => {
                codec::read_body(source, entries, length, &mut table, &mut payload).unwrap();
                let described = blocks.table(&table).unwrap();
                let content = match encoding {
                    Encoding::None => &payload,
                    encoding => {
                        decoder.decode(encoding, &payload, described, &mut decoded).unwrap();
                        &decoded
                    }
                };
                blocks.apply(content, |found| wrong.lock().unwrap().push(found)).unwrap();
            }
            Header::Sync => blocks.sync(),
            Header::Barrier(_) => tell.send((stream, blocks.sum())).unwrap(),
            other => panic!("{other:?}"),
        }
    }
}

/// A guest's disk whose writes are mirrored.
struct Writer {
    client: Client,
    image: RawImage,
}

impl Writer {
    fn write(&mut self, offset: u64, data: &[u8]) {
        self.image.write(offset, data).unwrap();
        self.client.write(offset, data).unwrap();
    }
    fn zero(&mut self, offset: u64, length: u64) {
        self.image.zero(offset, length).unwrap();
        self.client.zero(offset, length, true).unwrap();
    }
    fn trim(&mut self, offset: u64, length: u64) {
        self.image.zero(offset, length).unwrap();
        self.client.trim(offset, length).unwrap();
    }
}

#[derive(Debug, Clone)]
enum Step {
    Write { disk: usize, offset: u64, length: usize, fill: u8 },
    Zero { disk: usize, offset: u64, length: u64 },
    Trim { disk: usize, offset: u64, length: u64 },
    Settle,
}

fn step() -> impl Strategy<Value = Step> {
    let place = (0..SIZES.len(), 0u64..u64::MAX, 1u64..400_000, any::<bool>()).prop_map(
        |(disk, offset, length, aligned)| {
            let unit = if aligned { BLOCK_SIZE as u64 } else { 512 };
            let offset = offset % SIZES[disk] / unit * unit;
            (disk, offset, length.next_multiple_of(unit).min(SIZES[disk] - offset))
        },
    );
    prop_oneof![
        6 => (place.clone(), any::<u8>()).prop_map(|((disk, offset, length), fill)| {
            Step::Write { disk, offset, length: length as usize, fill }
        }),
        1 => place.clone().prop_map(|(disk, offset, length)| Step::Zero { disk, offset, length }),
        1 => place.prop_map(|(disk, offset, length)| Step::Trim { disk, offset, length }),
        1 => Just(Step::Settle),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn whatever_is_written_the_copy_is_equal_and_the_ledgers_say_so(
        steps in prop::collection::vec(step(), 1..60), streams in 1u16..4,
    ) {
        let rig = Rig::new(streams);
        let mut disks: Vec<Writer> = (0..SIZES.len()).map(|disk| rig.client(disk)).collect();
        for step in steps {
            match step {
                Step::Write { disk, offset, length, fill } => {
                    // Not all the same, so that what lands in the wrong place is seen.
                    let data: Vec<u8> = (0..length).map(|at| fill ^ (at / 511) as u8).collect();
                    disks[disk].write(offset, &data);
                }
                Step::Zero { disk, offset, length } => disks[disk].zero(offset, length),
                Step::Trim { disk, offset, length } => disks[disk].trim(offset, length),
                Step::Settle => rig.source.settle().unwrap(),
            }
        }
        disks.iter_mut().for_each(|disk| disk.client.flush().unwrap());
        rig.settle_all();
        prop_assert!(rig.barrier(), "the ledgers differ");
        prop_assert_eq!(&*rig.wrong.lock().unwrap(), &[], "no block was wrong");
        prop_assert!(rig.is_equal());
        let proof = rig.source.prove(&proof_images(&rig)).unwrap();
        prop_assert_eq!((proof.blocks, proof.mismatches), (rig.source.layout().block_count(), 0));
    }
}

fn proof_images(rig: &Rig) -> Vec<Box<dyn Image>> {
    let open = |disk| RawImage::readable(&image(rig.directory.path(), "source", disk), false).unwrap();
    (0..SIZES.len()).map(|disk| Box::new(open(disk)) as Box<dyn Image>).collect()
}

#[test]
fn a_guest_does_not_wait_for_a_link_that_stands_still_and_nothing_is_lost() {
    let rig = Rig::new(1);
    let mut disk = rig.client(0);
    disk.client.set_timeout(Some(Duration::from_secs(30))).unwrap();
    // Seen before, so this is the guest's.
    disk.zero(0, SIZES[0]);
    rig.still.store(true, Ordering::Relaxed);
    let content: Vec<u8> = (0..1 << 20).map(|at: u32| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    // More than may wait.
    for round in 0..3u8 {
        for at in 0..8u64 {
            let data: Vec<u8> = content.iter().map(|byte| byte ^ round).collect();
            disk.write((at << 20) + 512, &data);
        }
    }
    assert!(rig.source.uncertain() > 0, "what was let go of is owed");
    rig.still.store(false, Ordering::Relaxed);
    rig.settle_all();
    assert!(rig.is_equal());
}

/// The stream stops within the last frame that there was to send: when that is through, nothing else reminds of it.
#[test]
fn a_stream_that_stopped_within_its_last_frame_goes_on() {
    let rig = Rig::new(1);
    let mut disk = rig.client(0);
    disk.zero(0, SIZES[0]);
    assert!(rig.barrier());
    rig.still.store(true, Ordering::Relaxed);
    disk.write(0, &[1; BLOCK_SIZE]);
    while rig.source.waiting() > 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    disk.write(BLOCK_SIZE as u64, &[2; BLOCK_SIZE]);
    while rig.source.uncertain() == 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    rig.still.store(false, Ordering::Relaxed);
    rig.settle_all();
    assert!(rig.is_equal());
}

/// An image whose last sync failed, and which says so once, as the system does.
struct Forgetful(AtomicBool);

impl Image for Forgetful {
    fn read(&self, _: u64, buffer: &mut [u8]) -> io::Result<()> {
        buffer.fill(0);
        Ok(())
    }
    fn write(&self, _: u64, _: &[u8]) -> io::Result<()> {
        Ok(())
    }
    fn zero(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }
    fn sync(&self) -> io::Result<()> {
        if self.0.swap(true, Ordering::Relaxed) { Ok(()) } else { Err(io::Error::from_raw_os_error(5)) }
    }
}

#[test]
fn what_is_not_on_stable_storage_is_told_for_ever() {
    let layout = DiskLayout::new([1 << 20], 1).unwrap();
    let images = vec![Box::new(Forgetful(AtomicBool::new(false))) as Box<dyn Image>];
    let secret = Secret::random().unwrap();
    let destination = StorageDestination::start(layout, secret, images, &[true], |_| {}).unwrap();
    for _ in 0..2 {
        let error = destination.sync().unwrap_err();
        let why = std::error::Error::source(&error).unwrap().to_string();
        assert!(why.contains("Input/output error"), "{why}");
    }
    assert!(destination.stream(0).apply(&[], |_| {}).is_err(), "nothing more is taken in");
}

#[test]
fn a_write_that_was_not_mirrored_is_found_by_the_audit_and_by_the_proof() {
    let rig = Rig::new(2);
    let mut disk = rig.client(1);
    disk.write(0, &[7; 1 << 20]);
    rig.source.settle().unwrap();
    assert!(rig.barrier() && rig.is_equal());
    disk.image.write(4096, b"behind the mirror").unwrap();
    assert_eq!(rig.source.prove(&proof_images(&rig)).unwrap().mismatches, 1);
    assert_eq!(rig.source.audit().unwrap(), rig.source.layout().block_count());
    assert_eq!(rig.source.uncertain(), 1);
    rig.source.settle().unwrap();
    assert!(rig.barrier() && rig.is_equal());
}

#[test]
fn a_copy_that_changes_by_itself_is_found_and_repaired() {
    let rig = Rig::new(1);
    let mut disk = rig.client(0);
    disk.write(0, &[3; 2 << 20]);
    assert!(rig.barrier());
    let copy = RawImage::writable(&image(rig.directory.path(), "copy", 0), Room::Thin).unwrap();
    copy.write(BLOCK_SIZE as u64 + 100, b"rot").unwrap();
    let start = Instant::now();
    let found = loop {
        let mut found = Vec::new();
        rig.destination.audit(|wrong| found.push(wrong)).unwrap();
        found.extend(rig.wrong.lock().unwrap().drain(..));
        if !found.is_empty() || start.elapsed() > Duration::from_secs(10) {
            break found;
        }
    };
    assert_eq!(found, [Wrong { block: BlockIndex(1), checked: false }]);
    assert!(!rig.barrier(), "the ledgers differ until it is repaired");
    assert!(rig.source.repair(&[BlockIndex(1)]));
    rig.source.settle().unwrap();
    assert!(rig.barrier() && rig.is_equal());
}

#[test]
fn what_the_destination_has_already_does_not_travel() {
    let rig = Rig::new(2);
    // What an earlier attempt has left.
    let content: Vec<u8> = (0..SIZES[1]).map(|at| (at / 1000) as u8).collect();
    for name in ["source", "copy"] {
        std::fs::write(image(rig.directory.path(), name, 1), &content).unwrap();
    }
    rig.destination
        .contents()
        .read_back(1, |first, hashes| {
            let hashes: Vec<_> = hashes.iter().copied().map(Some).collect();
            assert!(rig.source.holds(1, first, &hashes));
        })
        .unwrap();
    let mut disk = rig.client(1);
    disk.client.write(0, &content[..2 << 20]).unwrap();
    disk.write(2 << 20, &[9; 64 << 10]);
    disk.client.write((2 << 20) + (64 << 10), &content[(2 << 20) + (64 << 10)..]).unwrap();
    assert!(rig.barrier() && rig.is_equal());
    let flow = rig.source.flow(1);
    assert_eq!(flow.raw_bytes, SIZES[1]);
    assert!(flow.wire_bytes < 100_000, "{flow:?}");
}
