//! What both directions do with their sockets: options, deadlines, and an end that lets the peer read why.

use std::io::{self, IoSlice, Read, Write};
use std::time::{Duration, Instant};

use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// How long a peer that was turned away may take to read why.
pub(crate) const LINGER: Duration = Duration::from_millis(500);

/// Lets the peer read what was sent last before the socket is closed.
///
/// To close a socket with unread data in it makes the kernel send a reset, on which the peer's kernel throws away
/// what it has not delivered yet: here the alert, or the answer, that says why the peer was turned away.
pub(crate) async fn linger(mut socket: tokio::net::TcpStream) {
    // Whatever fails here, the connection is over.
    let _ = socket.shutdown().await;
    let mut sink = [0; 4096];
    let drain = async { while matches!(socket.read(&mut sink).await, Ok(1..)) {} };
    let _ = tokio::time::timeout(LINGER, drain).await;
}

/// As [`linger`]. An agent at the other end lingers as well, so this takes no longer than a round trip.
pub(crate) fn linger_blocking(socket: &std::net::TcpStream) {
    let _ = socket.shutdown(std::net::Shutdown::Write);
    let mut timed = Timed { socket, until: Instant::now() + LINGER };
    let mut sink = [0; 4096];
    while matches!(timed.read(&mut sink), Ok(1..)) {}
}

/// Options of every socket: no waiting for full packets, and a dead host found out by the kernel too.
///
/// Buffer sizes are left alone on purpose: the kernel tunes them per connection up to several MiB, which setting
/// them would end (tcp(7), SO_RCVBUF). Fixed ones of 1 and 4 MiB showed no gain on loopback; long fat networks are unmeasured.
pub(crate) fn set_options(socket: SockRef<'_>, dead_after: Duration) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    let probe = (dead_after / 3).max(Duration::from_secs(1));
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(probe).with_interval(probe).with_retries(3))?;
    socket.set_tcp_user_timeout(Some(dead_after))
}

/// A blocking socket with one deadline for all that is done on it, so that a peer cannot win time byte by byte.
pub(crate) struct Timed<'a> {
    pub(crate) socket: &'a std::net::TcpStream,
    pub(crate) until: Instant,
}

impl Timed<'_> {
    fn left(&self) -> io::Result<Option<Duration>> {
        match self.until.checked_duration_since(Instant::now()) {
            Some(left) if !left.is_zero() => Ok(Some(left)),
            _ => Err(io::ErrorKind::TimedOut.into()),
        }
    }
}

/// A blocking socket's timeout comes as `WouldBlock`.
fn timed_out(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::WouldBlock { io::ErrorKind::TimedOut.into() } else { error }
}

impl Read for Timed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.socket.set_read_timeout(self.left()?)?;
        self.socket.read(buffer).map_err(timed_out)
    }
}

impl Write for Timed<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.socket.set_write_timeout(self.left()?)?;
        self.socket.write(bytes).map_err(timed_out)
    }

    // Without it only the first of several records would be written when TLS has one last chance to say something.
    fn write_vectored(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        self.socket.set_write_timeout(self.left()?)?;
        self.socket.write_vectored(pieces).map_err(timed_out)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
