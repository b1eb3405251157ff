//! The network at the source: what comes for the guest from shortly before its pause on goes with it, and the addresses that it is
//! known by.

use std::time::{Duration, Instant};

use link::{Bandwidth, Endpoint};
use mirror::network::PacketSocket;
use mirror::network::mac::Mac;
use mirror::network::snoop::Snoop;
use mirror::network::source::NetworkSource;
use mirror::network::tap::{OwnTap, QemuQueue};
use uuid::Uuid;

use crate::failure::chain;
use crate::report;
use crate::tap::diversion::Diversion;
use crate::tap::{Interfaces, TapError};
use crate::wire::{self, NETWORK_STREAM};

/// For so long nothing must have come for a guest that has gone, before what comes is not diverted any more.
const QUIET: Duration = Duration::from_millis(300);
/// Nobody keeps sending to a place for longer where nothing is.
const LONGEST: Duration = Duration::from_secs(10);

/// Why frames are not diverted.
#[derive(Debug, thiserror::Error)]
enum NotDiverted {
    #[error(transparent)]
    Tap(#[from] TapError),
    #[error("no interface of our own to divert to")]
    OwnTap(#[source] std::io::Error),
    #[error("no way into the queues of QEMU's taps")]
    Queues(#[source] std::io::Error),
    #[error("the destination takes no frames")]
    Stream(#[source] link::ConnectError),
    #[error("no frames can be carried")]
    Thread(#[source] std::io::Error),
}

/// A guest is given so long to take what came for it before.
const TAKE: Duration = Duration::from_millis(3);
const LOOK: Duration = Duration::from_micros(100);

/// The network of a machine that is being mirrored.
pub(super) struct Network {
    taps: Vec<wire::Tap>,
    snoops: Vec<Option<Snoop>>,
    carried: Option<Carried>,
}

/// Frames that are, or can be, diverted.
struct Carried {
    interfaces: Interfaces,
    diversions: Vec<Diversion>,
    /// QEMU's queues, of each interface.
    queues: Vec<Vec<QemuQueue>>,
    frames: NetworkSource,
    diverted: bool,
}

impl Network {
    /// Learns from now on what addresses the guest has.
    pub(super) fn of(taps: Vec<wire::Tap>) -> Network {
        let snoop = |tap: &wire::Tap| {
            let mac: Mac = tap.mac.parse().ok()?;
            let snoop = Snoop::start(&tap.ifname, mac);
            snoop
                .inspect_err(
                    |e| tracing::warn!(tap = tap.ifname, error = %e, "its guest's addresses are not learned"),
                )
                .ok()
        };
        let snoops = taps.iter().map(snoop).collect();
        Network { taps, snoops, carried: None }
    }

    /// Prepares to divert what comes for the guest. Where that cannot be done, it is lost while the guest moves, and the migration goes
    /// on.
    pub(super) async fn prepare(&mut self, endpoint: &Endpoint, address: &str, session: Uuid, pid: u32) {
        if self.taps.is_empty() {
            return;
        }
        match self.carried(endpoint, address, session, pid).await {
            Ok(carried) => self.carried = Some(carried),
            Err(e) => tracing::warn!(
                error = chain(&e),
                "frames that come for the guest while it moves will be lost"
            ),
        }
    }

    async fn carried(
        &self,
        endpoint: &Endpoint,
        address: &str,
        session: Uuid,
        pid: u32,
    ) -> Result<Carried, NotDiverted> {
        let interfaces = Interfaces::open()?;
        let (mut own, mut diversions, mut queues) = (Vec::new(), Vec::new(), Vec::new());
        for tap in &self.taps {
            let to = OwnTap::make().map_err(NotDiverted::OwnTap)?;
            diversions.push(interfaces.prepare_diversion(&tap.ifname, to.name()).await?);
            queues.push(QemuQueue::all(pid, &tap.ifname).map_err(NotDiverted::Queues)?);
            own.push((to, tap.mac.parse().ok()));
        }
        let (endpoint, address) = (endpoint.clone(), address.to_owned());
        // A limit is for what can wait.
        let opened = tokio::task::spawn_blocking(move || {
            endpoint.open_data(&address, session, NETWORK_STREAM, Bandwidth::new(None))
        });
        let stream = opened.await.map_err(|e| NotDiverted::Thread(e.into()))?.map_err(NotDiverted::Stream)?;
        let frames = NetworkSource::start(own, stream).map_err(NotDiverted::Thread)?;
        Ok(Carried { interfaces, diversions, queues, frames, diverted: false })
    }

    /// From the next frame on what comes is diverted: the guest is about to be paused.
    pub(super) async fn divert(&mut self) {
        let Some(carried) = &mut self.carried else { return };
        carried.diverted = true;
        for diversion in &carried.diversions {
            if let Err(e) = carried.interfaces.divert(diversion).await {
                tracing::warn!(
                    error = chain(&e),
                    "frames that come for the guest while it moves will be lost"
                );
            }
        }
        let until = Instant::now() + TAKE;
        while !carried.queues.iter().flatten().all(QemuQueue::is_empty) && Instant::now() < until {
            tokio::time::sleep(LOOK).await;
        }
    }

    /// The guest is paused for good.
    pub(super) fn is_paused(&self) {
        if let Some(carried) = &self.carried {
            carried.frames.is_paused(&carried.queues);
        }
    }

    /// The guest runs at the destination.
    pub(super) fn has_gone(&self) {
        if let Some(carried) = &self.carried {
            carried.frames.has_gone();
        }
    }

    /// The guest runs on here, and gets what came meanwhile.
    pub(super) async fn has_stayed(self) {
        let Some(carried) = self.carried else { return };
        if carried.diverted {
            carried.frames.has_stayed(sockets(&self.taps));
        }
        // What was diverted up to here is with us by now, and goes before what comes from here on.
        carried.end_diversions().await;
        tokio::task::block_in_place(|| carried.frames.finish());
    }

    /// The network has learned where the guest is: nothing more comes here. Returns what came.
    pub(super) async fn finish(self) -> report::Network {
        let Some(carried) = self.carried else { return report::Network::default() };
        let start = Instant::now();
        while carried.frames.quiet_for() < QUIET && start.elapsed() < LONGEST {
            tokio::time::sleep(QUIET.saturating_sub(carried.frames.quiet_for())).await;
        }
        carried.end_diversions().await;
        let diverted = tokio::task::block_in_place(|| carried.frames.finish());
        report::Network { frames_forwarded: diverted.forwarded, frames_dropped: diverted.dropped }
    }

    /// The addresses that the guest is known by, for whoever announces it at its new place.
    pub(super) fn neighbours(&self) -> Vec<wire::Neighbour> {
        let told = self.taps.iter().zip(&self.snoops).map(|(tap, snoop)| wire::Neighbour {
            netdev: tap.netdev.clone(),
            mac: tap.mac.clone(),
            addresses: snoop.iter().flat_map(Snoop::addresses).map(|address| address.to_string()).collect(),
        });
        told.collect()
    }
}

impl Carried {
    async fn end_diversions(&self) {
        for diversion in &self.diversions {
            if let Err(e) = self.interfaces.end_diversion(diversion).await {
                tracing::error!(error = chain(&e), "a tap's frames are still diverted");
            }
        }
    }
}

/// Ways to the guest behind these taps that no diversion is in.
fn sockets(taps: &[wire::Tap]) -> Vec<PacketSocket> {
    let open = |tap: &wire::Tap| {
        let socket = PacketSocket::open(&tap.ifname)?;
        socket.set_qdisc_bypass()?;
        socket.set_virtio_header()?;
        Ok::<_, std::io::Error>(socket)
    };
    let mut sockets = Vec::new();
    for tap in taps {
        match open(tap) {
            Ok(socket) => sockets.push(socket),
            Err(e) => {
                tracing::error!(tap = tap.ifname, error = %e, "its guest does not get what came meanwhile");
                break;
            }
        }
    }
    sockets
}
