//! The destination's side alone.

use std::io::{self, Cursor, Write};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use compression::Compression;
use criterion::{Criterion, Throughput};
use mirror::memory::round::Guest;

use crate::content::Content;
use crate::encode::{BYTES, COMPRESSIONS, DELTA_BYTES, group};
use crate::rig::{Destination, Tracee};

/// A stream whose bytes are kept.
#[derive(Clone, Default)]
struct Recorder(Arc<Mutex<Vec<u8>>>);

impl Write for Recorder {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The destination takes in, from memory, the frames of one stream that a source has written before, and writes them to
/// a file on tmpfs. In bytes of guest memory per second.
///
/// The first round of 256 MiB, by content and compression, into an empty file; a later round of 64 MiB in which each page
/// comes as a delta of one word.
pub(crate) fn decode(c: &mut Criterion) {
    let mut group = group(c, "decode", BYTES);
    for content in Content::ALL {
        let mut tracee = None;
        for (name, compression) in COMPRESSIONS {
            group.bench_function(format!("first round, {}, {name}", content.name()), |b| {
                let tracee = tracee.get_or_insert_with(|| Tracee::new(BYTES, content));
                let recorder = Recorder::default();
                tracee.source(compression, vec![recorder.clone()]).round(Guest::Running).unwrap();
                let frames: Arc<[u8]> = Arc::from(std::mem::take(&mut *recorder.0.lock().unwrap()));
                b.iter_custom(|iterations| {
                    let mut total = Duration::ZERO;
                    for _ in 0..iterations {
                        let begin = Instant::now();
                        let destination = Destination::new(BYTES, vec![Cursor::new(Arc::clone(&frames))]);
                        total += destination.barrier(0) - begin;
                        destination.finish();
                    }
                    total
                });
            });
        }
    }
    group.throughput(Throughput::Bytes(DELTA_BYTES as u64));
    group.bench_function("deltas", |b| {
        let mut tracee = Tracee::new(DELTA_BYTES, Content::Incompressible);
        let recorder = Recorder::default();
        let mut source = tracee.source(Compression::Off, vec![recorder.clone()]);
        // What is sent as a delta in the third round was sent whole in one after the first.
        for round in 0..3 {
            let sent = source.round(Guest::Running).unwrap();
            source.acknowledge();
            assert_eq!(sent.counts.delta, if round == 2 { tracee.pages() } else { 0 });
            tracee.tell("change all");
        }
        let frames: Arc<[u8]> = Arc::from(std::mem::take(&mut *recorder.0.lock().unwrap()));
        b.iter_custom(|iterations| {
            let mut total = Duration::ZERO;
            for _ in 0..iterations {
                let destination = Destination::new(DELTA_BYTES, vec![Cursor::new(Arc::clone(&frames))]);
                destination.barrier(0);
                let begin = destination.barrier(1);
                total += destination.barrier(2) - begin;
                destination.finish();
            }
            total
        });
    });
    group.finish();
}
