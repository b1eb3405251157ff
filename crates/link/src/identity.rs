//! Who this agent is: its certificate authority, its certificate, and its key.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier as _;
use rustls::crypto::CryptoProvider;
use rustls::server::WebPkiClientVerifier;
use rustls::sign::CertifiedKey;
use rustls::{CertificateError, RootCertStore};
use rustls_pki_types::pem::{self, PemObject as _};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use crate::error::day;

/// An agent's certificate authority, own certificate chain, own key, and own name.
#[derive(Clone)]
pub struct Identity {
    pub(crate) roots: Arc<RootCertStore>,
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) key: Arc<PrivateKeyDer<'static>>,
    name: String,
}

// The key must not get into a log.
impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("name", &self.name).finish_non_exhaustive()
    }
}

/// Why an identity cannot be used. Each names the file at fault.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// The file cannot be read.
    #[error("cannot read {}", file.display())]
    Read {
        /// The file at fault.
        file: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file is not PEM, or has nothing of the sort in it.
    #[error("{} holds no {what} in PEM form", file.display())]
    Pem {
        /// The file at fault.
        file: PathBuf,
        /// What was looked for.
        what: &'static str,
        /// Why.
        #[source]
        source: pem::Error,
    },
    /// What is in the file is not an X.509 certificate.
    #[error("{} holds a certificate that cannot be decoded: {reason}", file.display())]
    Encoding {
        /// The file at fault.
        file: PathBuf,
        /// Why.
        reason: String,
    },
    /// The certificate in the CA file may not sign certificates.
    #[error("the certificate in {} is not a certificate authority's", file.display())]
    NotAnAuthority {
        /// The file at fault.
        file: PathBuf,
    },
    /// A certificate is no longer valid.
    #[error("the certificate in {} expired on {since}", file.display())]
    Expired {
        /// The file at fault.
        file: PathBuf,
        /// Its last valid moment.
        since: String,
    },
    /// A certificate is not valid yet.
    #[error("the certificate in {} is valid only from {from}; is this host's clock wrong?", file.display())]
    NotYetValid {
        /// The file at fault.
        file: PathBuf,
        /// Its first valid moment.
        from: String,
    },
    /// The certificate was signed by another authority.
    #[error("the certificate in {} was not signed by the certificate authority in {}", file.display(), ca.display())]
    OtherAuthority {
        /// The certificate's file.
        file: PathBuf,
        /// The authority's file.
        ca: PathBuf,
    },
    /// The certificate is not usable for an agent, which is both TLS client and TLS server.
    #[error("the certificate in {} cannot be used by an agent", file.display())]
    Unusable {
        /// The file at fault.
        file: PathBuf,
        /// Why.
        #[source]
        source: rustls::Error,
    },
    /// The certificate has no common name and no DNS name.
    #[error("the certificate in {} names nobody: {reason}", file.display())]
    Nameless {
        /// The file at fault.
        file: PathBuf,
        /// What was looked for.
        reason: String,
    },
    /// The key cannot be used.
    #[error("the private key in {} is of no supported kind", file.display())]
    Key {
        /// The file at fault.
        file: PathBuf,
        /// Why.
        #[source]
        source: rustls::Error,
    },
    /// The key is not the certificate's.
    #[error("the private key in {} does not belong to the certificate in {}", file.display(), cert.display())]
    KeyMismatch {
        /// The key's file.
        file: PathBuf,
        /// The certificate's file.
        cert: PathBuf,
    },
}

impl Identity {
    /// Reads and checks the three PEM files of an agent: the certificate authority (one or several certificates),
    /// the agent's own certificate (followed by intermediate ones, if any), and its private key.
    ///
    /// # Errors
    /// All that would make a peer refuse this agent is found here already: an unreadable file, a certificate that
    /// is expired, not valid yet, or signed by another authority, a key that is another certificate's.
    pub fn load(ca: &Path, cert: &Path, key: &Path) -> Result<Self, IdentityError> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let now = UnixTime::now();

        let mut roots = RootCertStore::empty();
        for authority in certificates(ca)? {
            check_authority(ca, &authority, now)?;
            roots.add(authority).map_err(|source| IdentityError::Encoding {
                file: ca.to_path_buf(),
                reason: source.to_string(),
            })?;
        }
        let roots = Arc::new(roots);

        let chain = certificates(cert)?;
        let name = subject_name(&chain[0])
            .map_err(|reason| IdentityError::Nameless { file: cert.to_path_buf(), reason })?;
        check_trust(&provider, &roots, &chain, now).map_err(|error| refusal(error, cert, ca))?;

        let private =
            PrivateKeyDer::from_pem_file(key).map_err(|source| pem_error(key, "private key", source))?;
        check_key(&provider, &chain, &private, key, cert)?;
        Ok(Self { roots, chain, key: Arc::new(private), name })
    }

    /// This agent's name: the common name in its certificate, or else the first DNS name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }
}

fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let found: Vec<_> = CertificateDer::pem_file_iter(file)
        .and_then(Iterator::collect)
        .map_err(|source| pem_error(file, "certificate", source))?;
    if found.is_empty() {
        return Err(pem_error(file, "certificate", pem::Error::NoItemsFound));
    }
    Ok(found)
}

fn pem_error(file: &Path, what: &'static str, error: pem::Error) -> IdentityError {
    let file = file.to_path_buf();
    match error {
        pem::Error::Io(source) => IdentityError::Read { file, source },
        source => IdentityError::Pem { file, what, source },
    }
}

/// TLS takes a trust anchor as it is, whatever its dates; a person wants to know.
fn check_authority(file: &Path, der: &CertificateDer<'_>, now: UnixTime) -> Result<(), IdentityError> {
    let (_, certificate) = X509Certificate::from_der(der)
        .map_err(|e| IdentityError::Encoding { file: file.to_path_buf(), reason: e.to_string() })?;
    if !certificate.is_ca() {
        return Err(IdentityError::NotAnAuthority { file: file.to_path_buf() });
    }
    let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
    let validity = certificate.validity();
    if now > validity.not_after.timestamp() {
        return Err(IdentityError::Expired {
            file: file.to_path_buf(),
            since: validity.not_after.to_string(),
        });
    }
    if now < validity.not_before.timestamp() {
        return Err(IdentityError::NotYetValid {
            file: file.to_path_buf(),
            from: validity.not_before.to_string(),
        });
    }
    Ok(())
}

/// Looks at our own certificate as peers will, in both roles.
fn check_trust(
    provider: &Arc<CryptoProvider>,
    roots: &Arc<RootCertStore>,
    chain: &[CertificateDer<'_>],
    now: UnixTime,
) -> Result<(), rustls::Error> {
    let general = |e: rustls::server::VerifierBuilderError| rustls::Error::General(e.to_string());
    let (own, intermediates) =
        chain.split_first().ok_or_else(|| rustls::Error::General("no certificate".into()))?;
    WebPkiClientVerifier::builder_with_provider(Arc::clone(roots), Arc::clone(provider))
        .build()
        .map_err(general)?
        .verify_client_cert(own, intermediates, now)?;
    let server = WebPkiServerVerifier::builder_with_provider(Arc::clone(roots), Arc::clone(provider))
        .build()
        .map_err(general)?;
    // Which address peers will dial is unknown here, so only the name's mismatch is no matter.
    let nobody = ServerName::try_from("invalid").map_err(|e| rustls::Error::General(e.to_string()))?;
    match server.verify_server_cert(own, intermediates, &nobody, &[], now) {
        Ok(_)
        | Err(rustls::Error::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        )) => Ok(()),
        Err(error) => Err(error),
    }
}

fn refusal(error: rustls::Error, file: &Path, ca: &Path) -> IdentityError {
    let file = file.to_path_buf();
    match error {
        rustls::Error::InvalidCertificate(
            CertificateError::UnknownIssuer | CertificateError::BadSignature,
        ) => IdentityError::OtherAuthority { file, ca: ca.to_path_buf() },
        rustls::Error::InvalidCertificate(CertificateError::ExpiredContext { not_after, .. }) => {
            IdentityError::Expired { file, since: day(not_after) }
        }
        rustls::Error::InvalidCertificate(CertificateError::NotValidYetContext { not_before, .. }) => {
            IdentityError::NotYetValid { file, from: day(not_before) }
        }
        source => IdentityError::Unusable { file, source },
    }
}

fn check_key(
    provider: &CryptoProvider,
    chain: &[CertificateDer<'static>],
    private: &PrivateKeyDer<'static>,
    key: &Path,
    cert: &Path,
) -> Result<(), IdentityError> {
    let signing = provider
        .key_provider
        .load_private_key(private.clone_key())
        .map_err(|source| IdentityError::Key { file: key.to_path_buf(), source })?;
    match CertifiedKey::new(chain.to_vec(), signing).keys_match() {
        Ok(()) => Ok(()),
        Err(rustls::Error::InconsistentKeys(_)) => {
            Err(IdentityError::KeyMismatch { file: key.to_path_buf(), cert: cert.to_path_buf() })
        }
        Err(source) => Err(IdentityError::Unusable { file: cert.to_path_buf(), source }),
    }
}

/// The name that a certificate gives its subject: the common name, or else the first DNS name.
pub(crate) fn subject_name(der: &CertificateDer<'_>) -> Result<String, String> {
    let (_, certificate) = X509Certificate::from_der(der).map_err(|e| e.to_string())?;
    let common = certificate.subject().iter_common_name().find_map(|name| name.as_str().ok());
    let dns = || {
        let names = certificate.subject_alternative_name().ok().flatten()?;
        names.value.general_names.iter().find_map(|name| match name {
            GeneralName::DNSName(name) => Some(*name),
            _ => None,
        })
    };
    match common.filter(|name| !name.is_empty()).or_else(dns) {
        Some(name) => Ok(crate::hello::printable(name)),
        None => Err("it has neither a common name nor a DNS name".into()),
    }
}
