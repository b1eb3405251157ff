//! A hundred clients that are no agents, of every kind, must have no effect on a migration beside them: it completes, the guest is sound,
//! and the destination's agent has afterwards what it had before.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, SystemTime};

use end_to_end::{Pair, report_adds_up, until};
use link::certificates::{IssueOptions, Validity, init, issue, issue_with};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore};
use socket2::{Domain, Socket, Type};
use testbed::guest_spec::GuestSpec;

/// Clients of each kind.
const OF_EACH: usize = 20;
/// By how much the agent's memory may differ, in KiB: what its allocator keeps.
const SLACK_KIB: u64 = 48 << 10;

/// Connects from an address of this host's own, of which there are many.
fn connect(from: u8, to: SocketAddr) -> Option<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).ok()?;
    socket.bind(&SocketAddr::new(IpAddr::V4(Ipv4Addr::new(127, 0, 1, from)), 0).into()).ok()?;
    socket.connect_timeout(&to.into(), Duration::from_secs(1)).ok()?;
    Some(socket.into())
}

/// What a TLS client says first, but for its end.
const CLIENT_HELLO: &[u8] = &[0x16, 0x03, 0x01, 0x02, 0x00, 0x01, 0x00, 0x01, 0xfc, 0x03, 0x03];

/// Something else than TLS, and a lot of it.
fn garbage(from: u8, to: SocketAddr) {
    let Some(mut stream) = connect(from, to) else { return };
    let _ = stream.write_all(b"GET / HTTP/1.1\r\n\r\n").and_then(|()| stream.write_all(&[0x5a; 64 << 10]));
    let _ = stream.read(&mut [0; 64]);
}

/// A handshake that is never done, byte by byte.
fn slow(from: u8, to: SocketAddr, over: &AtomicBool) {
    let Some(mut stream) = connect(from, to) else { return };
    for byte in CLIENT_HELLO.iter().chain(&[0; 500]) {
        if over.load(Ordering::Relaxed) || stream.write_all(&[*byte]).is_err() {
            return;
        }
        thread::sleep(Duration::from_millis(200));
    }
}

/// Says that it has said all, and listens.
fn half_closed(from: u8, to: SocketAddr) {
    let Some(mut stream) = connect(from, to) else { return };
    let _ = stream.write_all(CLIENT_HELLO);
    let _ = stream.shutdown(Shutdown::Write);
    let _ = stream.set_read_timeout(Some(Duration::from_secs(2)));
    while matches!(stream.read(&mut [0; 256]), Ok(1..)) {}
}

/// Comes and goes.
fn knock(from: u8, to: SocketAddr) {
    drop(connect(from, to));
}

/// A client that does TLS as an agent does, but for its certificate: it is told nothing.
fn unbelieved(from: u8, stranger: &Arc<ClientConfig>, to: SocketAddr) {
    let Some(mut stream) = connect(from, to) else { return };
    let _ = stream.set_read_timeout(Some(Duration::from_secs(15)));
    let mut tls = ClientConnection::new(Arc::clone(stranger), ServerName::from(to.ip())).unwrap();
    let mut tls = rustls::Stream::new(&mut tls, &mut stream);
    let _ = tls.write_all(b"vmirror\x01\0\0\0\x06\x08\x01\x10\x01\x22\0");
    let answer = tls.read(&mut [0; 64]);
    assert!(!matches!(answer, Ok(1..)), "a stranger is answered: {answer:?}");
}

/// One without a certificate, one with another authority's, one whose own has expired.
fn strangers(pair: &Pair) -> [Arc<ClientConfig>; 3] {
    let real = pair.testbed().certificates();
    let directory = |name: &str| -> PathBuf {
        let directory = pair.testbed().directory().join(name);
        std::fs::create_dir_all(&directory).unwrap();
        directory
    };
    let addresses = ["10.9.0.2".to_owned()];
    let other = directory("other");
    init(&other).unwrap();
    issue(&other, "host-a", &addresses).unwrap();
    let expired = directory("expired");
    for file in ["ca.pem", "ca-key.pem"] {
        std::fs::copy(real.join(file), expired.join(file)).unwrap();
    }
    let ago = |seconds| SystemTime::now() - Duration::from_secs(seconds);
    let validity = Validity { not_before: ago(7200), not_after: ago(3600) };
    issue_with(&expired, "host-a", &addresses, &IssueOptions::new(validity)).unwrap();
    [None, Some(&*other), Some(&*expired)].map(|of| Arc::new(client(&real.join("ca.pem"), of)))
}

fn client(authority: &Path, of: Option<&Path>) -> ClientConfig {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(authority).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match of {
        None => config.with_no_client_auth(),
        Some(directory) => {
            let certificate = CertificateDer::from_pem_file(directory.join("host-a.pem")).unwrap();
            let key = PrivateKeyDer::from_pem_file(directory.join("host-a-key.pem")).unwrap();
            config.with_client_auth_cert(vec![certificate], key).unwrap()
        }
    };
    config.alpn_protocols = vec![b"vmirror".to_vec()];
    config
}

/// Descriptors and resident memory, in KiB.
fn taken(pid: i32) -> (usize, u64) {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    let kib = resident.split_whitespace().next().unwrap().parse().unwrap();
    (std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count(), kib)
}

#[test]
fn a_hundred_bad_clients_have_no_effect_on_a_migration() {
    if !testbed::root_or_skip("addresses of its own for each client") {
        return;
    }
    let pair = Pair::start();
    let spec = GuestSpec { fill_mib: 24, rate: 200, ..pair.spec("vm", 128) };
    let guest = pair.run(pair.a(), "vm", &spec);
    // Once there and back: from here on the agents have what they keep.
    pair.migrate("vm", pair.a(), pair.b(), &[]);
    pair.migrate("vm", pair.b(), pair.a(), &[]);
    let agent = pair.b().agent_pid().unwrap();
    let (descriptors, memory) = taken(agent);
    let (before, strangers) = (guest.status(), strangers(&pair));
    let (to, over, come) = (pair.b().listen(), AtomicBool::new(false), AtomicUsize::new(0));
    let report = thread::scope(|scope| {
        let (over, come, strangers, pair) = (&over, &come, &strangers, &pair);
        scope.spawn(move || {
            // Each of them again and again, from addresses of the destination's own network.
            let all = || {
                thread::scope(|scope| {
                    for number in 0..5 * OF_EACH {
                        scope.spawn(move || {
                            let from = (number / 10 + 1) as u8;
                            while !over.load(Ordering::Relaxed) {
                                match number / OF_EACH {
                                    0 => garbage(from, to),
                                    1 => slow(from, to, over),
                                    2 => half_closed(from, to),
                                    3 => (0..50).for_each(|_| knock(from, to)),
                                    _ => unbelieved(from, &strangers[number % 3], to),
                                }
                                come.fetch_add(1, Ordering::Relaxed);
                                thread::sleep(Duration::from_millis(20));
                            }
                        });
                    }
                });
            };
            pair.b().on_network(all).unwrap();
        });
        until("they have come", || come.load(Ordering::Relaxed) >= OF_EACH);
        let migrated = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            pair.migrate("vm", pair.a(), pair.b(), &[])
        }));
        over.store(true, Ordering::Relaxed);
        migrated.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });
    report_adds_up(&report, &guest);
    guest.sound_since(&before);
    eprintln!("{} came, downtime {:.1} ms", come.load(Ordering::Relaxed), report.downtime_ms);
    // The VM is there, so the agent has what one VM takes; back again, it has what it had.
    pair.migrate("vm", pair.b(), pair.a(), &[]);
    until("nothing is left of them", || taken(agent).0 <= descriptors);
    let (_, now) = taken(agent);
    assert!(now < memory + SLACK_KIB, "{now} KiB, were {memory}");
    guest.sound_since(&before);
}
