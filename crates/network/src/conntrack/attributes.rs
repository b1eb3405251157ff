//! Flows as the attributes of ctnetlink (linux/netfilter/nfnetlink_conntrack.h), and back.
//!
//! Those that `netlink-packet-netfilter` has no names for are its `Other`, by the numbers below.

use std::net::IpAddr;

use netlink_packet_netfilter::conntrack::{
    ConntrackAttribute, IPTuple, ProtoInfo, ProtoInfoTCP, ProtoTuple, Status, Tuple as Attribute,
};
use rtnetlink::packet_core::{DefaultNla, Emitable, Nla};

use super::flow::{Ends, Flow, ICMP, LABELS, SCTP, TCP, Tcp, TcpEnd, Tuple};

const CTA_NAT_SRC: u16 = 6;
const CTA_NAT_DST: u16 = 13;
const CTA_ZONE: u16 = 18;
const CTA_LABELS: u16 = 22;
const CTA_TUPLE_ZONE: u16 = 3;
const CTA_PROTO_ICMP_ID: u16 = 4;
const CTA_PROTO_ICMP_TYPE: u16 = 5;
const CTA_PROTO_ICMP_CODE: u16 = 6;
const CTA_PROTO_ICMPV6_ID: u16 = 7;
const CTA_PROTO_ICMPV6_TYPE: u16 = 8;
const CTA_PROTO_ICMPV6_CODE: u16 = 9;
// Which the crate names, but lets nobody make.
const CTA_PROTOINFO_TCP_FLAGS_ORIGINAL: u16 = 4;
const CTA_PROTOINFO_TCP_FLAGS_REPLY: u16 = 5;
const CTA_NAT_V4_MINIP: u16 = 1;
const CTA_NAT_PROTO: u16 = 3;
const CTA_NAT_V6_MINIP: u16 = 4;
const CTA_PROTONAT_PORT_MIN: u16 = 1;

/// `TCP_CONNTRACK_ESTABLISHED`.
const ESTABLISHED: u8 = 3;

/// A flow that a flow table has taken over is told without its state and its time. It is in use, and its next packet gives it the
/// time of its kind.
const OFFLOADED_TIMEOUT: u32 = 120;

/// The flow that these attributes say; none where they are not of one that can be entered elsewhere.
pub(super) fn flow(attributes: &[ConntrackAttribute]) -> Option<Flow> {
    let (mut original, mut reply) = (None, None);
    let (mut status, mut timeout, mut tcp) = (Status::empty(), None, None);
    let (mut zone, mut mark, mut labels) = (0, 0, None);
    for attribute in attributes {
        match attribute {
            ConntrackAttribute::CtaTupleOrig(parts) => original = tuple(parts),
            ConntrackAttribute::CtaTupleReply(parts) => reply = tuple(parts),
            ConntrackAttribute::CtaProtoInfo(parts) => tcp = parts.iter().find_map(tcp_of),
            ConntrackAttribute::CtaStatus(bits) => status = *bits,
            ConntrackAttribute::CtaTimeout(seconds) => timeout = Some(*seconds),
            ConntrackAttribute::CtaMark(bits) => mark = *bits,
            ConntrackAttribute::Other(other) => match other.kind() {
                CTA_ZONE => zone = u16::from_be_bytes(value(other)?),
                CTA_LABELS => labels = value::<LABELS>(other).filter(|labels| *labels != [0; LABELS]),
                _ => {}
            },
            _ => {}
        }
    }
    let (original, reply) = (original?, reply?);
    if original.protocol == TCP && tcp.is_none() {
        tcp = Some(Tcp { state: ESTABLISHED, original: TcpEnd::default(), reply: TcpEnd::default() });
    }
    let flow = Flow {
        original,
        reply,
        zone,
        seen_reply: status.contains(Status::SeenReply),
        assured: status.contains(Status::Assured),
        timeout: timeout.unwrap_or(OFFLOADED_TIMEOUT),
        mark,
        labels,
        tcp,
    };
    // Without the tags of its association, which are not carried, no packet of SCTP would be taken for the flow's.
    (flow.is_consistent() && original.protocol != SCTP).then_some(flow)
}

fn tuple(parts: &[Attribute]) -> Option<Tuple> {
    let (mut source, mut destination, mut protocol, mut zone) = (None, None, None, None);
    let (mut ports, mut icmp) = ((None, None), (None, None, None));
    for part in parts {
        match part {
            Attribute::Ip(addresses) => {
                for address in addresses {
                    match address {
                        IPTuple::SourceAddress(address) => source = Some(*address),
                        IPTuple::DestinationAddress(address) => destination = Some(*address),
                        _ => {}
                    }
                }
            }
            Attribute::Proto(parts) => {
                for part in parts {
                    match part {
                        ProtoTuple::Protocol(number) => protocol = Some(u8::from(*number)),
                        ProtoTuple::SourcePort(port) => ports.0 = Some(*port),
                        ProtoTuple::DestinationPort(port) => ports.1 = Some(*port),
                        ProtoTuple::Other(other) => match other.kind() {
                            CTA_PROTO_ICMP_ID | CTA_PROTO_ICMPV6_ID => {
                                icmp.0 = value(other).map(u16::from_be_bytes);
                            }
                            CTA_PROTO_ICMP_TYPE | CTA_PROTO_ICMPV6_TYPE => {
                                icmp.1 = value(other).map(u8::from_be_bytes);
                            }
                            CTA_PROTO_ICMP_CODE | CTA_PROTO_ICMPV6_CODE => {
                                icmp.2 = value(other).map(u8::from_be_bytes);
                            }
                            _ => {}
                        },
                        _ => {}
                    }
                }
            }
            Attribute::Other(other) if other.kind() == CTA_TUPLE_ZONE => {
                zone = Some(u16::from_be_bytes(value(other)?));
            }
            _ => {}
        }
    }
    let ends = match (ports, icmp) {
        ((Some(source), Some(destination)), _) => Ends::Ports { source, destination },
        (_, (Some(id), Some(kind), Some(code))) => Ends::Icmp { id, kind, code },
        _ => Ends::Neither,
    };
    Some(Tuple { source: source?, destination: destination?, protocol: protocol?, ends, zone })
}

fn tcp_of(info: &ProtoInfo) -> Option<Tcp> {
    let ProtoInfo::TCP(parts) = info else { return None };
    let (mut state, mut original, mut reply) = (None, TcpEnd::default(), TcpEnd::default());
    for part in parts {
        match part {
            ProtoInfoTCP::State(number) => state = Some(*number),
            ProtoInfoTCP::OriginalWindowScale(bits) => original.window_scale = *bits,
            ProtoInfoTCP::ReplyWindowScale(bits) => reply.window_scale = *bits,
            ProtoInfoTCP::OriginalFlags(flags) => original.flags = flags.flags & TcpEnd::CARRIED,
            ProtoInfoTCP::ReplyFlags(flags) => reply.flags = flags.flags & TcpEnd::CARRIED,
            _ => {}
        }
    }
    Some(Tcp { state: state?, original, reply })
}

/// The attributes that enter a flow.
///
/// Where addresses are translated the kernel is told the untranslated direction back, and what is to be translated: it puts that
/// into the direction back itself, and only so remembers to do it. Given both directions as they are it would let them pass
/// untouched.
pub(super) fn to_enter(flow: &Flow) -> Vec<ConntrackAttribute> {
    let mut status = Status::Confirmed;
    status.set(Status::SeenReply, flow.seen_reply);
    status.set(Status::Assured, flow.assured);
    let mut attributes = to_find(flow);
    attributes.extend([
        ConntrackAttribute::CtaTupleReply(parts(&flow.untranslated_reply())),
        ConntrackAttribute::CtaStatus(status),
        // One with none left would be gone before its next packet.
        ConntrackAttribute::CtaTimeout(flow.timeout.max(1)),
        ConntrackAttribute::CtaMark(flow.mark),
    ]);
    for (kind, end) in [(CTA_NAT_SRC, flow.translated_source()), (CTA_NAT_DST, flow.translated_destination())]
    {
        attributes.extend(end.map(|end| translation(kind, end)));
    }
    attributes.extend(flow.labels.map(|labels| other(CTA_LABELS, &labels)));
    attributes.extend(flow.tcp.map(|tcp| ConntrackAttribute::CtaProtoInfo(vec![protocol_info(tcp)])));
    attributes
}

/// The attributes that say which flow is meant.
pub(super) fn to_find(flow: &Flow) -> Vec<ConntrackAttribute> {
    let mut attributes = vec![ConntrackAttribute::CtaTupleOrig(parts(&flow.original))];
    attributes.extend(zone(flow));
    attributes
}

/// The same by the direction back.
pub(super) fn to_find_by_reply(flow: &Flow) -> Vec<ConntrackAttribute> {
    let mut attributes = vec![ConntrackAttribute::CtaTupleReply(parts(&flow.reply))];
    attributes.extend(zone(flow));
    attributes
}

/// A kernel without zones takes none, not even the first.
fn zone(flow: &Flow) -> Option<ConntrackAttribute> {
    (flow.zone != 0).then(|| other(CTA_ZONE, &flow.zone.to_be_bytes()))
}

fn parts(tuple: &Tuple) -> Vec<Attribute> {
    let mut ends = vec![ProtoTuple::Protocol(tuple.protocol.into())];
    match tuple.ends {
        Ends::Ports { source, destination } => {
            ends.extend([ProtoTuple::SourcePort(source), ProtoTuple::DestinationPort(destination)]);
        }
        Ends::Icmp { id, kind, code } => {
            let kinds = match tuple.protocol {
                ICMP => [CTA_PROTO_ICMP_ID, CTA_PROTO_ICMP_TYPE, CTA_PROTO_ICMP_CODE],
                _ => [CTA_PROTO_ICMPV6_ID, CTA_PROTO_ICMPV6_TYPE, CTA_PROTO_ICMPV6_CODE],
            };
            ends.extend([
                ProtoTuple::Other(nla(kinds[0], &id.to_be_bytes())),
                ProtoTuple::Other(nla(kinds[1], &[kind])),
                ProtoTuple::Other(nla(kinds[2], &[code])),
            ]);
        }
        Ends::Neither => {}
    }
    let mut parts = vec![
        Attribute::Ip(vec![
            IPTuple::SourceAddress(tuple.source),
            IPTuple::DestinationAddress(tuple.destination),
        ]),
        Attribute::Proto(ends),
    ];
    parts.extend(tuple.zone.map(|zone| Attribute::Other(nla(CTA_TUPLE_ZONE, &zone.to_be_bytes()))));
    parts
}

/// The windows that the kernel has seen are not among what it gives out, so it begins anew with the first packet, and what was sent
/// before and is still on its way may lie outside of what it then takes for the window. Both ends are to be taken liberally, as
/// conntrackd has it too: then such a packet is no reason to call it invalid.
fn protocol_info(tcp: Tcp) -> ProtoInfo {
    let mut parts = vec![ProtoInfoTCP::State(tcp.state)];
    if tcp.original.flags & tcp.reply.flags & TcpEnd::WINDOW_SCALE != 0 {
        parts.extend([
            ProtoInfoTCP::OriginalWindowScale(tcp.original.window_scale),
            ProtoInfoTCP::ReplyWindowScale(tcp.reply.window_scale),
        ]);
    }
    parts.extend([
        ProtoInfoTCP::Other(nla(CTA_PROTOINFO_TCP_FLAGS_ORIGINAL, &liberal(tcp.original.flags))),
        ProtoInfoTCP::Other(nla(CTA_PROTOINFO_TCP_FLAGS_REPLY, &liberal(tcp.reply.flags))),
    ]);
    ProtoInfo::TCP(parts)
}

/// `struct nf_ct_tcp_flags`: the flags, and which of them are meant.
fn liberal(flags: u8) -> [u8; 2] {
    [flags | TcpEnd::BE_LIBERAL, TcpEnd::CARRIED]
}

/// Without the flag that says that there are attributes within, which the crate leaves out of its `Other`, and which the kernel does
/// not ask for here.
fn translation(kind: u16, (address, port): (IpAddr, Option<u16>)) -> ConntrackAttribute {
    let mut parts = vec![match address {
        IpAddr::V4(address) => nla(CTA_NAT_V4_MINIP, &address.octets()),
        IpAddr::V6(address) => nla(CTA_NAT_V6_MINIP, &address.octets()),
    }];
    parts.extend(
        port.map(|port| nla(CTA_NAT_PROTO, &bytes(&[nla(CTA_PROTONAT_PORT_MIN, &port.to_be_bytes())]))),
    );
    other(kind, &bytes(&parts))
}

fn bytes(attributes: &[DefaultNla]) -> Vec<u8> {
    let mut bytes = vec![0; attributes.buffer_len()];
    attributes.emit(&mut bytes);
    bytes
}

fn nla(kind: u16, value: &[u8]) -> DefaultNla {
    DefaultNla::new(kind, value.to_vec())
}

fn other(kind: u16, value: &[u8]) -> ConntrackAttribute {
    ConntrackAttribute::Other(nla(kind, value))
}

/// An attribute's value, where it has that length.
fn value<const LEN: usize>(attribute: &DefaultNla) -> Option<[u8; LEN]> {
    let mut value = [0; LEN];
    (attribute.value_len() == LEN).then(|| attribute.emit_value(&mut value))?;
    Some(value)
}
