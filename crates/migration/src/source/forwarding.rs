//! A machine stays in this host's network when it leaves: this host's ends of its tunnels, and the destination told that they end.

use std::net::IpAddr;
use std::time::SystemTime;

use tokio::time::timeout;
use uuid::Uuid;

use super::peer::{Destination, violation};
use super::stop::Stop;
use crate::linked::LinkedHost;
use ::network::interfaces::tunnel::{Tunnel, identifier};
use ::network::interfaces::{Interfaces, TapError};
use finding::{Finding, Stage, chain, kind};
use host::Host;
use host::Vm;
use host::forward::Forward;
use protocol::deadlines::ANSWER;
use protocol::wire::{self, Reply, Request};

/// Makes this host's ends of the tunnels for a machine.
pub(super) async fn begin(
    host: &Host,
    vm: &Vm,
    destination: &Destination,
    session: Uuid,
    taps: &[wire::Tap],
) -> Result<(), Finding> {
    let (local, remote) = destination.hosts();
    if is_link_local(local) {
        return Err(Finding::new(
            "forward",
            format!("{local} is of one link only: nothing can be forwarded between such addresses"),
            "name the destination by another of its addresses",
        ));
    }
    let described = tunnels(host, session, (local, remote), taps).await;
    let tunnels = described.map_err(|e| Finding::new("network", chain(&e), "let the agent use netlink"))?;
    let chained = vm.record.made.forwarded.iter();
    let forward = Forward {
        vm: vm.record.name.clone(),
        session,
        to: destination.name().to_owned(),
        address: destination.address().to_owned(),
        since: SystemTime::now(),
        memory: vm.record.memory,
        generation: vm.record.generation,
        macs: taps.iter().map(|tap| tap.mac.clone()).collect(),
        tunnels,
        ports: taps.iter().map(|tap| tap.port.as_ref().and_then(wire::Port::checked)).collect(),
        chained: chained.flat_map(|tap| [tap.tunnel.clone(), tap.bridge.clone()]).collect(),
    };
    host.forwards.begin(forward).await
}

/// What the destination is asked for.
pub(super) fn request(host: &Host) -> wire::Forward {
    wire::Forward { port: host.forward_port.into() }
}

fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    }
}

async fn tunnels(
    host: &Host,
    session: Uuid,
    (local, remote): (IpAddr, IpAddr),
    taps: &[wire::Tap],
) -> Result<Vec<Tunnel>, TapError> {
    let interfaces = Interfaces::open()?;
    let mut tunnels = Vec::new();
    for (number, tap) in taps.iter().enumerate() {
        // Of one that is in another host's network already, what the source names is the bridge there.
        let bridge = interfaces.describe(&tap.ifname).await?.and_then(|here| here.bridge);
        tunnels.push(Tunnel {
            identifier: identifier(session, number),
            local,
            remote,
            port: host.forward_port,
            bridge: bridge.ok_or_else(|| TapError::Missing(tap.bridge.clone()))?,
            mtu: tap.mtu,
        });
    }
    Ok(tunnels)
}

/// Has the host that a machine is on now take it into its own network. One that has not got it any more, or not so, has nothing to do.
pub(crate) async fn unforward(host: &LinkedHost, forward: &Forward) -> Result<(), Finding> {
    let Forward { vm, to, address, .. } = forward;
    let hint = format!("see to {to}, or end it on this host only with `vmirror release {vm} --force`");
    let commit =
        wire::Commit { session: forward.session.as_bytes().to_vec(), name: vm.to_string(), generation: 0 };
    let asked = async {
        let mut destination = Destination::connect(host, address).await.map_err(Stop::Failed)?;
        if destination.name() != to {
            let message = format!("{} answers at {address}, not {to}", destination.name());
            return Err(Stop::Failed(Finding::new("other-agent", message, "see to the address")));
        }
        destination.send(Request::EndForwarding(commit)).await?;
        match destination.receive().await? {
            Reply::ForwardingEnded(_) => Ok(()),
            other => Err(violation(&format!("said {other} instead of taking the VM into its network"))),
        }
    };
    match timeout(ANSWER, asked).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(Stop::Failed(finding))) if finding.kind == kind::NOT_FORWARDED => Ok(()),
        Ok(Err(stop)) => {
            let finding = stop.into_failure(Stage::Failed).finding;
            Err(Finding::new(finding.kind, format!("{vm} is still forwarded: {}", finding.message), hint))
        }
        Err(_) => {
            let message = format!("{vm} is still forwarded: {to} does not answer within {ANSWER:?}");
            Err(Finding::new("unreachable", message, hint))
        }
    }
}
