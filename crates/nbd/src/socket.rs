//! Reading from and writing to a connection's socket, of either end.

use std::io::{self, IoSlice, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// The reading half of a connection. While `until` is set, every read must be done by then, so that a peer that
/// sends a byte now and then does not hold up anybody.
#[derive(Debug)]
pub(super) struct Incoming {
    pub(super) stream: UnixStream,
    pub(super) until: Option<Instant>,
}

impl Incoming {
    /// From here on reads take as long as they take.
    pub(super) fn wait_for_ever(&mut self) -> io::Result<()> {
        self.until = None;
        self.stream.set_read_timeout(None)
    }
}

impl Read for Incoming {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if let Some(until) = self.until {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            // Zero would be no limit at all.
            self.stream.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        }
        self.stream.read(buffer).map_err(timed_out)
    }
}

/// A socket's timeout shows as "would block".
pub(super) fn timed_out(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::WouldBlock { io::ErrorKind::TimedOut.into() } else { error }
}

/// Reads a piece of a length known beforehand.
pub(super) fn read_array<const N: usize>(from: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    from.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Writes all of the parts, with as few calls as the socket allows.
pub(super) fn write_parts(mut stream: &UnixStream, mut parts: &mut [IoSlice<'_>]) -> io::Result<()> {
    // Parts that are empty to begin with would look like a socket that takes nothing.
    IoSlice::advance_slices(&mut parts, 0);
    while !parts.is_empty() {
        match stream.write_vectored(parts) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => IoSlice::advance_slices(&mut parts, written),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(timed_out(error)),
        }
    }
    Ok(())
}
