//! A machine that came here and stays in its source's network: this host's ends of its tunnels, until it is to be in the network here.

use std::net::IpAddr;

use link::Peer;
use uuid::Uuid;

use crate::end::End;
use crate::network;
use crate::source::Source;
use ::network::interfaces::tunnel::{Tunnel, identifier};
use ::network::interfaces::{self, Interfaces, TapError};
use finding::{Finding, chain, kind};
use host::Host;
use host::Journal;
use host::vm::{Forwarded, Record};
use ownership::Ownership;
use protocol::wire::{self, Reply};

/// What a source asks for, within bounds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tunnels {
    pub(crate) port: u16,
    local: IpAddr,
    remote: IpAddr,
}

impl Tunnels {
    /// Between the two ends of the connection by which they are asked for.
    pub(crate) fn decode(asked: wire::Forward, peer: &Peer) -> Option<Tunnels> {
        let port = u16::try_from(asked.port).ok().filter(|port| *port > 0)?;
        Some(Tunnels {
            port,
            local: peer.local.ip().to_canonical(),
            remote: peer.address.ip().to_canonical(),
        })
    }

    /// Makes a bridge for a tap, with a tunnel to the source's in it. On record before either exists.
    pub(crate) async fn make(
        &self,
        interfaces: &Interfaces,
        journal: &Journal,
        record: &mut Record,
        (session, number): (Uuid, usize),
        tap: &wire::Tap,
    ) -> Result<String, MakeError> {
        let identifier = identifier(session, number);
        let bridge = Tunnel::own_bridge(identifier);
        let tunnel = Tunnel {
            identifier,
            local: self.local,
            remote: self.remote,
            port: self.port,
            bridge: bridge.clone(),
            mtu: tap.mtu,
        };
        for name in [&bridge, &tunnel.name()] {
            if interfaces.exists(name).await? {
                // Somebody else's: it must not go with the machine.
                return Err(MakeError::Taken(name.clone()));
            }
        }
        let forwarded = Forwarded {
            tap: tap.ifname.clone(),
            home: tap.bridge.clone(),
            port: tap.port.as_ref().and_then(wire::Port::checked),
            bridge: bridge.clone(),
            tunnel: tunnel.name(),
        };
        journal.amend(record, |now| now.made.forwarded.push(forwarded))?;
        interfaces.make_bridge(&bridge, tap.mtu).await?;
        interfaces.make_tunnel(&tunnel).await?;
        // The tap is not, before the machine is this host's.
        interfaces.raise(&tunnel.name()).await?;
        Ok(bridge)
    }
}

/// Why a tunnel's end could not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MakeError {
    #[error("there is an interface {0} already")]
    Taken(String),
    #[error(transparent)]
    Interfaces(#[from] TapError),
    #[error(transparent)]
    Journal(#[from] ownership::JournalError),
}

/// Puts a machine into the network here, which is announced there, and removes its tunnels. With `force`, the tunnels are removed even
/// if it can be in no network here.
///
/// # Errors
/// Why it cannot be in the network here.
pub async fn release(host: &Host, mut record: Record, force: bool) -> Result<Record, Finding> {
    let Some(_held) = host.forwards.hold(&record.name) else {
        let message = format!("VM {} is being migrated, or released already", record.name);
        return Err(Finding::new("busy", message, "try again when that has ended"));
    };
    let failed =
        |e: &TapError| Finding::new("network", chain(e), "let the agent make interfaces (CAP_NET_ADMIN)");
    let interfaces = Interfaces::open().map_err(|e| failed(&e))?;
    for tap in &record.made.forwarded {
        match place(host, &interfaces, tap).await {
            Err(finding) if !force => return Err(finding),
            Err(finding) => {
                tracing::warn!(vm = %record.name, why = finding.message, "it is in no network now")
            }
            Ok(()) => {}
        }
    }
    for forwarded in &record.made.forwarded {
        if place(host, &interfaces, forwarded).await.is_ok() {
            interfaces.join(&forwarded.tap, &forwarded.home).await.map_err(|e| failed(&e))?;
            if let Some(port) = &forwarded.port {
                interfaces.set_port(&forwarded.tap, port).await.map_err(|e| failed(&e))?;
            }
        }
    }
    // All of them are in the network here, so nothing of the tunnels is needed any more.
    let left = record.made.forwarding();
    let recorded = host.journal.amend(&mut record, |now| now.made.forwarded.clear());
    interfaces::remove_all(&left).await;
    recorded.map_err(|e| Finding::new("journal", chain(&e), "see to the disk of state_dir"))?;
    tracing::info!(vm = %record.name, "it is in the network of this host now");
    network::announce(host, &record);
    network::is_home(host, &record).await;
    Ok(record)
}

/// Whether a tap can be in the network here.
async fn place(host: &Host, interfaces: &Interfaces, tap: &Forwarded) -> Result<(), Finding> {
    let name = &host.name;
    if !host.allow.bridges.contains(&tap.home) {
        return Err(Finding::new(
            "bridge-not-allowed",
            format!("{name} does not allow bridge {}", tap.home),
            "add it to [allow] bridges in that agent's configuration",
        ));
    }
    match interfaces.describe(&tap.home).await {
        Ok(Some(_)) => Ok(()),
        _ => Err(Finding::new(
            "bridge-missing",
            format!("{name} has no bridge {}, for interface {}", tap.home, tap.tap),
            "make the bridge there",
        )),
    }
}

impl Source {
    /// The host that a machine came from sends on nothing more.
    pub(super) async fn end_forwarding(&mut self, commit: &wire::Commit) -> Result<(), End> {
        let refused = |kind: &str, message: String, hint: &str| {
            Err(End::Failed(vec![Finding::new(kind, message, hint)]))
        };
        let (name, host) = (&commit.name, &self.host.name);
        if !self.host.allow.peers.contains(&self.peer.name) {
            let message = format!("{host} takes nothing from {} any more", self.peer.name);
            return refused(
                "peer-not-allowed",
                message,
                "add it to [allow] peers there, or release the VM there",
            );
        }
        let here = |(record, _): &(Record, Uuid)| !record.made.forwarded.is_empty();
        let Some((record, _)) = self.meant(commit).filter(here) else {
            if let Some(onward) = name.parse().ok().and_then(|name| self.host.forwards.of(&name)) {
                let message = format!("VM {name} has moved on from {host} to {} with its network", onward.to);
                return refused("forwarded-on", message, "release it on the host that it left last first");
            }
            let message = format!("{host} has no VM {name} in another host's network");
            return refused(kind::NOT_FORWARDED, message, "there is nothing to end");
        };
        if record.ownership != Ownership::Owner {
            let message = format!("it is not certain on which host VM {name} is");
            return refused("uncertain", message, "settle that first, with `vmirror resolve`");
        }
        let released = release(&self.host, record, false).await;
        released.map_err(|finding| End::Failed(vec![finding]))?;
        self.reply(Reply::ForwardingEnded(wire::Nothing {})).await
    }
}
