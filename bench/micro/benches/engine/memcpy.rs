//! The ceiling: what the machine itself can copy.

use std::hint::black_box;

use criterion::{Criterion, Throughput};

/// More than the caches hold.
const BYTES: usize = 64 << 20;

/// Copies 64 MiB from one buffer to another, in one thread. In bytes copied per second.
pub(crate) fn memcpy(c: &mut Criterion) {
    let mut group = c.benchmark_group("memcpy");
    group.throughput(Throughput::Bytes(BYTES as u64));
    group.bench_function("64 MiB", |b| {
        let (from, mut to) = (vec![1_u8; BYTES], vec![2_u8; BYTES]);
        b.iter(|| black_box(&mut to[..]).copy_from_slice(black_box(&from)));
    });
    group.finish();
}
