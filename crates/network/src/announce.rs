//! The frames by which the network learns where a machine is now.
//!
//! They are sent by the destination at the hand-over, in the machine's name: the source address of every one of them is the
//! machine's MAC, from which each switch on the way learns the new port. For that alone the first would do, which needs no IP
//! address. The others reach what looks at addresses too: a host, router or fabric that keeps for itself where an address is.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use super::addresses::is_of_one_machine;
use super::frame::{
    ARP, ARP_OF_IPV4, ARP_REQUEST, ICMPV6, IPV6, NEIGHBOR_ADVERTISEMENT, ON_LINK, OVERRIDE, RARP,
    RARP_REQUEST,
};
use super::mac::Mac;

/// When the frames are sent again, counted from the first time: within a second, as QEMU repeats its own, since one may be lost
/// while switches relearn.
pub const REPEATED: [Duration; 4] = [
    Duration::from_millis(50),
    Duration::from_millis(150),
    Duration::from_millis(350),
    Duration::from_millis(750),
];

/// The shortest Ethernet frame in bytes, without its check sequence, which the hardware adds.
const SHORTEST: usize = 60;

/// Bytes of a Neighbor Advertisement with one option.
const ADVERTISEMENT: u16 = 32;

const BROADCAST: Mac = Mac::from_bytes([0xff; 6]);

/// All nodes of the link, `ff02::1`.
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
/// Where a frame to [`ALL_NODES`] goes (RFC 2464 §7).
const ALL_NODES_MAC: Mac = Mac::from_bytes([0x33, 0x33, 0, 0, 0, 1]);

/// What announces a machine that has this MAC address and these IP addresses: a RARP request, then for every address, in the order
/// given, an ARP announcement or an unsolicited Neighbor Advertisement.
///
/// The advertisements say that the machine is no router, on which neighbours who took it for one remove it from their default
/// routers (RFC 4861 §7.2.5); so no IPv6 address of a router must be given. Addresses that no single machine can have
/// (unspecified, loopback, multicast) are left out. The frames are untagged.
#[must_use]
pub fn frames(mac: Mac, addresses: &[IpAddr]) -> Vec<Vec<u8>> {
    let of_address = |address: &IpAddr| match *address {
        IpAddr::V4(address) => arp_announcement(mac, address),
        IpAddr::V6(address) => neighbor_advertisement(mac, address),
    };
    let told = addresses.iter().filter(|address| is_of_one_machine(**address));
    std::iter::once(rarp_request(mac)).chain(told.map(of_address)).collect()
}

/// "Which IP address has this MAC?" (RFC 903), asked of everybody. Byte for byte what QEMU's `announce_self` sends.
fn rarp_request(mac: Mac) -> Vec<u8> {
    let nobody = Ipv4Addr::UNSPECIFIED;
    ethernet(BROADCAST, mac, RARP, &arp(RARP_REQUEST, (mac, nobody), (mac.bytes(), nobody)))
}

/// An ARP announcement (RFC 5227 §3), also known as gratuitous ARP: a request, since some stacks ignore a reply that nobody asked
/// for, in which sender and target are the same address.
fn arp_announcement(mac: Mac, address: Ipv4Addr) -> Vec<u8> {
    ethernet(BROADCAST, mac, ARP, &arp(ARP_REQUEST, (mac, address), ([0; 6], address)))
}

/// A packet of ARP (RFC 826) or RARP, which has the same form.
fn arp(operation: u16, sender: (Mac, Ipv4Addr), target: ([u8; 6], Ipv4Addr)) -> Vec<u8> {
    let mut packet = ARP_OF_IPV4.to_vec();
    packet.extend(operation.to_be_bytes());
    packet.extend(sender.0.bytes());
    packet.extend(sender.1.octets());
    packet.extend(target.0);
    packet.extend(target.1.octets());
    packet
}

/// An unsolicited Neighbor Advertisement (RFC 4861 §4.4, §7.2.6) to all nodes, which overrides what they knew.
fn neighbor_advertisement(mac: Mac, address: Ipv6Addr) -> Vec<u8> {
    let mut message = vec![NEIGHBOR_ADVERTISEMENT, 0, 0, 0, OVERRIDE, 0, 0, 0];
    message.extend(address.octets());
    // Option 2, Target Link-Layer Address; its length is in units of eight bytes.
    message.extend([2, 1]);
    message.extend(mac.bytes());

    let checksum = icmpv6_checksum(address, ALL_NODES, &message);
    message[2..4].copy_from_slice(&checksum.to_be_bytes());

    // Version 6, no traffic class, no flow label.
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend(ADVERTISEMENT.to_be_bytes());
    packet.extend([ICMPV6, ON_LINK]);
    packet.extend(address.octets());
    packet.extend(ALL_NODES.octets());
    packet.extend(message);
    ethernet(ALL_NODES_MAC, mac, IPV6, &packet)
}

/// The Internet checksum (RFC 1071) of a message, whose own checksum is zero as yet, and the pseudo-header before it
/// (RFC 8200 §8.1).
fn icmpv6_checksum(source: Ipv6Addr, destination: Ipv6Addr, message: &[u8]) -> u16 {
    let words = |bytes: &[u8]| -> u64 {
        bytes.chunks(2).map(|word| u64::from(word[0]) << 8 | u64::from(*word.get(1).unwrap_or(&0))).sum()
    };
    let mut sum = words(&source.octets()) + words(&destination.octets()) + words(message);
    sum += message.len() as u64 + u64::from(ICMPV6);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn ethernet(destination: Mac, source: Mac, ethertype: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = [&destination.bytes(), &source.bytes(), &ethertype.to_be_bytes()[..], payload].concat();
    frame.resize(frame.len().max(SHORTEST), 0);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addresses::sender;
    use proptest::prelude::*;

    const MAC: Mac = Mac::from_bytes([0x52, 0x54, 0x00, 0x12, 0x34, 0x56]);

    fn bytes(hex: &str) -> Vec<u8> {
        let digits: Vec<u32> = hex.chars().filter_map(|digit| digit.to_digit(16)).collect();
        digits.chunks(2).map(|pair| (pair[0] << 4 | pair[1]) as u8).collect()
    }

    fn padded(hex: &str) -> Vec<u8> {
        let mut frame = bytes(hex);
        frame.resize(60, 0);
        frame
    }

    #[test]
    fn the_first_is_what_qemu_sends() {
        let expected = padded(
            "ffffffffffff 525400123456 8035  0001 0800 06 04 0003  525400123456 00000000  525400123456 00000000",
        );
        assert_eq!(frames(MAC, &[]), [expected]);
    }

    #[test]
    fn an_ipv4_address_is_announced_by_a_request_for_itself() {
        let expected = padded(
            "ffffffffffff 525400123456 0806  0001 0800 06 04 0001  525400123456 c0a8010a  000000000000 c0a8010a",
        );
        assert_eq!(frames(MAC, &["192.168.1.10".parse().unwrap()])[1..], [expected]);
    }

    /// Both were made by a program that shares nothing with this one (it takes the sum of all words for what it is, the number
    /// they spell modulo 65,535), and tcpdump says of both "icmp6 sum ok".
    #[test]
    fn an_ipv6_address_is_announced_to_all_nodes_with_a_right_checksum() {
        let header = "333300000001 525400123456 86dd  60000000 0020 3a ff";
        let global = format!(
            "{header} 20010db8000000000000000000000005 ff020000000000000000000000000001
            88 00 7467 20000000 20010db8000000000000000000000005  02 01 525400123456"
        );
        let link_local = format!(
            "{header} fe80000000000000505400fffe123456 ff020000000000000000000000000001
            88 00 cb68 20000000 fe80000000000000505400fffe123456  02 01 525400123456"
        );
        let addresses = ["2001:db8::5".parse().unwrap(), "fe80::5054:ff:fe12:3456".parse().unwrap()];
        assert_eq!(frames(MAC, &addresses)[1..], [bytes(&global), bytes(&link_local)]);
    }

    #[test]
    fn what_no_machine_can_have_is_not_announced() {
        let addresses = ["0.0.0.0", "127.0.0.1", "224.0.0.1", "255.255.255.255", "::", "::1", "ff02::1"]
            .map(|text| text.parse().unwrap());
        assert_eq!(frames(MAC, &addresses).len(), 1);
    }

    proptest! {
        #[test]
        fn what_is_announced_is_understood(mac in any::<[u8; 6]>(), addresses in prop::collection::vec(any::<IpAddr>(), 0..8)) {
            let mac = Mac::from_bytes(mac);
            let frames = frames(mac, &addresses);
            prop_assert!(frames.iter().all(|frame| frame.len() >= 60));
            prop_assert_eq!(sender(&frames[0], mac), None);
            let understood: Vec<_> = frames[1..].iter().map(|frame| sender(frame, mac)).collect();
            let told: Vec<_> = addresses.into_iter().filter(|address| is_of_one_machine(*address)).map(Some).collect();
            prop_assert_eq!(understood, told);
        }

        /// A receiver's check: with the checksum in it, the sum of all words is 0xffff, which a number modulo 65,535 shows as 0.
        #[test]
        fn every_checksum_is_right(address in any::<std::net::Ipv6Addr>(), mac in any::<[u8; 6]>()) {
            let frame = neighbor_advertisement(Mac::from_bytes(mac), address);
            let covered = [&frame[22..], &32u32.to_be_bytes(), &58u32.to_be_bytes()].concat();
            let remainder = covered.iter().fold(0u64, |rest, byte| (rest << 8 | u64::from(*byte)) % 0xffff);
            prop_assert_eq!(remainder, 0);
        }
    }
}
