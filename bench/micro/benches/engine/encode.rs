//! The source's side alone.

use std::hint::black_box;
use std::io;
use std::time::{Duration, Instant};

use compression::Compression;
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, SamplingMode, Throughput};
use mirror::memory::round::{Counts, Guest};

use crate::content::Content;
use crate::rig::Tracee;

pub(crate) const BYTES: usize = 256 << 20;
/// What the last sent content of hot pages has room for, with some to spare.
pub(crate) const DELTA_BYTES: usize = 64 << 20;
/// A frame's payload.
const BLOCK: usize = 1 << 20;

pub(crate) const COMPRESSIONS: [(&str, Compression); 3] =
    [("none", Compression::Off), ("LZ4", Compression::Lz4), ("Zstandard", Compression::Zstd)];

/// A group of measurements that take long each, of so many bytes.
pub(crate) fn group<'a>(c: &'a mut Criterion, name: &str, bytes: usize) -> BenchmarkGroup<'a, WallTime> {
    let mut group = c.benchmark_group(name);
    group.throughput(Throughput::Bytes(bytes as u64)).sampling_mode(SamplingMode::Flat).sample_size(10);
    group.measurement_time(Duration::from_secs(3));
    group
}

/// A whole round of the source, scan and all, on one stream to a sink that discards. In bytes of guest memory per second.
///
/// The first round of 256 MiB, by content and compression; a round in which all of 256 MiB was written and nothing has
/// changed; one in which a word of each page of 64 MiB has changed, so that each is sent as a delta.
pub(crate) fn encode(c: &mut Criterion) {
    let mut group = group(c, "encode", BYTES);
    for content in Content::ALL {
        let mut tracee = None;
        for (name, compression) in COMPRESSIONS {
            group.bench_function(format!("first round, {}, {name}", content.name()), |b| {
                let tracee = tracee.get_or_insert_with(|| Tracee::new(BYTES, content));
                b.iter_custom(|iterations| {
                    let mut total = Duration::ZERO;
                    for _ in 0..iterations {
                        let mut source = tracee.source(compression, vec![io::sink()]);
                        let begin = Instant::now();
                        let sent = source.round(Guest::Running).unwrap();
                        total += begin.elapsed();
                        assert_eq!(sent.due, tracee.pages());
                    }
                    total
                });
            });
        }
    }
    group.bench_function("unchanged pages", |b| {
        again(b, Tracee::new(BYTES, Content::Text), "touch all", |counts| counts.unchanged);
    });
    group.throughput(Throughput::Bytes(DELTA_BYTES as u64));
    group.bench_function("deltas", |b| {
        again(b, Tracee::new(DELTA_BYTES, Content::Incompressible), "change all", |counts| counts.delta);
    });
    group.finish();
}

/// Rounds after the first two, before each of which the process writes. All pages are to be of one kind.
fn again(b: &mut criterion::Bencher<'_>, mut tracee: Tracee, command: &str, kind: fn(&Counts) -> u64) {
    let mut source = tracee.source(Compression::Off, vec![io::sink()]);
    source.round(Guest::Running).unwrap();
    source.acknowledge();
    // What is sent as a delta was sent whole in a round after the first.
    tracee.tell(command);
    source.round(Guest::Running).unwrap();
    source.acknowledge();
    b.iter_custom(|iterations| {
        let mut total = Duration::ZERO;
        for _ in 0..iterations {
            tracee.tell(command);
            let begin = Instant::now();
            let sent = source.round(Guest::Running).unwrap();
            total += begin.elapsed();
            source.acknowledge();
            assert_eq!(kind(&sent.counts), tracee.pages(), "{sent:?}");
        }
        total
    });
}

/// The compressors alone, on blocks of 1 MiB, in one thread. In bytes that go in per second.
pub(crate) fn compress(c: &mut Criterion) {
    let mut group = group(c, "compress", DELTA_BYTES);
    for content in Content::ALL {
        let bytes = content.bytes(DELTA_BYTES);
        group.bench_function(format!("LZ4, {}", content.name()), |b| {
            let mut output = vec![0; lz4_flex::block::get_maximum_output_size(BLOCK)];
            b.iter(|| {
                for block in bytes.chunks(BLOCK) {
                    black_box(lz4_flex::block::compress_into(block, &mut output).unwrap());
                }
            });
        });
        for level in [1, 6] {
            group.bench_function(format!("Zstandard {level}, {}", content.name()), |b| {
                let mut output = vec![0; zstd::zstd_safe::compress_bound(BLOCK)];
                let mut zstd = zstd::bulk::Compressor::new(level).unwrap();
                b.iter(|| {
                    for block in bytes.chunks(BLOCK) {
                        black_box(zstd.compress_to_buffer(block, &mut output[..]).unwrap());
                    }
                });
            });
        }
    }
    group.finish();
}
