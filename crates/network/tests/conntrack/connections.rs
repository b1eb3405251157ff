//! Connections through a stateful firewall, when another one takes its place.
//!
//! ```text
//!             ┌── firewall a ──┐
//!   client ───┤                ├─── server
//!             └── firewall b ──┘
//! ```
//! All four are network namespaces. Which firewall packets pass is a matter of two routes, as a bridge's port is when a machine moves.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::namespaces::{Namespace, available};
use network::conntrack::wire::{self, Flows};
use network::conntrack::{self, ConntrackError, Entered, Flow, MAX_FLOWS};

const CLIENT: &str = "10.77.0.1";
const SERVER: &str = "10.77.0.2";
const CLIENT_6: &str = "fd77::1";
const SERVER_6: &str = "fd77::2";

/// Long enough for several retransmissions, which begin after 200 ms.
const CUT_OFF: Duration = Duration::from_millis(1500);
/// Long enough for the next one, which comes after twice as long as all before.
const PASSES: Duration = Duration::from_secs(10);

/// Nothing that does not begin here, or belongs to what did.
const RULES: &str = "
    table inet firewall {
        counter invalid {
        }
        chain forward {
            type filter hook forward priority 0; policy drop
            ct state established,related accept
            ct state invalid counter name invalid drop
            iifname c ct state new tcp flags & (syn | ack | fin | rst) == syn accept
            iifname c ct state new meta l4proto { udp, icmp } accept
        }
    }
    ";

struct Bed {
    client: Namespace,
    server: Namespace,
    a: Namespace,
    b: Namespace,
}

impl Bed {
    fn new() -> Bed {
        let namespace = Namespace::new;
        let bed = Bed { client: namespace(), server: namespace(), a: namespace(), b: namespace() };
        for (firewall, name, net) in [(&bed.a, "a", 1), (&bed.b, "b", 2)] {
            let sides = [(&bed.client, "c", CLIENT, CLIENT_6, 1), (&bed.server, "s", SERVER, SERVER_6, 2)];
            for (end, side, address, address_6, number) in sides {
                end.link(name, firewall, side);
                end.run(&format!("ip address add 10.77.{number}{net}.2/24 dev {name}"));
                end.run(&format!("ip address add fd77:{number}{net}::2/64 dev {name} nodad"));
                firewall.run(&format!("ip address add 10.77.{number}{net}.1/24 dev {side}"));
                firewall.run(&format!("ip address add fd77:{number}{net}::1/64 dev {side} nodad"));
                firewall.run(&format!("ip route add {address} via 10.77.{number}{net}.2"));
                firewall.run(&format!("ip route add {address_6} via fd77:{number}{net}::2"));
            }
            firewall.run("sysctl -q net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1");
            firewall.nft(RULES);
        }
        for (end, address, address_6) in [(&bed.client, CLIENT, CLIENT_6), (&bed.server, SERVER, SERVER_6)] {
            end.run(&format!("ip address add {address}/32 dev lo"));
            end.run(&format!("ip address add {address_6}/128 dev lo nodad"));
        }
        bed.through("a");
        bed
    }

    /// Has everything pass a firewall.
    fn through(&self, name: &str) {
        let net = if name == "a" { 1 } else { 2 };
        for (end, number, own, own_6) in
            [(&self.client, 1, CLIENT, CLIENT_6), (&self.server, 2, SERVER, SERVER_6)]
        {
            end.run(&format!("ip route replace default via 10.77.{number}{net}.1 src {own}"));
            end.run(&format!("ip -6 route replace default via fd77:{number}{net}::1 src {own_6}"));
        }
    }

    /// A connection from the client to the server, over which something has been said.
    fn connection(&self, server: &str) -> (TcpStream, TcpStream) {
        let listener = self.server.within(|| TcpListener::bind((address(server), 0)).unwrap());
        let to = listener.local_addr().unwrap();
        let mut near = self.client.within(|| TcpStream::connect_timeout(&to, PASSES).unwrap());
        let (mut far, _) = listener.accept().unwrap();
        assert!(says(&mut near, &mut far) && says(&mut far, &mut near));
        (near, far)
    }
}

/// Whether what one end says arrives at the other before long.
fn says(from: &mut TcpStream, to: &mut TcpStream) -> bool {
    from.write_all(b"x").unwrap();
    hears(to, PASSES)
}

fn hears(to: &mut TcpStream, within: Duration) -> bool {
    to.set_read_timeout(Some(within)).unwrap();
    match to.read_exact(&mut [0]) {
        Ok(()) => true,
        Err(e) if e.kind() == ErrorKind::WouldBlock => false,
        Err(e) => panic!("{e}"),
    }
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn dump(host: &Namespace, of: &str) -> Vec<Flow> {
    host.block_on(conntrack::dump(&[address(of)])).unwrap()
}

/// Flows as another agent has them.
fn told(flows: &[Flow]) -> Vec<Flow> {
    let mut told = Vec::new();
    assert!(Flows::of(flows).iter().all(|part| part.add_to(&mut told)));
    assert_eq!(told, flows);
    told
}

fn enter(host: &Namespace, flows: &[Flow]) -> Entered {
    host.block_on(conntrack::enter(flows)).unwrap()
}

/// What of flows neither time changes nor the entering.
fn lasting(flows: &[Flow]) -> Vec<wire::Flow> {
    const BE_LIBERAL: u32 = 0x08;
    let mut flows: Vec<wire::Flow> = Flows::of(flows).into_iter().flat_map(|part| part.flows).collect();
    for flow in &mut flows {
        flow.timeout = 0;
        if let Some(tcp) = &mut flow.tcp {
            tcp.original_flags &= !BE_LIBERAL;
            tcp.reply_flags &= !BE_LIBERAL;
        }
    }
    flows
}

#[test]
fn connections_are_cut_by_a_firewall_that_has_not_seen_them_and_not_by_one_that_was_told() {
    if !available("connections_are_cut_by_a_firewall_that_has_not_seen_them_and_not_by_one_that_was_told") {
        return;
    }
    let bed = Bed::new();
    for (server, client) in [(SERVER, CLIENT), (SERVER_6, CLIENT_6)] {
        let (mut near, mut far) = bed.connection(server);
        let flows = dump(&bed.a, client);
        assert_eq!(flows.len(), 1, "{flows:?}");
        assert_eq!(lasting(&dump(&bed.a, server)), lasting(&flows), "by its other address");
        assert!(dump(&bed.a, "10.77.0.9").is_empty() && dump(&bed.b, client).is_empty());

        bed.through("b");
        far.write_all(b"x").unwrap();
        assert!(!hears(&mut near, CUT_OFF), "a firewall that knows nothing of it lets it through");
        assert_eq!(enter(&bed.b, &told(&flows)), Entered { entered: 1, refused: 0 });
        assert!(hears(&mut near, PASSES), "cut off though the firewall was told");
        assert!(says(&mut near, &mut far));

        assert_eq!(lasting(&dump(&bed.b, client)), lasting(&flows));
        assert_eq!(bed.b.block_on(conntrack::remove(&flows)).unwrap(), 1);
        assert_eq!(bed.b.block_on(conntrack::remove(&flows)).unwrap(), 0);
        assert!(dump(&bed.b, client).is_empty());
        bed.through("a");
    }
}

#[test]
fn an_entry_that_a_stray_packet_made_the_wrong_way_round_does_not_stay() {
    if !available("an_entry_that_a_stray_packet_made_the_wrong_way_round_does_not_stay") {
        return;
    }
    let bed = Bed::new();
    let (mut near, mut far) = bed.connection(SERVER);
    let flows = dump(&bed.a, CLIENT);
    // A firewall that lets anything through takes the server for the one who began.
    bed.b.run("nft add chain inet firewall forward { policy accept ; }");
    bed.through("b");
    assert!(says(&mut far, &mut near));
    let stray = dump(&bed.b, CLIENT);
    assert_ne!(lasting(&stray)[0].original, lasting(&flows)[0].original);
    bed.b.run("nft add chain inet firewall forward { policy drop ; }");
    assert_eq!(enter(&bed.b, &flows), Entered { entered: 1, refused: 0 });
    assert_eq!(lasting(&dump(&bed.b, CLIENT)), lasting(&flows));
    assert!(says(&mut near, &mut far) && says(&mut far, &mut near));
}

#[test]
fn no_segment_of_a_stream_in_full_flow_is_called_invalid() {
    if !available("no_segment_of_a_stream_in_full_flow_is_called_invalid") {
        return;
    }
    let bed = Bed::new();
    let (mut near, mut far) = bed.connection(SERVER);
    far.set_write_timeout(Some(PASSES)).unwrap();
    let over = AtomicBool::new(false);
    let mut counts = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let data = vec![0; 1 << 16];
            while !over.load(Ordering::Relaxed) {
                far.write_all(&data).unwrap();
            }
            far.shutdown(std::net::Shutdown::Write).unwrap();
        });
        let heard = scope.spawn(move || {
            near.set_read_timeout(Some(PASSES)).unwrap();
            let (mut buffer, mut heard) = (vec![0; 1 << 16], 0);
            loop {
                match near.read(&mut buffer).unwrap() {
                    0 => return heard,
                    more => heard += more,
                }
            }
        });
        for _ in 0..5 {
            for (from, to, name) in [(&bed.a, &bed.b, "b"), (&bed.b, &bed.a, "a")] {
                let before = invalid(to);
                let flows = dump(from, CLIENT);
                enter(to, &flows);
                bed.through(name);
                std::thread::sleep(Duration::from_millis(100));
                // Not so at the other: while one route was changed and not yet the other it saw one direction only.
                counts.push((before, invalid(to)));
            }
        }
        over.store(true, Ordering::Relaxed);
        assert!(heard.join().unwrap() > 1 << 20);
    });
    assert!(counts.iter().all(|(before, after)| before == after), "{counts:#?}");
}

fn invalid(firewall: &Namespace) -> String {
    firewall.output("nft list counter inet firewall invalid")
}

#[test]
fn translated_connections_are_translated_by_the_other_firewall_too() {
    if !available("translated_connections_are_translated_by_the_other_firewall_too") {
        return;
    }
    let bed = Bed::new();
    for firewall in [&bed.a, &bed.b] {
        firewall.nft(
            "table ip translation {
                chain source {
                    type nat hook postrouting priority srcnat
                    oifname s meta l4proto tcp snat to 10.77.9.9:20000-20999
                }
                chain destination {
                    type nat hook prerouting priority dstnat
                    iifname c ip daddr 10.77.9.8 tcp dport 80 dnat to 10.77.0.2:8080
                }
            }
            ",
        );
    }
    let listener = bed.server.within(|| TcpListener::bind((address(SERVER), 8080)).unwrap());
    let mut near = bed.client.within(|| TcpStream::connect("10.77.9.8:80").unwrap());
    let (mut far, peer) = listener.accept().unwrap();
    assert_eq!(peer.ip(), address("10.77.9.9"));
    assert!(says(&mut near, &mut far) && says(&mut far, &mut near));
    let flows = dump(&bed.a, CLIENT);
    for other in [SERVER, "10.77.9.8", "10.77.9.9"] {
        assert_eq!(lasting(&dump(&bed.a, other)), lasting(&flows), "any of its four addresses");
    }

    bed.through("b");
    near.write_all(b"x").unwrap();
    assert!(!hears(&mut far, CUT_OFF));
    assert_eq!(enter(&bed.b, &told(&flows)), Entered { entered: 1, refused: 0 });
    assert!(hears(&mut far, PASSES));
    assert!(says(&mut far, &mut near));
    assert_eq!(lasting(&dump(&bed.b, CLIENT)), lasting(&flows));
    assert_eq!(enter(&bed.b, &flows), Entered { entered: 1, refused: 0 }, "once more");
    assert!(says(&mut far, &mut near) && says(&mut near, &mut far));
}

#[test]
fn flows_of_udp_and_icmp_are_carried_with_mark_and_zone_and_labels() {
    if !available("flows_of_udp_and_icmp_are_carried_with_mark_and_zone_and_labels") {
        return;
    }
    let bed = Bed::new();
    for firewall in [&bed.a, &bed.b] {
        firewall.nft(
            "table inet marks {
                chain zones {
                    type filter hook prerouting priority raw
                    iifname c udp dport 5000 ct zone set 7
                    iifname s udp sport 5000 ct zone set 7
                }
                chain marks {
                    type filter hook forward priority 10
                    ct state new ct mark set 0x12345678 ct label set 77
                }
            }
            ",
        );
    }
    let server = bed.server.within(|| UdpSocket::bind((address(SERVER), 5000)).unwrap());
    let client = bed.client.within(|| UdpSocket::bind((address(CLIENT), 0)).unwrap());
    client.send_to(b"x", (address(SERVER), 5000)).unwrap();
    server.set_read_timeout(Some(PASSES)).unwrap();
    let (_, from) = server.recv_from(&mut [0]).unwrap();
    server.send_to(b"x", from).unwrap();
    client.set_read_timeout(Some(PASSES)).unwrap();
    client.recv_from(&mut [0]).unwrap();
    bed.client.within(|| echo(SERVER));

    let flows = dump(&bed.a, CLIENT);
    assert_eq!(flows.len(), 2, "{flows:?}");
    let described = format!("{flows:?}");
    for part in ["Icmp { id: ", "zone: 7", "mark: 305419896", "labels: Some(["] {
        assert!(described.contains(part), "{part}: {described}");
    }
    bed.through("b");
    server.send_to(b"x", from).unwrap();
    client.set_read_timeout(Some(CUT_OFF)).unwrap();
    client.recv_from(&mut [0]).unwrap_err();
    assert_eq!(enter(&bed.b, &told(&flows)), Entered { entered: 2, refused: 0 });
    let sorted = |host| {
        let mut flows = lasting(&dump(host, CLIENT));
        flows.sort_by_key(|flow| flow.zone);
        flows
    };
    assert_eq!(sorted(&bed.b), sorted(&bed.a));
    server.send_to(b"x", from).unwrap();
    client.set_read_timeout(Some(PASSES)).unwrap();
    client.recv_from(&mut [0]).unwrap();
    assert_eq!(bed.b.block_on(conntrack::remove(&flows)).unwrap(), 2);
}

/// Asks for an echo, and does not wait for it.
fn echo(of: &str) {
    use rustix::net::{AddressFamily, SendFlags, SocketAddrAny, SocketType, ipproto, sendto, socket};
    std::fs::write("/proc/sys/net/ipv4/ping_group_range", "0 0").unwrap();
    let socket = socket(AddressFamily::INET, SocketType::DGRAM, Some(ipproto::ICMP)).unwrap();
    let request = [8, 0, 0, 0, 0, 0, 0, 1];
    let to = SocketAddrAny::from(std::net::SocketAddr::new(address(of), 0));
    sendto(&socket, &request, SendFlags::empty(), &to).unwrap();
    std::thread::sleep(Duration::from_millis(100));
}

#[test]
fn as_many_as_are_carried_are_entered_and_read_and_more_are_an_error() {
    if !available("as_many_as_are_carried_are_entered_and_read_and_more_are_an_error") {
        return;
    }
    let host = Namespace::new();
    let flows: Vec<wire::Flow> =
        (0..=MAX_FLOWS).map(|number| invented(u32::try_from(number).unwrap())).collect();
    let mut told = Vec::new();
    assert!(Flows { flows: flows[..MAX_FLOWS].to_vec(), more: true }.add_to(&mut told));
    let begun = Instant::now();
    assert_eq!(enter(&host, &told), Entered { entered: MAX_FLOWS, refused: 0 });
    let entered = begun.elapsed();
    let begun = Instant::now();
    assert_eq!(dump(&host, CLIENT).len(), MAX_FLOWS);
    println!("{MAX_FLOWS} flows: entered in {entered:?}, read in {:?}", begun.elapsed());
    let begun = Instant::now();
    assert!(dump(&host, "10.77.0.77").is_empty());
    println!("none of them read in {:?}", begun.elapsed());

    let mut more = Vec::new();
    assert!(Flows { flows: flows[MAX_FLOWS..].to_vec(), more: false }.add_to(&mut more));
    assert_eq!(enter(&host, &more), Entered { entered: 1, refused: 0 });
    let error = host.block_on(conntrack::dump(&[address(CLIENT)])).unwrap_err();
    assert!(matches!(error, ConntrackError::TooMany), "{error}");
    assert_eq!(host.block_on(conntrack::remove(&told)).unwrap(), MAX_FLOWS);
    assert_eq!(lasting(&dump(&host, CLIENT)), lasting(&more));
}

/// A flow that never was.
fn invented(number: u32) -> wire::Flow {
    let (client, server) = (vec![10, 77, 0, 1], (0x0b00_0000 + number / 60_000).to_be_bytes().to_vec());
    let (from, to) = (1 + number % 60_000, 80);
    let tuple = |source: &Vec<u8>, destination: &Vec<u8>, ports| wire::Tuple {
        source: source.clone(),
        destination: destination.clone(),
        protocol: 17,
        ports: Some(ports),
        icmp: None,
        zone: None,
    };
    wire::Flow {
        original: Some(tuple(&client, &server, wire::Ports { source: from, destination: to })),
        reply: Some(tuple(&server, &client, wire::Ports { source: to, destination: from })),
        timeout: 600,
        ..wire::Flow::default()
    }
}
