//! The network at the destination: what was on its way to the guest reaches it here, and the network is told where the guest is now.

use std::net::IpAddr;

use ::network::PacketSocket;
use ::network::announce;
use ::network::destination::{HeldBack, NetworkDestination, Played};
use ::network::diversion::Diversion;
use ::network::mac::Mac;
use ::network::tap::{OwnTap, QueuePlace};
use link::{AbortHandle, DataReceiver};
use qemu::{Qmp, Spec};
use tokio::task::JoinHandle;

use crate::end::{End, failed};
use ::network::conntrack::{self, Flow};
use ::network::interfaces;
use finding::{Finding, chain};
use host::Host;
use host::Record;
use host::guest_addresses::Neighbour;
use host::hooks::{self, Hook};
use ownership::VmName;
use protocol::deadlines::STRAGGLERS;
use protocol::wire;

/// Interfaces of one machine that are known by anything.
const INTERFACES: usize = 256;
/// Addresses of one interface that are announced: more are a mistake, or a flood.
const ADDRESSES: usize = 64;

/// Frames that come from the source. No more do once this is dropped.
#[derive(Default)]
pub(super) struct Frames(Option<(NetworkDestination, AbortHandle)>);

impl Frames {
    pub(super) fn receive(receiver: DataReceiver) -> Result<Frames, End> {
        let abort = receiver.abort_handle().map_err(|e| failed("data-stream", &e))?;
        let frames = NetworkDestination::start(receiver).map_err(|e| failed("data-stream", &e))?;
        Ok(Frames(Some((frames, abort))))
    }

    pub(super) fn is_expected(&self) -> bool {
        self.0.is_none()
    }

    /// Waits for the source to have no more, for a while.
    pub(super) async fn finish(mut self) -> Played {
        let Some((frames, abort)) = self.0.take() else { return Played::default() };
        let mut ended = tokio::task::spawn_blocking(move || frames.finish());
        let played = match tokio::time::timeout(STRAGGLERS, &mut ended).await {
            Ok(played) => played,
            Err(_) => {
                abort.abort();
                ended.await
            }
        };
        played.unwrap_or_default()
    }
}

impl Drop for Frames {
    fn drop(&mut self) {
        if let Some((_, abort)) = &self.0 {
            abort.abort();
        }
    }
}

fn neighbour(wire::Neighbour { netdev, mac, addresses }: wire::Neighbour) -> Neighbour {
    Neighbour { netdev, mac, addresses }
}

/// What is known of a guest outside of it.
#[derive(Default)]
pub(super) struct Known {
    pub(super) neighbours: Vec<Neighbour>,
    flows: Vec<Flow>,
    entered: Vec<Flow>,
}

impl Known {
    /// Takes in a part of it. With the last one this host's firewall is told of the guest's connections.
    pub(super) async fn take(&mut self, part: wire::Known, host: &Host, vm: &VmName) {
        let room = INTERFACES.saturating_sub(self.neighbours.len());
        self.neighbours.extend(part.neighbours.into_iter().take(room).map(neighbour));
        // Should the link break, it is announced by them all the same.
        host.guest_addresses.tell(vm, self.neighbours.clone());
        let Some(flows) = part.flows else { return };
        if !flows.add_to(&mut self.flows) {
            tracing::warn!("connections that make no sense, or too many, are left out");
        }
        if flows.more || !host.firewall.conntrack {
            return;
        }
        let addresses: Vec<IpAddr> =
            self.neighbours.iter().filter_map(decode).flat_map(|(_, addresses)| addresses).collect();
        // Of others a source has nothing to say.
        let mut flows = std::mem::take(&mut self.flows);
        flows.retain(|flow| flow.concerns(&addresses));
        flows.truncate(conntrack::MAX_FLOWS - self.entered.len());
        if flows.is_empty() {
            return;
        }
        let entered = conntrack::enter(&flows).await;
        // Should the machine not come, all of them go, however many lists they came in.
        self.entered.extend(flows);
        match entered {
            Ok(done) => tracing::info!(done.entered, done.refused, "connections are known to the firewall"),
            Err(e) => tracing::error!(error = chain(&e), "the firewall does not know the VM's connections"),
        }
    }

    /// The machine does not come.
    pub(super) async fn forget(self) {
        if !self.entered.is_empty()
            && let Err(e) = conntrack::remove(&self.entered).await
        {
            tracing::warn!(
                error = chain(&e),
                "the firewall still knows connections of a VM that does not come"
            );
        }
    }
}

/// The interfaces of a machine that is about to run here.
pub(super) struct Interfaces {
    each: Vec<Interface>,
    held_back: bool,
}

struct Interface {
    netdev: String,
    ifname: String,
    /// Nothing can be sent to the guest by it but from the network.
    macvtap: bool,
    /// Towards the guest.
    socket: Option<PacketSocket>,
    /// What else is sent to it can be held back.
    own: Option<(OwnTap, Diversion)>,
    /// Away from it. Not held: where the machine does not come, its taps are free when its QEMU has ended, whoever still has this.
    queues: Vec<QueuePlace>,
}

impl Interfaces {
    /// Gets hold of them: nothing has to be looked for once they are needed.
    pub(super) async fn of(record: &Record, spec: &Spec) -> Interfaces {
        let mut interfaces = Interfaces::to_announce(record, spec);
        let kernel = interfaces::Interfaces::open().ok();
        for interface in interfaces.each.iter_mut().filter(|interface| !interface.macvtap) {
            let Interface { ifname, socket, own, .. } = interface;
            match PacketSocket::to_guest(ifname) {
                Ok(way) => *socket = Some(way),
                Err(e) => tracing::warn!(tap = ifname, error = %e, "what was on its way is lost"),
            }
            if let Some(kernel) = &kernel {
                *own = prepare(kernel, ifname).await;
            }
        }
        interfaces
    }

    /// Of a machine for which nothing is on its way.
    pub(super) fn to_announce(record: &Record, spec: &Spec) -> Interfaces {
        let pid = record.process.as_ref().map(|process| process.pid);
        let interface = |nic: qemu::Nic| {
            let ifname = record.interface(&nic)?;
            let queues = pid.map_or(Ok(Vec::new()), |pid| QueuePlace::all(pid, &ifname));
            let queues = queues
                .inspect_err(|e| tracing::warn!(tap = ifname, error = %e, "its guest is not announced"));
            Some(Interface {
                macvtap: record.has_macvtap(&nic),
                netdev: nic.netdev,
                ifname,
                socket: None,
                own: None,
                queues: queues.unwrap_or_default(),
            })
        };
        Interfaces { each: spec.nics().into_iter().filter_map(interface).collect(), held_back: false }
    }

    /// From here on what else is sent to them is held back, if there is anything for it to wait for. They are about to be brought up.
    pub(super) fn hold_back(&mut self, frames: &Frames) {
        // They are known by their place: where one cannot be held back, none is.
        self.held_back = !frames.is_expected()
            && self
                .each
                .iter()
                .filter(|interface| !interface.macvtap)
                .all(|interface| interface.socket.is_some() && interface.own.is_some());
        for (_, diversion) in self.each.iter().filter(|_| self.held_back).filter_map(|each| each.own.as_ref())
        {
            if let Err(e) = diversion.begin() {
                tracing::warn!(error = %e, "frames may overtake those that were on their way");
            }
        }
        if !self.held_back {
            return;
        }
        // Of an interface that was there before: what came to it then was not for a guest here.
        for interface in &self.each {
            let queues = interface.queues.iter().filter_map(|place| place.open().ok());
            let stale = queues.map(|queue| queue.drain().len()).sum::<usize>();
            if stale > 0 {
                tracing::debug!(tap = interface.ifname, stale, "frames of before the VM came are dropped");
            }
        }
    }

    /// They are up: the guest gets what has come and what comes, and the network is told, now and again a few times.
    pub(super) fn are_up(self, frames: &Frames, neighbours: &[Neighbour]) {
        let (mut sockets, mut taps, mut diversions, mut told) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let whole = self.each.iter().all(|interface| interface.macvtap || interface.socket.is_some());
        for interface in self.each {
            sockets.extend(interface.socket);
            if let Some((tap, diversion)) = interface.own {
                taps.push(tap);
                diversions.push(diversion);
            }
            let known = neighbours.iter().find(|known| known.netdev == interface.netdev);
            let queue = interface.queues.into_iter().next();
            let Some((queue, (mac, addresses))) = queue.zip(known.and_then(decode)) else {
                continue;
            };
            told.push((interface.ifname, queue, announce::frames(mac, &addresses)));
        }
        let held_back = frames.0.as_ref().map(|(frames, _)| {
            let taps = if self.held_back { std::mem::take(&mut taps) } else { Vec::new() };
            // Frames know their interface by its place: where one has no way, all are dropped rather than given to another.
            let sockets = if whole { std::mem::take(&mut sockets) } else { Vec::new() };
            tokio::task::block_in_place(|| frames.play(sockets, taps))
        });
        say(&told);
        // Interfaces take a while to go, and packet sockets too (an RCU grace period), and nobody waits for that.
        tokio::task::spawn_blocking(move || {
            let_go(held_back, diversions);
            drop((taps, sockets));
        });
        let begin = tokio::time::Instant::now();
        tokio::spawn(async move {
            for after in announce::REPEATED {
                tokio::time::sleep_until(begin + after).await;
                say(&told);
            }
        });
    }
}

/// Tells the network of a machine that is in it here.
pub(super) fn announce(host: &Host, record: &Record) {
    let Ok(spec) = Spec::parse(&record.argv) else { return };
    let neighbours = host.guest_addresses.known(record, &spec);
    Interfaces::to_announce(record, &spec).are_up(&Frames::default(), &neighbours);
}

/// The same, and whatever else turns the network, of a machine that was resumed when nobody was there to see to that: after a crash, or by
/// a person's word.
pub fn turn(host: &Host, record: &Record, qmp: &Qmp) {
    let (host, record, qmp) = (host.clone(), record.clone(), qmp.clone());
    tokio::spawn(async move {
        announce(&host, &record);
        if let Err(e) = qmp.announce_self().await {
            tracing::debug!(vm = %record.name, error = chain(&e), "QEMU did not announce its place");
        }
        is_home(&host, &record).await;
        let _ = redirect(&host, record).await;
    });
}

/// Has the operator's hook turn the network, whether or not anybody waits for it.
pub(super) fn redirect(host: &Host, record: Record) -> JoinHandle<Result<(), Finding>> {
    let host = host.clone();
    tokio::spawn(async move {
        let run = hooks::run(&host, Hook::Redirect, &record, false).await;
        run.inspect_err(|finding| {
            tracing::error!(vm = %record.name, kind = finding.kind, hint = finding.hint, "{}", finding.message);
        })
    })
}

/// What came for it here when it was elsewhere is its own again.
pub(super) async fn is_home(host: &Host, record: &Record) {
    if record.made.forwarded.is_empty() {
        host.forwards.end(&record.name).await;
    }
}

/// Prepares to hold back what is sent to a tap.
async fn prepare(kernel: &interfaces::Interfaces, tap: &str) -> Option<(OwnTap, Diversion)> {
    let own = OwnTap::make().ok()?;
    match kernel.prepare_diversion(tap, own.name()).await {
        Ok(diversion) => Some((own, diversion)),
        Err(e) => {
            tracing::warn!(tap, error = chain(&e), "frames may overtake those that were on their way");
            None
        }
    }
}

/// Lets what is held back go when it may, and holds nothing back any more.
fn let_go(held_back: Option<HeldBack>, diversions: Vec<Diversion>) {
    if let Some(held_back) = &held_back {
        held_back.hold();
    }
    for diversion in &diversions {
        if let Err(e) = diversion.end() {
            tracing::error!(error = %e, "a tap's frames are still held back");
        }
    }
    if let Some(held_back) = &held_back {
        held_back.pass_on();
        // Whoever was about to divert a frame has done so when these are gone.
        drop(diversions);
        held_back.pass_on();
    }
}

fn decode(known: &Neighbour) -> Option<(Mac, Vec<IpAddr>)> {
    let mac: Mac = known.mac.parse().ok()?;
    let addresses = known.addresses.iter().take(ADDRESSES).filter_map(|address| address.parse().ok());
    (!mac.is_group()).then(|| (mac, addresses.collect()))
}

fn say(told: &[(String, QueuePlace, Vec<Vec<u8>>)]) {
    for (tap, place, frames) in told {
        let said = place
            .open()
            .and_then(|queue| frames.iter().map(|frame| queue.send(frame)).fold(Ok(()), Result::and));
        if let Err(e) = said {
            tracing::debug!(tap, error = %e, "its guest could not be announced");
        }
    }
}
