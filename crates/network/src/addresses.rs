//! A machine's IP addresses, as far as its guest tells them to its neighbours.
//!
//! What is learned is a hint. A guest that was silent while it was listened to has told nothing, and one that lies is believed:
//! where a guest may not claim an address, what it claimed must not be announced for it either.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::frame::{
    ARP, ARP_OF_IPV4, ARP_REPLY, ARP_REQUEST, ICMPV6, IPV6, IPV6_HEADER, NEIGHBOR_ADVERTISEMENT,
    NEIGHBOR_SOLICITATION, ON_LINK, ROUTER, ROUTER_ADVERTISEMENT, VLAN,
};
use super::mac::Mac;

/// Most addresses kept of one machine: far more than guests have, and a limit to what one can make this process remember.
pub const MAX_ADDRESSES: usize = 64;

/// The address that a frame tells as its sender's own, if the sender is this MAC.
///
/// That is the sender of an ARP request or reply (but for a probe, RFC 5227 §1.1, which has none), the source of a Neighbor
/// Solicitation (but for one that detects duplicates, RFC 4862 §5.4.2, which has none), and the target of a Neighbor Advertisement.
/// Plain IP traffic tells nothing: a machine that routes sends what is from others.
///
/// The frame may be cut short after what is read of it, and may have one 802.1Q tag. Which VLAN that names is not told here, though
/// the address is of that VLAN only. The checksum is not looked at: a guest leaves it to the hardware, so at a tap it is not
/// there yet.
#[must_use]
pub fn sender(frame: &[u8], mac: Mac) -> Option<IpAddr> {
    let address = match payload(frame, mac)? {
        (ARP, packet) => arp_sender(packet, mac)?.into(),
        (IPV6, packet) => neighbor(packet)?.into(),
        _ => return None,
    };
    is_of_one_machine(address).then_some(address)
}

/// Whether by this frame its sender, if it is this MAC, says that it is an IPv6 router: a Router Advertisement, or a Neighbor
/// Advertisement with the Router flag.
#[must_use]
pub fn is_of_router(frame: &[u8], mac: Mac) -> bool {
    let Some((IPV6, packet)) = payload(frame, mac) else { return false };
    match neighbor_discovery(packet) {
        Some((_, &[ROUTER_ADVERTISEMENT, ..])) => true,
        Some((_, &[NEIGHBOR_ADVERTISEMENT, _, _, _, flags, ..])) => flags & ROUTER != 0,
        _ => false,
    }
}

/// Whether an address can be one machine's own on a network.
pub(super) fn is_of_one_machine(address: IpAddr) -> bool {
    let is_broadcast = address == IpAddr::V4(Ipv4Addr::BROADCAST);
    !(address.is_unspecified() || address.is_loopback() || address.is_multicast() || is_broadcast)
}

/// Ethertype and payload of a frame from this MAC, behind one tag if there is one.
fn payload(frame: &[u8], mac: Mac) -> Option<(u16, &[u8])> {
    let (_destination, rest) = frame.split_first_chunk::<6>()?;
    let (source, rest) = rest.split_first_chunk()?;
    if Mac::from_bytes(*source) != mac {
        return None;
    }
    let (ethertype, rest) = rest.split_first_chunk()?;
    if u16::from_be_bytes(*ethertype) != VLAN {
        return Some((u16::from_be_bytes(*ethertype), rest));
    }
    let (_tag, rest) = rest.split_first_chunk::<2>()?;
    let (ethertype, rest) = rest.split_first_chunk()?;
    Some((u16::from_be_bytes(*ethertype), rest))
}

/// The sender of an ARP packet (RFC 826).
fn arp_sender(packet: &[u8], mac: Mac) -> Option<Ipv4Addr> {
    let (form, rest) = packet.split_first_chunk()?;
    let (operation, rest) = rest.split_first_chunk()?;
    let (hardware, rest) = rest.split_first_chunk()?;
    let address: &[u8; 4] = rest.first_chunk()?;
    let is_known = matches!(u16::from_be_bytes(*operation), ARP_REQUEST | ARP_REPLY);
    // Who answers for another's MAC says nothing of its own.
    (*form == ARP_OF_IPV4 && is_known && Mac::from_bytes(*hardware) == mac).then_some((*address).into())
}

/// Whom a message of neighbour discovery is from.
fn neighbor(packet: &[u8]) -> Option<Ipv6Addr> {
    let (source, message) = neighbor_discovery(packet)?;
    // Type, code, checksum, flags; then the target, of both kinds of message.
    let (head, rest) = message.split_first_chunk::<8>()?;
    let target: &[u8; 16] = rest.first_chunk()?;
    match head[0] {
        NEIGHBOR_SOLICITATION => Some(source),
        NEIGHBOR_ADVERTISEMENT => Some((*target).into()),
        _ => None,
    }
}

/// The source of an IPv6 packet and its ICMPv6 message, if it can be of neighbour discovery (RFC 4861 §7.1: hop limit 255,
/// code 0). Extension headers are not looked behind: nobody sends them there, and fragments are forbidden (RFC 6980).
fn neighbor_discovery(packet: &[u8]) -> Option<(Ipv6Addr, &[u8])> {
    let (header, message) = packet.split_first_chunk::<IPV6_HEADER>()?;
    let [version, _, _, _, length_high, length_low, next_header, hop_limit, rest @ ..] = header;
    let source: &[u8; 16] = rest.first_chunk()?;
    let length = usize::from(u16::from_be_bytes([*length_high, *length_low]));
    let message = message.get(..length).unwrap_or(message);
    let is_valid = version >> 4 == 6 && *next_header == ICMPV6 && *hop_limit == ON_LINK;
    (is_valid && message.get(1) == Some(&0)).then_some(((*source).into(), message))
}

/// The addresses of one machine that were seen most recently, at most [`MAX_ADDRESSES`].
#[derive(Debug, Clone, Default)]
pub struct Addresses {
    /// The most recent first.
    seen: VecDeque<IpAddr>,
    is_router: bool,
}

impl Addresses {
    /// Notes an address, and forgets for it the one not seen for longest if there are too many. Link-local ones are kept as
    /// others are; one that no single machine can have (unspecified, loopback, multicast) is ignored.
    pub fn see(&mut self, address: IpAddr) {
        if !is_of_one_machine(address) {
            return;
        }
        self.seen.retain(|seen| *seen != address);
        self.seen.truncate(MAX_ADDRESSES - 1);
        self.seen.push_front(address);
    }

    /// Notes that the machine is an IPv6 router. From then on its IPv6 addresses are not listed: who
    /// [announces](super::announce::frames) them would take it from its neighbours' default routers.
    /// A router that has sent nothing but solicitations so far is not known for one.
    pub fn see_router(&mut self) {
        self.is_router = true;
    }

    /// The addresses to announce, the most recently seen first.
    #[must_use]
    pub fn list(&self) -> Vec<IpAddr> {
        self.seen.iter().copied().filter(|address| !self.is_router || address.is_ipv4()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::announce::frames;
    use proptest::prelude::*;

    const MAC: Mac = Mac::from_bytes([0x52, 0x54, 0x00, 0x12, 0x34, 0x56]);
    const OTHER: Mac = Mac::from_bytes([0x52, 0x54, 0x00, 0x12, 0x34, 0x57]);

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// "Who has 10.0.0.1? Tell 10.0.0.5", as Linux sends it.
    const ARP_WHO_HAS: [u8; 42] = [
        0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x52, 0x54, 0x00, 0x12, 0x34, 0x56, 0x08, 0x06, // Ethernet
        0x00, 0x01, 0x08, 0x00, 0x06, 0x04, 0x00, 0x01, // request
        0x52, 0x54, 0x00, 0x12, 0x34, 0x56, 10, 0, 0, 5, 0, 0, 0, 0, 0, 0, 10, 0, 0, 1,
    ];

    /// A message of neighbour discovery from MAC, its source `fe80::1`, its target `2001:db8::5`.
    fn discovery(kind: u8, flags: u8) -> Vec<u8> {
        let mut frame = frames(MAC, &[ip("2001:db8::5")])[1].clone();
        frame[22..38].copy_from_slice(&"fe80::1".parse::<Ipv6Addr>().unwrap().octets());
        frame[54] = kind;
        frame[58] = flags;
        frame
    }

    fn tagged(frame: &[u8]) -> Vec<u8> {
        [&frame[..12], &[0x81, 0x00, 0x00, 0x05], &frame[12..]].concat()
    }

    #[test]
    fn arp_tells_its_sender() {
        assert_eq!(sender(&ARP_WHO_HAS, MAC), Some(ip("10.0.0.5")));
        assert_eq!(sender(&tagged(&ARP_WHO_HAS), MAC), Some(ip("10.0.0.5")));
        assert_eq!(sender(&tagged(&tagged(&ARP_WHO_HAS)), MAC), None);
        assert_eq!(sender(&ARP_WHO_HAS, OTHER), None);
        let with = |at: usize, byte: u8| {
            let mut frame = ARP_WHO_HAS;
            frame[at] = byte;
            sender(&frame, MAC)
        };
        assert_eq!(with(21, 2), Some(ip("10.0.0.5")), "a reply");
        assert_eq!(with(21, 3), None, "a reverse request");
        assert_eq!(with(27, 0), None, "another's MAC within");
        assert_eq!(with(28, 224), None, "multicast");
        for at in 14..21 {
            assert_eq!(with(at, 0xee), None, "not Ethernet and IPv4, at {at}");
        }
    }

    #[test]
    fn an_arp_probe_tells_nothing() {
        let mut probe = ARP_WHO_HAS;
        probe[28..32].fill(0);
        assert_eq!(sender(&probe, MAC), None);
    }

    #[test]
    fn neighbour_discovery_tells_what_is_its_senders_own() {
        assert_eq!(
            sender(&discovery(136, 0x60), MAC),
            Some(ip("2001:db8::5")),
            "the target of an advertisement"
        );
        assert_eq!(sender(&discovery(135, 0), MAC), Some(ip("fe80::1")), "the source of a solicitation");
        assert_eq!(sender(&tagged(&discovery(135, 0)), MAC), Some(ip("fe80::1")));
        assert_eq!(sender(&discovery(134, 0), MAC), None);
        assert_eq!(sender(&discovery(137, 0), MAC), None);
        assert_eq!(sender(&discovery(136, 0), OTHER), None);
    }

    #[test]
    fn detection_of_duplicates_tells_nothing() {
        let mut probe = discovery(135, 0);
        probe[22..38].fill(0);
        assert_eq!(sender(&probe, MAC), None);
    }

    #[test]
    fn what_came_through_a_router_or_is_no_discovery_tells_nothing() {
        // Version, next header, hop limit, code.
        for (at, byte) in [(14, 0x40), (20, 17), (21, 254), (55, 1)] {
            let mut frame = discovery(136, 0x20);
            frame[at] = byte;
            assert_eq!(sender(&frame, MAC), None, "byte {at}");
            frame[58] = 0x80;
            assert!(!is_of_router(&frame, MAC), "byte {at}");
        }
        let mut short = discovery(136, 0x20);
        short[19] = 23;
        assert_eq!(sender(&short, MAC), None, "a target that is not in the packet");
    }

    #[test]
    fn plain_traffic_tells_nothing() {
        let mut frame = ARP_WHO_HAS.to_vec();
        frame[12..14].copy_from_slice(&[0x08, 0x00]);
        assert_eq!(sender(&frame, MAC), None);
        frame[12..14].copy_from_slice(&[0x88, 0xcc]);
        assert_eq!(sender(&frame, MAC), None);
    }

    #[test]
    fn a_frame_cut_short_tells_nothing_or_the_same() {
        for (frame, needed) in [(ARP_WHO_HAS.to_vec(), 32), (discovery(136, 0x20), 78)] {
            let whole = sender(&frame, MAC);
            assert!(whole.is_some());
            for length in 0..frame.len() {
                assert_eq!(
                    sender(&frame[..length], MAC),
                    whole.filter(|_| length >= needed),
                    "{length} bytes"
                );
            }
        }
    }

    #[test]
    fn a_router_is_told_by_its_advertisements() {
        assert!(is_of_router(&discovery(134, 0), MAC));
        assert!(is_of_router(&discovery(136, 0xe0), MAC));
        assert!(!is_of_router(&discovery(136, 0x60), MAC));
        assert!(!is_of_router(&discovery(135, 0x80), MAC));
        assert!(!is_of_router(&discovery(134, 0), OTHER));
    }

    #[test]
    fn the_ipv6_addresses_of_a_router_are_not_listed() {
        let mut addresses = Addresses::default();
        addresses.see(ip("fe80::1"));
        addresses.see_router();
        addresses.see(ip("10.0.0.1"));
        addresses.see(ip("2001:db8::1"));
        assert_eq!(addresses.list(), [ip("10.0.0.1")]);
    }

    #[test]
    fn the_most_recent_are_kept() {
        let numbered = |number: usize| IpAddr::from([10, 0, 0, u8::try_from(number).unwrap()]);
        let mut addresses = Addresses::default();
        (0..MAX_ADDRESSES).for_each(|number| addresses.see(numbered(number)));
        addresses.see(numbered(0));
        addresses.see(ip("fe80::1"));
        let list = addresses.list();
        assert_eq!((list.len(), &list[..2]), (MAX_ADDRESSES, &[ip("fe80::1"), numbered(0)][..]));
        assert!(!list.contains(&numbered(1)) && list.contains(&numbered(2)));
    }

    #[test]
    fn what_no_machine_can_have_is_not_kept() {
        let mut addresses = Addresses::default();
        for text in ["0.0.0.0", "127.0.0.1", "224.0.0.1", "255.255.255.255", "::", "::1", "ff02::1"] {
            addresses.see(ip(text));
        }
        assert_eq!(addresses.list(), Vec::<IpAddr>::new());
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(frame in prop::collection::vec(any::<u8>(), 0..200)) {
            let mac = frame.get(6..12).and_then(|bytes| bytes.try_into().ok()).map_or(MAC, Mac::from_bytes);
            let _ = (sender(&frame, mac), is_of_router(&frame, mac));
        }

        #[test]
        fn no_spoiled_frame_makes_it_panic(
            kind in 133u8..138, spoiled in prop::collection::vec((12usize..86, any::<u8>()), 0..4), length in 0usize..=90,
        ) {
            for mut frame in [discovery(kind, 0x20), tagged(&discovery(kind, 0x20)), frames(MAC, &[ip("10.0.0.5")])[1].clone()] {
                for (at, byte) in &spoiled {
                    let at = at % frame.len();
                    frame[at] = *byte;
                }
                frame.truncate(length);
                let _ = (sender(&frame, MAC), is_of_router(&frame, MAC));
            }
        }

        #[test]
        fn every_address_is_listed_once(seen in prop::collection::vec(0u8..100, 0..300)) {
            let mut addresses = Addresses::default();
            seen.iter().for_each(|number| addresses.see(IpAddr::from([10, 0, 0, *number])));
            let list = addresses.list();
            let distinct: std::collections::BTreeSet<_> = list.iter().collect();
            let all: std::collections::BTreeSet<_> = seen.iter().collect();
            prop_assert_eq!(list.len(), distinct.len());
            prop_assert_eq!(list.len(), all.len().min(MAX_ADDRESSES));
        }
    }
}
