//! Being connected to.
//!
//! Every connection is greeted in a task of its own, under a deadline, so that a peer that is slow, silent or hostile
//! holds up nobody. How many are being greeted at once is bounded, in all and per address: where one more comes, the one that has
//! taken longest makes room. An agent is done in milliseconds, so however many come that are not, agents get in.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::task::AbortOnDropHandle;

use crate::control::Control;
use crate::data::DataReceiver;
use crate::endpoint::{Endpoint, certified_name, check_alpn};
use crate::error::{AcceptError, HelloError, TlsError};
use crate::hello::{self, Answer, DataHello, Hello, Purpose};
use crate::peer::Peer;
use crate::socket::{LINGER, linger, set_options};

/// Connections that were greeted and wait to be taken with [`Listener::accept`].
const WAITING: usize = 16;
/// After a failure of the listening socket itself, such as no file descriptors left.
const PAUSE: Duration = Duration::from_millis(100);

/// How much a listener takes on at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ListenerLimits {
    /// Connections being greeted, in all. For one more the one that has taken longest is dropped.
    pub handshakes: usize,
    /// Connections being greeted from one IP address. For one more that of the same address which has taken longest is dropped.
    pub handshakes_per_address: usize,
}

impl Default for ListenerLimits {
    fn default() -> Self {
        Self { handshakes: 128, handshakes_per_address: 32 }
    }
}

/// Decides, once a peer is known, whether it is welcome. It is asked from within a tokio task and must not block.
pub trait Admission: Send + Sync + 'static {
    /// Says yes, or the reason why not, which the peer is told.
    ///
    /// # Errors
    /// The reason for a refusal.
    fn admit(&self, peer: &Peer, purpose: &Purpose) -> Result<(), String>;
}

impl<F: Fn(&Peer, &Purpose) -> Result<(), String> + Send + Sync + 'static> Admission for F {
    fn admit(&self, peer: &Peer, purpose: &Purpose) -> Result<(), String> {
        self(peer, purpose)
    }
}

/// A connection that was greeted.
#[derive(Debug)]
pub enum Incoming {
    /// A control connection.
    Control(Control, Peer),
    /// A data connection. Whether its session is this peer's is for the caller to check (or for [`Admission`]).
    Data(DataReceiver, Peer, DataHello),
}

/// Listens for peers, until dropped.
#[derive(Debug)]
pub struct Listener {
    address: SocketAddr,
    greeted: tokio::sync::Mutex<mpsc::Receiver<Result<Incoming, AcceptError>>>,
    _task: AbortOnDropHandle<()>,
}

impl Listener {
    /// Listens on `address` (`host:port`) and greets everybody with a certificate of our authority.
    ///
    /// # Errors
    /// If the address cannot be listened on.
    pub async fn bind(endpoint: &Endpoint, address: &str) -> io::Result<Self> {
        Self::bind_with(endpoint, address, ListenerLimits::default(), |_: &Peer, _: &Purpose| Ok(())).await
    }

    /// As [`Listener::bind`], with limits, and with a say in who is welcome.
    ///
    /// # Errors
    /// If the address cannot be listened on.
    pub async fn bind_with(
        endpoint: &Endpoint,
        address: &str,
        limits: ListenerLimits,
        admission: impl Admission,
    ) -> io::Result<Self> {
        let socket = TcpListener::bind(address).await?;
        let address = socket.local_addr()?;
        let (results, greeted) = mpsc::channel(WAITING);
        let host = Host {
            endpoint: endpoint.clone(),
            admission: Arc::new(admission),
            limits,
            under_way: Arc::default(),
            results,
        };
        let task = tokio::spawn(host.run(socket));
        Ok(Self { address, greeted: tokio::sync::Mutex::new(greeted), _task: AbortOnDropHandle::new(task) })
    }

    /// The address listened on; with the port that was chosen if port 0 was asked for.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// The next connection that was greeted, or the next that failed to be. Cancel-safe.
    ///
    /// # Errors
    /// [`AcceptError`] concerns one peer, and the next call goes on with the others, unless it is
    /// [`AcceptError::Closed`]. Errors are dropped (after being logged) when nobody asks for them.
    pub async fn accept(&self) -> Result<Incoming, AcceptError> {
        self.greeted.lock().await.recv().await.unwrap_or(Err(AcceptError::Closed))
    }
}

/// The task behind a listener.
struct Host {
    endpoint: Endpoint,
    admission: Arc<dyn Admission>,
    limits: ListenerLimits,
    under_way: Arc<Mutex<UnderWay>>,
    results: mpsc::Sender<Result<Incoming, AcceptError>>,
}

/// Those being greeted, in the order in which they came.
#[derive(Default)]
struct UnderWay {
    came: u64,
    each: BTreeMap<u64, (SocketAddr, AbortHandle)>,
}

impl UnderWay {
    /// Ends the one that has taken longest, of those that come from there, if any does. Returns where it came from.
    fn end_oldest(&mut self, of: Option<IpAddr>) -> Option<SocketAddr> {
        let is_one = |address: &SocketAddr| of.is_none_or(|ip| address.ip() == ip);
        let (&number, _) = self.each.iter().find(|(_, (address, _))| is_one(address))?;
        let (address, task) = self.each.remove(&number)?;
        task.abort();
        Some(address)
    }

    fn of(&self, ip: IpAddr) -> usize {
        self.each.values().filter(|(address, _)| address.ip() == ip).count()
    }
}

impl Host {
    async fn run(self, socket: TcpListener) {
        let room = Arc::new(Semaphore::new(self.limits.handshakes));
        // Dropped with this task, and with it everything that is under way.
        let mut tasks = JoinSet::new();
        loop {
            let (stream, address) = match socket.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Of one connection that was gone before it was taken, or of a process without descriptors.
                    tracing::warn!(%error, "cannot accept a connection; trying on");
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            };
            while tasks.try_join_next().is_some() {}
            self.make_room(address.ip(), room.available_permits() == 0);
            // Where all have been greeted and nobody takes them, further ones wait in the kernel's queue. Never closed.
            let Ok(place) = Arc::clone(&room).acquire_owned().await else { return };
            // Held until it is known by its handle, so that it cannot end before.
            let mut under_way = lock(&self.under_way);
            let number = under_way.came;
            under_way.came += 1;
            let being = Being { number, under_way: Arc::clone(&self.under_way) };
            let (endpoint, admission) = (self.endpoint.clone(), Arc::clone(&self.admission));
            let results = self.results.clone();
            let task = tasks.spawn(async move {
                let after = endpoint.deadlines.handshake;
                let greeted = timeout(after, greet(&endpoint, &*admission, stream, address)).await;
                drop(being);
                match greeted.unwrap_or(Err(AcceptError::Timeout { address, after })) {
                    // The place is kept until the caller has taken it: what nobody takes is bounded too.
                    Ok(incoming) => drop(results.send(Ok(incoming)).await),
                    Err(error) => report(&results, error),
                }
                drop(place);
            });
            under_way.each.insert(number, (address, task));
        }
    }

    /// Ends what takes too long already, where one more would be too many.
    fn make_room(&self, ip: IpAddr, is_full: bool) {
        let limit = self.limits.handshakes_per_address;
        let (of_one, all) = {
            let mut under_way = lock(&self.under_way);
            let of_one = (under_way.of(ip) >= limit).then(|| under_way.end_oldest(Some(ip))).flatten();
            let all = (is_full && of_one.is_none()).then(|| under_way.end_oldest(None)).flatten();
            (of_one.map(|address| (address, limit)), all.map(|address| (address, self.limits.handshakes)))
        };
        for (address, limit) in of_one.into_iter().chain(all) {
            self.report(AcceptError::TooManyHandshakes { address, limit });
        }
    }

    fn report(&self, error: AcceptError) {
        report(&self.results, error);
    }
}

/// Hands an error to the caller if it keeps up; a flood of bad peers must not fill the queue for good ones.
fn report(results: &mpsc::Sender<Result<Incoming, AcceptError>>, error: AcceptError) {
    let source = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
    tracing::info!(%error, source, "a connection was turned away");
    if results.capacity() > WAITING / 2 {
        // Full or closed: it was logged.
        let _ = results.try_send(Err(error));
    }
}

fn lock(under_way: &Mutex<UnderWay>) -> MutexGuard<'_, UnderWay> {
    under_way.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One of those being greeted; not any more when dropped.
struct Being {
    number: u64,
    under_way: Arc<Mutex<UnderWay>>,
}

impl Drop for Being {
    fn drop(&mut self) {
        lock(&self.under_way).each.remove(&self.number);
    }
}

async fn greet(
    endpoint: &Endpoint,
    admission: &dyn Admission,
    socket: TcpStream,
    address: SocketAddr,
) -> Result<Incoming, AcceptError> {
    let broken = |source| AcceptError::Socket { address, source };
    let local = socket.local_addr().map_err(broken)?;
    set_options(SockRef::from(&socket), endpoint.deadlines.silence).map_err(broken)?;

    let accepting = TlsAcceptor::from(Arc::clone(&endpoint.server)).accept(socket).into_fallible();
    let mut stream = match accepting.await {
        Ok(stream) => stream,
        Err((error, socket)) => {
            linger(socket).await;
            return Err(AcceptError::Tls { address, source: error.into() });
        }
    };
    let peer = match known(&stream) {
        Ok(name) => Peer { name, address, local },
        Err(source) => {
            turn_away(stream).await;
            return Err(AcceptError::Tls { address, source });
        }
    };
    let hello = match read_hello(&mut stream).await {
        Ok(hello) => hello,
        Err(source) => {
            turn_away(stream).await;
            return Err(AcceptError::Hello { address, source });
        }
    };

    let (answer, outcome) = match endpoint.versions.shared(hello.versions) {
        None => {
            let (ours, theirs) = (endpoint.versions, hello.versions);
            let error = AcceptError::Version { address, name: peer.name.clone(), ours, theirs };
            (Answer::NoSharedVersion { theirs: ours }, Err(error))
        }
        Some(version) => match admission.admit(&peer, &hello.purpose) {
            Ok(()) => (Answer::Accepted { version }, Ok(version)),
            Err(reason) => {
                let error =
                    AcceptError::NotAdmitted { address, name: peer.name.clone(), reason: reason.clone() };
                (Answer::Refused { reason }, Err(error))
            }
        },
    };
    let answered = async {
        stream.write_all(&answer.encode()).await?;
        stream.flush().await
    };
    answered.await.map_err(broken)?;
    let version = match outcome {
        Ok(version) => version,
        Err(error) => {
            turn_away(stream).await;
            return Err(error);
        }
    };
    tracing::debug!(%peer, agent = hello.agent, version, purpose = ?hello.purpose, "connection greeted");

    match hello.purpose {
        Purpose::Control => {
            let control = Control::start(
                tokio_rustls::TlsStream::from(stream),
                peer.clone(),
                version,
                endpoint.deadlines,
            );
            Ok(Incoming::Control(control, peer))
        }
        Purpose::Data(data) => {
            let (socket, tls) = stream.into_inner();
            set_options(SockRef::from(&socket), endpoint.deadlines.stall).map_err(broken)?;
            let socket = socket.into_std().map_err(broken)?;
            let receiver = DataReceiver::new(socket, tls, peer.clone()).map_err(broken)?;
            Ok(Incoming::Data(receiver, peer, data))
        }
    }
}

fn known(stream: &TlsStream<TcpStream>) -> Result<String, TlsError> {
    let (_, tls) = stream.get_ref();
    check_alpn(tls.alpn_protocol())?;
    certified_name(tls.peer_certificates())
}

async fn read_hello(stream: &mut TlsStream<TcpStream>) -> Result<Hello, HelloError> {
    let mut envelope = [0; hello::ENVELOPE];
    stream.read_exact(&mut envelope).await.map_err(HelloError::Io)?;
    let mut body = vec![0; hello::body_length(&envelope)?];
    stream.read_exact(&mut body).await.map_err(HelloError::Io)?;
    Hello::decode(&body)
}

/// Ends TLS in the orderly way, then the connection.
async fn turn_away(mut stream: TlsStream<TcpStream>) {
    // The peer may be gone already.
    let _ = timeout(LINGER, stream.shutdown()).await;
    linger(stream.into_inner().0).await;
}
