//! The kernel's connection tracking: the flows of a machine's addresses, taken from one host and entered at another.
//!
//! A stateful firewall lets a packet through that belongs to a connection which it has seen begin. After a migration it is another
//! host's firewall, which has not: it calls such a packet invalid, or new without a SYN, and drops it. So what the source knows of
//! the machine's flows is entered at the destination before the machine's network is.
//!
//! ctnetlink is spoken directly (docs/decisions/0033): no program need be installed. Everything here is about the network
//! namespace of the calling thread, which for an agent is the host's.

mod attributes;
mod flow;
mod socket;
pub mod wire;

use std::io;
use std::net::IpAddr;

use netlink_packet_netfilter::NetfilterProtoFamily;

pub use flow::Flow;
use socket::{Request, Socket};

/// Flows of one machine that are carried at most. Its addresses may have more only where a client or the guest itself opens them
/// without end; then what matters of them cannot be told.
pub const MAX_FLOWS: usize = 65_536;

/// Why flows could not be read or changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConntrackError {
    /// There is no way to the kernel's connection tracking.
    #[error("cannot talk to the kernel's connection tracking")]
    Open(#[source] io::Error),
    /// A request failed as a whole.
    #[error("cannot {action} the kernel's table of connections")]
    Request {
        /// What was asked for.
        action: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// More than are carried.
    #[error("more than {MAX_FLOWS} connections are tracked for the VM's addresses")]
    TooMany,
}

/// What became of flows that were to be entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Entered {
    /// Flows that the kernel knows now.
    pub entered: usize,
    /// Flows that it would not have: its table is full, addresses are translated and the translated ones are taken, a zone that it
    /// cannot have.
    pub refused: usize,
}

/// The flows of this host that have one of these addresses in either direction. None on a kernel without connection tracking.
///
/// # Errors
/// [`ConntrackError`]: the kernel cannot be asked (it takes `CAP_NET_ADMIN`), or there are more than [`MAX_FLOWS`].
pub async fn dump(addresses: &[IpAddr]) -> Result<Vec<Flow>, ConntrackError> {
    let mut flows = Vec::new();
    let mut socket = match Socket::open() {
        Err(e) if is_absent(&e) => return Ok(flows),
        socket => socket.map_err(ConntrackError::Open)?,
    };
    for family in [NetfilterProtoFamily::IPv4, NetfilterProtoFamily::IPv6] {
        if !addresses.iter().any(|address| family_of(address) == family) {
            continue;
        }
        let dumped = socket.dump(family, addresses, |attributes| {
            let flow = attributes::flow(attributes).filter(|flow| flow.concerns(addresses));
            flows.extend(flow);
            flows.len() <= MAX_FLOWS
        });
        match dumped.await {
            Err(e) if is_absent(&e) => return Ok(Vec::new()),
            dumped => dumped.map_err(|source| ConntrackError::Request { action: "read", source })?,
        }
        if flows.len() > MAX_FLOWS {
            return Err(ConntrackError::TooMany);
        }
    }
    Ok(flows)
}

/// Enters flows; one that is there already is replaced. The kernel's refusal of some is no error.
///
/// # Errors
/// [`ConntrackError`]: the kernel cannot be asked, or takes no requests (`CAP_NET_ADMIN`).
pub async fn enter(flows: &[Flow]) -> Result<Entered, ConntrackError> {
    let mut socket = Socket::open().map_err(ConntrackError::Open)?;
    let failed = |source| ConntrackError::Request { action: "write to", source };
    let mut entered = Entered::default();
    let requests: Vec<Request<'_>> = flows.iter().map(Request::Enter).collect();
    let answers = socket.request(&requests).await.map_err(failed)?;
    let mut taken = Vec::new();
    for (flow, answer) in flows.iter().zip(answers) {
        match answer {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => taken.push(flow),
            answer => entered.count(flow, &answer),
        }
    }
    // An entry of the same ends may have come to be by a stray packet, the wrong way round too, and some of it cannot be changed. It
    // is another entry, and not this one, when only the directions back are the same.
    let mut requests = Vec::with_capacity(taken.len() * 3);
    for flow in &taken {
        requests.extend([Request::Delete(flow), Request::DeleteReply(flow), Request::Enter(flow)]);
    }
    let answers = socket.request(&requests).await.map_err(failed)?;
    for (flow, answers) in taken.iter().zip(answers.chunks(3)) {
        if let [.., answer] = answers {
            entered.count(flow, answer);
        }
    }
    Ok(entered)
}

/// Removes flows, and says how many of them there were.
///
/// # Errors
/// As [`enter`].
pub async fn remove(flows: &[Flow]) -> Result<usize, ConntrackError> {
    let mut socket = Socket::open().map_err(ConntrackError::Open)?;
    let requests: Vec<Request<'_>> = flows.iter().map(Request::Delete).collect();
    let answers = socket.request(&requests).await;
    let answers = answers.map_err(|source| ConntrackError::Request { action: "write to", source })?;
    Ok(answers.iter().filter(|answer| answer.is_ok()).count())
}

/// Whether an error says that the kernel has no such thing: no netfilter, or none of its modules and no way to load them.
fn is_absent(error: &io::Error) -> bool {
    let absent = [libc::EPROTONOSUPPORT, libc::EAFNOSUPPORT, libc::EOPNOTSUPP, libc::ENOENT, libc::EINVAL];
    error.raw_os_error().is_some_and(|number| absent.contains(&number))
}

fn family_of(address: &IpAddr) -> NetfilterProtoFamily {
    match address {
        IpAddr::V4(_) => NetfilterProtoFamily::IPv4,
        IpAddr::V6(_) => NetfilterProtoFamily::IPv6,
    }
}

impl Flow {
    fn family(&self) -> NetfilterProtoFamily {
        family_of(&self.original.source)
    }
}

impl Entered {
    fn count(&mut self, flow: &Flow, answer: &io::Result<()>) {
        match answer {
            Ok(()) => self.entered += 1,
            Err(error) => {
                self.refused += 1;
                tracing::debug!(?flow, %error, "the kernel does not take a connection");
            }
        }
    }
}

#[cfg(test)]
mod tests;
