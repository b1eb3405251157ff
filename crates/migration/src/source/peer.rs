//! The destination at the other end of the link.

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use link::{ConnectError, ControlReceiver, ControlSender, LinkError, Peer, TlsError};
use mirror::hash::Secret;
use mirror::layout::PageIndex;
use qemu::Qmp;
use qemu::qmp::CpuidWord;
use tokio::sync::{Mutex, mpsc};
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

use super::stop::Stop;
use crate::boot_files;
use crate::failure::{Finding, chain};
use crate::host::Host;
use crate::machine::{self, Machine};
use crate::options::{DiskRoom, Engine, OnDiverge, Options};
use crate::reservation::CPU_FEATURE_MISSING;
use crate::vm::Vm;
use crate::wire::{self, Reply, Request, ToDestination, ToSource};

/// How long a destination may take to start QEMU and set everything aside.
const RESERVE: Duration = Duration::from_secs(60);

/// Words of the destination that may wait for somebody to listen.
const UNREAD: usize = 4096;

/// The destination's agent, in one session.
pub(super) struct Destination {
    peer: Peer,
    address: String,
    sender: Sender,
    inbox: mpsc::Receiver<Result<Reply, LinkError>>,
    /// Supplies pages that a guest there waits for.
    supply: Option<Supply>,
    _reader: AbortOnDropHandle<()>,
}

type Supply = Box<dyn Fn(Vec<PageIndex>) + Send + Sync>;

/// What became of the wish that a destination throw its copy away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Withdrawal {
    /// There is no copy any more.
    Done,
    /// The machine is the destination's, and has run there.
    RunsThere,
    /// Nothing was heard.
    Unheard,
}

/// The way to the destination, for several tasks. A message is sent whole, one after the other.
#[derive(Debug, Clone)]
pub(super) struct Sender(Arc<Mutex<ControlSender>>);

impl Sender {
    pub(super) async fn send(&self, request: Request) -> Result<(), Stop> {
        let sent = self.0.lock().await.send(&ToDestination::from(request)).await;
        sent.map_err(lost)
    }
}

/// The link has failed.
pub(super) fn lost(error: LinkError) -> Stop {
    Stop::because("link", &error, "see to the network between the hosts, and to the destination's agent")
}

/// The peer does not keep to the protocol.
pub(super) fn violation(what: &str) -> Stop {
    let message = format!("the destination {what}");
    Stop::Failed(Finding::new("protocol", message, "see whether both agents are of the same version"))
}

impl Destination {
    pub(super) async fn connect(host: &Host, address: &str) -> Result<Destination, Finding> {
        let control = host.endpoint.connect(address).await.map_err(|e| not_connected(&e))?;
        let peer = control.peer().clone();
        if peer.name == host.name {
            return Err(Finding::new(
                "same-host",
                format!("{address} is this host's own agent, {}", peer.name),
                "name another host's agent with --to",
            ));
        }
        let (sender, receiver) = control.split();
        let (tell, inbox) = mpsc::channel(UNREAD);
        let reader = AbortOnDropHandle::new(tokio::spawn(read(receiver, tell)));
        let sender = Sender(Arc::new(Mutex::new(sender)));
        Ok(Destination { peer, address: address.to_owned(), sender, inbox, supply: None, _reader: reader })
    }

    pub(super) fn name(&self) -> &str {
        &self.peer.name
    }

    /// The addresses of the two hosts, this one's first, as the connection has them.
    pub(super) fn hosts(&self) -> (IpAddr, IpAddr) {
        (self.peer.local.ip().to_canonical(), self.peer.address.ip().to_canonical())
    }

    pub(super) fn address(&self) -> &str {
        &self.address
    }

    pub(super) fn sender(&self) -> Sender {
        self.sender.clone()
    }

    pub(super) async fn send(&self, request: Request) -> Result<(), Stop> {
        self.sender.send(request).await
    }

    /// From now on, what its guest waits for is supplied whenever the destination is listened to.
    pub(super) fn supply(&mut self, supply: impl Fn(Vec<PageIndex>) + Send + Sync + 'static) {
        self.supply = Some(Box::new(supply));
    }

    /// What the destination says next. Nothing is lost when this is cancelled.
    pub(super) async fn receive(&mut self) -> Result<Reply, Stop> {
        let word = loop {
            match (self.inbox.recv().await, &self.supply) {
                (Some(Ok(Reply::Wanted(pages))), Some(supply)) => {
                    supply(pages.pages.into_iter().map(PageIndex).collect());
                }
                (word, _) => break word,
            }
        };
        match word {
            Some(Ok(Reply::Failed(findings))) => {
                let mut findings = findings.findings.into_iter().map(Into::into);
                let unknown = || Finding::new("destination", "the destination failed", "see its log");
                Err(Stop::Failed(findings.next().unwrap_or_else(unknown)))
            }
            Some(Ok(reply)) => Ok(reply),
            Some(Err(error)) => Err(lost(error)),
            None => Err(lost(LinkError::Closed)),
        }
    }

    /// What the destination says next, if that is soon enough. `what` is what it is expected to do.
    pub(super) async fn receive_within(&mut self, limit: Duration, what: &str) -> Result<Reply, Stop> {
        timeout(limit, self.receive()).await.map_err(|_| {
            let message = format!("{} did not {what} within {limit:?}", self.name());
            Stop::Failed(Finding::new("link", message, "see the log of the destination's agent"))
        })?
    }

    /// Asks the destination to set everything aside for the machine behind `qmp`.
    pub(super) async fn reserve(
        &mut self,
        request: wire::Reserve,
        qmp: &Qmp,
    ) -> Result<wire::Reserved, Stop> {
        let rehearsal = request.rehearsal;
        let files = request.boot_files.clone();
        self.send(Request::Reserve(request)).await?;
        let mut reply = self.receive_within(RESERVE, "answer the reservation").await?;
        if let Reply::Lacking(lacking) = reply {
            self.ship(&files, &lacking.paths).await?;
            reply = self.receive_within(RESERVE, "answer the reservation").await?;
        }
        match reply {
            Reply::Reserved(reserved) => Ok(reserved),
            Reply::Refused(wire::Findings { findings, reserved, .. }) if rehearsal && findings.is_empty() => {
                Ok(reserved.unwrap_or_default())
            }
            Reply::Refused(wire::Findings { findings, cpu_features, .. }) => {
                let mut findings: Vec<Finding> = findings.into_iter().map(Into::into).collect();
                for finding in findings.iter_mut().filter(|finding| finding.kind == CPU_FEATURE_MISSING) {
                    name_missing(finding, &cpu_features, qmp).await;
                }
                Err(Stop::Refused(findings))
            }
            other => Err(violation(&format!("answered a reservation with {other:?}"))),
        }
    }

    /// Sends files that the machine boots from, of those that were announced.
    async fn ship(&self, files: &[wire::BootFile], wanted: &[String]) -> Result<(), Stop> {
        for path in wanted {
            if !files.iter().any(|file| file.path == *path) {
                return Err(violation("wants a file that was not announced"));
            }
            let parts = boot_files::parts(Path::new(path)).map_err(|e| {
                Stop::because("boot-file", &e, "see whether the VM's kernel and initrd are still there")
            })?;
            for part in parts {
                self.send(Request::FilePart(part)).await?;
            }
        }
        Ok(())
    }

    /// Tells the destination to throw its copy away, and waits until it has.
    pub(super) async fn cancel(&mut self, commit: wire::Commit, deadline: Duration) -> Withdrawal {
        let cancelled = async {
            self.send(Request::Cancel(commit)).await?;
            loop {
                match self.inbox.recv().await {
                    Some(Ok(Reply::Cancelled(_) | Reply::Failed(_) | Reply::Refused(_))) => {
                        return Ok(Withdrawal::Done);
                    }
                    Some(Ok(Reply::Running(_))) => return Ok(Withdrawal::RunsThere),
                    Some(Ok(_)) => {}
                    Some(Err(e)) => return Err(lost(e)),
                    None => return Err(lost(LinkError::Closed)),
                }
            }
        };
        match timeout(deadline, cancelled).await {
            Ok(Ok(withdrawal)) => withdrawal,
            Ok(Err(stop)) => {
                tracing::warn!(destination = self.name(), ?stop, "the destination cannot be told");
                Withdrawal::Unheard
            }
            Err(_) => {
                tracing::warn!(
                    destination = self.name(),
                    "the destination does not confirm the cancellation"
                );
                Withdrawal::Unheard
            }
        }
    }
}

/// Names the features that are missing, by what both sides have: CPUID alone has no names.
async fn name_missing(finding: &mut Finding, there: &[String], qmp: &Qmp) {
    // Without the names the finding says what it says: which bits.
    let Ok(here) = machine::features_on(qmp).await else { return };
    let missing: Vec<String> = here.into_iter().filter(|feature| !there.contains(feature)).collect();
    if !missing.is_empty() {
        finding.message = format!("{}: {}", finding.message, missing.join(", "));
    }
}

fn wire_word(word: &CpuidWord) -> wire::CpuidWord {
    let CpuidWord { leaf, subleaf, register, features } = word.clone();
    wire::CpuidWord { leaf, subleaf, register, features }
}

/// Passes on what the destination says. One that says more than is listened to has the link ended: waiting for the listener
/// would leave the destination's pings unanswered.
async fn read(mut receiver: ControlReceiver, tell: mpsc::Sender<Result<Reply, LinkError>>) {
    loop {
        let message = match receiver.receive::<ToSource>().await {
            Ok(ToSource { reply: Some(reply) }) => Ok(reply),
            // A reply of a later version: what it would have said is not understood, so it is not passed over.
            Ok(ToSource { reply: None }) => Err(LinkError::Closed),
            Err(error) => Err(error),
        };
        let last = message.is_err();
        if tell.try_send(message).is_err() || last {
            return;
        }
    }
}

/// The reason and the remedy of a connection that could not be made.
fn not_connected(error: &ConnectError) -> Finding {
    let (kind, hint) = match error {
        ConnectError::Address { .. } => ("bad-address", "write it as HOST:PORT"),
        ConnectError::Refused { .. } => ("no-agent", "start the agent there, or see to the port"),
        ConnectError::Tls { source: TlsError::NameMismatch { .. }, .. } => {
            ("not-trusted", "use an address that is in the certificate, or issue it with that --address")
        }
        ConnectError::Tls { source: TlsError::PeerExpired { .. } | TlsError::OwnExpired, .. } => {
            ("not-trusted", "issue a new certificate for that agent")
        }
        ConnectError::Tls { .. } => {
            ("not-trusted", "issue both agents' certificates from the same authority")
        }
        ConnectError::RefusedByPeer { .. } => {
            ("peer-not-allowed", "add this agent to [allow] peers in the destination's configuration")
        }
        ConnectError::Version { .. } => ("version", "update the older of the two agents"),
        _ => ("unreachable", "see to the address and the network"),
    };
    Finding::new(kind, chain(error), hint)
}

/// What the destination is asked to set aside.
pub(super) fn reserve_request(
    session: Uuid,
    vm: &Vm,
    machine: &Machine,
    options: &Options,
    streams: u16,
    secret: &[u8; mirror::hash::SECRET_LENGTH],
    rehearsal: bool,
) -> wire::Reserve {
    let (macvtaps, taps) = machine.taps.iter().cloned().partition(|tap| tap.macvtap.is_some());
    wire::Reserve {
        session: session.as_bytes().to_vec(),
        name: vm.record.name.to_string(),
        generation: vm.record.generation,
        argv: vm.spec.to_argv(),
        machine: machine.machine.clone(),
        qemu_version: machine.qemu_version.clone(),
        cpuid: machine.cpuid.iter().map(wire_word).collect(),
        cpu_features: machine.cpu_features.clone(),
        ram: machine.ram.iter().map(wire_ram).collect(),
        disks: machine.disks.iter().map(crate::disks::Disk::wire).collect(),
        boot_files: Secret::try_from(&secret[..])
            .map_or_else(|_| Vec::new(), |secret| boot_files::of(&vm.spec, &secret)),
        whole_room: options.disk_room == DiskRoom::Whole,
        accept_disconnect: options.accept_disconnect,
        taps,
        macvtaps,
        limits: machine.limits.wire(),
        streams: u32::from(streams),
        secret: secret.to_vec(),
        rehearsal,
        forward: None,
        nft: String::new(),
        post_copy: options.on_diverge == OnDiverge::PostCopy,
        qemu_stream: options.engine == Engine::Qemu,
    }
}

fn wire_ram(block: &qemu::RamBlock) -> wire::RamBlock {
    let is_huge = block.page_size > mirror::layout::PAGE_SIZE as u64;
    let huge_page = if is_huge { block.page_size } else { 0 };
    wire::RamBlock { id: block.id.clone(), size: block.size, huge_page }
}
