//! What every page goes through on both sides.

use std::hint::black_box;

use criterion::{Criterion, Throughput};
use mirror::hash::{Secret, is_zero};
use mirror::layout::PAGE_SIZE;

use crate::content::Content;

/// More than the caches hold.
const BYTES: usize = 64 << 20;

/// The content hash, and the check for zero, of 64 MiB of pages in one thread; the check where each page is zero, so is
/// read to its end, and where none is. In bytes looked at per second.
pub(crate) fn hash(c: &mut Criterion) {
    let mut group = c.benchmark_group("hash");
    group.throughput(Throughput::Bytes(BYTES as u64));
    group.bench_function("XXH3-128", |b| {
        let secret = Secret::random().unwrap();
        let pages = Content::Incompressible.bytes(BYTES);
        b.iter(|| pages.chunks_exact(PAGE_SIZE).for_each(|page| _ = black_box(secret.hash(page))));
    });
    for (name, value) in [("zero check, zero", 0), ("zero check, not zero", 1)] {
        group.bench_function(name, |b| {
            let pages = vec![value; BYTES];
            b.iter(|| pages.chunks_exact(PAGE_SIZE).filter(|page| is_zero(black_box(page))).count());
        });
    }
    group.finish();
}
