//! Frames at a real interface: a pair of virtual Ethernet devices, in a network namespace of the test's own, in which what is
//! sent into one end arrives at the other. Needs root, and is skipped without.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod frames;

use std::fs::File;
use std::io::{Read, Write};
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use libc::sock_filter;
use network::PacketSocket;
use network::announce::frames;
use network::mac::Mac;
use network::snoop::{Side, Snoop};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::thread::{UnshareFlags, unshare_unsafe};

const GUEST: Mac = Mac::from_bytes([0x52, 0x54, 0x00, 0x12, 0x34, 0x56]);
const OTHER: Mac = Mac::from_bytes([0x52, 0x54, 0x00, 0x12, 0x34, 0x57]);

/// Runs a test on a thread in a namespace of its own, which ends with it, and with it the interfaces: `host`, which is to the
/// tests the host's end of a tap, and `guest`.
fn between_two_interfaces(test: impl FnOnce() + Send + 'static) {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: needs root, for a network namespace");
        return;
    }
    // Descriptors are the whole process's, and interfaces of two namespaces can have the same name: one test at a time.
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let thread = std::thread::spawn(|| {
        // SAFETY: a network namespace is of this thread alone; no descriptor or other state of the process is unshared.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
        ip("link add name host type veth peer name guest");
        for interface in ["host", "guest"] {
            // Else the kernel sends of its own.
            ip(&format!("link set dev {interface} addrgenmode none up"));
        }
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn ip(arguments: &str) {
    assert!(Command::new("ip").args(arguments.split(' ')).status().unwrap().success(), "ip {arguments}");
}

fn addresses<const N: usize>(texts: [&str; N]) -> Vec<IpAddr> {
    texts.map(|text| text.parse().unwrap()).to_vec()
}

/// What announces one address, without the RARP request.
fn frame_of(mac: Mac, address: &str) -> Vec<u8> {
    frames(mac, &addresses([address])).pop().unwrap()
}

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !holds() {
        assert!(begin.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whether a frame is there. What was sent into the other end before is, at the latest after a moment.
fn is_ready(socket: &PacketSocket, within: Duration) -> bool {
    let within = Timespec::try_from(within).unwrap();
    poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&within)).unwrap() == 1
}

#[test]
fn what_a_guest_tells_is_learned() {
    between_two_interfaces(|| {
        let snoop = Snoop::start("host", GUEST, Side::Guest).unwrap();
        let guest = PacketSocket::open("guest").unwrap();
        let told = addresses(["10.0.0.5", "2001:db8::5", "fe80::5054:ff:fe12:3456"]);
        for frame in frames(GUEST, &told) {
            guest.send(&frame).unwrap();
        }
        wait_until("all are learned", || snoop.addresses().len() == 3);
        assert_eq!(snoop.addresses(), [told[2], told[1], told[0]]);
    });
}

#[test]
fn what_a_guest_tells_by_a_macvtap_is_learned_as_it_leaves() {
    between_two_interfaces(|| {
        let snoop = Snoop::start("host", GUEST, Side::Own).unwrap();
        let (guest, neighbour) = (PacketSocket::open("host").unwrap(), PacketSocket::open("guest").unwrap());
        neighbour.send(&frame_of(OTHER, "10.0.0.6")).unwrap();
        guest.send(&frame_of(GUEST, "10.0.0.5")).unwrap();
        wait_until("it is learned", || !snoop.addresses().is_empty());
        assert_eq!(snoop.addresses(), addresses(["10.0.0.5"]));
    });
}

/// The guest's end of a new tap, as QEMU has it.
fn open_tap(name: &[u8]) -> File {
    let tap = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
    // SAFETY: an `ifreq` is numbers and arrays of them, of which any may be zero.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as i16;
    // SAFETY: TUNSETIFF reads and writes one `ifreq`.
    assert_eq!(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &raw mut request) }, 0);
    tap
}

#[test]
fn at_a_tap_the_guest_is_heard_and_what_is_sent_reaches_it() {
    between_two_interfaces(|| {
        let mut guest = open_tap(b"tap");
        ip("link set dev tap addrgenmode none up");
        let snoop = Snoop::start("tap", GUEST, Side::Guest).unwrap();
        let host = PacketSocket::open("tap").unwrap();

        let to_guest = frame_of(GUEST, "10.0.0.9");
        host.send(&to_guest).unwrap();
        let mut buffer = [0; 2000];
        let length = guest.read(&mut buffer).unwrap();
        assert_eq!(buffer[..length], to_guest);

        let told = addresses(["10.0.0.5", "2001:db8::5"]);
        for frame in frames(GUEST, &told) {
            guest.write_all(&frame).unwrap();
        }
        wait_until("both are learned", || snoop.addresses().len() == 2);
        assert_eq!(snoop.addresses(), [told[1], told[0]]);
    });
}

#[test]
fn what_is_not_told_by_the_guest_in_its_own_network_is_not_learned() {
    between_two_interfaces(|| {
        let snoop = Snoop::start("host", GUEST, Side::Guest).unwrap();
        let guest = PacketSocket::open("guest").unwrap();
        let host = PacketSocket::open("host").unwrap();

        host.send(&frame_of(GUEST, "10.0.0.1")).unwrap(); // on its way to the guest
        guest.send(&frame_of(OTHER, "10.0.0.2")).unwrap();
        let frame = frame_of(GUEST, "10.0.0.3");
        guest.send(&[&frame[..12], &[0x81, 0x00, 0x00, 0x07], &frame[12..]].concat()).unwrap(); // of VLAN 7
        // Of no VLAN, but with a priority.
        let frame = frame_of(GUEST, "10.0.0.4");
        guest.send(&[&frame[..12], &[0x81, 0x00, 0xe0, 0x00], &frame[12..]].concat()).unwrap();
        guest.send(&frame_of(GUEST, "10.0.0.5")).unwrap();

        let last = addresses(["10.0.0.5", "10.0.0.4"]);
        wait_until("the last is learned", || snoop.addresses().first() == last.first());
        assert_eq!(snoop.addresses(), last);
    });
}

#[test]
fn a_router_that_says_so_is_not_announced_as_a_host() {
    between_two_interfaces(|| {
        let snoop = Snoop::start("host", GUEST, Side::Guest).unwrap();
        let guest = PacketSocket::open("guest").unwrap();
        guest.send(&frame_of(GUEST, "10.0.0.5")).unwrap();
        guest.send(&frame_of(GUEST, "fe80::1")).unwrap();
        wait_until("both are learned", || snoop.addresses().len() == 2);
        let mut advertisement = frame_of(GUEST, "fe80::1");
        advertisement[58] |= 0x80;
        guest.send(&advertisement).unwrap();
        wait_until("only IPv4 is left", || snoop.addresses() == addresses(["10.0.0.5"]));
    });
}

#[test]
fn an_interface_that_was_down_is_listened_to_when_it_is_up() {
    between_two_interfaces(|| {
        ip("link set dev host down");
        let snoop = Snoop::start("host", GUEST, Side::Guest).unwrap();
        let guest = PacketSocket::open("guest").unwrap();
        for address in ["10.0.0.5", "10.0.0.6"] {
            ip("link set dev host up");
            // The guest's end has a carrier a moment after the host's is up; what it sends before is lost.
            let frame = frame_of(GUEST, address);
            wait_until("it is learned", || {
                let _ = guest.send(&frame);
                snoop.addresses().first() == addresses([address]).first()
            });
            ip("link set dev host down");
        }
    });
}

#[test]
fn a_removed_interface_is_survived() {
    between_two_interfaces(|| {
        let snoop = Snoop::start("host", GUEST, Side::Guest).unwrap();
        let guest = PacketSocket::open("guest").unwrap();
        guest.send(&frame_of(GUEST, "10.0.0.5")).unwrap();
        wait_until("it is learned", || snoop.addresses().len() == 1);
        ip("link delete dev host");
        assert!(guest.send(&frame_of(GUEST, "10.0.0.6")).is_err());
        assert_eq!(snoop.addresses(), addresses(["10.0.0.5"]));
        drop(snoop);
        let error = Snoop::start("host", GUEST, Side::Guest).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENODEV));
    });
}

#[test]
fn an_interface_is_promiscuous_only_while_it_is_listened_to() {
    let is_promiscuous = || {
        let shown = Command::new("ip").args(["-details", "link", "show", "dev", "host"]).output().unwrap();
        String::from_utf8(shown.stdout).unwrap().contains("promiscuity 1")
    };
    between_two_interfaces(move || {
        let snoop = Snoop::start("host", GUEST, Side::Guest).unwrap();
        assert!(is_promiscuous());
        drop(snoop);
        assert!(!is_promiscuous());
    });
}

#[test]
fn a_frame_arrives_as_it_was_sent() {
    between_two_interfaces(|| {
        let [from, to] = ["guest", "host"].map(|interface| PacketSocket::open(interface).unwrap());
        from.set_qdisc_bypass().unwrap();
        from.send(&frame_of(OTHER, "10.0.0.1")).unwrap();
        assert!(!is_ready(&to, Duration::from_millis(100)), "it does not listen yet");
        to.listen().unwrap();
        // To another's address: received all the same.
        let mut frame: Vec<u8> = (0..1514).map(|byte| byte as u8).collect();
        frame[..14].copy_from_slice(&[0x52, 0x54, 0, 0, 0, 9, 0x52, 0x54, 0, 0, 0, 8, 0x88, 0xb5]);
        from.send(&frame).unwrap();
        assert!(is_ready(&to, Duration::from_secs(20)));
        let mut buffer = [0; 2000];
        let length = to.recv(&mut buffer).unwrap();
        assert_eq!(buffer[..length], frame);

        to.send(&frame).unwrap();
        assert!(!is_ready(&to, Duration::from_millis(100)), "what goes out is not received");
        let too_long = from.send(&[0; 1515]).unwrap_err();
        assert_eq!(too_long.raw_os_error(), Some(libc::EMSGSIZE));
    });
}

#[test]
fn a_filter_lets_nothing_else_pass() {
    between_two_interfaces(|| {
        let [from, to] = ["guest", "host"].map(|interface| PacketSocket::open(interface).unwrap());
        let returns = |length| sock_filter { code: 0x06, jt: 0, jf: 0, k: length };
        to.set_filter(&[returns(0)]).unwrap();
        to.listen().unwrap();
        from.send(&frame_of(GUEST, "10.0.0.5")).unwrap();
        assert!(!is_ready(&to, Duration::from_millis(100)));
        to.set_filter(&[returns(20)]).unwrap();
        from.send(&frame_of(GUEST, "10.0.0.5")).unwrap();
        assert!(is_ready(&to, Duration::from_secs(20)));
        assert_eq!(to.recv(&mut [0; 100]).unwrap(), 20);
        assert_eq!(to.set_filter(&[]).unwrap_err().raw_os_error(), Some(libc::EINVAL));
    });
}
