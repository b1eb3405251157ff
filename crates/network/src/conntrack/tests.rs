//! Entries as Linux 6.18 dumps them, and what is made of them.

use netlink_packet_netfilter::conntrack::{ConntrackAttribute, ConntrackMessage};
use netlink_packet_netfilter::{NetfilterMessage, NetfilterMessageInner};
use proptest::prelude::*;
use rtnetlink::packet_core::{Emitable, NetlinkMessage, NetlinkPayload};

use super::flow::tests::any_flow;
use super::flow::{Ends, Flow, Tcp, TcpEnd, Tuple};
use super::{attributes, is_absent};

/// A connection over IPv6 with mark 0x12345678 and label 77, which is in all of these.
const TCP_6: &str = "1801000000012200010000000d7900000a0000004c0001802c0001801400030000000000000000000000000000000001140004000000\
    00000000000000000000000000011c000280050001000600000006000200a085000006000300e76500004c0002802c0001801400030000000000000000000000\
    00000000000114000400000000000000000000000000000000011c000280050001000600000006000200e765000006000300a0850000080003000000000e0800\
    08001234567808000c0086e0b43d08000b0000000001080007000006977f300004802c0001800500010003000000050002000a000000050003000a0000000600\
    04002300000006000500230000001400160000000000000000000020000000000000";

/// One from 127.0.0.3:40000 to 127.0.0.5:80, made one from 127.0.0.9:20000 to 127.0.0.4:8080.
const TRANSLATED: &str = "e800000000012200010000000d790000020000003400018014000180080001007f000003080002007f0000051c0002800500010006\
    000000060002009c40000006000300005000003400028014000180080001007f000004080002007f0000091c0002800500010006000000060002001f90000006\
    0003004e20000008000300000001be080008001234567808000c009c98c64108000b00000000010800070000069780300004802c000180050001000300000005\
    0002000a000000050003000a000000060004002300000006000500230000001400160000000000000000000020000000000000";

/// An echo in zone 7.
const ECHO: &str = "d000000000012200010000000d790000020000003c00018014000180080001007f000001080002007f000006240002800500010001000000\
    0600040000070000050005000800000005000600000000003c00028014000180080001007f000006080002007f00000124000280050001000100000006000400\
    00070000050005000000000005000600000000000600120000070000080003000000018a080008001234567808000c0013ddb86e08000b000000000208000700\
    0000001d1400160000000000000000000020000000000000";

/// What a dump says of an entry.
fn dumped(hex: &str) -> Vec<ConntrackAttribute> {
    let digits: Vec<u8> = hex.bytes().filter(u8::is_ascii_hexdigit).collect();
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    let bytes: Vec<u8> = digits.chunks(2).map(byte).collect();
    match NetlinkMessage::<NetfilterMessage>::deserialize(&bytes).unwrap().payload {
        NetlinkPayload::InnerMessage(NetfilterMessage {
            inner: NetfilterMessageInner::Conntrack(ConntrackMessage::New(attributes)),
            ..
        }) => attributes,
        other => panic!("{other:?}"),
    }
}

fn labels() -> [u8; 16] {
    let mut labels = [0; 16];
    labels[77 / 8] = 1 << (77 % 8);
    labels
}

fn tuple(protocol: u8, source: &str, destination: &str, ends: Ends) -> Tuple {
    let address = |text: &str| text.parse().unwrap();
    Tuple { source: address(source), destination: address(destination), protocol, ends, zone: None }
}

fn ports(source: u16, destination: u16) -> Ends {
    Ends::Ports { source, destination }
}

/// Established, with windows of both scaled by 10 and selective acknowledgements.
const ESTABLISHED: Tcp = Tcp {
    state: 3,
    original: TcpEnd { flags: 3, window_scale: 10 },
    reply: TcpEnd { flags: 3, window_scale: 10 },
};

fn tcp_6() -> Flow {
    Flow {
        original: tuple(6, "::1", "::1", ports(41_093, 59_237)),
        reply: tuple(6, "::1", "::1", ports(59_237, 41_093)),
        zone: 0,
        seen_reply: true,
        assured: true,
        timeout: 431_999,
        mark: 0x1234_5678,
        labels: Some(labels()),
        tcp: Some(ESTABLISHED),
    }
}

fn translated() -> Flow {
    Flow {
        original: tuple(6, "127.0.0.3", "127.0.0.5", ports(40_000, 80)),
        reply: tuple(6, "127.0.0.4", "127.0.0.9", ports(8080, 20_000)),
        timeout: 432_000,
        ..tcp_6()
    }
}

#[test]
fn an_entry_of_the_kernel_is_understood() {
    assert_eq!(attributes::flow(&dumped(TCP_6)), Some(tcp_6()));
    assert_eq!(attributes::flow(&dumped(TRANSLATED)), Some(translated()));
    let echo = Flow {
        original: tuple(1, "127.0.0.1", "127.0.0.6", Ends::Icmp { id: 7, kind: 8, code: 0 }),
        reply: tuple(1, "127.0.0.6", "127.0.0.1", Ends::Icmp { id: 7, kind: 0, code: 0 }),
        zone: 7,
        assured: false,
        timeout: 29,
        tcp: None,
        ..tcp_6()
    };
    assert_eq!(attributes::flow(&dumped(ECHO)), Some(echo));
}

#[test]
fn one_that_a_flow_table_has_taken_over_is_established_and_not_at_its_end() {
    let told = |attribute: &ConntrackAttribute| {
        !matches!(attribute, ConntrackAttribute::CtaTimeout(_) | ConntrackAttribute::CtaProtoInfo(_))
    };
    let attributes: Vec<_> = dumped(TCP_6).into_iter().filter(told).collect();
    let flow = attributes::flow(&attributes).unwrap();
    assert_eq!((flow.timeout, flow.tcp.unwrap().state), (120, 3));
}

#[test]
fn what_lacks_a_direction_is_no_flow() {
    let mut attributes = dumped(TCP_6);
    attributes.retain(|attribute| !matches!(attribute, ConntrackAttribute::CtaTupleReply(_)));
    assert_eq!(attributes::flow(&attributes), None);
}

#[test]
fn what_is_translated_is_told_apart_from_the_direction_back() {
    let flow = translated();
    assert_eq!(flow.translated_source(), Some(("127.0.0.9".parse().unwrap(), Some(20_000))));
    assert_eq!(flow.translated_destination(), Some(("127.0.0.4".parse().unwrap(), Some(8080))));
    let bytes = bytes(&attributes::to_enter(&flow));
    // CTA_NAT_SRC and CTA_NAT_DST: CTA_NAT_V4_MINIP, and CTA_NAT_PROTO with CTA_PROTONAT_PORT_MIN.
    let source = [24, 0, 6, 0, 8, 0, 1, 0, 127, 0, 0, 9, 12, 0, 3, 0, 6, 0, 1, 0, 0x4e, 0x20, 0, 0];
    let destination = [24, 0, 13, 0, 8, 0, 1, 0, 127, 0, 0, 4, 12, 0, 3, 0, 6, 0, 1, 0, 0x1f, 0x90, 0, 0];
    assert!([source, destination].iter().all(|part| bytes.windows(part.len()).any(|found| found == part)));
}

#[test]
fn a_kernel_without_connection_tracking_is_told_from_one_that_forbids_it() {
    let error = std::io::Error::from_raw_os_error;
    assert!(is_absent(&error(libc::EPROTONOSUPPORT)) && is_absent(&error(libc::EOPNOTSUPP)));
    assert!(!is_absent(&error(libc::EPERM)) && !is_absent(&error(libc::ENOBUFS)));
}

fn bytes(attributes: &[ConntrackAttribute]) -> Vec<u8> {
    let mut bytes = vec![0; attributes.buffer_len()];
    attributes.emit(&mut bytes);
    bytes
}

proptest! {
    #[test]
    fn what_is_entered_is_what_was_read_but_liberal(mut flow in any_flow()) {
        flow.reply = flow.untranslated_reply();
        flow.timeout = flow.timeout.max(1);
        // Scales are told of connections both of whose ends have them, and not otherwise.
        if let Some(tcp) = &mut flow.tcp {
            let ends = [&mut tcp.original, &mut tcp.reply];
            let scaled = ends.iter().all(|end| end.flags & TcpEnd::WINDOW_SCALE != 0);
            for end in ends {
                end.flags |= TcpEnd::BE_LIBERAL;
                end.window_scale *= u8::from(scaled);
            }
        }
        // Through bytes, as the kernel has them.
        let header = [&[0; 16][..], &[2, 0, 0, 0]].concat();
        let mut message = [header, bytes(&attributes::to_enter(&flow))].concat();
        let length = u32::try_from(message.len()).unwrap();
        message[..4].copy_from_slice(&length.to_ne_bytes());
        message[4..6].copy_from_slice(&0x0100_u16.to_ne_bytes());
        let hex: String = message.iter().map(|byte| format!("{byte:02x}")).collect();
        prop_assert_eq!(attributes::flow(&dumped(&hex)), Some(flow));
    }
}
