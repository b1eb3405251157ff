//! Source and destination together, over TCP between two network namespaces.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::File;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use criterion::{Criterion, SamplingMode, Throughput};
use mirror::memory::compress::Compression;
use mirror::memory::round::Guest;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::content::Content;
use crate::rig::{Destination, Tracee};

const BYTES: u64 = 1 << 30;
/// What iperf3 sends at a time: enough that its beginning does not matter.
const IPERF_BYTES: u64 = 4 << 30;
const IPERF_PORT: u16 = 5201;

/// The first round of 1 GiB of incompressible memory from a process's file to the destination's file, both on tmpfs, over
/// plain TCP through a veth pair between two network namespaces, on one and on two streams, compression left to itself as
/// it is by default. From the beginning of the round until everything is applied. Beside it iperf3 over the same veth
/// pair, with as many streams. In bytes per second.
///
/// At the end the medians of both, and their ratio. Needs root and iperf3; says so and is left out otherwise.
pub(crate) fn through(c: &mut Criterion) {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED through: network namespaces need root");
        return;
    }
    let has_iperf = Command::new("iperf3").arg("--version").stdout(Stdio::null()).status().is_ok();
    if !has_iperf {
        println!("SKIPPED through/iperf3: iperf3 is not installed");
    }
    let times: RefCell<BTreeMap<(&str, u16), Vec<f64>>> = RefCell::default();
    let note = |what, streams, time: Duration| {
        let rate = BYTES as f64 / time.as_secs_f64();
        times.borrow_mut().entry((what, streams)).or_default().push(rate);
    };
    let mut group = c.benchmark_group("through");
    group.throughput(Throughput::Bytes(BYTES)).sampling_mode(SamplingMode::Flat).sample_size(10);
    group.warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(10));
    let (mut pair, mut tracee) = (None, None);
    for streams in [1, 2] {
        if has_iperf {
            group.bench_function(format!("iperf3, streams {streams}"), |b| {
                let pair = pair.get_or_insert_with(VethPair::new);
                let _server = pair.iperf_server();
                b.iter_custom(|iterations| {
                    let mut total = Duration::ZERO;
                    for _ in 0..iterations {
                        let time = Duration::from_secs_f64(BYTES as f64 / pair.iperf(streams));
                        note("iperf3", streams, time);
                        total += time;
                    }
                    total
                });
            });
        }
        group.bench_function(format!("mirror, streams {streams}"), |b| {
            let pair = pair.get_or_insert_with(VethPair::new);
            let tracee = tracee.get_or_insert_with(|| Tracee::new(BYTES as usize, Content::Incompressible));
            b.iter_custom(|iterations| {
                let mut total = Duration::ZERO;
                for _ in 0..iterations {
                    let (near, far) = pair.connect(streams);
                    let destination = Destination::new(BYTES as usize, far);
                    let ends = near.iter().map(|end| end.try_clone().unwrap()).collect::<Vec<_>>();
                    let mut source = tracee.source(Compression::Auto, near);
                    let begin = Instant::now();
                    let sent = source.round(Guest::Running).unwrap();
                    let time = destination.barrier(0) - begin;
                    assert_eq!(sent.counts.plain, tracee.pages());
                    note("mirror", streams, time);
                    total += time;
                    drop(source);
                    ends.iter().for_each(|end| end.shutdown(Shutdown::Both).unwrap());
                    destination.finish();
                }
                total
            });
        });
    }
    group.finish();
    let median = |what, streams| {
        let mut rates = times.borrow().get(&(what, streams)).cloned()?;
        rates.sort_by(f64::total_cmp);
        Some(rates[rates.len() / 2])
    };
    for streams in [1, 2] {
        if let (Some(mirror), Some(iperf)) = (median("mirror", streams), median("iperf3", streams)) {
            println!(
                "through, streams {streams}: {:.2} GB/s, iperf3 {:.2} GB/s, ratio {:.2}",
                mirror / 1e9,
                iperf / 1e9,
                mirror / iperf
            );
        }
    }
}

/// Two network namespaces with a veth pair between them. Gone when dropped.
struct VethPair {
    near: String,
    far: String,
}

const FAR_ADDRESS: &str = "10.213.77.2";

impl VethPair {
    fn new() -> VethPair {
        let name = |end: &str| format!("vmirror-micro-{}-{end}", std::process::id());
        let pair = VethPair { near: name("near"), far: name("far") };
        let (near, far) = (pair.near.as_str(), pair.far.as_str());
        ip(&["netns", "add", near]);
        ip(&["netns", "add", far]);
        ip(&["-n", near, "link", "add", "veth0", "type", "veth", "peer", "name", "veth0", "netns", far]);
        for (namespace, address) in [(near, "10.213.77.1/30"), (far, "10.213.77.2/30")] {
            ip(&["-n", namespace, "address", "add", address, "dev", "veth0"]);
            ip(&["-n", namespace, "link", "set", "lo", "up"]);
            ip(&["-n", namespace, "link", "set", "veth0", "up"]);
        }
        pair
    }

    /// Connections between the two: the near ends, and the far ends in the same order.
    fn connect(&self, streams: u16) -> (Vec<TcpStream>, Vec<TcpStream>) {
        let far: SocketAddr = (FAR_ADDRESS.parse::<std::net::IpAddr>().unwrap(), 0).into();
        let listener = within(&self.far, move || TcpListener::bind(far).unwrap());
        let address = listener.local_addr().unwrap();
        let connect = move || (0..streams).map(|_| TcpStream::connect(address).unwrap()).collect::<Vec<_>>();
        let near = within(&self.near, connect);
        let mut accepted: Vec<_> = (0..streams).map(|_| listener.accept().unwrap()).collect();
        let position = |peer: &SocketAddr| near.iter().position(|end| end.local_addr().unwrap() == *peer);
        accepted.sort_by_key(|(_, peer)| position(peer));
        (near, accepted.into_iter().map(|(end, _)| end).collect())
    }

    /// Starts iperf3's server, and waits until it listens.
    fn iperf_server(&self) -> Server {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.far, "iperf3", "-s", "-p", &IPERF_PORT.to_string()]);
        let server = Server(command.stdout(Stdio::null()).spawn().unwrap());
        // Looked up and not tried: it takes whoever connects for a client.
        let listens = |table: &str| {
            let table = std::fs::read_to_string(format!("/proc/{}/net/{table}", server.0.id())).unwrap();
            table.contains(&format!(":{IPERF_PORT:04X} "))
        };
        let begin = Instant::now();
        while !listens("tcp") && !listens("tcp6") {
            assert!(begin.elapsed() < Duration::from_secs(10), "iperf3's server does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        server
    }

    /// One transfer by iperf3, in bytes received per second.
    fn iperf(&self, streams: u16) -> f64 {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.near, "iperf3", "-c", FAR_ADDRESS, "-J"]);
        command.args(["-p", &IPERF_PORT.to_string()]);
        command.args(["-P", &streams.to_string(), "-n", &(IPERF_BYTES / u64::from(streams)).to_string()]);
        let output = command.output().unwrap().stdout;
        let report: serde_json::Value = serde_json::from_slice(&output).unwrap();
        let bits = report["end"]["sum_received"]["bits_per_second"].as_f64();
        bits.unwrap_or_else(|| panic!("{report}")) / 8.0
    }
}

impl Drop for VethPair {
    fn drop(&mut self) {
        ip(&["netns", "delete", &self.near]);
        ip(&["netns", "delete", &self.far]);
    }
}

/// A process that is ended when dropped.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn ip(arguments: &[&str]) {
    assert!(Command::new("ip").args(arguments).status().unwrap().success(), "ip {arguments:?}");
}

/// Does something in a network namespace. A socket made there stays there.
fn within<T: Send + 'static>(namespace: &str, act: impl FnOnce() -> T + Send + 'static) -> T {
    let namespace = File::open(format!("/run/netns/{namespace}")).unwrap();
    std::thread::spawn(move || {
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
        act()
    })
    .join()
    .unwrap()
}
