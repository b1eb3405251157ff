//! How long things may take.

use std::time::Duration;

/// How long things may take. Both agents of a link should use the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deadlines {
    /// Resolving a name and connecting TCP.
    pub connect: Duration,
    /// TLS and hello, together, on either side.
    pub handshake: Duration,
    /// A control connection on which nothing was sent for so long sends a ping.
    pub ping: Duration,
    /// A control connection on which nothing was heard for so long, or nothing could be sent, is dead.
    pub silence: Duration,
    /// A data connection whose peer takes nothing for so long is dead.
    pub stall: Duration,
}

impl Default for Deadlines {
    /// Silence of 10 s is four missed pings and more: short enough for a person who waits, long enough for a host under load.
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(5),
            handshake: Duration::from_secs(10),
            ping: Duration::from_secs(2),
            silence: Duration::from_secs(10),
            stall: Duration::from_secs(30),
        }
    }
}
