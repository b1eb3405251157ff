//! The memory engine, stage by stage: copy, find, hash, encode, decode, and all of it over a network.
//!
//! `cargo bench -p micro`, or `cargo bench -p micro -- NAME` for those with that in their name. What each one measures, and in
//! what unit, is said at its function. Figures of earlier runs are under `target/criterion`; criterion compares. What memcpy
//! and through measure is left in `target/engine-throughput.json` for the benchmark of migrations.
//!
//! Tracking needs ptrace on a process of one's own, so root or CAP_SYS_PTRACE where that is restricted.

#![expect(clippy::unwrap_used, reason = "a benchmark that cannot go on fails by panicking")]

mod content;
mod decode;
mod encode;
mod figures;
mod hash;
mod memcpy;
mod rig;
mod scan;
mod through;
mod tls;
mod veth;

use std::time::Duration;

use criterion::Criterion;

fn main() {
    let criterion =
        Criterion::default().warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(3));
    let mut criterion = criterion.configure_from_args();
    let memcpy = memcpy::memcpy(&mut criterion);
    for stage in [scan::scan, hash::hash, encode::encode, encode::compress, decode::decode] {
        stage(&mut criterion);
    }
    figures::write(memcpy, through::through(&mut criterion));
    criterion.final_summary();
}
