//! The numbers of the frames that are made, read and filtered here.

/// Ethertype of the Address Resolution Protocol (RFC 826).
pub(super) const ARP: u16 = 0x0806;
/// Ethertype of the Reverse Address Resolution Protocol (RFC 903).
pub(super) const RARP: u16 = 0x8035;
/// Ethertype of IPv6 (RFC 2464).
pub(super) const IPV6: u16 = 0x86DD;
/// Ethertype of a VLAN tag (IEEE 802.1Q).
pub(super) const VLAN: u16 = 0x8100;

/// Bytes of an Ethernet header: two addresses and the ethertype.
pub(super) const ETHERNET_HEADER: usize = 14;

/// How an ARP packet begins that is of Ethernet and IPv4: hardware type 1, protocol type 0x0800, and the lengths of the addresses.
pub(super) const ARP_OF_IPV4: [u8; 6] = [0, 1, 8, 0, 6, 4];
/// ARP operation.
pub(super) const ARP_REQUEST: u16 = 1;
/// ARP operation.
pub(super) const ARP_REPLY: u16 = 2;
/// RARP operation.
pub(super) const RARP_REQUEST: u16 = 3;

/// Bytes of an IPv6 header without extensions.
pub(super) const IPV6_HEADER: usize = 40;
/// Where in it the number of what follows is.
pub(super) const IPV6_NEXT_HEADER: usize = 6;
/// The number of ICMPv6 (RFC 4443) there.
pub(super) const ICMPV6: u8 = 58;
/// The hop limit of all neighbour discovery: a packet that came through a router has less (RFC 4861 §3.1).
pub(super) const ON_LINK: u8 = 255;

/// ICMPv6 type (RFC 4861 §4.2).
pub(super) const ROUTER_ADVERTISEMENT: u8 = 134;
/// ICMPv6 type (RFC 4861 §4.3).
pub(super) const NEIGHBOR_SOLICITATION: u8 = 135;
/// ICMPv6 type (RFC 4861 §4.4).
pub(super) const NEIGHBOR_ADVERTISEMENT: u8 = 136;

/// Flag of a Neighbor Advertisement, in its fifth byte: the sender is a router.
pub(super) const ROUTER: u8 = 0x80;
/// Flag, there too: what was known before is overridden.
pub(super) const OVERRIDE: u8 = 0x20;
