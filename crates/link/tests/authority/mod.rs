//! A certificate authority in a directory of its own, and hosts that it vouches for.

use std::path::{Path, PathBuf};

use link::certificates;
use link::{Deadlines, Endpoint, Identity, Listener};
use tempfile::TempDir;

/// An authority; its files are gone when it is dropped.
pub(crate) struct Authority(TempDir);

impl Authority {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        certificates::init(dir.path()).expect("an authority");
        Self(dir)
    }

    pub(crate) fn dir(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A new certificate for a host that is dialled as 127.0.0.1.
    pub(crate) fn identity(&self, name: &str) -> Identity {
        certificates::issue(self.dir(), name, &["127.0.0.1".into()]).expect("a certificate");
        let (cert, key) = (self.file(&format!("{name}.pem")), self.file(&format!("{name}-key.pem")));
        Identity::load(&self.file("ca.pem"), &cert, &key).expect("an identity")
    }

    pub(crate) fn endpoint(&self, name: &str) -> Endpoint {
        Endpoint::new(&self.identity(name), Deadlines::default()).expect("an endpoint")
    }
}

/// A listener on a port of the kernel's choice, and its address.
pub(crate) async fn listen(endpoint: &Endpoint) -> (Listener, String) {
    let listener = Listener::bind(endpoint, "127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().to_string();
    (listener, address)
}
