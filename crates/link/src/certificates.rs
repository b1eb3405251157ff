//! A small certificate authority for those who have none: `vmirror cert init` and `vmirror cert issue`.
//!
//! ECDSA on P-256 throughout. The authority's key stays in the directory it was made in and is needed on no agent.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType,
};
use uuid::Uuid;

/// The authority's certificate, in the directory of [`init`].
pub const CA_CERT: &str = "ca.pem";
/// The authority's private key, in the directory of [`init`].
pub const CA_KEY: &str = "ca-key.pem";

/// A day.
const DAY: Duration = Duration::from_secs(24 * 3600);
/// Certificates are valid from a little before they are made, since no two clocks agree.
const SKEW: Duration = Duration::from_secs(3600);
/// The longest name: the limit of a common name (X.520, ub-common-name).
const MAX_NAME: usize = 64;

/// From when until when a certificate is valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    /// The first moment.
    pub not_before: SystemTime,
    /// The last moment.
    pub not_after: SystemTime,
}

impl Validity {
    /// From an hour ago (for clocks that differ) for so many days from now.
    #[must_use]
    pub fn days(days: u32) -> Self {
        let now = SystemTime::now();
        Self { not_before: now - SKEW, not_after: now + DAY * days }
    }
}

/// How to make a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct IssueOptions {
    /// From when until when it is valid.
    pub validity: Validity,
}

impl IssueOptions {
    /// Options with this validity.
    #[must_use]
    pub fn new(validity: Validity) -> Self {
        Self { validity }
    }
}

impl Default for IssueOptions {
    /// Two years for an agent.
    fn default() -> Self {
        Self::new(Validity::days(730))
    }
}

/// The two files that were made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files {
    /// The certificate.
    pub certificate: PathBuf,
    /// Its private key, readable by its owner alone.
    pub key: PathBuf,
}

/// Why no certificate was made. Nothing is left behind.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CertificatesError {
    /// There is such a file already; it is never overwritten.
    #[error("{} exists already and is not overwritten", .0.display())]
    Exists(PathBuf),
    /// There is no authority in the directory.
    #[error("{} holds no certificate authority: there is no {}", dir.display(), missing)]
    NoAuthority {
        /// The directory.
        dir: PathBuf,
        /// The file that is missing.
        missing: &'static str,
    },
    /// A file cannot be read or written.
    #[error("cannot {action} {}", file.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// The file or directory at fault.
        file: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The name cannot be that of a host.
    #[error("{name:?} cannot be a host's name: {reason}")]
    Name {
        /// The name.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The address is neither an IP address nor a host name.
    #[error("{address:?} is neither an IP address nor a host name: {reason}")]
    Address {
        /// The address.
        address: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The certificate ends before it begins.
    #[error("a certificate cannot end before it begins")]
    Validity,
    /// The authority's files are not what they should be.
    #[error("the certificate authority in {} cannot be used", dir.display())]
    Authority {
        /// The directory.
        dir: PathBuf,
        /// Why.
        #[source]
        source: rcgen::Error,
    },
    /// The certificate cannot be made.
    #[error("cannot make the certificate")]
    Make(#[source] rcgen::Error),
}

/// Makes a new certificate authority in a directory, which is made as well if need be; valid for ten years.
///
/// # Errors
/// If there is one already, or the files cannot be written.
pub fn init(dir: &Path) -> Result<Files, CertificatesError> {
    init_with(dir, &IssueOptions::new(Validity::days(3650)))
}

/// As [`init`], with options.
///
/// # Errors
/// As [`init`].
pub fn init_with(dir: &Path, options: &IssueOptions) -> Result<Files, CertificatesError> {
    let mut params = params(options)?;
    // Told apart by name: with two authorities of one name, TLS speaks of bad signatures instead of another authority.
    let id = Uuid::new_v4().simple().to_string();
    params.distinguished_name.push(DnType::CommonName, format!("vmirror authority {}", &id[..12]));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(CertificatesError::Make)?;
    let certificate = params.self_signed(&key).map_err(CertificatesError::Make)?;
    std::fs::create_dir_all(dir).map_err(|source| CertificatesError::File {
        action: "create",
        file: dir.to_path_buf(),
        source,
    })?;
    let files = Files { certificate: dir.join(CA_CERT), key: dir.join(CA_KEY) };
    write_pair(&files, &certificate.pem(), &key.serialize_pem())?;
    Ok(files)
}

/// Makes `NAME.pem` and `NAME-key.pem` for one agent, signed by the authority in the same directory.
///
/// The name becomes the certificate's common name and a DNS name; peers know the agent by it. `addresses`, IP
/// addresses or host names, are those by which peers dial it.
///
/// # Errors
/// If there is no authority, the files exist already, or a name or address is malformed.
pub fn issue(dir: &Path, name: &str, addresses: &[String]) -> Result<Files, CertificatesError> {
    issue_with(dir, name, addresses, &IssueOptions::default())
}

/// As [`issue`], with options.
///
/// # Errors
/// As [`issue`].
pub fn issue_with(
    dir: &Path,
    name: &str,
    addresses: &[String],
    options: &IssueOptions,
) -> Result<Files, CertificatesError> {
    check_name(name).map_err(|reason| CertificatesError::Name { name: name.into(), reason })?;
    if format!("{name}.pem") == CA_CERT {
        // Its files would be the authority's.
        return Err(CertificatesError::Name { name: name.into(), reason: "it is the authority's own" });
    }
    let mut params = params(options)?;
    params.distinguished_name.push(DnType::CommonName, name);
    params.subject_alt_names.push(dns(name)?);
    for address in addresses {
        let entry = subject_alternative(address)?;
        if !params.subject_alt_names.contains(&entry) {
            params.subject_alt_names.push(entry);
        }
    }
    // QEMU wants key encipherment of certificates that it is to use, also where TLS 1.3 has no use for it.
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
    // An agent is both: it dials, and it is dialled.
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;

    let authority = |source| CertificatesError::Authority { dir: dir.to_path_buf(), source };
    let ca_key = KeyPair::from_pem(&read(dir, CA_KEY)?).map_err(authority)?;
    let issuer = Issuer::from_ca_cert_pem(&read(dir, CA_CERT)?, ca_key).map_err(authority)?;
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(CertificatesError::Make)?;
    let certificate = params.signed_by(&key, &issuer).map_err(CertificatesError::Make)?;
    let files =
        Files { certificate: dir.join(format!("{name}.pem")), key: dir.join(format!("{name}-key.pem")) };
    write_pair(&files, &certificate.pem(), &key.serialize_pem())?;
    Ok(files)
}

fn params(options: &IssueOptions) -> Result<CertificateParams, CertificatesError> {
    if options.validity.not_after <= options.validity.not_before {
        return Err(CertificatesError::Validity);
    }
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.not_before = options.validity.not_before.into();
    params.not_after = options.validity.not_after.into();
    Ok(params)
}

fn subject_alternative(address: &str) -> Result<SanType, CertificatesError> {
    match address.parse::<IpAddr>() {
        Ok(ip) => Ok(SanType::IpAddress(ip)),
        Err(_) => {
            // No top-level domain is a number (RFC 1123, section 2.1): it would be an address with a part missing.
            let last = address.rsplit('.').next().unwrap_or_default();
            let number = !last.is_empty() && last.bytes().all(|byte| byte.is_ascii_digit());
            let named = if number { Err("its last part is a number") } else { check_name(address) };
            named.map_err(|reason| CertificatesError::Address { address: address.into(), reason })?;
            dns(address)
        }
    }
}

fn dns(name: &str) -> Result<SanType, CertificatesError> {
    Ok(SanType::DnsName(name.try_into().map_err(CertificatesError::Make)?))
}

/// A host name as DNS has them (RFC 1123, section 2.1); it also becomes part of a file's name.
fn check_name(name: &str) -> Result<(), &'static str> {
    if name.is_empty() {
        return Err("it is empty");
    }
    if name.len() > MAX_NAME {
        return Err("it is longer than 64 characters");
    }
    if !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'.') {
        return Err("only letters, digits, hyphens and dots may be in it");
    }
    for label in name.split('.') {
        if label.is_empty() {
            return Err("there is nothing beside one of its dots");
        }
        if label.len() > 63 {
            return Err("one of its parts is longer than 63 characters");
        }
        if label.starts_with('-') || label.ends_with('-') {
            return Err("one of its parts begins or ends with a hyphen");
        }
    }
    if name.parse::<IpAddr>().is_ok() {
        return Err("it is an IP address");
    }
    Ok(())
}

fn read(dir: &Path, file: &'static str) -> Result<String, CertificatesError> {
    let path = dir.join(file);
    std::fs::read_to_string(&path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => CertificatesError::NoAuthority { dir: dir.to_path_buf(), missing: file },
        _ => CertificatesError::File { action: "read", file: path, source },
    })
}

/// Writes both or none.
fn write_pair(files: &Files, certificate: &str, key: &str) -> Result<(), CertificatesError> {
    write_new(&files.key, 0o600, key)?;
    write_new(&files.certificate, 0o644, certificate).inspect_err(|_| {
        // The key was made a moment ago and belongs to nothing; if this fails, the next attempt names the file.
        let _ = std::fs::remove_file(&files.key);
    })
}

fn write_new(path: &Path, mode: u32, content: &str) -> Result<(), CertificatesError> {
    let failed = |action, source| CertificatesError::File { action, file: path.to_path_buf(), source };
    // create_new also refuses a symbolic link, so a key cannot be led elsewhere.
    let mut file: File = OpenOptions::new().write(true).create_new(true).mode(mode).open(path).map_err(
        |source| match source.kind() {
            io::ErrorKind::AlreadyExists => CertificatesError::Exists(path.to_path_buf()),
            _ => failed("create", source),
        },
    )?;
    file.write_all(content.as_bytes()).and_then(|()| file.sync_all()).map_err(|source| {
        // An empty or half file would look like a certificate and stand in the way of the next attempt.
        let _ = std::fs::remove_file(path);
        failed("write", source)
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::identity::{Identity, IdentityError};

    fn authority() -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a directory");
        init(dir.path()).expect("an authority");
        dir
    }

    fn load(dir: &Path, files: &Files) -> Result<Identity, IdentityError> {
        Identity::load(&dir.join(CA_CERT), &files.certificate, &files.key)
    }

    fn listing(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(dir)
            .expect("listed")
            .map(|entry| entry.expect("an entry").file_name().into_string().expect("text"))
            .collect();
        names.sort();
        names
    }

    #[test]
    fn what_is_issued_can_be_loaded_and_names_its_host() {
        let dir = authority();
        let files = issue(dir.path(), "host-a.example", &["10.9.0.2".into(), "::1".into(), "a.lan".into()])
            .expect("issued");
        assert_eq!(load(dir.path(), &files).expect("loaded").name(), "host-a.example");
    }

    #[test]
    fn keys_are_for_their_owner_alone() {
        let dir = authority();
        issue(dir.path(), "host-a", &[]).expect("issued");
        for (file, mode) in
            [("ca-key.pem", 0o600), ("host-a-key.pem", 0o600), ("ca.pem", 0o644), ("host-a.pem", 0o644)]
        {
            let metadata = std::fs::metadata(dir.path().join(file)).expect("there");
            // Less than that under a strict umask, never more.
            assert_eq!(metadata.permissions().mode() & 0o777 & !mode, 0, "{file}");
        }
    }

    #[test]
    fn nothing_is_overwritten_and_nothing_half_done_is_left() {
        let dir = authority();
        let ca = std::fs::read(dir.path().join(CA_CERT)).expect("read");
        assert!(matches!(init(dir.path()), Err(CertificatesError::Exists(file)) if file.ends_with(CA_KEY)));
        assert_eq!(std::fs::read(dir.path().join(CA_CERT)).expect("read"), ca);

        std::fs::write(dir.path().join("host-a.pem"), "mine").expect("written");
        let before = listing(dir.path());
        let error = issue(dir.path(), "host-a", &[]).expect_err("exists");
        assert!(matches!(&error, CertificatesError::Exists(file) if file.ends_with("host-a.pem")), "{error}");
        assert_eq!(listing(dir.path()), before);
    }

    #[test]
    fn names_that_are_none_are_refused_before_anything_is_written() {
        let dir = authority();
        let before = listing(dir.path());
        let long = "x".repeat(65);
        for name in
            ["", "../evil", "a/b", "a b", "a..b", "-a", "a-", "10.0.0.1", "ca", "hé", "a\0b", long.as_str()]
        {
            let refused = issue(dir.path(), name, &[]);
            assert!(matches!(refused, Err(CertificatesError::Name { .. })), "{name:?}: {refused:?}");
        }
        for address in ["", "10.0.0.1:7600", "10.9.0", "a b", "*"] {
            let refused = issue(dir.path(), "host-a", &[address.into()]);
            assert!(matches!(refused, Err(CertificatesError::Address { .. })), "{address:?}: {refused:?}");
        }
        assert_eq!(listing(dir.path()), before);
    }

    #[test]
    fn without_an_authority_nothing_is_issued() {
        let dir = tempfile::tempdir().expect("a directory");
        let error = issue(dir.path(), "host-a", &[]).expect_err("no authority");
        assert!(matches!(error, CertificatesError::NoAuthority { missing: CA_KEY, .. }), "{error}");
        assert!(listing(dir.path()).is_empty());
    }

    fn validity(from_days: i64, to_days: i64) -> Validity {
        let moment = |days: i64| {
            let distance = DAY * u32::try_from(days.unsigned_abs()).expect("short");
            if days < 0 { SystemTime::now() - distance } else { SystemTime::now() + distance }
        };
        Validity { not_before: moment(from_days), not_after: moment(to_days) }
    }

    fn issued(dir: &Path, name: &str, from: i64, to: i64) -> Files {
        issue_with(dir, name, &[], &IssueOptions::new(validity(from, to))).expect("issued")
    }

    #[test]
    fn a_certificate_out_of_its_time_is_found_when_loaded() {
        let dir = authority();
        let error = load(dir.path(), &issued(dir.path(), "old", -2, -1)).expect_err("expired");
        assert!(
            matches!(&error, IdentityError::Expired { file, .. } if file.ends_with("old.pem")),
            "{error}"
        );
        let error = load(dir.path(), &issued(dir.path(), "new", 1, 2)).expect_err("not yet valid");
        assert!(
            matches!(&error, IdentityError::NotYetValid { file, .. } if file.ends_with("new.pem")),
            "{error}"
        );
        let backwards = issue_with(dir.path(), "x", &[], &IssueOptions::new(validity(2, 1)));
        assert!(matches!(backwards, Err(CertificatesError::Validity)));
    }

    #[test]
    fn an_expired_authority_is_found_when_loaded() {
        let dir = tempfile::tempdir().expect("a directory");
        init_with(dir.path(), &IssueOptions::new(validity(-2, -1))).expect("an authority");
        let error =
            load(dir.path(), &issue(dir.path(), "host-a", &[]).expect("issued")).expect_err("expired");
        assert!(matches!(&error, IdentityError::Expired { file, .. } if file.ends_with(CA_CERT)), "{error}");
    }

    #[test]
    fn files_that_do_not_belong_together_are_found_when_loaded() {
        let (ours, theirs) = (authority(), authority());
        let (a, b) =
            (issue(ours.path(), "a", &[]).expect("issued"), issue(theirs.path(), "b", &[]).expect("issued"));
        let error = load(ours.path(), &b).expect_err("another authority");
        assert!(
            matches!(&error, IdentityError::OtherAuthority { file, .. } if *file == b.certificate),
            "{error}"
        );
        let mixed = Files { certificate: a.certificate.clone(), key: b.key.clone() };
        let error = load(ours.path(), &mixed).expect_err("another key");
        assert!(matches!(&error, IdentityError::KeyMismatch { file, .. } if *file == b.key), "{error}");
        let leaf_as_authority = Identity::load(&a.certificate, &a.certificate, &a.key).expect_err("a leaf");
        assert!(matches!(leaf_as_authority, IdentityError::NotAnAuthority { .. }), "{leaf_as_authority}");
    }

    #[test]
    fn files_that_are_missing_or_something_else_are_named() {
        let dir = authority();
        let files = issue(dir.path(), "host-a", &[]).expect("issued");
        let absent = dir.path().join("absent.pem");
        let error = load(dir.path(), &Files { key: absent.clone(), ..files.clone() }).expect_err("absent");
        assert!(matches!(&error, IdentityError::Read { file, .. } if *file == absent), "{error}");
        let swapped = Files { certificate: files.key.clone(), key: files.certificate };
        let error = load(dir.path(), &swapped).expect_err("a key is no certificate");
        assert!(
            matches!(&error, IdentityError::Pem { file, what: "certificate", .. } if *file == files.key),
            "{error}"
        );
    }
}
