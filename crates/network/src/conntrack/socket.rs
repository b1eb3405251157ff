//! Requests to ctnetlink and its answers.
//!
//! On the socket itself, and not through `netlink-proto`: that reads a dump to its end before it passes on any of it, and the table
//! of a host may have millions of entries of which few are wanted.

use std::io;
use std::net::IpAddr;

use netlink_packet_netfilter::conntrack::{ConntrackAttribute, ConntrackMessage};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};
use rtnetlink::packet_core::{
    DecodeError, NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NLMSG_ALIGNTO,
    NetlinkBuffer, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::sys::protocols::NETLINK_NETFILTER;
use rtnetlink::sys::{AsyncSocket as _, AsyncSocketExt as _, SocketAddr, TokioSocket};

use super::attributes;
use super::flow::Flow;

/// Requests that are sent at once. All are answered before the sending returns, and so many answers always fit into a receive
/// buffer of the default size (212,992 bytes), in which the kernel counts each with 768.
const BATCH: usize = 128;

/// Messages begin at multiples of so many bytes.
const ALIGNMENT: usize = NLMSG_ALIGNTO as usize;

/// What the type of a message says that is an entry of the table: the subsystem `NFNL_SUBSYS_CTNETLINK`, and `IPCTNL_MSG_CT_NEW`.
const ENTRY: u16 = 1 << 8;

/// What a receive must have room for: the kernel puts at most 32 KiB into a part of a dump.
const PART: usize = 64 << 10;

/// A request about one flow.
pub(super) enum Request<'a> {
    /// Enter it; an error where there is one of the same ends, in either direction.
    Enter(&'a Flow),
    /// Delete the one that has its ends.
    Delete(&'a Flow),
    /// Delete the one that has the ends of its direction back.
    DeleteReply(&'a Flow),
}

/// The connection tracking of the network namespace of the thread that opens it.
pub(super) struct Socket {
    socket: TokioSocket,
    sequence: u32,
    received: Vec<u8>,
}

impl Socket {
    pub(super) fn open() -> io::Result<Socket> {
        let mut socket = TokioSocket::new(NETLINK_NETFILTER)?;
        socket.socket_mut().bind_auto()?;
        // An error is told without the request that it is about.
        socket.socket_ref().set_cap_ack(true)?;
        Ok(Socket { socket, sequence: 0, received: Vec::with_capacity(PART) })
    }

    /// Has each entry of a family looked at that has one of these addresses, and maybe some others, until `each` has seen enough.
    pub(super) async fn dump(
        &mut self,
        family: NetfilterProtoFamily,
        addresses: &[IpAddr],
        mut each: impl FnMut(&[ConntrackAttribute]) -> bool,
    ) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let request = message(family, ConntrackMessage::Get(Vec::new()), NLM_F_DUMP, self.sequence);
        self.send(&[request]).await?;
        loop {
            self.receive().await?;
            for part in parts(&self.received) {
                let part = part?;
                if part.sequence_number() != self.sequence {
                    continue;
                }
                // To take an entry apart costs ten times what it costs to see that it holds none of the addresses.
                if part.message_type() == ENTRY
                    && !addresses.iter().any(|address| holds(part.payload(), address))
                {
                    continue;
                }
                match decode(&part)?.payload {
                    NetlinkPayload::Error(error) => return Err(error.to_io()),
                    NetlinkPayload::Done(done) if done.code != 0 => {
                        return Err(io::Error::from_raw_os_error(done.code.abs()));
                    }
                    NetlinkPayload::Done(_) => return Ok(()),
                    NetlinkPayload::InnerMessage(NetfilterMessage {
                        inner: NetfilterMessageInner::Conntrack(ConntrackMessage::New(attributes)),
                        ..
                    }) if !each(&attributes) => return Ok(()),
                    _ => {}
                }
            }
        }
    }

    /// Makes requests, many at once, and has each one's answer, in their order.
    pub(super) async fn request(&mut self, requests: &[Request<'_>]) -> io::Result<Vec<io::Result<()>>> {
        let mut answers = Vec::with_capacity(requests.len());
        for batch in requests.chunks(BATCH) {
            let first = self.sequence.wrapping_add(1);
            let mut messages = Vec::with_capacity(batch.len());
            for request in batch {
                self.sequence = self.sequence.wrapping_add(1);
                messages.push(request.message(self.sequence));
            }
            self.send(&messages).await?;
            answers.extend(self.answers(first, batch.len()).await?);
        }
        Ok(answers)
    }

    async fn answers(&mut self, first: u32, count: usize) -> io::Result<Vec<io::Result<()>>> {
        let mut answers: Vec<Option<io::Result<()>>> = Vec::new();
        answers.resize_with(count, || None);
        let mut missing = count;
        while missing > 0 {
            self.receive().await?;
            for part in parts(&self.received) {
                let (header, payload) = decode(&part?)?.into_parts();
                let NetlinkPayload::Error(error) = payload else { continue };
                // Without the privilege the first request is refused for all of them.
                if error.raw_code() == -libc::EPERM {
                    return Err(error.to_io());
                }
                let at = usize::try_from(header.sequence_number.wrapping_sub(first)).unwrap_or(usize::MAX);
                if let Some(answer @ None) = answers.get_mut(at) {
                    *answer = Some(if error.code.is_some() { Err(error.to_io()) } else { Ok(()) });
                    missing -= 1;
                }
            }
        }
        Ok(answers.into_iter().flatten().collect())
    }

    async fn send(&self, messages: &[NetlinkMessage<NetfilterMessage>]) -> io::Result<()> {
        let mut bytes = vec![0; messages.iter().map(NetlinkMessage::buffer_len).sum()];
        let mut rest = &mut bytes[..];
        for message in messages {
            let (this, others) = rest.split_at_mut(message.buffer_len());
            message.serialize(this);
            rest = others;
        }
        self.socket.send_to(&bytes, &SocketAddr::new(0, 0)).await?;
        Ok(())
    }

    async fn receive(&mut self) -> io::Result<()> {
        self.received.clear();
        self.socket.recv_from(&mut self.received).await?;
        Ok(())
    }
}

impl Request<'_> {
    fn message(&self, sequence: u32) -> NetlinkMessage<NetfilterMessage> {
        let (flow, request, flags) = match *self {
            Request::Enter(flow) => {
                (flow, ConntrackMessage::New(attributes::to_enter(flow)), NLM_F_CREATE | NLM_F_EXCL)
            }
            Request::Delete(flow) => (flow, ConntrackMessage::Delete(attributes::to_find(flow)), 0),
            Request::DeleteReply(flow) => {
                (flow, ConntrackMessage::Delete(attributes::to_find_by_reply(flow)), 0)
            }
        };
        message(flow.family(), request, NLM_F_ACK | flags, sequence)
    }
}

fn message(
    family: NetfilterProtoFamily,
    request: ConntrackMessage,
    flags: u16,
    sequence: u32,
) -> NetlinkMessage<NetfilterMessage> {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | flags;
    header.sequence_number = sequence;
    let request = NetfilterMessage::new(NetfilterHeader::new(family, 0, 0), request);
    let mut message = NetlinkMessage::new(header, request.into());
    message.finalize();
    message
}

/// The messages of what was received at once.
fn parts(mut bytes: &[u8]) -> impl Iterator<Item = io::Result<NetlinkBuffer<&[u8]>>> {
    std::iter::from_fn(move || {
        if bytes.is_empty() {
            return None;
        }
        let checked = NetlinkBuffer::new_checked(bytes).map_err(invalid);
        let length = checked.as_ref().map_or(bytes.len(), |part| part.length() as usize);
        let part = checked.map(|_| NetlinkBuffer::new(&bytes[..length]));
        bytes = bytes.get(length.next_multiple_of(ALIGNMENT)..).unwrap_or_default();
        Some(part)
    })
}

fn decode(part: &NetlinkBuffer<&[u8]>) -> io::Result<NetlinkMessage<NetfilterMessage>> {
    NetlinkMessage::deserialize(part.buffer).map_err(invalid)
}

fn invalid(error: DecodeError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// Whether a message holds an address, which is always at a multiple of the alignment.
fn holds(message: &[u8], address: &IpAddr) -> bool {
    let at_each =
        |octets: &[u8]| (0..message.len()).step_by(ALIGNMENT).any(|at| message[at..].starts_with(octets));
    match address {
        IpAddr::V4(address) => at_each(&address.octets()),
        IpAddr::V6(address) => at_each(&address.octets()),
    }
}
