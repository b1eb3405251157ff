//! Two network namespaces with a cable between them.

use std::fs::File;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// What iperf3 sends at a time: enough that its beginning does not matter.
const IPERF_BYTES: u64 = 4 << 30;
const IPERF_PORT: u16 = 5201;

/// Two network namespaces with a veth pair between them. Gone when dropped.
pub(crate) struct VethPair {
    pub(crate) near: String,
    pub(crate) far: String,
}

pub(crate) const FAR_ADDRESS: &str = "10.213.77.2";

impl VethPair {
    pub(crate) fn new() -> VethPair {
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
    pub(crate) fn connect(&self, streams: u16) -> (Vec<TcpStream>, Vec<TcpStream>) {
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
    pub(crate) fn iperf_server(&self) -> Server {
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
    pub(crate) fn iperf(&self, streams: u16) -> f64 {
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
pub(crate) struct Server(Child);

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
pub(crate) fn within<T: Send + 'static>(namespace: &str, act: impl FnOnce() -> T + Send + 'static) -> T {
    let namespace = File::open(format!("/run/netns/{namespace}")).unwrap();
    std::thread::spawn(move || {
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
        act()
    })
    .join()
    .unwrap()
}
