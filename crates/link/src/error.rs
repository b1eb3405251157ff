//! What can go wrong on the link, told apart for people and for code.
//!
//! The outer errors ([`ConnectError`], [`AcceptError`]) say which connection and which step failed; their
//! sources ([`TlsError`], [`HelloError`]) say why. Print the whole chain to a person.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rustls::{AlertDescription, CertificateError, InvalidMessage, PeerIncompatible};
use rustls_pki_types::UnixTime;

use crate::versions::VersionRange;

/// Why a connection to a peer could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// The address is not of the form `host:port`.
    #[error("{address:?} is not an address of the form HOST:PORT: {reason}")]
    Address {
        /// What was given.
        address: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The host name could not be turned into an IP address.
    #[error("the host of {address} cannot be resolved")]
    Resolve {
        /// What was dialled.
        address: String,
        /// The resolver's answer.
        #[source]
        source: io::Error,
    },
    /// Nothing listens there.
    #[error("{address} refused the connection: no agent listens there")]
    Refused {
        /// What was dialled.
        address: String,
    },
    /// Some step took longer than its deadline.
    #[error("{address} did not finish {step} within {after:?}")]
    Timeout {
        /// What was dialled.
        address: String,
        /// The step that was under way.
        step: Step,
        /// The deadline it missed.
        after: Duration,
    },
    /// The network cannot reach it, or another failure of the socket.
    #[error("cannot connect to {address}")]
    Unreachable {
        /// What was dialled.
        address: String,
        /// The operating system's answer.
        #[source]
        source: io::Error,
    },
    /// The TLS handshake failed, on our side or by the peer's refusal.
    #[error("no trusted connection to {address}")]
    Tls {
        /// What was dialled.
        address: String,
        /// Why.
        #[source]
        source: TlsError,
    },
    /// The peer's answer to our hello makes no sense.
    #[error("{address} did not answer as an agent does")]
    Hello {
        /// What was dialled.
        address: String,
        /// Why.
        #[source]
        source: HelloError,
    },
    /// The two agents have no protocol version in common.
    #[error("no protocol version shared with {address}: this agent speaks {ours}, the peer {theirs}")]
    Version {
        /// What was dialled.
        address: String,
        /// Versions of this agent.
        ours: VersionRange,
        /// Versions of the peer.
        theirs: VersionRange,
    },
    /// The peer understood us and said no.
    #[error("{address} refused: {reason}")]
    RefusedByPeer {
        /// What was dialled.
        address: String,
        /// The peer's reason, in its words.
        reason: String,
    },
}

/// A step of making a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Step {
    /// Resolving the name and connecting TCP.
    Connect,
    /// TLS and the exchange of hellos.
    Handshake,
}

impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Connect => "connecting",
            Self::Handshake => "the TLS handshake and hello",
        })
    }
}

/// Why a peer that came to us was turned away, or why there will be no more peers.
///
/// Only [`AcceptError::Closed`] ends the accepting; every other variant concerns one peer alone.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AcceptError {
    /// The TLS handshake failed.
    #[error("no trusted connection from {address}")]
    Tls {
        /// Who came.
        address: SocketAddr,
        /// Why.
        #[source]
        source: TlsError,
    },
    /// The hello makes no sense.
    #[error("{address} did not greet as an agent does")]
    Hello {
        /// Who came.
        address: SocketAddr,
        /// Why.
        #[source]
        source: HelloError,
    },
    /// The two agents have no protocol version in common.
    #[error(
        "no protocol version shared with {name} at {address}: this agent speaks {ours}, the peer {theirs}"
    )]
    Version {
        /// Who came.
        address: SocketAddr,
        /// The name in its certificate.
        name: String,
        /// Versions of this agent.
        ours: VersionRange,
        /// Versions of the peer.
        theirs: VersionRange,
    },
    /// This side's admission said no; the peer was told the reason.
    #[error("{name} at {address} was refused: {reason}")]
    NotAdmitted {
        /// Who came.
        address: SocketAddr,
        /// The name in its certificate.
        name: String,
        /// What it was told.
        reason: String,
    },
    /// TLS and hello took longer than the deadline.
    #[error("{address} did not finish the TLS handshake and hello within {after:?}")]
    Timeout {
        /// Who came.
        address: SocketAddr,
        /// The deadline.
        after: Duration,
    },
    /// Too many handshakes were under way, of one address or in all; this one had taken longest and made room for another.
    #[error("the handshake with {address} was the slowest of {limit} and has made room for another")]
    TooManyHandshakes {
        /// Who came.
        address: SocketAddr,
        /// How many are allowed.
        limit: usize,
    },
    /// The socket failed while it was made ready.
    #[error("the connection from {address} failed")]
    Socket {
        /// Who came.
        address: SocketAddr,
        /// The operating system's answer.
        #[source]
        source: io::Error,
    },
    /// The listener's task has ended; there will be no more peers.
    #[error("the listener is closed")]
    Closed,
}

/// Why the TLS handshake failed. "Ours" and "own" are this agent's.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// The peer does not speak TLS.
    #[error("the peer does not speak TLS")]
    NotTls,
    /// The peer speaks TLS but not version 1.3.
    #[error("the peer does not speak TLS 1.3")]
    NotTls13,
    /// The peer speaks TLS 1.3 but is not a vmirror agent.
    #[error("the peer speaks TLS but is not a vmirror agent")]
    NotAnAgent,
    /// The peer showed no certificate.
    #[error("the peer presented no certificate")]
    NoCertificate,
    /// The peer's certificate was not signed by our certificate authority.
    #[error("the peer's certificate was not signed by this agent's certificate authority")]
    PeerUntrusted,
    /// The peer's certificate is no longer valid.
    #[error("the peer's certificate expired on {since}")]
    PeerExpired {
        /// The last moment at which it was valid.
        since: String,
    },
    /// The peer's certificate is not valid yet.
    #[error("the peer's certificate is valid only from {from}; is a clock wrong?")]
    PeerNotYetValid {
        /// The first moment at which it is valid.
        from: String,
    },
    /// The peer's certificate is for another address than the one dialled.
    #[error("the peer's certificate is not for {dialled} but for {}", presented.join(", "))]
    NameMismatch {
        /// The host that was dialled.
        dialled: String,
        /// The names and addresses in the certificate.
        presented: Vec<String>,
    },
    /// The peer's certificate is unacceptable for another reason.
    #[error("the peer's certificate is not acceptable")]
    PeerCertificate(#[source] rustls::Error),
    /// The peer's certificate has no usable name in it.
    #[error("the peer's certificate names nobody: {0}")]
    PeerNameless(String),
    /// The peer does not know the authority that signed our certificate.
    #[error(
        "the peer does not trust this agent's certificate: it was signed by another certificate authority"
    )]
    OwnUntrusted,
    /// The peer says that our certificate is not valid at this time.
    #[error("the peer says that this agent's certificate is expired (or not valid yet, by its clock)")]
    OwnExpired,
    /// The peer refused our certificate for another reason.
    #[error("the peer refused this agent's certificate (TLS alert {alert})")]
    OwnRefused {
        /// The TLS alert that it sent.
        alert: String,
    },
    /// The peer hung up in the middle.
    #[error("the peer closed the connection during the handshake")]
    HungUp,
    /// The socket failed.
    #[error("the connection broke during the handshake")]
    Io(#[source] io::Error),
    /// Anything else.
    #[error("the TLS handshake failed")]
    Other(#[source] rustls::Error),
}

impl From<rustls::Error> for TlsError {
    fn from(error: rustls::Error) -> Self {
        use rustls::Error as E;
        match error {
            E::InvalidMessage(
                InvalidMessage::InvalidContentType
                | InvalidMessage::UnknownProtocolVersion
                | InvalidMessage::MessageTooLarge,
            ) => Self::NotTls,
            E::NoApplicationProtocol => Self::NotAnAgent,
            E::NoCertificatesPresented => Self::NoCertificate,
            E::PeerIncompatible(
                PeerIncompatible::ServerDoesNotSupportTls12Or13
                | PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig
                | PeerIncompatible::SupportedVersionsExtensionRequired
                | PeerIncompatible::Tls12NotOfferedOrEnabled
                | PeerIncompatible::Tls13RequiredForQuic,
            ) => Self::NotTls13,
            E::AlertReceived(alert) => match alert {
                AlertDescription::UnknownCA => Self::OwnUntrusted,
                AlertDescription::CertificateExpired => Self::OwnExpired,
                AlertDescription::ProtocolVersion => Self::NotTls13,
                AlertDescription::NoApplicationProtocol => Self::NotAnAgent,
                AlertDescription::BadCertificate
                | AlertDescription::UnsupportedCertificate
                | AlertDescription::CertificateRevoked
                | AlertDescription::CertificateUnknown
                | AlertDescription::CertificateRequired
                | AlertDescription::AccessDenied
                | AlertDescription::DecryptError => Self::OwnRefused { alert: format!("{alert:?}") },
                _ => Self::Other(error),
            },
            E::InvalidCertificate(ref why) => match why {
                // A bad signature is what one gets when two authorities carry the same name.
                CertificateError::UnknownIssuer | CertificateError::BadSignature => Self::PeerUntrusted,
                CertificateError::Expired => Self::PeerExpired { since: "an unknown day".into() },
                CertificateError::ExpiredContext { not_after, .. } => {
                    Self::PeerExpired { since: day(*not_after) }
                }
                CertificateError::NotValidYet => Self::PeerNotYetValid { from: "an unknown day".into() },
                CertificateError::NotValidYetContext { not_before, .. } => {
                    Self::PeerNotYetValid { from: day(*not_before) }
                }
                CertificateError::NotValidForNameContext { expected, presented } => Self::NameMismatch {
                    dialled: expected.to_str().into_owned(),
                    presented: presented.clone(),
                },
                _ => Self::PeerCertificate(error),
            },
            _ => Self::Other(error),
        }
    }
}

impl From<io::Error> for TlsError {
    fn from(error: io::Error) -> Self {
        if let Some(tls) = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            return tls.clone().into();
        }
        match error.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
                Self::HungUp
            }
            _ => Self::Io(error),
        }
    }
}

/// A moment as people write it.
pub(crate) fn day(time: UnixTime) -> String {
    i64::try_from(time.as_secs())
        .ok()
        .and_then(|seconds| x509_parser::time::ASN1Time::from_timestamp(seconds).ok())
        .map_or_else(|| format!("second {} since 1970", time.as_secs()), |t| t.to_string())
}

/// Why a hello, or the answer to one, was not understood.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HelloError {
    /// The first bytes are not those of this protocol.
    #[error("it does not begin with the protocol's magic but with {0:02x?}")]
    Magic([u8; 8]),
    /// The hello is longer than any hello may be.
    #[error("it announces {length} bytes; at most {limit} are allowed")]
    TooLong {
        /// The length announced.
        length: usize,
        /// The length allowed.
        limit: usize,
    },
    /// Not a valid protobuf message.
    #[error("it cannot be decoded")]
    Decode(#[source] prost::DecodeError),
    /// A field that must be there is not.
    #[error("its field {0} is missing")]
    Missing(&'static str),
    /// A field has a value that cannot be.
    #[error("its field {field} has the impossible value {value}")]
    Invalid {
        /// The field's name.
        field: &'static str,
        /// The value, as text.
        value: String,
    },
    /// The socket or TLS failed before it was complete.
    #[error("the connection ended before it was complete")]
    Io(#[source] io::Error),
}

/// What ended, or disturbed, an established control connection.
///
/// After any of these but [`LinkError::Decode`] and [`LinkError::TooLongToSend`] the connection is of no more
/// use; both its halves then keep answering with the same error.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum LinkError {
    /// The peer closed the connection in the orderly way.
    #[error("the peer closed the connection")]
    Closed,
    /// The peer closed the connection and said why.
    #[error("the peer closed the connection: {reason}")]
    ClosedBecause {
        /// The peer's reason, in its words.
        reason: String,
    },
    /// Nothing came from the peer, not even a ping, for too long.
    #[error("nothing was heard from the peer for {after:?}")]
    Silent {
        /// How long nothing was heard.
        after: Duration,
    },
    /// The peer did not take what we sent for too long.
    #[error("the peer took nothing for {after:?}")]
    Stalled {
        /// How long it took nothing.
        after: Duration,
    },
    /// The stream ended without the mark of an orderly end.
    #[error("the connection was cut off")]
    Truncated,
    /// The peer announced a frame longer than any may be.
    #[error("the peer announced a frame of {length} bytes; at most {limit} are allowed")]
    TooLong {
        /// The length announced.
        length: usize,
        /// The length allowed.
        limit: usize,
    },
    /// The message is made of more parts than any that makes sense, and was not decoded. The connection goes on.
    #[error("the peer's message of {length} bytes is made of too many parts")]
    Crammed {
        /// The message's length.
        length: usize,
    },
    /// The message to send is longer than a frame may be; nothing was sent.
    #[error("the message has {length} bytes; at most {limit} are allowed")]
    TooLongToSend {
        /// The message's length.
        length: usize,
        /// The length allowed.
        limit: usize,
    },
    /// The peer sent a frame of an unknown kind.
    #[error("the peer sent a frame of the unknown kind {kind}")]
    UnknownFrame {
        /// The kind's number.
        kind: u8,
    },
    /// The frame is not the message that was expected. The connection goes on.
    #[error("the peer's message of {length} bytes cannot be decoded")]
    Decode {
        /// The message's length.
        length: usize,
        /// What is wrong with it.
        #[source]
        source: prost::DecodeError,
    },
    /// The socket or TLS failed.
    #[error("the connection failed")]
    Io(#[source] Arc<io::Error>),
}

impl From<io::Error> for LinkError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Self::Truncated,
            _ => Self::Io(Arc::new(error)),
        }
    }
}
