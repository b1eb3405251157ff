//! Machines that have left this host and stay in its network: tunnels lead from its bridges to where they run, until they are released.
//!
//! They need nobody to run: the agent makes them, remembers them, makes them again after a reboot of its host, and removes them.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::state_file::StateFile;
use crate::vm::Journal;
use crate::vm::Record;
use finding::{Finding, chain};
use network::interfaces::port::Port;
use network::interfaces::tunnel::Tunnel;
use network::interfaces::{self, Interfaces, TapError};
use ownership::{Ownership, VmName};

/// UDP port of VXLAN (RFC 7348).
pub const PORT: u16 = 4789;
const FILE: &str = "forwards.json";

/// A machine that has left, or is about to, and stays in the network here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forward {
    /// The machine.
    pub vm: VmName,
    /// The migration by which it left.
    pub session: Uuid,
    /// Name of the agent that has it.
    pub to: String,
    /// Address of that agent.
    pub address: String,
    /// Since when.
    pub since: SystemTime,
    /// Its guest RAM, in bytes.
    pub memory: u64,
    /// Its generation before it left.
    pub generation: u64,
    /// The cards' addresses, where the command line has them: they tell whether a machine of that name is this one.
    pub macs: Vec<String>,
    /// One for each tap.
    pub tunnels: Vec<Tunnel>,
    /// The settings of each as a port of its bridge.
    pub ports: Vec<Option<Port>>,
    /// Interfaces by which it was itself in another host's network while it was here: that is where the tunnels lead on to.
    pub chained: Vec<String>,
}

impl Forward {
    /// The interfaces that were made for it here.
    #[must_use]
    pub fn interfaces(&self) -> Vec<String> {
        self.tunnels.iter().map(Tunnel::name).collect()
    }

    /// The host that the tunnels lead to.
    #[must_use]
    pub fn remote(&self) -> Option<IpAddr> {
        self.tunnels.first().map(|tunnel| tunnel.remote)
    }

    /// Makes what is not there of the tunnels' ends here, down.
    async fn make(&self) -> Result<(), TapError> {
        let interfaces = Interfaces::open()?;
        for (tunnel, port) in self.tunnels.iter().zip(&self.ports) {
            let name = tunnel.name();
            if !interfaces.exists(&name).await? {
                interfaces.make_tunnel(tunnel).await?;
            }
            interfaces.join(&name, &tunnel.bridge).await?;
            if let Some(port) = port {
                interfaces.set_port(&name, port).await?;
            }
        }
        Ok(())
    }

    async fn raise(&self) -> Result<(), TapError> {
        let interfaces = Interfaces::open()?;
        for tunnel in &self.tunnels {
            interfaces.raise(&tunnel.name()).await?;
        }
        Ok(())
    }

    /// An interface that has the name of one of its own, and is somebody else's.
    async fn taken(&self) -> Result<Option<String>, TapError> {
        let interfaces = Interfaces::open()?;
        for name in self.interfaces() {
            if interfaces.exists(&name).await? {
                return Ok(Some(name));
            }
        }
        Ok(None)
    }
}

/// The machines that have left this host and stay in its network.
#[derive(Debug)]
pub struct Forwards {
    file: StateFile,
    known: Mutex<Vec<Forward>>,
    /// Held by who removes tunnels, and by who puts them right.
    changing: tokio::sync::Mutex<()>,
    /// Machines whose network is not to be changed now.
    busy: Arc<Mutex<BTreeSet<VmName>>>,
}

/// Keeps the network of a machine as it is until it is dropped.
#[derive(Debug)]
pub struct Busy {
    busy: Arc<Mutex<BTreeSet<VmName>>>,
    vm: VmName,
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.vm);
    }
}

impl Forwards {
    /// Reads what is on record below the agent's state directory.
    #[must_use]
    pub fn open(state_dir: &Path) -> Forwards {
        let (file, known) = StateFile::open(state_dir.join(FILE));
        let known = Mutex::new(known);
        Forwards { file, known, changing: tokio::sync::Mutex::default(), busy: Arc::default() }
    }

    /// What an operator is told where it is not known what was on record.
    #[must_use]
    pub fn problem(&self) -> Option<Finding> {
        Some(self.file.unknown()?.finding(
            "forwards-unreadable",
            "which VMs that have left stay in this host's network is not known, and nothing keeps their tunnels up",
            "bring those VMs into a network of their own, or here again, and remove what tunnels are left (`ip link show type vxlan`: vmf…)",
        ))
    }

    /// All of them.
    #[must_use]
    pub fn all(&self) -> Vec<Forward> {
        self.known().clone()
    }

    /// The last one of a machine.
    #[must_use]
    pub fn of(&self, vm: &VmName) -> Option<Forward> {
        self.known().iter().rev().find(|forward| forward.vm == *vm).cloned()
    }

    /// Nobody else changes the network of a machine from here on; none where somebody does already.
    pub fn hold(&self, vm: &VmName) -> Option<Busy> {
        let mut busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        busy.insert(vm.clone()).then(|| Busy { busy: Arc::clone(&self.busy), vm: vm.clone() })
    }

    /// That of a migration.
    pub fn with(&self, session: Uuid) -> Option<Forward> {
        self.known().iter().find(|forward| forward.session == session).cloned()
    }

    /// Whether there is one of that migration.
    #[must_use]
    pub fn has(&self, session: Uuid) -> bool {
        self.with(session).is_some()
    }

    /// The interfaces by which a machine is in another host's network, but for those that lead on to where it has gone.
    pub(crate) fn interfaces_of(&self, record: &Record) -> Vec<String> {
        let leads_on =
            matches!(&record.ownership, Ownership::HandedOver { session, .. } if self.has(*session));
        if leads_on { Vec::new() } else { record.made.forwarding() }
    }

    /// Makes this host's ends of the tunnels, on record first. They are down.
    ///
    /// # Errors
    /// What an operator is told; nothing is left of the attempt then.
    pub async fn begin(&self, forward: Forward) -> Result<(), Finding> {
        let session = forward.session;
        let network = |e: &TapError| Finding::new("network", chain(e), "let the agent use netlink");
        if let Some(name) = forward.taken().await.map_err(|e| network(&e))? {
            let message = format!("there is an interface {name} already, whose name a tunnel would have");
            return Err(Finding::new("interface-taken", message, "try again: the next name is another"));
        }
        let recorded = {
            let mut known = self.known();
            known.push(forward.clone());
            self.write(&known)
        };
        let made = match recorded {
            Ok(()) => forward.make().await.map_err(|e| {
                Finding::new(
                    "forward",
                    chain(&e),
                    "let the agent make interfaces (CAP_NET_ADMIN), on a kernel with VXLAN",
                )
            }),
            Err(e) => Err(Finding::new("journal", chain(&e), "see to the disk of state_dir")),
        };
        if made.is_err() {
            self.undo(session).await;
        }
        made
    }

    /// From now on frames pass: the machine is about to leave.
    ///
    /// # Errors
    /// What an operator is told where an interface cannot be raised.
    pub async fn raise(&self, session: Uuid) -> Result<(), Finding> {
        let Some(forward) = self.with(session) else { return Ok(()) };
        forward.raise().await.map_err(|e| Finding::new("forward", chain(&e), "see to that interface"))
    }

    /// The machine has not left after all.
    pub async fn undo(&self, session: Uuid) {
        let _changing = self.changing.lock().await;
        let its = |forward: &Forward| forward.session == session;
        for forward in self.all().iter().filter(|forward| its(forward)) {
            interfaces::remove_all(&forward.interfaces()).await;
        }
        self.forget(its);
    }

    /// A machine is in the network here by itself: nothing is sent on to where it was.
    pub async fn end(&self, vm: &VmName) {
        let _changing = self.changing.lock().await;
        let its = |forward: &Forward| forward.vm == *vm;
        for forward in self.all().iter().filter(|forward| its(forward)) {
            tracing::info!(vm = %vm, to = forward.to, "what comes for it is not forwarded any more");
            interfaces::remove_all(&forward.interfaces()).await;
            interfaces::remove_all(&forward.chained).await;
        }
        self.forget(its);
    }

    /// Puts right what a crash or a reboot has left: tunnels of machines that have left are there, others are not.
    pub async fn restore(&self, journal: &Journal) {
        for forward in self.all() {
            let here = journal.get(&forward.vm).filter(|record| record.ownership == Ownership::Owner);
            match here {
                Some(record) if record.generation <= forward.generation => self.undo(forward.session).await,
                Some(record) if record.made.forwarded.is_empty() => self.end(&forward.vm).await,
                // It has left; or is here again, and in this network by way of where it has been.
                _ => {
                    let made = async {
                        forward.make().await?;
                        forward.raise().await
                    };
                    if let Err(e) = made.await {
                        tracing::error!(vm = %forward.vm, error = chain(&e), "what comes for it is not forwarded");
                    }
                }
            }
        }
    }

    /// Puts right what has been changed since: a bridge that was not there, or was made anew.
    pub async fn repair(&self, journal: &Journal) {
        let left = |forward: &Forward| {
            journal.get(&forward.vm).is_none_or(|record| record.ownership != Ownership::Owner)
        };
        for forward in self.all() {
            let _changing = self.changing.lock().await;
            if !left(&forward) || !self.has(forward.session) {
                continue;
            }
            let made = async {
                forward.make().await?;
                forward.raise().await
            };
            if let Err(e) = made.await {
                tracing::warn!(vm = %forward.vm, error = chain(&e), "what comes for it is not forwarded");
            }
        }
    }

    /// They go from the record when nothing is left of them.
    fn forget(&self, which: impl Fn(&Forward) -> bool) {
        let mut known = self.known();
        let before = known.len();
        known.retain(|forward| !which(forward));
        if known.len() != before
            && let Err(e) = self.write(&known)
        {
            tracing::error!(file = %self.file.path().display(), error = %e, "what is forwarded cannot be put on record");
        }
    }

    fn write(&self, known: &Vec<Forward>) -> std::io::Result<()> {
        self.file.write(known)
    }

    fn known(&self) -> MutexGuard<'_, Vec<Forward>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_forwarded_is_known_again_after_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let forwards = Forwards::open(directory.path());
        let vm: VmName = "web1".parse().unwrap();
        let forward = Forward {
            vm: vm.clone(),
            session: Uuid::from_u128(7),
            to: "host-b".to_owned(),
            address: "10.9.0.3:7600".to_owned(),
            since: SystemTime::now(),
            memory: 1 << 30,
            generation: 3,
            macs: vec!["52:54:00:88:00:0a".to_owned()],
            tunnels: vec![Tunnel {
                identifier: 77,
                local: "10.9.0.2".parse().unwrap(),
                remote: "10.9.0.3".parse().unwrap(),
                port: PORT,
                bridge: "br0".to_owned(),
                mtu: 1500,
            }],
            ports: vec![Some(Port::default())],
            chained: Vec::new(),
        };
        {
            let mut known = forwards.known();
            known.push(forward.clone());
            forwards.write(&known).unwrap();
        }
        let again = Forwards::open(directory.path());
        assert_eq!(again.of(&vm), Some(forward.clone()));
        assert!(again.has(forward.session) && !again.has(Uuid::from_u128(8)));
        assert_eq!(forward.interfaces(), ["vmf00004d"]);
        again.forget(|forward| forward.vm == vm);
        assert_eq!(Forwards::open(directory.path()).all(), []);
    }
}
