//! The network at the source: what comes for the guest from shortly before its pause on goes with it, and the addresses that it is
//! known by.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use ::network::PacketSocket;
use ::network::diversion::Diversion;
use ::network::mac::Mac;
use ::network::mark;
use ::network::source::NetworkSource;
use ::network::tap::{OwnTap, QemuQueue};
use link::{Bandwidth, Endpoint};
use uuid::Uuid;

use ::network::conntrack::{self, Flow};
use ::network::interfaces::{Interfaces, TapError};
use finding::chain;
use host::Host;
use ownership::VmName;
use protocol::deadlines::DIVERTED;
use protocol::wire::{self, NETWORK_STREAM};
use session::report;

/// For so long nothing must have come for a guest that has gone, before what comes is not diverted any more.
const QUIET: Duration = Duration::from_millis(300);

/// Why frames are not diverted.
#[derive(Debug, thiserror::Error)]
enum NotDiverted {
    #[error(transparent)]
    Tap(#[from] TapError),
    #[error("no interface of our own to divert to")]
    OwnTap(#[source] std::io::Error),
    #[error("no way into the queues of QEMU's taps")]
    Queues(#[source] std::io::Error),
    #[error("no way to the guest past QEMU's taps")]
    Way(#[source] std::io::Error),
    #[error("the destination takes no frames")]
    Stream(#[source] link::ConnectError),
    #[error("no frames can be carried")]
    Thread(#[source] std::io::Error),
}

/// What takes no longer is done while the guest is paused.
const QUICK: Duration = Duration::from_millis(3);
/// A guest is given so long to take what came for it before. It runs, and takes that at once unless it gets no CPU time: under load half
/// a second was seen. What it does not take goes with it, but for one frame that its QEMU has read by then.
const TAKE: Duration = Duration::from_secs(1);
/// Not one that was never seen to have taken everything, neither when its mirror began nor for so long: nobody listens to that
/// interface.
const UNREAD: Duration = Duration::from_millis(100);
const LOOK: Duration = Duration::from_micros(100);

/// The network of a machine that is being mirrored.
pub(super) struct Network {
    taps: Vec<wire::Tap>,
    /// By what addresses each interface's guest is known here.
    known: Vec<BTreeSet<IpAddr>>,
    /// What this host's firewall knows, and how long it took to find that out, where it was asked.
    flows: Vec<Flow>,
    took: Option<Duration>,
    carried: Option<Carried>,
}

/// Frames that are, or can be, diverted.
struct Carried {
    diversions: Vec<Diversion>,
    /// The names of the interfaces that are diverted to.
    own: Vec<String>,
    /// QEMU's queues, of each interface, and whether they were once seen with nothing in them, as those of one that the guest reads are.
    queues: Vec<Vec<QemuQueue>>,
    read: Vec<bool>,
    /// Ways to the guest that no diversion is in.
    sockets: Vec<PacketSocket>,
    frames: NetworkSource,
    diverted: bool,
}

impl Network {
    /// Nothing is known yet.
    pub(super) fn of(taps: Vec<wire::Tap>) -> Network {
        let known = taps.iter().map(|_| BTreeSet::new()).collect();
        Network { taps, known, flows: Vec::new(), took: None, carried: None }
    }

    /// Prepares to divert what comes for the guest. Where that cannot be done, it is lost while the guest moves, and the migration goes
    /// on.
    pub(super) async fn prepare(&mut self, endpoint: &Endpoint, address: &str, session: Uuid, pid: u32) {
        for macvtap in self.taps.iter().filter(|tap| tap.macvtap.is_some()) {
            tracing::warn!(
                macvtap = macvtap.ifname,
                "frames that come for the guest while it moves will be lost: they cannot be diverted from a macvtap"
            );
        }
        if self.diverted().next().is_none() {
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

    /// The interfaces that frames can be diverted from.
    fn diverted(&self) -> impl Iterator<Item = &wire::Tap> {
        self.taps.iter().filter(|tap| tap.macvtap.is_none())
    }

    async fn carried(
        &self,
        endpoint: &Endpoint,
        address: &str,
        session: Uuid,
        pid: u32,
    ) -> Result<Carried, NotDiverted> {
        let interfaces = Interfaces::open()?;
        let (mut names, mut own, mut diversions, mut queues, mut sockets) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for tap in self.diverted() {
            let to = OwnTap::make().map_err(NotDiverted::OwnTap)?;
            diversions.push(interfaces.prepare_diversion(&tap.ifname, to.name()).await?);
            queues.push(QemuQueue::all(pid, &tap.ifname).map_err(NotDiverted::Queues)?);
            sockets.push(PacketSocket::to_guest(&tap.ifname).map_err(NotDiverted::Way)?);
            names.push(to.name().to_owned());
            own.push((to, tap.mac.parse().ok()));
        }
        let (endpoint, address) = (endpoint.clone(), address.to_owned());
        // A limit is for what can wait.
        let opened = tokio::task::spawn_blocking(move || {
            endpoint.open_data(&address, session, NETWORK_STREAM, Bandwidth::new(None))
        });
        let stream = opened.await.map_err(|e| NotDiverted::Thread(e.into()))?.map_err(NotDiverted::Stream)?;
        let abort = stream.abort_handle().map_err(NotDiverted::Thread)?;
        let frames = NetworkSource::start(own, stream, move || abort.abort()).map_err(NotDiverted::Thread)?;
        let read = queues.iter().map(|queues| queues.iter().all(QemuQueue::is_empty)).collect();
        Ok(Carried { diversions, own: names, queues, read, sockets, frames, diverted: false })
    }

    /// From the next frame on what comes is diverted: the guest is about to be paused.
    pub(super) async fn divert(&mut self) {
        let Some(carried) = &mut self.carried else { return };
        carried.diverted = true;
        carried.frames.begin();
        for diversion in &carried.diversions {
            if let Err(e) = diversion.begin() {
                tracing::warn!(error = %e, "frames that come for the guest while it moves will be lost");
            }
        }
        let until = Instant::now() + TAKE;
        let read = |(_, read): &(usize, bool)| *read;
        let mut taken = true;
        for (interface, _) in carried.read.iter().copied().enumerate().filter(read) {
            if let Some(Err(e)) = carried.sockets.get(interface).map(mark::send) {
                tracing::debug!(error = %e, "it is not certain that the guest takes all that came before");
            }
        }
        for (interface, _) in carried.read.iter().copied().enumerate().filter(read) {
            taken &= are_empty(&carried.queues[interface], until).await;
        }
        if !taken {
            tracing::debug!("the guest has not taken all that came before its pause");
            carried.frames.take_over(&carried.queues);
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
    pub(super) async fn has_stayed(mut self) {
        let Some(carried) = self.carried.take() else { return };
        if carried.diverted {
            tokio::task::block_in_place(|| carried.frames.has_stayed(carried.sockets));
        }
        // What was diverted up to here is with us by now, and goes before what comes from here on.
        end(&carried.diversions);
        tokio::task::block_in_place(|| {
            // Whoever was about to divert a frame has done so when these are gone.
            drop(carried.diversions);
            carried.frames.finish()
        });
    }

    /// Nobody knows where the guest goes on: nothing is diverted any more.
    pub(super) fn abandon(self) {
        let Some(carried) = self.carried else { return };
        end(&carried.diversions);
        tokio::task::block_in_place(|| drop(carried));
    }

    /// The network has learned where the guest is: nothing more comes here. Returns what came.
    pub(super) async fn finish(self, forwarded: bool) -> report::Network {
        let flows_carried = self.flows.len() as u64;
        // What is forwarded still goes through this host's firewall.
        if !self.flows.is_empty()
            && !forwarded
            && let Err(e) = conntrack::remove(&self.flows).await
        {
            tracing::warn!(error = chain(&e), "the firewall still knows connections of a VM that has gone");
        }
        let Some(carried) = self.carried else { return report::Network::default() };
        let start = Instant::now();
        while carried.frames.quiet_for() < QUIET && start.elapsed() < DIVERTED {
            tokio::time::sleep(QUIET.saturating_sub(carried.frames.quiet_for())).await;
        }
        end(&carried.diversions);
        let overflow = overflow(&carried.own).await;
        let diverted = tokio::task::block_in_place(|| {
            drop(carried.diversions);
            carried.frames.finish()
        });
        report::Network {
            frames_forwarded: diverted.forwarded,
            frames_dropped: diverted.dropped + overflow,
            flows_carried,
            turned: diverted.turned,
            ..report::Network::default()
        }
    }

    /// What is known of the guest outside of it, for its new place.
    pub(super) fn known(&self) -> Vec<wire::Known> {
        let told = self.taps.iter().zip(&self.known).map(|(tap, addresses)| wire::Neighbour {
            netdev: tap.netdev.clone(),
            mac: tap.mac.clone(),
            addresses: addresses.iter().map(IpAddr::to_string).collect(),
        });
        let mut neighbours: Vec<wire::Neighbour> = told.collect();
        let parts = conntrack::wire::Flows::of(&self.flows).into_iter();
        parts
            .map(|flows| wire::Known { neighbours: std::mem::take(&mut neighbours), flows: Some(flows) })
            .collect()
    }

    /// Looks what this host knows of the guest: where it is a router, its neighbours' addresses; and their connections, if its
    /// firewall keeps account of them. The guest still runs.
    pub(super) async fn look(&mut self, host: &Host, vm: &VmName) {
        for (tap, known) in self.taps.iter().zip(&mut self.known) {
            known.extend(host.guest_addresses.addresses(vm, &tap.ifname));
        }
        if let Ok(interfaces) = Interfaces::open() {
            for (tap, known) in self.taps.iter().zip(&mut self.known) {
                let Ok(mac) = tap.mac.parse::<Mac>() else { continue };
                match interfaces.neighbours(mac.bytes()).await {
                    Ok(found) => known.extend(found),
                    Err(e) => tracing::warn!(error = chain(&e), "this host's neighbours cannot be looked at"),
                }
            }
        }
        if let Some(carried) = &mut self.carried {
            for (queues, read) in carried.queues.iter().zip(&mut carried.read) {
                *read = *read || are_empty(queues, Instant::now() + UNREAD).await;
            }
        }
        if host.firewall.conntrack && !self.taps.is_empty() {
            let begin = Instant::now();
            self.dump().await;
            self.took = Some(begin.elapsed());
        }
    }

    /// The same once more of a guest that is paused, if that takes no time.
    pub(super) async fn look_again(&mut self) {
        if self.took.is_some_and(|took| took <= QUICK) {
            self.dump().await;
        }
    }

    async fn dump(&mut self) {
        let addresses: Vec<IpAddr> = self.known.iter().flatten().copied().collect();
        if addresses.is_empty() {
            return;
        }
        match conntrack::dump(&addresses).await {
            Ok(flows) => self.flows = flows,
            Err(e) => tracing::warn!(error = chain(&e), "connections are not carried over"),
        }
    }
}

/// Frames that came faster than they were read.
async fn overflow(own: &[String]) -> u64 {
    let mut dropped = 0;
    let Ok(interfaces) = Interfaces::open() else { return dropped };
    for name in own {
        match interfaces.dropped(name).await {
            Ok(more) => dropped += more,
            Err(e) => tracing::warn!(error = chain(&e), "it is not known whether all that came was read"),
        }
    }
    dropped
}

/// Waits until QEMU has taken all that is in its queues. Whether it has in time.
async fn are_empty(queues: &[QemuQueue], until: Instant) -> bool {
    loop {
        if queues.iter().all(QemuQueue::is_empty) {
            return true;
        }
        if Instant::now() >= until {
            return false;
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn end(diversions: &[Diversion]) {
    for diversion in diversions {
        if let Err(e) = diversion.end() {
            tracing::error!(error = %e, "a tap's frames are still diverted");
        }
    }
}
