//! The destination at the other end of the link.

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use link::{ConnectError, ControlReceiver, ControlSender, LinkError, Peer, TlsError};
use mirror::layout::PageIndex;
use qemu::Qmp;
use tokio::sync::{Mutex, mpsc};
use tokio::time::{Instant, timeout};
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

use super::boot_files;
use super::stop::Stop;
use crate::linked::LinkedHost;
use finding::{Finding, chain, kind};
use host::Record;
use movable::compatibility::features_on;
use ownership::{Answer, Withdrawal};
use protocol::deadlines::{KNOWN, POST_COPY_READY, RESERVE, RESERVE_WORD};
use protocol::wire::bounds::{self, Unheard};
use protocol::wire::{self, Reply, Request, ToDestination};

/// Words of the destination that may wait for somebody to listen, and the bytes that they may take.
const UNREAD: usize = 4096;
const UNREAD_BYTES: usize = 64 << 20;

/// The destination's agent, in one session.
pub(super) struct Destination {
    peer: Peer,
    address: String,
    sender: Sender,
    inbox: mpsc::Receiver<Result<Reply, Unheard>>,
    /// Bytes of what waits in it.
    unread: Arc<AtomicUsize>,
    /// Supplies pages that a guest there waits for.
    supply: Option<Supply>,
    _reader: AbortOnDropHandle<()>,
}

type Supply = Box<dyn Fn(Vec<PageIndex>) -> bool + Send + Sync>;

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
    Stop::Failed(Finding::new(kind::PROTOCOL, message, "see whether both agents are of the same version"))
}

impl From<Unheard> for Stop {
    fn from(unheard: Unheard) -> Stop {
        match unheard {
            Unheard::Link(error) => lost(error),
            Unheard::Violation(what) => violation(&what),
        }
    }
}

impl Destination {
    pub(super) async fn connect(host: &LinkedHost, address: &str) -> Result<Destination, Finding> {
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
        let unread = Arc::default();
        let reader = AbortOnDropHandle::new(tokio::spawn(read(receiver, tell, Arc::clone(&unread))));
        let sender = Sender(Arc::new(Mutex::new(sender)));
        let address = address.to_owned();
        Ok(Destination { peer, address, sender, inbox, unread, supply: None, _reader: reader })
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

    /// From now on, what its guest waits for is supplied whenever the destination is listened to. `supply` says whether it asked for
    /// what can be.
    pub(super) fn supply(&mut self, supply: impl Fn(Vec<PageIndex>) -> bool + Send + Sync + 'static) {
        self.supply = Some(Box::new(supply));
    }

    /// Whatever the destination says next. Nothing is lost when this is cancelled.
    async fn word(&mut self) -> Result<Reply, Stop> {
        let word = self.inbox.recv().await.unwrap_or(Err(Unheard::Link(LinkError::Closed)))?;
        self.unread.fetch_sub(word.weight(), Ordering::Relaxed);
        Ok(word)
    }

    /// What the destination says next. Nothing is lost when this is cancelled.
    pub(super) async fn receive(&mut self) -> Result<Reply, Stop> {
        loop {
            match (self.word().await?, &self.supply) {
                (Reply::Wanted(pages), Some(supply)) => {
                    if !supply(pages.pages.into_iter().map(PageIndex).collect()) {
                        return Err(violation("asks for more of the VM's memory than there is"));
                    }
                }
                (Reply::Failed(findings), _) => {
                    let mut findings = findings.findings.into_iter().map(Into::into);
                    let unknown = || Finding::new("destination", "the destination failed", "see its log");
                    return Err(Stop::Failed(findings.next().unwrap_or_else(unknown)));
                }
                (reply, _) => return Ok(reply),
            }
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
        let until = Instant::now() + RESERVE;
        let mut reply = self.reserved_by(until).await?;
        if let Reply::Lacking(lacking) = reply {
            self.ship(&files, &lacking.paths).await?;
            reply = self.reserved_by(until).await?;
        }
        match reply {
            Reply::Reserved(reserved) => Ok(reserved),
            Reply::Refused(wire::Findings { findings, reserved, .. }) if rehearsal && findings.is_empty() => {
                Ok(reserved.unwrap_or_default())
            }
            Reply::Refused(wire::Findings { findings, cpu_features, .. }) => {
                let mut findings: Vec<Finding> = findings.into_iter().map(Into::into).collect();
                for finding in findings.iter_mut().filter(|finding| finding.kind == kind::CPU_FEATURE_MISSING)
                {
                    name_missing(finding, &cpu_features, qmp).await;
                }
                Err(Stop::Refused(findings))
            }
            other => Err(violation(&format!("answered a reservation with {other}"))),
        }
    }

    /// What comes of a reservation.
    async fn reserved_by(&mut self, until: Instant) -> Result<Reply, Stop> {
        patiently(self, until).await
    }

    /// Sends files that the machine boots from, of those that were announced.
    async fn ship(&self, files: &[wire::BootFile], wanted: &[String]) -> Result<(), Stop> {
        for (number, path) in wanted.iter().enumerate() {
            if !files.iter().any(|file| file.path == *path) || wanted[..number].contains(path) {
                return Err(violation("wants a file that was not announced, or one twice"));
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

    /// Tells what is known of the guest's network. The guest is paused meanwhile, and nothing has been handed over yet.
    pub(super) async fn tell_known(&self, known: Vec<wire::Known>) -> Result<(), Stop> {
        let told = async {
            for part in known {
                self.send(Request::Known(part)).await?;
            }
            Ok::<_, Stop>(())
        };
        timeout(KNOWN, told).await.unwrap_or_else(|_| Err(takes_nothing()))
    }

    /// Has QEMU there wait for pages that it does not have.
    pub(super) async fn prepare_post_copy(&mut self) -> Result<(), Stop> {
        self.send(Request::PostCopy(wire::Nothing {})).await?;
        ready_for_post_copy(self).await
    }

    /// Tells the destination that the machine is its own, and waits for what it says.
    pub(super) async fn commit(&mut self, commit: wire::Commit) -> Result<Answer, Stop> {
        self.send(Request::Commit(commit)).await?;
        Ok(match self.word().await? {
            Reply::Running(_) => Answer::Running,
            Reply::Failed(failed) if says(&failed, kind::NO_COPY) => {
                Answer::NoCopy { keeper: Uuid::from_slice(&failed.keeper).ok() }
            }
            Reply::Failed(failed) if says(&failed, kind::UNKNOWN_COPY) => Answer::Unknown,
            other => {
                tracing::warn!(destination = self.name(), %other, "it does not say that the VM runs there");
                Answer::Other
            }
        })
    }

    /// Tells the destination to throw its copy away, and waits until it has.
    pub(super) async fn cancel(&mut self, commit: wire::Commit, deadline: Duration) -> Withdrawal {
        let cancelled = async {
            self.send(Request::Cancel(commit)).await?;
            loop {
                match self.word().await? {
                    Reply::Failed(failed) if failed.findings.iter().any(knows_nothing) => {
                        return Ok::<_, Stop>(Withdrawal::Unheard);
                    }
                    Reply::Cancelled(_) => return Ok(Withdrawal::Done),
                    Reply::Failed(failed) if says(&failed, kind::NO_COPY) => return Ok(Withdrawal::Done),
                    Reply::Failed(failed) if says(&failed, kind::UNKNOWN_COPY) => {
                        return Ok(Withdrawal::Unknown);
                    }
                    // It may have been said of something else: a copy that is ready outlives it.
                    Reply::Failed(_) | Reply::Refused(_) => return Ok(Withdrawal::Unheard),
                    Reply::Running(_) => return Ok(Withdrawal::RunsThere),
                    _ => {}
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

/// Whether a destination says that it does not know what it has of the machine.
fn knows_nothing(finding: &wire::Finding) -> bool {
    [kind::BUSY, kind::RECORD_UNREADABLE].contains(&finding.kind.as_str())
}

/// Which hand-over is meant.
pub(super) fn about(session: &Uuid, record: &Record) -> wire::Commit {
    wire::Commit {
        session: session.as_bytes().to_vec(),
        name: record.name.to_string(),
        generation: record.generation,
    }
}

/// Whoever is listened to.
trait Words {
    /// The next word, if that is soon enough. `what` is what is expected.
    fn word(&mut self, limit: Duration, what: &str) -> impl Future<Output = Result<Reply, Stop>> + Send;
}

impl Words for Destination {
    async fn word(&mut self, limit: Duration, what: &str) -> Result<Reply, Stop> {
        self.receive_within(limit, what).await
    }
}

/// Waits for what comes of a reservation, for which a destination takes its time as long as it says that it is at it.
async fn patiently(destination: &mut impl Words, until: Instant) -> Result<Reply, Stop> {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        match destination.word(RESERVE_WORD.min(left), "answer the reservation").await? {
            Reply::Working(_) => {}
            reply => return Ok(reply),
        }
    }
}

/// Waits until QEMU there waits for pages that it does not have.
async fn ready_for_post_copy(destination: &mut impl Words) -> Result<(), Stop> {
    match destination.word(POST_COPY_READY, "be ready for post-copy").await? {
        Reply::PostCopyReady(_) => Ok(()),
        other => Err(violation(&format!("said {other} instead of being ready for post-copy"))),
    }
}

fn takes_nothing() -> Stop {
    let message =
        format!("the destination did not take what is known of the guest's network within {KNOWN:?}");
    Stop::Failed(Finding::new(
        "link",
        message,
        "see to the network between the hosts, and to the destination's agent",
    ))
}

fn says(failed: &wire::Findings, kind: &str) -> bool {
    failed.findings.first().is_some_and(|finding| finding.kind == kind)
}

/// Names the features that are missing, by what both sides have: CPUID alone has no names.
async fn name_missing(finding: &mut Finding, there: &[String], qmp: &Qmp) {
    // Without the names the finding says what it says: which bits.
    let Ok(here) = features_on(qmp).await else { return };
    let missing: Vec<String> = here.into_iter().filter(|feature| !there.contains(feature)).collect();
    if !missing.is_empty() {
        finding.message = format!("{}: {}", finding.message, missing.join(", "));
    }
}

/// Passes on what the destination says. One that says more than is listened to has the link ended: waiting for the listener
/// would leave the destination's pings unanswered.
async fn read(
    mut receiver: ControlReceiver,
    tell: mpsc::Sender<Result<Reply, Unheard>>,
    unread: Arc<AtomicUsize>,
) {
    // Room for the last word, by which it is told why there is no other.
    let (words, last) = (tell.clone(), tell.reserve_owned().await);
    let why = loop {
        let reply = match bounds::reply(&mut receiver).await {
            Ok(reply) => reply,
            Err(why) => break why,
        };
        let weight = reply.weight();
        let fits = unread.fetch_add(weight, Ordering::Relaxed) + weight <= UNREAD_BYTES;
        if !fits || words.try_send(Ok(reply)).is_err() {
            break Unheard::Violation("says more than is listened to".to_owned());
        }
    };
    if let Ok(last) = last {
        last.send(Err(why));
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

#[cfg(test)]
mod tests;
