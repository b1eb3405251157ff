//! Who is at the other end of a connection.

use std::fmt;
use std::net::SocketAddr;

/// Who is at the other end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// The name in its certificate; it is this that an allow-list is about.
    pub name: String,
    /// Where it connected from, or where it was reached.
    pub address: SocketAddr,
    /// This host's end of that connection.
    pub local: SocketAddr,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name, self.address)
    }
}
