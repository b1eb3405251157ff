//! Finding what was written.

use std::time::{Duration, Instant};

use criterion::{Criterion, SamplingMode, Throughput};
use dirty_tracker::Scan;

use crate::content::Content;
use crate::rig::Tracee;

const BYTES: usize = 1 << 30;

/// One scan of 1 GiB of a process, by what was written since the scan before: nothing, 1 % of the pages at random, all of
/// them. In two steps and in one step, as of a guest that runs, both of which protect what they find; and as a list
/// only, as of one that is paused. In time per scan.
pub(crate) fn scan(c: &mut Criterion) {
    let mut group = c.benchmark_group("scan 1 GiB");
    group.throughput(Throughput::Bytes(BYTES as u64)).sampling_mode(SamplingMode::Flat).sample_size(20);
    // Short, because what the process writes in between takes longer than the scan that is measured.
    group.measurement_time(Duration::from_millis(500));
    // One process for all, once one of the benchmarks is asked for.
    let mut started = None;
    let percent = format!("touch {}", BYTES / 4096 / 100);
    for (dirty, command) in
        [("clean", None), ("1 % dirty", Some(percent.as_str())), ("all dirty", Some("touch all"))]
    {
        for (name, scan) in [("two steps", Scan::TwoStep), ("one step", Scan::OneStep), ("list", Scan::List)]
        {
            group.bench_function(format!("{dirty}, {name}"), |b| {
                let (tracee, tracker) = started.get_or_insert_with(|| {
                    let tracee = Tracee::new(BYTES, Content::Text);
                    let tracker = tracee.track();
                    (tracee, tracker)
                });
                let mut regions = Vec::new();
                b.iter_custom(|iterations| {
                    let mut total = Duration::ZERO;
                    for _ in 0..iterations {
                        regions.clear();
                        tracker.scan(Scan::OneStep, &mut regions).unwrap();
                        command.iter().for_each(|command| tracee.tell(command));
                        regions.clear();
                        let begin = Instant::now();
                        let found = tracker.scan(scan, &mut regions).unwrap().pages;
                        total += begin.elapsed();
                        assert_eq!(found == 0, command.is_none());
                        assert!(command != Some("touch all") || found == tracee.pages());
                    }
                    total
                });
            });
        }
    }
    group.finish();
}
