//! Packet sockets (packet(7)): whole Ethernet frames, sent and received at an interface. They need `CAP_NET_RAW`.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use libc::{
    ETH_P_ALL, PACKET_ADD_MEMBERSHIP, PACKET_IGNORE_OUTGOING, PACKET_MR_PROMISC, PACKET_QDISC_BYPASS,
    PACKET_VNET_HDR, SO_ATTACH_FILTER, SOL_PACKET, SOL_SOCKET, c_int, packet_mreq, sock_filter, sock_fprog,
    sockaddr_ll,
};
use rustix::net::addr::{SocketAddrArg, SocketAddrLen, SocketAddrOpaque};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

/// A packet socket at one interface of the network namespace in which it was opened.
#[derive(Debug)]
pub struct PacketSocket {
    socket: OwnedFd,
    interface: c_int,
}

impl PacketSocket {
    /// Opens one for sending. It receives nothing before [`PacketSocket::listen`], so that a filter can be set that no frame
    /// escapes.
    ///
    /// # Errors
    /// ENODEV for an interface that is not there, EPERM without `CAP_NET_RAW`.
    pub fn open(interface: &str) -> io::Result<PacketSocket> {
        // Protocol 0 receives nothing; any other would from every interface at once, until the socket is bound.
        let socket =
            rustix::net::socket_with(AddressFamily::PACKET, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
        let interface = rustix::net::netdevice::name_to_index(&socket, interface)?;
        let interface = c_int::try_from(interface).map_err(|_| io::ErrorKind::InvalidInput)?;
        rustix::net::bind(&socket, &LinkAddress::new(interface, 0))?;
        Ok(PacketSocket { socket, interface })
    }

    /// Opens one that leads to the guest behind a tap, past whatever diverts or shapes what is sent there. Frames are sent with virtio
    /// headers.
    ///
    /// # Errors
    /// As [`PacketSocket::open`].
    pub fn to_guest(tap: &str) -> io::Result<PacketSocket> {
        let socket = PacketSocket::open(tap)?;
        socket.set_qdisc_bypass()?;
        socket.set_virtio_header()?;
        Ok(socket)
    }

    /// From now on receives every frame that arrives at the interface, whoever it is for: at a tap, what the guest sends. What
    /// is sent out of the interface, at a tap to the guest, is not received.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn listen(&self) -> io::Result<()> {
        set_option(&self.socket, SOL_PACKET, PACKET_IGNORE_OUTGOING, &1)?;
        // A tap passes on all that the guest sends. An interface with a device behind it passes on what is for itself, unless it
        // is promiscuous; this makes it so for as long as the socket is open.
        let membership = packet_mreq {
            mr_ifindex: self.interface,
            mr_type: PACKET_MR_PROMISC as u16,
            mr_alen: 0,
            mr_address: [0; 8],
        };
        set_option(&self.socket, SOL_PACKET, PACKET_ADD_MEMBERSHIP, &membership)?;
        // Not the ethertypes that are wanted: a socket has one, or all.
        Ok(rustix::net::bind(&self.socket, &LinkAddress::new(self.interface, ETH_P_ALL as u16))?)
    }

    /// From now on receives every frame that passes the interface, in either direction.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn listen_to_both(&self) -> io::Result<()> {
        Ok(rustix::net::bind(&self.socket, &LinkAddress::new(self.interface, ETH_P_ALL as u16))?)
    }

    /// Sends a frame, which begins with its Ethernet header, whole.
    ///
    /// # Errors
    /// ENETDOWN while the interface is down, EMSGSIZE for what is longer than it takes, ENOBUFS when its queue is full.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        rustix::io::retry_on_intr(|| rustix::net::send(&self.socket, frame, SendFlags::empty()))?;
        Ok(())
    }

    /// Sends past the interface's queueing discipline: nothing waits there behind other traffic, and what the driver has no room
    /// for is lost.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn set_qdisc_bypass(&self) -> io::Result<()> {
        set_option(&self.socket, SOL_PACKET, PACKET_QDISC_BYPASS, &1)
    }

    /// Every frame that is sent is preceded by a `struct virtio_net_hdr`, which says what a card has yet to do for it.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn set_virtio_header(&self) -> io::Result<()> {
        set_option(&self.socket, SOL_PACKET, PACKET_VNET_HDR, &1)
    }

    /// Receives only what a classic BPF program lets pass, and only so much of it. It sees frames from their Ethernet header on,
    /// without a VLAN tag, which the kernel has taken away.
    ///
    /// # Errors
    /// EINVAL for a program that the kernel does not accept.
    pub fn set_filter(&self, program: &[sock_filter]) -> io::Result<()> {
        attach_filter(&self.socket, program)
    }

    /// Waits for a frame. Of one longer than the buffer the rest is lost.
    ///
    /// # Errors
    /// ENETDOWN, once, when the interface went down or was down at [`PacketSocket::listen`]; when it comes up, frames arrive
    /// again.
    pub fn recv(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let (length, _) =
            rustix::io::retry_on_intr(|| rustix::net::recv(&self.socket, &mut *buffer, RecvFlags::empty()))?;
        Ok(length)
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Attaches a classic BPF program to a socket of any kind.
pub(super) fn attach_filter(socket: impl AsFd, program: &[sock_filter]) -> io::Result<()> {
    let len = u16::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    // The kernel copies the program from behind the pointer, and does not write there.
    let program = sock_fprog { len, filter: program.as_ptr().cast_mut() };
    set_option(socket, SOL_SOCKET, SO_ATTACH_FILTER, &program)
}

/// A plain structure of the kernel's interface, or a number.
trait OptionValue {}

impl OptionValue for c_int {}
impl OptionValue for packet_mreq {}
impl OptionValue for sock_fprog {}

fn set_option<T: OptionValue>(socket: impl AsFd, level: c_int, name: c_int, value: &T) -> io::Result<()> {
    let socket = socket.as_fd().as_raw_fd();
    let length = size_of::<T>() as libc::socklen_t;
    // SAFETY: the kernel reads `length` bytes from a value that is borrowed meanwhile, and the program of a filter, which
    // `attach_filter` borrows meanwhile. It writes nothing; what it cannot read it refuses.
    let result = unsafe { libc::setsockopt(socket, level, name, std::ptr::from_ref(value).cast(), length) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// An interface, and the ethertype that is received from it.
struct LinkAddress(sockaddr_ll);

impl LinkAddress {
    fn new(interface: c_int, protocol: u16) -> LinkAddress {
        LinkAddress(sockaddr_ll {
            sll_family: AddressFamily::PACKET.as_raw(),
            sll_protocol: protocol.to_be(),
            sll_ifindex: interface,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 0,
            sll_addr: [0; 8],
        })
    }
}

// SAFETY: the pointer is to a `sockaddr_ll`, the address of the family that it names, and can be read for the length of one.
unsafe impl SocketAddrArg for LinkAddress {
    unsafe fn with_sockaddr<R>(&self, f: impl FnOnce(*const SocketAddrOpaque, SocketAddrLen) -> R) -> R {
        f((&raw const self.0).cast(), size_of::<sockaddr_ll>() as SocketAddrLen)
    }
}
