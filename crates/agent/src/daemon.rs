//! The agent itself: what it opens, in which order, and how it ends.

pub(crate) mod socket;

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use destination::{DataConnections, PostCopies, ReceivingHost};
use finding::Finding;
use futures::FutureExt as _;
use host::{Host, Journal, lifecycle};
use link::{Deadlines, Endpoint, Identity, Incoming, Listener, ListenerLimits, Peer, Purpose};
use migration::LinkedHost;
use ownership::VmName;
use tokio::net::UnixListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::api::{self, Api};
use crate::config::Config;
use crate::events::{Events, unix_ms};
use crate::heap;
use crate::history::History;
use crate::lock::{self, Lock, LockError};
use crate::vms::Vms;
use protocol::deadlines::{DROPPED, GOING_DOWN};

/// An agent that listens on its link and its API, and finds its machines again; [`Vms::found`] says when it has.
#[derive(Debug)]
pub struct Daemon {
    config: Config,
    vms: Vms,
    listener: Listener,
    data: DataConnections,
    api: UnixListener,
    closing: CancellationToken,
    /// Held until the end.
    _locks: [Lock; 2],
}

/// Why an agent cannot start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// A directory cannot be made.
    #[error("cannot make the directory {}", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Only root can start a QEMU as another user.
    #[error(
        "[allow] user is {user:?}, and only an agent that runs as root can start QEMU as another user than its own"
    )]
    User {
        /// The user.
        user: String,
    },
    /// The directory for guest RAM is not there.
    #[error("ram_dir {} is not a directory", .0.display())]
    RamDir(PathBuf),
    /// The directory for its RAM files is not its own.
    #[error(transparent)]
    RamFiles(#[from] qemu::RamFileError),
    /// Another agent runs on the same directories.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The certificates cannot be used.
    #[error("the certificates of [tls] cannot be used")]
    Identity(#[source] link::IdentityError),
    /// The certificate is another agent's.
    #[error("the certificate {} is of {in_certificate:?}, and this agent is to be {configured:?}", path.display())]
    Name {
        /// The certificate's file.
        path: PathBuf,
        /// The name in it.
        in_certificate: String,
        /// The name in the configuration.
        configured: String,
    },
    /// The link cannot be made from the certificates.
    #[error("the link cannot be set up")]
    Endpoint(#[source] link::EndpointError),
    /// The link's address cannot be listened on.
    #[error("cannot listen on {address} for the link")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The API's socket cannot be made.
    #[error("cannot listen on {} for the API", path.display())]
    Api {
        /// The socket.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The journal cannot be read.
    #[error("the journal in {} cannot be read", path.display())]
    Journal {
        /// The state directory.
        path: PathBuf,
        /// Why not.
        #[source]
        source: ownership::JournalError,
    },
}

impl Daemon {
    /// Opens everything, listens, and begins to find the machines again.
    ///
    /// # Errors
    /// [`StartError`]; nothing is left behind but empty directories and lock files.
    pub async fn start(config: Config) -> Result<Daemon, StartError> {
        let identity = identity(&config)?;
        for directory in [Some(&*config.state_dir), Some(&*config.run_dir), config.api.parent()] {
            make_private(directory.unwrap_or(Path::new("/")))?;
        }
        // What is only to be read later keeps no agent from its machines.
        if let Err(error) = make_private(&config.log_dir) {
            tracing::error!(error = %finding::chain(&error), "no VM can be started or received without log_dir");
        }
        if let Some(user) = config.allow.other_user() {
            if !rustix::process::geteuid().is_root() {
                return Err(StartError::User { user: user.to_string() });
            }
            // QEMUs of other users go through to what is theirs.
            let opened = std::fs::set_permissions(&config.run_dir, PermissionsExt::from_mode(0o711));
            opened.map_err(|source| StartError::Directory { path: config.run_dir.clone(), source })?;
        }
        if !config.ram_dir.is_dir() {
            return Err(StartError::RamDir(config.ram_dir));
        }
        let locks = [
            lock::take(&config.state_dir.join("agent.lock"))?,
            lock::take(&socket::beside(&config.api, "lock"))?,
        ];
        host::guest_ram::directory(&config.ram_dir, &config.name)?;
        let most = host::paths::longest_name(&config.run_dir);
        if most < VmName::LONGEST {
            tracing::warn!(run_dir = %config.run_dir.display(), "names of VMs may have at most {most} letters here");
        }
        if !is_tmpfs(&config.ram_dir) && qemu::huge_page_size(&config.ram_dir).is_none() {
            let ram_dir = config.ram_dir.display();
            tracing::warn!(%ram_dir, "ram_dir is on neither tmpfs nor hugetlbfs: guest RAM will be written to a disk");
        }

        let endpoint = Endpoint::new(&identity, Deadlines::default()).map_err(StartError::Endpoint)?;
        let journal = Journal::open(&config.state_dir)
            .map_err(|source| StartError::Journal { path: config.state_dir.clone(), source })?;
        // Before anything else: who starts a machine that has left once more is to find its images locked.
        let left = Arc::new(host::LeftImages::open(&config.state_dir));
        let fence = host::Fence::new(Arc::clone(&left), &journal.all(), config.keeper.clone());
        let history = History::open_or_off(&config.state_dir.join("history.db"));
        let post_copies = PostCopies::default();
        let host = Host {
            name: config.name.clone(),
            journal: Arc::new(journal),
            run_dir: config.run_dir.clone(),
            logs: host::Logs::new(&config.log_dir, config.log_max),
            ram_dir: config.ram_dir.clone(),
            allow: config.allow.clone(),
            hooks: config.hooks.clone(),
            firewall: config.firewall.clone(),
            trust_seccomp: config.trust_seccomp,
            guest_addresses: Arc::default(),
            post_copy_memory: Arc::new(post_copies.clone()),
            lingering: host::Lingering::default(),
            recovering: host::Recovering::default(),
            ram_files: Arc::default(),
            left,
            fence: Arc::new(fence),
            forwards: Arc::new(host::Forwards::open(&config.state_dir)),
            forward_port: config.forward_port,
        };
        let host = LinkedHost {
            host: Arc::new(ReceivingHost { host, post_copies }),
            endpoint: endpoint.clone(),
            link_port: Arc::default(),
            bandwidth: link::Bandwidth::new(config.bandwidth),
            switch_cost: Arc::default(),
        };

        let closing = CancellationToken::new();
        let vms = Vms::new(Arc::new(host), history, Events::default(), closing.clone());
        let data = DataConnections::new();
        let expected = data.clone();
        // Control is for every agent of our authority: what it may ask is decided, and told, where it asks. Data is
        // only for a session that awaits it.
        let admission = move |peer: &Peer, purpose: &Purpose| match purpose {
            Purpose::Control => Ok(()),
            Purpose::Data(hello) if expected.expects(&peer.name, hello) => Ok(()),
            Purpose::Data(hello) => {
                Err(format!("no session {} awaits data from {}", hello.session, peer.name))
            }
        };
        let address = config.listen.to_string();
        let listener = Listener::bind_with(&endpoint, &address, ListenerLimits::default(), admission)
            .await
            .map_err(|source| StartError::Listen { address: config.listen, source })?;
        let _ = vms.host().link_port.set(listener.local_addr().port());
        let api = socket::listen(&config.api)
            .map_err(|source| StartError::Api { path: config.api.clone(), source })?;
        // Nothing that may take long comes before this: who asks is answered from the first moment on.
        vms.recover();
        Ok(Daemon { config, vms, listener, data, api, closing, _locks: locks })
    }

    /// Where the link listens, with the port that was chosen where none was asked for.
    #[must_use]
    pub fn link(&self) -> SocketAddr {
        self.listener.local_addr()
    }

    /// Its machines.
    #[must_use]
    pub fn vms(&self) -> &Vms {
        &self.vms
    }

    /// What it does without.
    #[must_use]
    pub fn problems(&self) -> Vec<Finding> {
        self.vms.problems()
    }

    /// The API's socket.
    #[must_use]
    pub fn api(&self) -> &Path {
        &self.config.api
    }

    /// Serves until `end` is ready. Then migrations from here are cancelled and waited for, those to here are
    /// dropped, and the machines run on.
    pub async fn run(self, end: impl Future<Output = ()> + Send) {
        let Daemon { config, vms, listener, data, api, closing, _locks } = self;
        let streams = CancellationToken::new();
        let served = TaskTracker::new();
        let router = api::router(Api {
            vms: vms.clone(),
            link: listener.local_addr().to_string().into(),
            started_unix_ms: unix_ms(),
            closing: streams.clone(),
        });
        let stop_serving = streams.clone();
        served.spawn(async move {
            let served = axum::serve(api, router).with_graceful_shutdown(stop_serving.cancelled_owned());
            if let Err(error) = served.await {
                tracing::error!(%error, "the API has failed");
            }
        });

        let mut incoming = JoinSet::new();
        tokio::select! {
            () = end => {}
            () = accept(&listener, &data, &vms, &mut incoming) => {}
        }

        tracing::info!("going down; VMs keep running");
        drop(listener);
        // One that has just put it on record that its copy is complete goes no further, and what it says there is true from here on.
        if tokio::time::timeout(DROPPED, incoming.shutdown()).await.is_err() {
            tracing::warn!("a migration to here does not end in time");
        }
        lifecycle::forget_incomplete(vms.host()).await;
        vms.cancel_all().await;
        let sessions = vms.sessions();
        closing.cancel();
        if tokio::time::timeout(GOING_DOWN, vms.idle()).await.is_err() {
            tracing::warn!("a migration did not end in time; its VM is found again by the next agent");
        }
        drop(sessions);
        streams.cancel();
        served.close();
        if tokio::time::timeout(Duration::from_secs(2), served.wait()).await.is_err() {
            tracing::debug!("a client was still connected");
        }
        // The next agent would remove it too, but until then it would look as if one ran.
        let _ = std::fs::remove_file(&config.api);
    }
}

fn identity(config: &Config) -> Result<Identity, StartError> {
    let tls = &config.tls;
    let identity = Identity::load(&tls.ca, &tls.cert, &tls.key).map_err(StartError::Identity)?;
    if identity.name() != config.name {
        return Err(StartError::Name {
            path: tls.cert.clone(),
            in_certificate: identity.name().to_owned(),
            configured: config.name.clone(),
        });
    }
    Ok(identity)
}

/// Makes a directory that only its owner may enter; one that is there is left as it is.
fn make_private(path: &Path) -> Result<(), StartError> {
    use std::os::unix::fs::DirBuilderExt as _;
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|source| StartError::Directory { path: path.to_owned(), source })
}

/// Accepts peers for ever. Every migration to here is among `incoming`.
async fn accept(listener: &Listener, data: &DataConnections, vms: &Vms, incoming: &mut JoinSet<()>) {
    let peers = PerPeer::default();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(Incoming::Control(control, peer)) => {
                    let Some(counted) = peers.count(&peer.name) else {
                        tracing::warn!(%peer, limit = PerPeer::MOST, "has too many connections, and is turned away");
                        // The half that receives is held until the reason has been told.
                        let (sender, receiver) = control.split();
                        incoming.spawn(async move {
                            let _ = sender.close("too many connections").await;
                            drop(receiver);
                        });
                        continue;
                    };
                    let (host, vms, data) = (Arc::clone(&vms.host().host), vms.clone(), data.clone());
                    let (name, keep) = (peer.name.clone(), vms.clone());
                    incoming.spawn(async move {
                        served(&vms, &name, destination::serve(host, control, peer, data, move |vm| keep.arrived(vm))).await;
                        drop(counted);
                    });
                }
                Ok(Incoming::Data(receiver, _, hello)) => data.deliver(&hello, receiver),
                Err(link::AcceptError::Closed) => return tracing::error!("the link's listener has ended"),
                Err(error) => {
                    tracing::info!(error = crate::error::chain(&error), "a connection to the link was refused");
                }
            },
            Some(ended) = incoming.join_next() => if let Err(error) = ended {
                tracing::error!(%error, "the handling of a peer failed");
            },
        }
    }
}

/// Serves a peer, and looks after what it leaves, however that ends.
async fn served(vms: &Vms, peer: &str, serving: impl Future<Output = Option<VmName>>) {
    match AssertUnwindSafe(serving).catch_unwind().await {
        Ok(Some(vm)) => {
            vms.doubt_copies_from(peer, |name| *name == vm);
            heap::give_back();
        }
        Ok(None) => {}
        // What it has left half done is on record, and nothing in memory that others use is changed in more than one step.
        Err(_) => {
            tracing::error!(peer, "the handling of a peer failed by a defect");
            vms.doubt_copies_from(peer, |_| true);
        }
    }
}

/// How many connections there are of each peer.
#[derive(Debug, Clone, Default)]
struct PerPeer(Arc<Mutex<HashMap<String, usize>>>);

/// One of them; not any more when dropped.
struct Counted {
    peers: PerPeer,
    name: String,
}

impl PerPeer {
    /// Control connections of one peer at once. A migration needs one, and so does each question about a hand-over; what is turned
    /// away comes again.
    const MOST: usize = 256;

    fn count(&self, name: &str) -> Option<Counted> {
        let mut peers = self.lock();
        let count = peers.entry(name.to_owned()).or_default();
        if *count >= PerPeer::MOST {
            return None;
        }
        *count += 1;
        Some(Counted { peers: self.clone(), name: name.to_owned() })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut peers = self.peers.lock();
        if let Some(count) = peers.get_mut(&self.name) {
            *count -= 1;
            if *count == 0 {
                peers.remove(&self.name);
            }
        }
    }
}

/// Whether a directory is on a tmpfs.
fn is_tmpfs(directory: &Path) -> bool {
    /// `TMPFS_MAGIC` of linux/magic.h.
    const MAGIC: u64 = 0x0102_1994;
    rustix::fs::statfs(directory).is_ok_and(|found| found.f_type as u64 == MAGIC)
}

#[cfg(test)]
mod tests;
