//! Flows as one agent tells them another.
//!
//! As of all messages between agents: a tag keeps its meaning, new fields are optional, and what a peer says is checked
//! where it comes in.

use std::net::IpAddr;

use prost::Message;

use super::MAX_FLOWS;
use super::flow::{self, Ends, TcpEnd};

/// Flows in one message: with the longest addresses and labels 630 KB of the 1 MiB that the link lets through.
const FLOWS: usize = 4096;

/// Some of the flows, or all.
#[derive(Clone, PartialEq, Message)]
pub struct Flows {
    /// They.
    #[prost(message, repeated, tag = "1")]
    pub flows: Vec<Flow>,
    /// More follow.
    #[prost(bool, tag = "2")]
    pub more: bool,
}

/// A flow.
#[derive(Clone, PartialEq, Message)]
pub struct Flow {
    /// As its first packet had it.
    #[prost(message, optional, tag = "1")]
    pub original: Option<Tuple>,
    /// As answers arrive.
    #[prost(message, optional, tag = "2")]
    pub reply: Option<Tuple>,
    /// Zone of both directions.
    #[prost(uint32, tag = "3")]
    pub zone: u32,
    /// Packets have been seen in both directions.
    #[prost(bool, tag = "4")]
    pub seen_reply: bool,
    /// It is not dropped early.
    #[prost(bool, tag = "5")]
    pub assured: bool,
    /// Seconds that it had left.
    #[prost(uint32, tag = "6")]
    pub timeout: u32,
    /// Its mark.
    #[prost(uint32, tag = "7")]
    pub mark: u32,
    /// Its labels, 16 bytes as the kernel has them; empty for none.
    #[prost(bytes = "vec", tag = "8")]
    pub labels: Vec<u8>,
    /// For TCP, and for nothing else.
    #[prost(message, optional, tag = "9")]
    pub tcp: Option<Tcp>,
}

/// One direction.
#[derive(Clone, PartialEq, Message)]
pub struct Tuple {
    /// 4 or 16 bytes.
    #[prost(bytes = "vec", tag = "1")]
    pub source: Vec<u8>,
    /// As many.
    #[prost(bytes = "vec", tag = "2")]
    pub destination: Vec<u8>,
    /// Of IP.
    #[prost(uint32, tag = "3")]
    pub protocol: u32,
    /// Of protocols that have such.
    #[prost(message, optional, tag = "4")]
    pub ports: Option<Ports>,
    /// Of ICMP.
    #[prost(message, optional, tag = "5")]
    pub icmp: Option<Icmp>,
    /// Zone of this direction alone.
    #[prost(uint32, optional, tag = "6")]
    pub zone: Option<u32>,
}

/// Ports.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct Ports {
    /// Of the sender.
    #[prost(uint32, tag = "1")]
    pub source: u32,
    /// Of the receiver.
    #[prost(uint32, tag = "2")]
    pub destination: u32,
}

/// What answers of ICMP are told by.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct Icmp {
    /// Whose.
    #[prost(uint32, tag = "1")]
    pub id: u32,
    /// Type of the message.
    #[prost(uint32, tag = "2")]
    pub kind: u32,
    /// Code of the message.
    #[prost(uint32, tag = "3")]
    pub code: u32,
}

/// State of a TCP connection.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct Tcp {
    /// Linux's number of it.
    #[prost(uint32, tag = "1")]
    pub state: u32,
    /// Linux's flags of who began it.
    #[prost(uint32, tag = "2")]
    pub original_flags: u32,
    /// And of the other.
    #[prost(uint32, tag = "3")]
    pub reply_flags: u32,
    /// Bits that windows of who began it are shifted by.
    #[prost(uint32, tag = "4")]
    pub original_scale: u32,
    /// And of the other.
    #[prost(uint32, tag = "5")]
    pub reply_scale: u32,
}

impl Flows {
    /// All of these, in as many messages as it takes; at least one.
    #[must_use]
    pub fn of(flows: &[flow::Flow]) -> Vec<Flows> {
        let part = |flows: &[flow::Flow]| Flows { flows: flows.iter().map(Flow::from).collect(), more: true };
        let mut parts: Vec<Flows> = flows.chunks(FLOWS).map(part).collect();
        match parts.last_mut() {
            Some(last) => last.more = false,
            None => parts.push(Flows::default()),
        }
        parts
    }

    /// Adds this part to others. False when one of it makes no sense, or there are more than [`MAX_FLOWS`].
    #[must_use]
    pub fn add_to(&self, flows: &mut Vec<flow::Flow>) -> bool {
        if self.flows.len() > MAX_FLOWS - flows.len().min(MAX_FLOWS) {
            return false;
        }
        self.flows.iter().all(|flow| {
            let flow = flow.checked();
            let sound = flow.is_some();
            flows.extend(flow);
            sound
        })
    }
}

impl Flow {
    fn checked(&self) -> Option<flow::Flow> {
        let flow = flow::Flow {
            original: self.original.as_ref()?.checked()?,
            reply: self.reply.as_ref()?.checked()?,
            zone: self.zone.try_into().ok()?,
            seen_reply: self.seen_reply,
            assured: self.assured,
            timeout: self.timeout,
            mark: self.mark,
            labels: if self.labels.is_empty() { None } else { Some(self.labels[..].try_into().ok()?) },
            tcp: match &self.tcp {
                Some(tcp) => Some(tcp.checked()?),
                None => None,
            },
        };
        flow.is_consistent().then_some(flow)
    }
}

impl Tuple {
    fn checked(&self) -> Option<flow::Tuple> {
        let ends = match (&self.ports, &self.icmp) {
            (Some(ports), None) => Ends::Ports {
                source: ports.source.try_into().ok()?,
                destination: ports.destination.try_into().ok()?,
            },
            (None, Some(icmp)) => Ends::Icmp {
                id: icmp.id.try_into().ok()?,
                kind: icmp.kind.try_into().ok()?,
                code: icmp.code.try_into().ok()?,
            },
            (None, None) => Ends::Neither,
            (Some(_), Some(_)) => return None,
        };
        Some(flow::Tuple {
            source: address(&self.source)?,
            destination: address(&self.destination)?,
            protocol: self.protocol.try_into().ok()?,
            ends,
            zone: match self.zone {
                Some(zone) => Some(zone.try_into().ok()?),
                None => None,
            },
        })
    }
}

impl Tcp {
    fn checked(self) -> Option<flow::Tcp> {
        let end = |flags: u32, scale: u32| {
            let flags = u8::try_from(flags).ok()? & TcpEnd::CARRIED;
            Some(TcpEnd { flags, window_scale: scale.try_into().ok()? })
        };
        Some(flow::Tcp {
            state: self.state.try_into().ok()?,
            original: end(self.original_flags, self.original_scale)?,
            reply: end(self.reply_flags, self.reply_scale)?,
        })
    }
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = || <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    let v6 = || <[u8; 16]>::try_from(bytes).map(IpAddr::from);
    v4().or_else(|_| v6()).ok()
}

impl From<&flow::Flow> for Flow {
    fn from(flow: &flow::Flow) -> Flow {
        Flow {
            original: Some((&flow.original).into()),
            reply: Some((&flow.reply).into()),
            zone: flow.zone.into(),
            seen_reply: flow.seen_reply,
            assured: flow.assured,
            timeout: flow.timeout,
            mark: flow.mark,
            labels: flow.labels.map_or(Vec::new(), |labels| labels.to_vec()),
            tcp: flow.tcp.map(|tcp| Tcp {
                state: tcp.state.into(),
                original_flags: tcp.original.flags.into(),
                reply_flags: tcp.reply.flags.into(),
                original_scale: tcp.original.window_scale.into(),
                reply_scale: tcp.reply.window_scale.into(),
            }),
        }
    }
}

impl From<&flow::Tuple> for Tuple {
    fn from(tuple: &flow::Tuple) -> Tuple {
        let octets = |address: IpAddr| match address {
            IpAddr::V4(address) => address.octets().to_vec(),
            IpAddr::V6(address) => address.octets().to_vec(),
        };
        let (ports, icmp) = match tuple.ends {
            Ends::Ports { source, destination } => {
                (Some(Ports { source: source.into(), destination: destination.into() }), None)
            }
            Ends::Icmp { id, kind, code } => {
                (None, Some(Icmp { id: id.into(), kind: kind.into(), code: code.into() }))
            }
            Ends::Neither => (None, None),
        };
        Tuple {
            source: octets(tuple.source),
            destination: octets(tuple.destination),
            protocol: tuple.protocol.into(),
            ports,
            icmp,
            zone: tuple.zone.map(Into::into),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conntrack::flow::tests::any_flow;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn flows_come_back_as_they_were(flows in prop::collection::vec(any_flow(), 0..20)) {
            let parts = Flows::of(&flows);
            let mut back = Vec::new();
            for part in &parts {
                let part = Flows::decode(&part.encode_to_vec()[..]).unwrap();
                prop_assert!(part.add_to(&mut back));
            }
            prop_assert_eq!(back, flows);
        }

        #[test]
        fn arbitrary_bytes_are_an_error_or_flows_that_make_sense_but_never_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            if let Ok(part) = Flows::decode(&bytes[..]) {
                let mut flows = Vec::new();
                let _ = part.add_to(&mut flows);
                prop_assert!(flows.iter().all(flow::Flow::is_consistent));
            }
        }

        #[test]
        fn what_does_not_fit_together_is_refused(flow in any_flow()) {
            let sound = Flow::from(&flow);
            prop_assert!(sound.checked().is_some());
            let (original, reply) = (sound.original.clone().unwrap(), sound.reply.clone().unwrap());
            let with_original = |original: Tuple| Flow { original: Some(original), ..sound.clone() };
            for bad in [
                Flow { original: None, ..sound.clone() },
                Flow { zone: 65_536, ..sound.clone() },
                Flow { labels: vec![0; 15], ..sound.clone() },
                with_original(Tuple { source: vec![1; 5], ..original.clone() }),
                with_original(Tuple { source: vec![1; if original.source.len() == 4 { 16 } else { 4 }], ..original.clone() }),
                with_original(Tuple { protocol: 300, ..original.clone() }),
                with_original(Tuple { protocol: original.protocol ^ 1, ..original.clone() }),
                with_original(Tuple { zone: Some(65_536), ..original.clone() }),
                with_original(Tuple { ports: Some(Ports::default()), icmp: Some(Icmp::default()), ..original.clone() }),
                with_original(Tuple { ports: Some(Ports { source: 65_536, destination: 1 }), ..original.clone() }),
                Flow { reply: Some(Tuple { ports: None, icmp: Some(Icmp { id: 1, kind: 256, code: 0 }), ..reply.clone() }), ..sound.clone() },
                Flow { tcp: Some(Tcp { original_scale: 15, ..Tcp::default() }), ..sound.clone() },
                Flow { tcp: Some(Tcp { state: 256, ..Tcp::default() }), ..sound.clone() },
            ] {
                prop_assert!(bad.checked().is_none(), "{:?}", bad);
            }
        }
    }

    #[test]
    fn many_go_in_several_messages_of_a_size_that_the_link_takes_and_too_many_are_refused() {
        let longest = flow::tests::longest();
        let parts = Flows::of(&vec![longest; MAX_FLOWS]);
        assert!(parts.iter().all(|part| part.encoded_len() < 1 << 20), "{}", parts[0].encoded_len());
        assert!(parts.iter().rev().skip(1).all(|part| part.more) && !parts.last().unwrap().more);
        let mut back = Vec::new();
        assert!(parts.iter().all(|part| part.add_to(&mut back)));
        assert_eq!(back.len(), MAX_FLOWS);
        assert!(!Flows { flows: parts[0].flows[..1].to_vec(), more: false }.add_to(&mut back));
        assert_eq!(Flows::of(&[]).len(), 1);
    }
}
