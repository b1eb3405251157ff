//! Frames for a guest that moves: diverted at its tap, carried, given to it at its new place or given back.

use std::io::Read;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use network::PacketSocket;
use network::announce;
use network::destination::NetworkDestination;
use network::diversion::Diversion;
use network::mac::Mac;
use network::mark;
use network::source::NetworkSource;
use network::tap::{OwnTap, QemuQueue};

use super::{GUEST, OTHER, between_two_interfaces, ip, wait_until};

/// Bytes of `struct virtio_net_hdr`.
const HEADER: usize = 10;

/// An ethertype for experiments (IEEE 802).
const TYPE: [u8; 2] = [0x88, 0xb5];

/// A tap that is up and on which the kernel says nothing of its own.
fn tap() -> OwnTap {
    let tap = OwnTap::make().unwrap();
    // As an agent does: a frame of the host's own would count as one for the guest.
    std::fs::write(format!("/proc/sys/net/ipv6/conf/{}/disable_ipv6", tap.name()), "1").unwrap();
    ip(&format!("link set dev {} addrgenmode none up", tap.name()));
    tap
}

fn index(tap: &OwnTap) -> u32 {
    let socket = PacketSocket::open(tap.name()).unwrap();
    rustix::net::netdevice::name_to_index(&socket, tap.name()).unwrap()
}

/// A frame with a number in it.
fn frame(to: Mac, number: u8) -> Vec<u8> {
    let mut frame = [&to.bytes()[..], &OTHER.bytes(), &TYPE, &[number]].concat();
    frame.resize(60, 0);
    frame
}

/// The number of the next frame of ours at a tap; none if there is none now. A frame of anybody else's is passed over.
fn next(tap: &OwnTap) -> Option<u8> {
    let mut buffer = [0; 2000];
    while let Some(length) = tap.next(&mut buffer).unwrap() {
        let frame = &buffer[HEADER..length];
        if frame[12..14] == TYPE {
            return Some(frame[14]);
        }
    }
    None
}

/// Waits for that many frames at a tap, and gives back their numbers.
fn numbers(tap: &OwnTap, count: usize) -> Vec<u8> {
    let mut numbers = Vec::new();
    wait_until("the frames have come", || {
        numbers.extend(std::iter::from_fn(|| next(tap)));
        numbers.len() >= count
    });
    numbers
}

/// The number of the next frame on a stream; none where it says that the network has turned.
fn carried(stream: &mut UnixStream) -> Option<u8> {
    let mut head = [0; 5];
    stream.read_exact(&mut head).unwrap();
    let mut content = vec![0; u32::from_le_bytes(head[1..].try_into().unwrap()) as usize];
    stream.read_exact(&mut content).unwrap();
    content.get(HEADER + 14).copied()
}

fn stream() -> (UnixStream, UnixStream) {
    let (to, from) = UnixStream::pair().unwrap();
    from.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    (to, from)
}

fn source(tap: OwnTap, stream: UnixStream) -> NetworkSource {
    let abort = stream.try_clone().unwrap();
    let abort = move || drop(abort.shutdown(Shutdown::Both));
    NetworkSource::start(vec![(tap, Some(GUEST))], stream, abort).unwrap()
}

#[test]
fn a_diversion_takes_effect_between_two_frames_and_ends_with_who_made_it() {
    between_two_interfaces(|| {
        let (guest, elsewhere) = (tap(), tap());
        let network = PacketSocket::open(guest.name()).unwrap();
        let send = |number| network.send(&frame(GUEST, number)).unwrap();
        let diversion = Diversion::prepare(index(&guest), index(&elsewhere)).unwrap();
        send(0);
        diversion.begin().unwrap();
        send(1);
        send(2);
        let mut given = vec![0; HEADER];
        given.extend(frame(GUEST, 3));
        PacketSocket::to_guest(guest.name()).unwrap().send(&given).unwrap();
        diversion.end().unwrap();
        send(4);
        diversion.begin().unwrap();
        drop(diversion);
        send(5);
        assert_eq!(numbers(&guest, 4), [0, 3, 4, 5]);
        assert_eq!(numbers(&elsewhere, 2), [1, 2]);
    });
}

#[test]
fn what_comes_from_the_pause_on_is_carried_in_order_and_then_only_what_is_for_the_guest() {
    between_two_interfaces(|| {
        let diverted = tap();
        let network = PacketSocket::open(diverted.name()).unwrap();
        let send = |to, number| network.send(&frame(to, number)).unwrap();
        let everybody = Mac::from_bytes([0xff; 6]);
        let (to, mut from) = stream();
        let source = source(diverted, to);
        source.begin();
        send(GUEST, 0);
        send(everybody, 1);
        source.is_paused(&[Vec::new()]);
        send(GUEST, 2);
        assert_eq!([0; 3].map(|_| carried(&mut from)), [Some(0), Some(1), Some(2)]);
        source.has_gone();
        send(everybody, 3);
        send(OTHER, 4);
        network.send(&announce::frames(GUEST, &[])[0]).unwrap();
        send(GUEST, 5);
        assert_eq!([0; 2].map(|_| carried(&mut from)), [None, Some(5)], "the network has turned");
        let done = source.finish();
        assert_eq!((done.forwarded, done.dropped), (4, 0), "{done:?}");
        assert_eq!(from.read(&mut [0]).unwrap(), 0, "and that was all");
    });
}

#[test]
fn what_a_guest_does_not_take_goes_with_it_and_the_mark_behind_it_does_not() {
    between_two_interfaces(|| {
        let (guest, diverted) = (tap(), tap());
        let network = PacketSocket::open(guest.name()).unwrap();
        let send = |number| network.send(&frame(GUEST, number)).unwrap();
        let diversion = Diversion::prepare(index(&guest), index(&diverted)).unwrap();
        let queues = [QemuQueue::all(std::process::id(), guest.name()).unwrap()];
        assert_eq!(queues[0].len(), 1);
        let (to, mut from) = stream();
        let source = source(diverted, to);
        (0..3).for_each(send);
        source.begin();
        diversion.begin().unwrap();
        mark::send(&PacketSocket::to_guest(guest.name()).unwrap()).unwrap();
        send(3);
        // It takes one, and then no more.
        assert_eq!(next(&guest), Some(0));
        assert!(!queues[0][0].is_empty());
        source.take_over(&queues);
        assert!(queues[0][0].is_empty());
        source.is_paused(&queues);
        send(4);
        assert_eq!([0; 4].map(|_| carried(&mut from)), [Some(1), Some(2), Some(3), Some(4)]);
    });
}

#[test]
fn a_guest_that_stays_gets_what_was_kept_from_it_though_nobody_reads_what_was_carried() {
    between_two_interfaces(|| {
        let (guest, diverted) = (tap(), tap());
        let network = PacketSocket::open(diverted.name()).unwrap();
        let (to, _nobody_reads) = stream();
        let source = source(diverted, to);
        source.begin();
        source.is_paused(&[Vec::new()]);
        // More than the stream takes.
        let mut large = frame(GUEST, 7);
        large.resize(1500, 0);
        for _ in 0..400 {
            network.send(&large).unwrap();
        }
        source.has_stayed(vec![PacketSocket::to_guest(guest.name()).unwrap()]);
        network.send(&frame(GUEST, 8)).unwrap();
        let got = numbers(&guest, 401);
        assert!(got[..400].iter().all(|number| *number == 7) && got[400..] == [8], "{got:?}");
        assert_eq!(source.finish().dropped, 0);
    });
}

#[test]
fn what_the_network_sends_to_the_new_place_comes_after_what_it_had_sent_to_the_old_one() {
    between_two_interfaces(|| {
        let (guest, own) = (tap(), tap());
        let diversion = Diversion::prepare(index(&guest), index(&own)).unwrap();
        diversion.begin().unwrap();
        let (mut to, from) = stream();
        let destination = NetworkDestination::start(from).unwrap();
        let mut carry = |number| {
            let content = [&[0; HEADER][..], &frame(GUEST, number)].concat();
            let length = u32::try_from(content.len()).unwrap().to_le_bytes();
            std::io::Write::write_all(&mut to, &[&[0][..], &length, &content].concat()).unwrap();
        };
        carry(0);
        carry(1);
        PacketSocket::open(guest.name()).unwrap().send(&frame(GUEST, 9)).unwrap();
        assert_eq!(next(&guest), None);
        let held_back = destination.play(vec![PacketSocket::to_guest(guest.name()).unwrap()], vec![own]);
        carry(2);
        drop(to);
        let played = destination.finish();
        assert_eq!((played.delivered, played.dropped), (3, 0), "{played:?}");
        assert_eq!(numbers(&guest, 3), [0, 1, 2]);
        assert_eq!(next(&guest), None);
        held_back.hold();
        assert_eq!(numbers(&guest, 1), [9]);
        diversion.end().unwrap();
        PacketSocket::open(guest.name()).unwrap().send(&frame(GUEST, 10)).unwrap();
        assert_eq!(numbers(&guest, 1), [10]);
    });
}
