//! Source and destination together, over TCP between two network namespaces.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use compression::Compression;
use criterion::{Criterion, SamplingMode, Throughput};
use micro::Through;
use mirror::memory::round::Guest;

use crate::content::Content;
use crate::rig::{Destination, Tracee};
use crate::tls::Agents;
use crate::veth::VethPair;

const BYTES: u64 = 1 << 30;

/// The first round of 1 GiB of incompressible memory from a process's file to the destination's file, both on tmpfs,
/// through a veth pair between two network namespaces, on one and on two streams: over plain TCP, and over the agents'
/// own connections with TLS. Compression is left to itself, as it is by default. From the beginning of the round until
/// everything is applied. Beside it iperf3 over the same veth pair, with as many streams. In bytes per second.
///
/// At the end the medians, and the ratios to iperf3; gives them back where there are all. Needs root and iperf3; says so and is
/// left out otherwise.
pub(crate) fn through(c: &mut Criterion) -> Option<Vec<Through>> {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED through: network namespaces need root");
        return None;
    }
    let has_iperf = Command::new("iperf3").arg("--version").stdout(Stdio::null()).status().is_ok();
    if !has_iperf {
        println!("SKIPPED through/iperf3: iperf3 is not installed");
    }
    let noted = Noted::default();
    let mut group = c.benchmark_group("through");
    group.throughput(Throughput::Bytes(BYTES)).sampling_mode(SamplingMode::Flat).sample_size(10);
    group.warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(10));
    let (mut pair, mut tracee, mut agents) = (None, None, None);
    for streams in [1, 2] {
        if has_iperf {
            group.bench_function(format!("iperf3, streams {streams}"), |b| {
                let pair = pair.get_or_insert_with(VethPair::new);
                let _server = pair.iperf_server();
                b.iter_custom(|iterations| {
                    let once = |_| {
                        let time = Duration::from_secs_f64(BYTES as f64 / pair.iperf(streams));
                        noted.add("iperf3", streams, time)
                    };
                    (0..iterations).map(once).sum()
                });
            });
        }
        group.bench_function(format!("mirror, streams {streams}"), |b| {
            let pair = pair.get_or_insert_with(VethPair::new);
            let tracee = tracee.get_or_insert_with(|| Tracee::new(BYTES as usize, Content::Incompressible));
            b.iter_custom(|iterations| {
                let once = |_| {
                    let (near, far) = pair.connect(streams);
                    let ends = near.iter().map(|end| end.try_clone().unwrap()).collect::<Vec<_>>();
                    let cut = || ends.iter().for_each(|end| end.shutdown(Shutdown::Both).unwrap());
                    noted.add("plain", streams, first_round(tracee, near, far, cut))
                };
                (0..iterations).map(once).sum()
            });
        });
        group.bench_function(format!("mirror with TLS, streams {streams}"), |b| {
            let pair = pair.get_or_insert_with(VethPair::new);
            let tracee = tracee.get_or_insert_with(|| Tracee::new(BYTES as usize, Content::Incompressible));
            let agents = agents.get_or_insert_with(Agents::new);
            b.iter_custom(|iterations| {
                let once = |_| {
                    let (near, aborts, far) = agents.connect(pair, streams);
                    let cut = || aborts.iter().for_each(link::AbortHandle::abort);
                    noted.add("tls", streams, first_round(tracee, near, far, cut))
                };
                (0..iterations).map(once).sum()
            });
        });
    }
    group.finish();
    let rates = |streams| {
        let median = |what| noted.median(what, streams);
        let rates =
            Through { streams, iperf3: median("iperf3")?, plain: median("plain")?, tls: median("tls")? };
        crate::figures::print(&rates);
        Some(rates)
    };
    [1, 2].into_iter().map(rates).collect()
}

/// Sends all of a process's memory to a new destination, over these connections, which are cut afterwards.
fn first_round<W: Write + Send + 'static, R: Read + Send + 'static>(
    tracee: &Tracee,
    near: Vec<W>,
    far: Vec<R>,
    cut: impl FnOnce(),
) -> Duration {
    let destination = Destination::new(BYTES as usize, far);
    let mut source = tracee.source(Compression::Auto, near);
    let begin = Instant::now();
    let sent = source.round(Guest::Running).unwrap();
    let time = destination.barrier(0) - begin;
    assert_eq!(sent.counts.plain, tracee.pages());
    drop(source);
    cut();
    destination.finish();
    time
}

/// What was measured, by what it was and on how many streams, in bytes per second.
#[derive(Default)]
struct Noted(Mutex<BTreeMap<(&'static str, u16), Vec<f64>>>);

impl Noted {
    fn add(&self, what: &'static str, streams: u16, time: Duration) -> Duration {
        let rate = BYTES as f64 / time.as_secs_f64();
        self.0.lock().unwrap().entry((what, streams)).or_default().push(rate);
        time
    }

    fn median(&self, what: &'static str, streams: u16) -> Option<f64> {
        crate::figures::median(self.0.lock().unwrap().get(&(what, streams))?)
    }
}
