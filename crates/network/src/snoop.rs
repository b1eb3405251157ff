//! Listens at a machine's tap for the addresses that its guest tells to its neighbours.

use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use libc::{
    BPF_ABS, BPF_ALU, BPF_AND, BPF_B, BPF_H, BPF_JEQ, BPF_JGE, BPF_JGT, BPF_JMP, BPF_K, BPF_LD, BPF_RET,
    BPF_W, SKF_AD_OFF, SKF_AD_VLAN_TAG, sock_filter,
};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use super::addresses::{self, Addresses};
use super::frame::{
    ARP, ETHERNET_HEADER, ICMPV6, IPV6, IPV6_HEADER, IPV6_NEXT_HEADER, NEIGHBOR_ADVERTISEMENT,
    ROUTER_ADVERTISEMENT,
};
use super::mac::Mac;
use super::packet::PacketSocket;

/// Bytes looked at of a frame: more than is read of any.
const LOOKED_AT: usize = 128;

/// Lets pass, in the kernel, ARP and what of neighbour discovery tells an address or a router, so that whatever else a busy
/// machine sends wakes nobody.
///
/// The kernel takes a frame's tag away before the program sees it, and tells it apart. A tagged frame does not pass: what
/// is announced is untagged, and in that network the address may be another machine's. (VLAN 0 is a priority only.)
const FILTER: [sock_filter; 13] = [
    statement(BPF_LD | BPF_W | BPF_ABS, (SKF_AD_OFF + SKF_AD_VLAN_TAG) as u32),
    statement(BPF_ALU | BPF_AND | BPF_K, 0xfff),
    jump(BPF_JEQ, 0, 0, 9),
    statement(BPF_LD | BPF_H | BPF_ABS, ETHERNET_HEADER as u32 - 2),
    jump(BPF_JEQ, ARP as u32, 6, 0),
    jump(BPF_JEQ, IPV6 as u32, 0, 6),
    statement(BPF_LD | BPF_B | BPF_ABS, (ETHERNET_HEADER + IPV6_NEXT_HEADER) as u32),
    jump(BPF_JEQ, ICMPV6 as u32, 0, 4),
    statement(BPF_LD | BPF_B | BPF_ABS, (ETHERNET_HEADER + IPV6_HEADER) as u32),
    // Solicitations are between the two.
    jump(BPF_JGE, ROUTER_ADVERTISEMENT as u32, 0, 2),
    jump(BPF_JGT, NEIGHBOR_ADVERTISEMENT as u32, 1, 0),
    statement(BPF_RET | BPF_K, LOOKED_AT as u32),
    statement(BPF_RET | BPF_K, 0),
];

const fn statement(code: u32, operand: u32) -> sock_filter {
    sock_filter { code: code as u16, jt: 0, jf: 0, k: operand }
}

/// Compares what was loaded, and goes on so many instructions after the next.
const fn jump(comparison: u32, operand: u32, if_true: u8, if_false: u8) -> sock_filter {
    sock_filter { code: (BPF_JMP | comparison | BPF_K) as u16, jt: if_true, jf: if_false, k: operand }
}

/// Where what a guest sends is seen at its interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// It arrives there: the interface is a tap, and the guest is at its other end.
    Guest,
    /// It leaves there: the interface is a macvtap, and the guest has the place of this host's own network at it.
    Own,
}

/// Listens until it is dropped.
#[derive(Debug)]
pub struct Snoop {
    learned: Arc<Mutex<Addresses>>,
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Snoop {
    /// Begins to listen at an interface of this thread's network namespace for the guest with this MAC. The interface may be down;
    /// if it is removed, nothing more is learned.
    ///
    /// # Errors
    /// ENODEV for an interface that is not there, EPERM without `CAP_NET_RAW`; or when there is no thread or descriptor to be had.
    pub fn start(interface: &str, mac: Mac, side: Side) -> io::Result<Snoop> {
        let socket = PacketSocket::open(interface)?;
        socket.set_filter(&FILTER)?;
        match side {
            Side::Guest => socket.listen()?,
            Side::Own => socket.listen_to_both()?,
        }
        let learned = Arc::new(Mutex::new(Addresses::default()));
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        let listener = Listener { socket, mac, learned: learned.clone(), stop: stop.clone() };
        let interface = interface.to_owned();
        let thread = std::thread::Builder::new().name("snoop".into()).spawn(move || {
            if let Err(error) = listener.listen() {
                tracing::warn!(%error, interface, "no more of the guest's addresses are learned");
            }
        })?;
        Ok(Snoop { learned, stop, thread: Some(thread) })
    }

    /// The addresses learned so far that can be announced, the most recently seen first.
    #[must_use]
    pub fn addresses(&self) -> Vec<IpAddr> {
        lock(&self.learned).list()
    }
}

impl Drop for Snoop {
    fn drop(&mut self) {
        // Nothing else is ever written, so there is room for it.
        let _ = rustix::io::write(&*self.stop, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What the thread has.
struct Listener {
    socket: PacketSocket,
    mac: Mac,
    learned: Arc<Mutex<Addresses>>,
    stop: Arc<OwnedFd>,
}

impl Listener {
    /// Learns until told to stop.
    fn listen(&self) -> io::Result<()> {
        let mut buffer = [0; LOOKED_AT];
        loop {
            let mut ready =
                [PollFd::new(&self.socket, PollFlags::IN), PollFd::new(&*self.stop, PollFlags::IN)];
            rustix::io::retry_on_intr(|| poll(&mut ready, None))?;
            if !ready[1].revents().is_empty() {
                return Ok(());
            }
            // Does not wait: nobody else takes what there is.
            match self.socket.recv(&mut buffer) {
                Ok(length) => self.learn(&buffer[..length]),
                // Told once; the tap may come up again.
                Err(error) if Errno::from_io_error(&error) == Some(Errno::NETDOWN) => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn learn(&self, frame: &[u8]) {
        if addresses::is_of_router(frame, self.mac) {
            lock(&self.learned).see_router();
        }
        if let Some(address) = addresses::sender(frame, self.mac) {
            lock(&self.learned).see(address);
        }
    }
}

/// What a thread that panicked had learned is as good as any.
fn lock(learned: &Mutex<Addresses>) -> MutexGuard<'_, Addresses> {
    learned.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::announce::frames;
    use crate::packet::attach_filter;
    use std::os::unix::net::UnixDatagram;

    /// What passes of a frame. A filter may be attached to any socket; these need no privilege, and have no tags.
    fn passes(frame: &[u8]) -> Option<usize> {
        let (from, to) = UnixDatagram::pair().unwrap();
        attach_filter(&to, &FILTER).unwrap();
        to.set_nonblocking(true).unwrap();
        // A datagram that is filtered out is lost without an error, as a frame is.
        from.send(frame).unwrap();
        to.recv(&mut [0; 1600]).ok()
    }

    #[test]
    fn only_arp_and_neighbour_discovery_pass() {
        let mac = Mac::from_bytes([0x52, 0x54, 0, 0x12, 0x34, 0x56]);
        let frames = frames(mac, &["10.0.0.5".parse().unwrap(), "fe80::5".parse().unwrap()]);
        let [rarp, arp, advertisement] = &frames[..] else { panic!("{frames:?}") };
        assert_eq!([passes(rarp), passes(arp), passes(advertisement)], [None, Some(60), Some(86)]);
        let with = |at: usize, byte: u8| {
            let mut frame = advertisement.clone();
            frame[at] = byte;
            passes(&frame)
        };
        assert_eq!([133, 134, 135, 137].map(|kind| with(54, kind)), [None, Some(86), Some(86), None]);
        assert_eq!([with(20, 6), with(13, 0)], [None, None], "TCP, and another ethertype");
        assert_eq!([passes(&advertisement[..54]), passes(&[0; 5])], [None, None]);
    }

    #[test]
    fn no_more_of_a_frame_is_taken_than_is_looked_at() {
        let mut frame = vec![0; 1500];
        frame[12..14].copy_from_slice(&ARP.to_be_bytes());
        assert_eq!(passes(&frame), Some(LOOKED_AT));
    }
}
