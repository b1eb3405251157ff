//! What is carried of an entry of the connection tracking.

use std::net::IpAddr;

/// A connection as the kernel tracks it, and as much of it as makes it one that is known at another host too.
///
/// Not carried: the helper and what it expects (FTP, SIP: connections that are already there are flows of their own and do come
/// along), adjusted sequence numbers, counters, and whether a flow table took it over. Bits of the status that say these are left
/// out too. That it is confirmed goes without saying: others are not in the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flow {
    /// As the first packet had it.
    pub(super) original: Tuple,
    /// As answers arrive. With address translation it is not the mirror image of `original`.
    pub(super) reply: Tuple,
    /// Zone of both directions; 0 where there are none.
    pub(super) zone: u16,
    /// Packets have been seen in both directions.
    pub(super) seen_reply: bool,
    /// It is not dropped early when the table is full.
    pub(super) assured: bool,
    /// Seconds that it had left.
    pub(super) timeout: u32,
    pub(super) mark: u32,
    pub(super) labels: Option<[u8; LABELS]>,
    pub(super) tcp: Option<Tcp>,
}

/// Bytes of labels: 128 bits (`XT_CONNLABEL_MAXBIT`).
pub(super) const LABELS: usize = 16;

/// One direction of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tuple {
    pub(super) source: IpAddr,
    /// Of the same family.
    pub(super) destination: IpAddr,
    /// Of IP, as in its header.
    pub(super) protocol: u8,
    pub(super) ends: Ends,
    /// Zone of this direction alone.
    pub(super) zone: Option<u16>,
}

/// An address with what tells flows at it from each other, where there is such.
pub(super) type End = (IpAddr, Option<u16>);

/// What tells flows between two addresses from each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ends {
    /// Ports, or the keys of GRE.
    Ports { source: u16, destination: u16 },
    /// Of an echo and the like; both versions of ICMP.
    Icmp { id: u16, kind: u8, code: u8 },
    /// Nothing, for protocols that the kernel does not look into.
    Neither,
}

/// What the kernel keeps of a TCP connection besides, and gives out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tcp {
    /// `enum tcp_conntrack`.
    pub(super) state: u8,
    pub(super) original: TcpEnd,
    pub(super) reply: TcpEnd,
}

/// What a sender was seen to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct TcpEnd {
    /// `IP_CT_TCP_FLAG_…`, those of [`TcpEnd::CARRIED`].
    pub(super) flags: u8,
    /// Its windows are to be shifted left by so many bits.
    pub(super) window_scale: u8,
}

impl TcpEnd {
    pub(super) const WINDOW_SCALE: u8 = 0x01;
    const SACK_PERMITTED: u8 = 0x02;
    const CLOSE_INITIATED: u8 = 0x04;
    pub(super) const BE_LIBERAL: u8 = 0x08;
    /// The other flags are about the last packets seen, which the kernel does not give out.
    pub(super) const CARRIED: u8 =
        Self::WINDOW_SCALE | Self::SACK_PERMITTED | Self::CLOSE_INITIATED | Self::BE_LIBERAL;
    /// The largest shift of RFC 7323.
    pub(super) const MAX_SCALE: u8 = 14;
}

pub(super) const TCP: u8 = libc::IPPROTO_TCP as u8;
pub(super) const ICMP: u8 = libc::IPPROTO_ICMP as u8;
pub(super) const ICMPV6: u8 = libc::IPPROTO_ICMPV6 as u8;
pub(super) const SCTP: u8 = libc::IPPROTO_SCTP as u8;

impl Flow {
    /// Whether one of its four addresses is one of these.
    #[must_use]
    pub fn concerns(&self, addresses: &[IpAddr]) -> bool {
        let ends = [&self.original, &self.reply];
        ends.iter().any(|tuple| addresses.contains(&tuple.source) || addresses.contains(&tuple.destination))
    }

    /// What the direction back would be without address translation.
    pub(super) fn untranslated_reply(&self) -> Tuple {
        let ends = match (self.original.ends, self.reply.ends) {
            (Ends::Ports { source, destination }, _) => {
                Ends::Ports { source: destination, destination: source }
            }
            // Whose kind is that of the answer.
            (Ends::Icmp { id, .. }, Ends::Icmp { kind, code, .. }) => Ends::Icmp { id, kind, code },
            (other, _) => other,
        };
        Tuple { source: self.original.destination, destination: self.original.source, ends, ..self.reply }
    }

    /// The source that it is given on its way, where that is not its own.
    pub(super) fn translated_source(&self) -> Option<End> {
        let given = self.reply.destination_end();
        (given != self.untranslated_reply().destination_end()).then_some(given)
    }

    /// The destination that it is given on its way, where that is not the one that it was sent to.
    pub(super) fn translated_destination(&self) -> Option<End> {
        let given = self.reply.source_end();
        (given != self.untranslated_reply().source_end()).then_some(given)
    }

    /// Whether all of it fits together; the kernel's own entries do.
    pub(super) fn is_consistent(&self) -> bool {
        let (original, reply) = (&self.original, &self.reply);
        let family = original.source.is_ipv4();
        let addresses = [original.destination, reply.source, reply.destination];
        let same_kind = matches!(
            (original.ends, reply.ends),
            (Ends::Ports { .. }, Ends::Ports { .. })
                | (Ends::Icmp { .. }, Ends::Icmp { .. })
                | (Ends::Neither, Ends::Neither)
        );
        let scales = |tcp: Tcp| tcp.original.window_scale.max(tcp.reply.window_scale) <= TcpEnd::MAX_SCALE;
        addresses.iter().all(|address| address.is_ipv4() == family)
            && original.protocol == reply.protocol
            && same_kind
            && matches!(original.ends, Ends::Icmp { .. }) == (original.protocol == self.icmp())
            && self.tcp.is_none_or(|tcp| original.protocol == TCP && scales(tcp))
    }

    /// The number of ICMP of its family.
    fn icmp(&self) -> u8 {
        if self.original.source.is_ipv4() { ICMP } else { ICMPV6 }
    }
}

impl Tuple {
    fn source_end(&self) -> End {
        let port = match self.ends {
            Ends::Ports { source, .. } => Some(source),
            _ => None,
        };
        (self.source, port)
    }

    /// An echo's id belongs to who asks, and so to the destination of answers.
    fn destination_end(&self) -> End {
        let port = match self.ends {
            Ends::Ports { destination, .. } => Some(destination),
            Ends::Icmp { id, .. } => Some(id),
            Ends::Neither => None,
        };
        (self.destination, port)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;
    use proptest::prelude::*;

    fn any_addresses() -> impl Strategy<Value = [IpAddr; 4]> {
        prop_oneof![
            any::<[Ipv4Addr; 4]>().prop_map(|addresses| addresses.map(IpAddr::V4)),
            any::<[Ipv6Addr; 4]>().prop_map(|addresses| addresses.map(IpAddr::V6)),
        ]
    }

    fn any_ends() -> impl Strategy<Value = (u8, [Ends; 2])> {
        let ports = any::<[(u16, u16); 2]>()
            .prop_map(|ports| ports.map(|(source, destination)| Ends::Ports { source, destination }));
        let icmp = any::<[(u16, u8, u8); 2]>()
            .prop_map(|icmp| icmp.map(|(id, kind, code)| Ends::Icmp { id, kind, code }));
        prop_oneof![
            (prop_oneof![Just(TCP), Just(17)], ports),
            (Just(ICMP), icmp),
            (Just(41), Just([Ends::Neither; 2])),
        ]
    }

    fn any_tcp() -> impl Strategy<Value = Tcp> {
        let end = || {
            (any::<u8>(), 0..=TcpEnd::MAX_SCALE)
                .prop_map(|(flags, window_scale)| TcpEnd { flags: flags & TcpEnd::CARRIED, window_scale })
        };
        (0..10u8, end(), end()).prop_map(|(state, original, reply)| Tcp { state, original, reply })
    }

    prop_compose! {
        pub(in super::super) fn any_flow()(
            addresses in any_addresses(),
            (protocol, ends) in any_ends(),
            zones: [Option<u16>; 2],
            (zone, timeout, mark) in any::<(u16, u32, u32)>(),
            (seen_reply, assured) in any::<(bool, bool)>(),
            labels: Option<[u8; LABELS]>,
            tcp in any_tcp(),
        ) -> Flow {
            let [a, b, c, d] = addresses;
            let protocol = if protocol == ICMP && a.is_ipv6() { ICMPV6 } else { protocol };
            Flow {
                original: Tuple { source: a, destination: b, protocol, ends: ends[0], zone: zones[0] },
                reply: Tuple { source: c, destination: d, protocol, ends: ends[1], zone: zones[1] },
                zone,
                seen_reply,
                assured,
                timeout,
                mark,
                labels: labels.filter(|labels| *labels != [0; LABELS]),
                tcp: (protocol == TCP).then_some(tcp),
            }
        }
    }

    /// The one that takes the most bytes to tell.
    pub(in super::super) fn longest() -> Flow {
        let ends = Ends::Ports { source: u16::MAX, destination: u16::MAX };
        let address = IpAddr::V6(Ipv6Addr::from_bits(u128::MAX));
        let tuple =
            Tuple { source: address, destination: address, protocol: TCP, ends, zone: Some(u16::MAX) };
        let end = TcpEnd { flags: TcpEnd::CARRIED, window_scale: TcpEnd::MAX_SCALE };
        Flow {
            original: tuple,
            reply: tuple,
            zone: u16::MAX,
            seen_reply: true,
            assured: true,
            timeout: u32::MAX,
            mark: u32::MAX,
            labels: Some([u8::MAX; LABELS]),
            tcp: Some(Tcp { state: u8::MAX, original: end, reply: end }),
        }
    }

    proptest! {
        #[test]
        fn any_of_the_four_addresses_makes_a_flow_the_machines(flow in any_flow(), other: Ipv4Addr) {
            let (original, reply) = (flow.original, flow.reply);
            let all = [original.source, original.destination, reply.source, reply.destination];
            prop_assert!(all.iter().all(|address| flow.concerns(&[*address])));
            prop_assume!(!all.contains(&other.into()));
            prop_assert!(!flow.concerns(&[other.into()]));
        }

        #[test]
        fn a_flow_whose_way_back_is_its_mirror_image_is_not_translated(mut flow in any_flow()) {
            flow.reply = flow.untranslated_reply();
            prop_assert_eq!(flow.translated_source(), None);
            prop_assert_eq!(flow.translated_destination(), None);
        }
    }
}
