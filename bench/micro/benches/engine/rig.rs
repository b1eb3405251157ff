//! A process with tracked memory, and both ends of a mirror of it.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Lines, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Instant;

use compression::Compression;
use dirty_tracker::{DescriptorSource, Tracker};
use mirror::hash::{SECRET_LENGTH, Secret};
use mirror::layout::{Layout, PAGE_SIZE};
use mirror::memory::destination::{Event, MemoryDestination};
use mirror::memory::source::{How, MemorySource, Scanning, TrackedRange};
use mirror::memory::{Ram, RamFile};
use tempfile::TempDir;

use crate::content::Content;

/// Bytes that a RAM file is filled with at a time.
const PIECE: usize = 1 << 20;

/// A process that maps a file on tmpfs, all of it present, and writes when it is told to. Gone when dropped.
pub(crate) struct Tracee {
    _directory: TempDir,
    path: PathBuf,
    bytes: usize,
    address: u64,
    child: Child,
    commands: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
}

impl Tracee {
    pub(crate) fn new(bytes: usize, content: Content) -> Tracee {
        let directory = directory();
        let path = directory.path().join("source");
        let file = File::create(&path).unwrap();
        let mut piece = vec![0; PIECE];
        for (number, at) in (0..bytes).step_by(PIECE).enumerate() {
            content.fill(&mut piece, number as u64 + 1);
            file.write_all_at(&piece[..PIECE.min(bytes - at)], at as u64).unwrap();
        }
        let mut child = Command::new(env!("CARGO_BIN_EXE_tracee"))
            .arg(&path)
            .arg(bytes.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let commands = child.stdin.take().unwrap();
        let mut answers = BufReader::new(child.stdout.take().unwrap()).lines();
        let address = answers.next().unwrap().unwrap().parse().unwrap();
        let mut tracee = Tracee { _directory: directory, path, bytes, address, child, commands, answers };
        tracee.tell("touch all");
        tracee
    }

    pub(crate) fn pages(&self) -> u64 {
        (self.bytes / PAGE_SIZE) as u64
    }

    /// Has it write, and waits until it has.
    pub(crate) fn tell(&mut self, command: &str) {
        writeln!(self.commands, "{command}").unwrap();
        assert_eq!(self.answers.next().unwrap().unwrap(), "done");
    }

    pub(crate) fn track(&self) -> Tracker {
        let range = self.address..self.address + self.bytes as u64;
        Tracker::attach(self.child.id(), &[range], DescriptorSource::Injected).unwrap()
    }

    fn layout(&self, streams: u16) -> Layout {
        Layout::new([("ram", self.bytes as u64)], streams).unwrap()
    }

    /// The source of a new mirror: to it, the destination is all zero.
    pub(crate) fn source<W: Write + Send + 'static>(
        &self,
        compression: Compression,
        sinks: Vec<W>,
    ) -> MemorySource {
        let ram = ram(&self.path, self.layout(sinks.len().try_into().unwrap()));
        let ranges = vec![TrackedRange { block: 0, offset: 0 }];
        let how = How { scanning: Scanning::Quickest, compression, gives_back: false };
        MemorySource::start(ram, secret(), self.track(), ranges, how, sinks, Vec::new()).unwrap()
    }
}

impl Drop for Tracee {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A destination, with a new and empty RAM file on tmpfs.
pub(crate) struct Destination {
    _directory: TempDir,
    destination: MemoryDestination,
    events: Receiver<(Event, Instant)>,
    streams: usize,
}

impl Destination {
    pub(crate) fn new<R: Read + Send + 'static>(bytes: usize, sources: Vec<R>) -> Destination {
        let directory = directory();
        let path = directory.path().join("destination");
        File::create(&path).unwrap().set_len(bytes as u64).unwrap();
        let streams = sources.len();
        let layout = Layout::new([("ram", bytes as u64)], streams.try_into().unwrap()).unwrap();
        let (tell, events) = channel();
        let mut destination = MemoryDestination::start(ram(&path, layout), secret(), move |event| {
            drop(tell.send((event, Instant::now())));
        })
        .unwrap();
        for (stream, source) in (0..).zip(sources) {
            destination.attach(stream, source, None).unwrap();
        }
        Destination { _directory: directory, destination, events, streams }
    }

    /// Waits until everything before a barrier is applied, on every stream. Returns when that was.
    pub(crate) fn barrier(&self, barrier: u32) -> Instant {
        let mut last = None;
        for _ in 0..self.streams {
            match self.events.recv().unwrap() {
                (Event::Barrier { number, .. }, at) if number == barrier => last = last.max(Some(at)),
                other => panic!("{other:?}"),
            }
        }
        last.unwrap()
    }

    /// Ends it. The streams must have ended.
    pub(crate) fn finish(self) {
        self.destination.finish();
    }
}

fn directory() -> TempDir {
    tempfile::Builder::new().prefix("vmirror-micro-").tempdir_in("/dev/shm").unwrap()
}

fn ram(path: &Path, layout: Layout) -> Ram {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    Ram::new(layout, vec![RamFile { file, offset: 0, process: None }]).unwrap()
}

/// The same for both ends and in every run.
fn secret() -> Secret {
    Secret::from(std::array::from_fn::<u8, SECRET_LENGTH, _>(|at| (at as u8).wrapping_mul(197)))
}
