//! Connecting to a peer, and the TLS that both directions share.

use std::fmt;
use std::io::{self, Read as _, Write as _};
use std::net::ToSocketAddrs as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::client::Resumption;
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, ClientConnection, ServerConfig};
use rustls_pki_types::{CertificateDer, ServerName};
use socket2::SockRef;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_rustls::TlsConnector;
use uuid::Uuid;

use crate::bandwidth::Bandwidth;
use crate::control::Control;
use crate::data::DataSender;
use crate::deadlines::Deadlines;
use crate::error::{ConnectError, HelloError, Step, TlsError};
use crate::hello::{self, Answer, DataHello, Hello, Purpose};
use crate::identity::{Identity, subject_name};
use crate::peer::Peer;
use crate::socket::{Timed, linger, linger_blocking, set_options};
use crate::versions::VersionRange;

/// What agents say they speak inside TLS (ALPN), so that no other service is mistaken for one.
const ALPN: &[u8] = b"vmirror";
/// Why an endpoint cannot be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EndpointError {
    /// TLS cannot be set up with this identity.
    #[error("TLS cannot be set up")]
    Tls(#[source] rustls::Error),
    /// The certificate authority cannot be used to check clients.
    #[error("the certificate authority cannot be used")]
    Authority(#[source] rustls::server::VerifierBuilderError),
    /// A deadline is zero, or a ping would not come before silence is declared.
    #[error("impossible deadlines: {0:?} (none may be zero, and ping must be shorter than silence)")]
    Deadlines(Deadlines),
}

/// One agent's side of all its links: TLS made ready once. Cheap to clone.
#[derive(Clone)]
pub struct Endpoint {
    pub(crate) client: Arc<ClientConfig>,
    pub(crate) server: Arc<ServerConfig>,
    pub(crate) deadlines: Deadlines,
    pub(crate) versions: VersionRange,
    name: Arc<str>,
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Endpoint")
            .field("name", &self.name)
            .field("versions", &self.versions)
            .field("deadlines", &self.deadlines)
            .finish_non_exhaustive()
    }
}

impl Endpoint {
    /// Makes TLS ready for an identity: version 1.3 only, certificates required on both sides, no resumption (every
    /// connection proves anew who it is).
    ///
    /// # Errors
    /// If TLS refuses the identity, or the deadlines make no sense.
    pub fn new(identity: &Identity, deadlines: Deadlines) -> Result<Self, EndpointError> {
        let all =
            [deadlines.connect, deadlines.handshake, deadlines.ping, deadlines.silence, deadlines.stall];
        if all.contains(&Duration::ZERO) || deadlines.ping >= deadlines.silence {
            return Err(EndpointError::Deadlines(deadlines));
        }
        let mut provider = rustls::crypto::aws_lc_rs::default_provider();
        // AES-128 first: 10 rounds instead of 14, and both are far beyond what can be broken. The difference was below the
        // noise where it was measured, on a busy machine.
        provider.cipher_suites = vec![
            rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
            rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
            rustls::crypto::aws_lc_rs::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        ];
        Self::with_provider(identity, deadlines, Arc::new(provider))
    }

    fn with_provider(
        identity: &Identity,
        deadlines: Deadlines,
        provider: Arc<rustls::crypto::CryptoProvider>,
    ) -> Result<Self, EndpointError> {
        let tls13 = [&rustls::version::TLS13];

        let mut client = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&tls13)
            .map_err(EndpointError::Tls)?
            .with_root_certificates(Arc::clone(&identity.roots))
            .with_client_auth_cert(identity.chain.clone(), identity.key.clone_key())
            .map_err(EndpointError::Tls)?;
        client.alpn_protocols = vec![ALPN.to_vec()];
        client.resumption = Resumption::disabled();

        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::clone(&identity.roots), Arc::clone(&provider))
                .build()
                .map_err(EndpointError::Authority)?;
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&tls13)
            .map_err(EndpointError::Tls)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(identity.chain.clone(), identity.key.clone_key())
            .map_err(EndpointError::Tls)?;
        server.alpn_protocols = vec![ALPN.to_vec()];
        server.send_tls13_tickets = 0;

        Ok(Self {
            client: Arc::new(client),
            server: Arc::new(server),
            deadlines,
            versions: VersionRange::SPOKEN,
            name: identity.name().into(),
        })
    }

    /// The same endpoint, offering only these protocol versions; to hold back a new version while a fleet is upgraded.
    #[must_use]
    pub fn offering(mut self, versions: VersionRange) -> Self {
        self.versions = versions;
        self
    }

    /// This agent's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The deadlines of all connections made here.
    #[must_use]
    pub fn deadlines(&self) -> Deadlines {
        self.deadlines
    }

    /// Opens a control connection to the agent at `address` (`host:port`): TLS done, hellos exchanged, version agreed.
    ///
    /// # Errors
    /// [`ConnectError`] tells apart what failed and on whose side.
    pub async fn connect(&self, address: &str) -> Result<Control, ConnectError> {
        let (name, host_port) = target(address)?;
        let limit = self.deadlines.connect;
        let connected = tokio::time::timeout(limit, tokio::net::TcpStream::connect(host_port)).await;
        let socket = match connected {
            Err(_) => {
                return Err(ConnectError::Timeout {
                    address: address.into(),
                    step: Step::Connect,
                    after: limit,
                });
            }
            Ok(Err(source)) => return Err(socket_failed(address, source, limit)),
            Ok(Ok(socket)) => socket,
        };
        let broken = |source| ConnectError::Unreachable { address: address.into(), source };
        let peer_address = socket.peer_addr().map_err(broken)?;
        let local = socket.local_addr().map_err(broken)?;
        set_options(SockRef::from(&socket), self.deadlines.silence).map_err(broken)?;

        let limit = self.deadlines.handshake;
        let greeted = tokio::time::timeout(limit, self.greet(address, name, socket)).await;
        let (stream, peer_name, version) = greeted.map_err(|_| ConnectError::Timeout {
            address: address.into(),
            step: Step::Handshake,
            after: limit,
        })??;
        let peer = Peer { name: peer_name, address: peer_address, local };
        tracing::debug!(%peer, version, "control connection open");
        Ok(Control::start(tokio_rustls::TlsStream::from(stream), peer, version, self.deadlines))
    }

    async fn greet(
        &self,
        address: &str,
        name: ServerName<'static>,
        socket: tokio::net::TcpStream,
    ) -> Result<(tokio_rustls::client::TlsStream<tokio::net::TcpStream>, String, u32), ConnectError> {
        let failed = |source| ConnectError::Tls { address: address.into(), source };
        let connecting = TlsConnector::from(Arc::clone(&self.client)).connect(name, socket).into_fallible();
        let mut stream = match connecting.await {
            Ok(stream) => stream,
            Err((error, socket)) => {
                // The caller need not wait for the peer to have read our reason.
                tokio::spawn(linger(socket));
                return Err(failed(error.into()));
            }
        };
        let peer_name = {
            let (_, tls) = stream.get_ref();
            check_alpn(tls.alpn_protocol()).map_err(failed)?;
            certified_name(tls.peer_certificates()).map_err(failed)?
        };
        // With TLS 1.3 the server looks at our certificate only after our side of the handshake is complete. If it
        // refuses it, it may have hung up before this is written; its reason can still be read.
        let hello = self.hello(Purpose::Control).encode();
        let written = match stream.write_all(&hello).await {
            Ok(()) => stream.flush().await,
            Err(e) => Err(e),
        };
        if let Err(error) = &written {
            tracing::debug!(%error, address, "could not send the hello");
        }
        let mut envelope = [0; hello::ENVELOPE];
        stream.read_exact(&mut envelope).await.map_err(|e| refusal_or_broken(address, e))?;
        let length = hello::body_length(&envelope)
            .map_err(|source| ConnectError::Hello { address: address.into(), source })?;
        let mut body = vec![0; length];
        stream.read_exact(&mut body).await.map_err(|e| refusal_or_broken(address, e))?;
        let version = self.judge(address, &body)?;
        Ok((stream, peer_name, version))
    }

    /// Opens one data connection of a session, blocking the calling thread (a plain one, not one of tokio's).
    ///
    /// # Errors
    /// As [`Endpoint::connect`].
    pub fn open_data(
        &self,
        address: &str,
        session: Uuid,
        stream: u16,
        bandwidth: Arc<Bandwidth>,
    ) -> Result<DataSender, ConnectError> {
        let (name, host_port) = target(address)?;
        let socket = connect_blocking(address, host_port, self.deadlines.connect)?;
        let broken = |source| ConnectError::Unreachable { address: address.into(), source };
        let peer_address = socket.peer_addr().map_err(broken)?;
        let local = socket.local_addr().map_err(broken)?;
        set_options(SockRef::from(&socket), self.deadlines.stall).map_err(broken)?;

        let failed = |source| ConnectError::Tls { address: address.into(), source };
        let mut tls = ClientConnection::new(Arc::clone(&self.client), name).map_err(|e| failed(e.into()))?;
        let after = self.deadlines.handshake;
        let mut timed = Timed { socket: &socket, until: Instant::now() + after };
        let late = |e: &io::Error| e.kind() == io::ErrorKind::TimedOut;
        let timeout = || ConnectError::Timeout { address: address.into(), step: Step::Handshake, after };

        while tls.is_handshaking() {
            if let Err(error) = tls.complete_io(&mut timed) {
                if late(&error) {
                    return Err(timeout());
                }
                linger_blocking(&socket);
                return Err(failed(error.into()));
            }
        }
        check_alpn(tls.alpn_protocol()).map_err(failed)?;
        let peer = Peer {
            name: certified_name(tls.peer_certificates()).map_err(failed)?,
            address: peer_address,
            local,
        };

        let purpose = Purpose::Data(DataHello { session, stream });
        let body = exchange(&mut tls, &mut timed, &self.hello(purpose)).map_err(|error| match error {
            Exchange::Io(e) if late(&e) => timeout(),
            Exchange::Io(e) => refusal_or_broken(address, e),
            Exchange::Hello(source) => ConnectError::Hello { address: address.into(), source },
        })?;
        let version = self.judge(address, &body)?;
        tracing::debug!(%peer, version, %session, stream, "data connection open");
        DataSender::new(socket, tls, peer, bandwidth, self.deadlines.stall).map_err(broken)
    }

    fn hello(&self, purpose: Purpose) -> Hello {
        Hello { versions: self.versions, agent: self.name.to_string(), purpose }
    }

    fn judge(&self, address: &str, answer: &[u8]) -> Result<u32, ConnectError> {
        let address = || address.to_owned();
        match Answer::decode(answer, self.versions) {
            Ok(Answer::Accepted { version }) => Ok(version),
            Ok(Answer::NoSharedVersion { theirs }) => {
                Err(ConnectError::Version { address: address(), ours: self.versions, theirs })
            }
            Ok(Answer::Refused { reason }) => Err(ConnectError::RefusedByPeer { address: address(), reason }),
            Err(source) => Err(ConnectError::Hello { address: address(), source }),
        }
    }
}

/// Why the exchange of hellos over a blocking socket failed.
enum Exchange {
    Io(io::Error),
    Hello(HelloError),
}

fn exchange(tls: &mut ClientConnection, socket: &mut Timed<'_>, hello: &Hello) -> Result<Vec<u8>, Exchange> {
    let mut stream = rustls::Stream::new(tls, socket);
    // As in `greet`: the reason of a refusal may be there to read even when nothing can be written.
    let written = stream.write_all(&hello.encode()).and_then(|()| stream.flush());
    if let Err(error) = written {
        tracing::debug!(%error, "could not send the hello");
    }
    let mut envelope = [0; hello::ENVELOPE];
    stream.read_exact(&mut envelope).map_err(Exchange::Io)?;
    let mut body = vec![0; hello::body_length(&envelope).map_err(Exchange::Hello)?];
    stream.read_exact(&mut body).map_err(Exchange::Io)?;
    Ok(body)
}

/// `host:port` taken apart: the name that the peer's certificate must have, and what to connect to.
fn target(address: &str) -> Result<(ServerName<'static>, (&str, u16)), ConnectError> {
    let wrong = |reason| ConnectError::Address { address: address.into(), reason };
    let (host, port) = address.rsplit_once(':').ok_or_else(|| wrong("there is no port"))?;
    let port = port.parse().ok().filter(|&port: &u16| port != 0);
    let port = port.ok_or_else(|| wrong("the port is not a number from 1 to 65535"))?;
    let host = match host.strip_prefix('[') {
        Some(inner) => inner.strip_suffix(']').ok_or_else(|| wrong("a bracket is not closed"))?,
        None if host.contains(':') => return Err(wrong("an IPv6 address needs brackets")),
        None => host,
    };
    let name = ServerName::try_from(host.to_owned())
        .map_err(|_| wrong("the host is neither an IP address nor a host name"))?;
    Ok((name, (host, port)))
}

fn connect_blocking(
    address: &str,
    host_port: (&str, u16),
    limit: Duration,
) -> Result<std::net::TcpStream, ConnectError> {
    let until = Instant::now() + limit;
    let timeout = || ConnectError::Timeout { address: address.into(), step: Step::Connect, after: limit };
    let resolve = |source| ConnectError::Resolve { address: address.into(), source };
    let mut last = None;
    for candidate in host_port.to_socket_addrs().map_err(resolve)? {
        let left = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero());
        match std::net::TcpStream::connect_timeout(&candidate, left.ok_or_else(timeout)?) {
            Ok(socket) => return Ok(socket),
            Err(error) => last = Some(error),
        }
    }
    match last {
        Some(error) => Err(socket_failed(address, error, limit)),
        None => Err(resolve(io::Error::new(io::ErrorKind::NotFound, "the name has no address"))),
    }
}

fn socket_failed(address: &str, source: io::Error, after: Duration) -> ConnectError {
    let address = address.to_owned();
    match source.kind() {
        io::ErrorKind::ConnectionRefused => ConnectError::Refused { address },
        io::ErrorKind::TimedOut => ConnectError::Timeout { address, step: Step::Connect, after },
        // The resolver's failures have no kind and no number of the operating system.
        _ if source.raw_os_error().is_none() => ConnectError::Resolve { address, source },
        _ => ConnectError::Unreachable { address, source },
    }
}

/// A failure after our side of the handshake: an alert is the peer's refusal, all else a broken exchange.
fn refusal_or_broken(address: &str, error: io::Error) -> ConnectError {
    let address = address.to_owned();
    if error.get_ref().is_some_and(|inner| inner.is::<rustls::Error>()) {
        return ConnectError::Tls { address, source: error.into() };
    }
    ConnectError::Hello { address, source: HelloError::Io(error) }
}

/// A peer that does not agree on our protocol by name is some other TLS service.
pub(crate) fn check_alpn(agreed: Option<&[u8]>) -> Result<(), TlsError> {
    if agreed == Some(ALPN) { Ok(()) } else { Err(TlsError::NotAnAgent) }
}

/// The name in the certificate that the peer has just proved to own.
pub(crate) fn certified_name(chain: Option<&[CertificateDer<'_>]>) -> Result<String, TlsError> {
    let own = chain.and_then(<[_]>::first).ok_or(TlsError::NoCertificate)?;
    subject_name(own).map_err(TlsError::PeerNameless)
}

#[cfg(test)]
mod tests {
    use rustls::crypto::CipherSuiteCommon;
    use rustls::{SupportedCipherSuite, Tls13CipherSuite};

    use super::*;
    use crate::{Incoming, Listener, certificates};

    /// AES-GCM keys are good for 2^24 records, 256 GiB (RFC 8446, section 5.5), which a stream may well carry. Here they
    /// are good for a few only.
    #[tokio::test]
    async fn keys_that_are_used_up_are_renewed_without_a_break() {
        let SupportedCipherSuite::Tls13(usual) =
            rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256;
        let common = CipherSuiteCommon { confidentiality_limit: 5, ..usual.common };
        // Suites live for ever in rustls; one more in a test does no harm.
        let suite: &'static Tls13CipherSuite = Box::leak(Box::new(Tls13CipherSuite { common, ..*usual }));
        let mut provider = rustls::crypto::aws_lc_rs::default_provider();
        provider.cipher_suites = vec![suite.into()];

        let dir = tempfile::tempdir().expect("a directory");
        certificates::init(dir.path()).expect("an authority");
        let files = certificates::issue(dir.path(), "host-a", &["127.0.0.1".into()]).expect("issued");
        let identity =
            Identity::load(&dir.path().join("ca.pem"), &files.certificate, &files.key).expect("an identity");
        let endpoint = Endpoint::with_provider(&identity, Deadlines::default(), Arc::new(provider))
            .expect("an endpoint");
        let listener = Listener::bind(&endpoint, "127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().to_string();

        let content: Vec<u8> = (0..8 << 20).map(|i: u32| (i / 253) as u8).collect();
        let sent = content.clone();
        let sending = std::thread::spawn(move || {
            let opened = endpoint.open_data(&address, Uuid::nil(), 0, Bandwidth::new(None));
            let mut sender = opened.expect("opened");
            for piece in sent.chunks(1 << 20) {
                sender.write_all(piece).expect("written");
            }
            sender.shutdown().expect("ended");
        });
        let Incoming::Data(mut receiver, ..) = listener.accept().await.expect("accepted") else {
            panic!("not a data connection");
        };
        let mut received = Vec::new();
        receiver.read_to_end(&mut received).expect("to the end");
        sending.join().expect("no panic");
        assert!(received == content, "{} bytes of {}", received.len(), content.len());
    }
}
