//! The ceiling: what the machine itself can copy.

use std::hint::black_box;
use std::time::Instant;

use criterion::{Criterion, Throughput};

use crate::figures::median;

/// More than the caches hold.
const BYTES: usize = 64 << 20;

/// Copies 64 MiB from one buffer to another, in one thread. In bytes copied per second; gives back the median.
pub(crate) fn memcpy(c: &mut Criterion) -> Option<f64> {
    let mut group = c.benchmark_group("memcpy");
    group.throughput(Throughput::Bytes(BYTES as u64));
    let mut rates = Vec::new();
    group.bench_function("64 MiB", |b| {
        let (from, mut to) = (vec![1_u8; BYTES], vec![2_u8; BYTES]);
        b.iter_custom(|iterations| {
            let begin = Instant::now();
            for _ in 0..iterations {
                black_box(&mut to[..]).copy_from_slice(black_box(&from));
            }
            let time = begin.elapsed();
            rates.push(BYTES as f64 * iterations as f64 / time.as_secs_f64());
            time
        });
    });
    group.finish();
    median(&rates)
}
