//! Tap interfaces: as they are at the source, and made alike at the destination.
//!
//! A tap that is made here is persistent, so that it can be a port of its bridge before QEMU opens it, and stays down
//! until the machine is this host's: until then no frame of the guest's network reaches it.

mod diversion;
pub mod macvtap;
pub mod port;
pub mod tunnel;

use std::fs::{File, OpenOptions};
use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::path::Path;

use futures::TryStreamExt;
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use rtnetlink::packet_route::neighbour::{NeighbourAddress, NeighbourAttribute};
use rtnetlink::{Handle, LinkUnspec};

use finding::chain;
use macvtap::Macvtap;

/// Longest name of an interface that the kernel takes.
pub const MAX_NAME: usize = 15;

/// A tap interface as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tap {
    /// The bridge it is a port of.
    pub bridge: Option<String>,
    /// Bytes.
    pub mtu: u32,
    /// Frames that may wait for the guest.
    pub queue_length: Option<u32>,
    /// Frames reach it.
    pub up: bool,
    /// What kind of interface it is.
    pub kind: Kind,
}

/// What kind of interface it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A tap.
    Tap,
    /// A macvtap.
    Macvtap(Macvtap),
    /// Another, by the kernel's name; empty for a card.
    Other(String),
}

/// Why an interface could not be looked at or made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TapError {
    /// The kernel's networking cannot be talked to.
    #[error("cannot talk to the kernel's networking")]
    Netlink(#[source] io::Error),
    /// A request was refused.
    #[error("cannot {action} interface {name}")]
    Request {
        /// What was asked for.
        action: &'static str,
        /// For which interface.
        name: String,
        /// Why not.
        #[source]
        source: rtnetlink::Error,
    },
    /// No such interface.
    #[error("there is no interface {0}")]
    Missing(String),
    /// Its frames cannot be diverted.
    #[error("cannot divert what is sent to {name}")]
    Divert {
        /// The interface.
        name: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// No queue of it can be had.
    #[error("cannot open a queue of {name}")]
    Open {
        /// The interface.
        name: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// `/dev/net/tun` would not have it.
    #[error("cannot make tap interface {name}")]
    Make {
        /// The interface.
        name: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// The kernel's networking, in the network namespace of this agent.
#[derive(Debug)]
pub struct Interfaces {
    handle: Handle,
    connection: tokio::task::JoinHandle<()>,
}

impl Interfaces {
    /// Those of this process's network namespace.
    ///
    /// # Errors
    /// [`TapError::Netlink`]
    pub fn open() -> Result<Interfaces, TapError> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(TapError::Netlink)?;
        Ok(Interfaces { handle, connection: tokio::spawn(connection) })
    }

    async fn find(&self, name: &str) -> Result<Option<LinkMessage>, TapError> {
        if name.is_empty() || name.len() > MAX_NAME {
            return Ok(None);
        }
        match self.handle.link().get().match_name(name).execute().try_next().await {
            Ok(link) => Ok(link),
            Err(rtnetlink::Error::NetlinkError(e)) if e.raw_code() == -libc::ENODEV => Ok(None),
            Err(source) => Err(TapError::Request { action: "find", name: name.to_owned(), source }),
        }
    }

    /// An interface, if there is one of the name.
    pub async fn describe(&self, name: &str) -> Result<Option<Tap>, TapError> {
        let Some(link) = self.find(name).await? else { return Ok(None) };
        let up = link.header.flags.contains(LinkFlags::Up);
        let kind = match self.macvtap(&link).await? {
            Some(macvtap) => Kind::Macvtap(macvtap),
            None => kind(&link),
        };
        let mut tap = Tap { bridge: None, mtu: 1500, queue_length: None, up, kind };
        for attribute in &link.attributes {
            match attribute {
                LinkAttribute::Mtu(mtu) => tap.mtu = *mtu,
                LinkAttribute::TxQueueLen(length) => tap.queue_length = Some(*length),
                LinkAttribute::Controller(index) => tap.bridge = self.bridge(*index).await?,
                _ => {}
            }
        }
        Ok(Some(tap))
    }

    /// The name of what an interface is a port of. An Open vSwitch is none that a port could be given by name: a hook does that.
    async fn bridge(&self, index: u32) -> Result<Option<String>, TapError> {
        let is_bridge = |link: &LinkMessage| kind(link) != Kind::Other("openvswitch".to_owned());
        Ok(self.numbered(index).await?.filter(is_bridge).and_then(name))
    }

    /// The name of an interface by its number.
    async fn name(&self, index: u32) -> Result<Option<String>, TapError> {
        Ok(self.numbered(index).await?.and_then(name))
    }

    async fn numbered(&self, index: u32) -> Result<Option<LinkMessage>, TapError> {
        let found = self.handle.link().get().match_index(index).execute().try_next().await;
        found.map_err(|source| TapError::Request { action: "find", name: format!("number {index}"), source })
    }

    /// The addresses of a neighbour of this host, by its MAC address.
    pub async fn neighbours(&self, mac: [u8; 6]) -> Result<Vec<IpAddr>, TapError> {
        let failed =
            |source| TapError::Request { action: "list neighbours of", name: "any".to_owned(), source };
        let mut all = self.handle.neighbours().get().execute();
        let mut found = Vec::new();
        while let Some(neighbour) = all.try_next().await.map_err(failed)? {
            let is_it = |attribute: &NeighbourAttribute| matches!(attribute, NeighbourAttribute::LinkLayerAddress(address) if *address == mac);
            if !neighbour.attributes.iter().any(is_it) {
                continue;
            }
            found.extend(neighbour.attributes.iter().filter_map(|attribute| match attribute {
                NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => {
                    Some(IpAddr::V4(*address))
                }
                NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => {
                    Some(IpAddr::V6(*address))
                }
                _ => None,
            }));
        }
        Ok(found)
    }

    /// Whether there is an interface of the name.
    pub async fn exists(&self, name: &str) -> Result<bool, TapError> {
        Ok(self.find(name).await?.is_some())
    }

    /// Makes a tap, which the user `owner` may use beside root, joins it to its bridge, and leaves it down.
    pub async fn make(
        &self,
        name: &str,
        bridge: Option<&str>,
        mtu: u32,
        queue_length: Option<u32>,
        multi_queue: bool,
        owner: Option<u32>,
    ) -> Result<(), TapError> {
        let failed = |source| TapError::Make { name: name.to_owned(), source };
        ioctl::make_persistent(name, multi_queue, owner).map_err(failed)?;
        let prepared = self.prepare(name, bridge, mtu, queue_length).await;
        if prepared.is_err() {
            // Nothing half-made is left; why it was not whole is the error that counts.
            let _ = self.remove(name).await;
        }
        prepared
    }

    async fn prepare(
        &self,
        name: &str,
        bridge: Option<&str>,
        mtu: u32,
        queue_length: Option<u32>,
    ) -> Result<(), TapError> {
        let mut change = LinkUnspec::new_with_index(self.index(name).await?).mtu(mtu);
        if let Some(length) = queue_length {
            change = change.append_extra_attribute(LinkAttribute::TxQueueLen(length));
        }
        if let Some(bridge) = bridge {
            change = change.controller(self.index(bridge).await?);
        }
        self.change("set up", name, change.build()).await
    }

    /// Makes it a port of a bridge.
    pub async fn join(&self, name: &str, bridge: &str) -> Result<(), TapError> {
        let change =
            LinkUnspec::new_with_index(self.index(name).await?).controller(self.index(bridge).await?);
        self.change("move", name, change.build()).await
    }

    /// Lets frames through.
    pub async fn raise(&self, name: &str) -> Result<(), TapError> {
        let change = LinkUnspec::new_with_index(self.index(name).await?).up().build();
        self.change("raise", name, change).await
    }

    /// Removes an interface, if it is there.
    pub async fn remove(&self, name: &str) -> Result<(), TapError> {
        let Some(link) = self.find(name).await? else { return Ok(()) };
        let removed = self.handle.link().del(link.header.index).execute().await;
        removed.map_err(|source| TapError::Request { action: "remove", name: name.to_owned(), source })
    }

    async fn index(&self, name: &str) -> Result<u32, TapError> {
        Ok(self.find(name).await?.ok_or_else(|| TapError::Missing(name.to_owned()))?.header.index)
    }

    /// Makes an interface that must not have been there.
    async fn add(&self, name: &str, link: LinkMessage) -> Result<(), TapError> {
        let added = self.handle.link().add(link).execute().await;
        added.map_err(|source| TapError::Request { action: "make", name: name.to_owned(), source })
    }

    async fn change(&self, action: &'static str, name: &str, change: LinkMessage) -> Result<(), TapError> {
        let changed = self.handle.link().set(change).execute().await;
        changed.map_err(|source| TapError::Request { action, name: name.to_owned(), source })
    }
}

/// Has this host say nothing of its own on an interface that a guest hears.
fn silence(name: &str) {
    if let Err(e) = std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1") {
        tracing::debug!(interface = name, error = %e, "IPv6 is not there to be turned off");
    }
}

/// Removes interfaces that were made for a machine. Of those that cannot be the log says why.
pub async fn remove_all(names: &[String]) {
    if names.is_empty() {
        return;
    }
    match Interfaces::open() {
        Ok(interfaces) => {
            for name in names {
                if let Err(e) = interfaces.remove(name).await {
                    tracing::error!(error = chain(&e), "it is left");
                }
            }
        }
        Err(e) => tracing::error!(error = chain(&e), ?names, "interfaces are left"),
    }
}

impl Drop for Interfaces {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

fn kind(link: &LinkMessage) -> Kind {
    let kind = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::LinkInfo(info) => info.iter().find_map(|info| match info {
            LinkInfo::Kind(kind) => Some(kind.to_string()),
            _ => None,
        }),
        _ => None,
    });
    match kind {
        Some(tun) if tun == "tun" => Kind::Tap,
        other => Kind::Other(other.unwrap_or_default()),
    }
}

fn name(link: LinkMessage) -> Option<String> {
    link.attributes.into_iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name),
        _ => None,
    })
}

/// Whether a tap that exists is free: no process has it open.
pub fn is_free(name: &str, multi_queue: bool) -> io::Result<bool> {
    match ioctl::attach(name, multi_queue, false) {
        Ok(_attached) => Ok(true),
        Err(e) if e.raw_os_error() == Some(libc::EBUSY) => Ok(false),
        Err(e) => Err(e),
    }
}

/// The requests of `/dev/net/tun` and of macvtaps (linux/if_tun.h), which have no netlink form.
mod ioctl {
    use super::{AsRawFd, File, MAX_NAME, OpenOptions, Path, io};

    /// `struct ifreq` as TUNSETIFF reads it: a name and flags, 40 bytes in all.
    #[repr(C)]
    struct Request {
        name: [u8; MAX_NAME + 1],
        flags: u16,
        rest: [u8; 22],
    }

    const TAP: u16 = 0x0002;
    const MULTI_QUEUE: u16 = 0x0100;
    const NO_PACKET_INFORMATION: u16 = 0x1000;
    const VIRTIO_HEADER: u16 = 0x4000;
    const EXCLUSIVE: u16 = 0x8000;

    /// Opens a queue of a tap; with `new`, of one that must not have been there.
    pub(super) fn attach(name: &str, multi_queue: bool, new: bool) -> io::Result<File> {
        let file = open(Path::new("/dev/net/tun"))?;
        set_up(&file, name, multi_queue, new)?;
        Ok(file)
    }

    pub(super) fn open(device: &Path) -> io::Result<File> {
        OpenOptions::new().read(true).write(true).open(device)
    }

    /// Says how frames are to come. Of `/dev/net/tun` also, of which interface it is a queue.
    pub(super) fn set_up(file: &File, name: &str, multi_queue: bool, new: bool) -> io::Result<()> {
        let mut flags = TAP | NO_PACKET_INFORMATION | VIRTIO_HEADER;
        if multi_queue {
            flags |= MULTI_QUEUE;
        }
        if new {
            flags |= EXCLUSIVE;
        }
        let mut request = Request { name: [0; MAX_NAME + 1], flags, rest: [0; 22] };
        if name.len() > MAX_NAME {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        request.name[..name.len()].copy_from_slice(name.as_bytes());
        // SAFETY: TUNSETIFF reads and writes one `struct ifreq`, which the request is laid out as and outlives the call.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })
    }

    pub(super) fn make_persistent(name: &str, multi_queue: bool, owner: Option<u32>) -> io::Result<()> {
        let file = attach(name, multi_queue, true)?;
        if let Some(owner) = owner {
            // SAFETY: TUNSETOWNER takes its argument by value.
            check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOWNER, libc::c_ulong::from(owner)) })?;
        }
        // SAFETY: TUNSETPERSIST takes its argument by value.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETPERSIST, 1) })
    }

    fn check(result: libc::c_int) -> io::Result<()> {
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}
