//! Data connections: byte streams in one direction, for plain threads that block.
//!
//! Speed is bought by doing things in large pieces: up to 256 KiB are encrypted straight from the caller's slice and
//! handed to the kernel in one call; the other side reads 64 KiB at once.

use std::fmt;
use std::io::{self, BufRead, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustls::{ClientConnection, ServerConnection};

use crate::bandwidth::{Bandwidth, MAX_QUANTUM};
use crate::peer::Peer;

/// The content of a full TLS record, in bytes (RFC 8446, section 5.1).
const RECORD: usize = 16 << 10;
/// What a TLS 1.3 record with AES-GCM adds to its content: header, content type, tag.
const RECORD_OVERHEAD: usize = 5 + 1 + 16;
/// How much is read from the socket at once, in bytes. 256 KiB were no better (loopback, within the noise), so the one
/// that takes less of the caches.
const INPUT: usize = 64 << 10;

/// The sending end of a data stream.
///
/// Small writes are collected, large ones encrypted where they are. Everything is taken from the shared
/// [`Bandwidth`] just before it is sent. Call [`DataSender::shutdown`] at the end: a sender that is merely dropped is,
/// for the receiver, a stream that was cut off.
pub struct DataSender {
    socket: TcpStream,
    tls: ClientConnection,
    peer: Peer,
    /// Less than a quantum, not yet encrypted.
    pending: Vec<u8>,
    bandwidth: Arc<Bandwidth>,
    aborted: Arc<AtomicBool>,
    /// After a failed write the peer's TLS may have half a record: nothing can follow.
    failed: bool,
}

impl fmt::Debug for DataSender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DataSender").field("peer", &self.peer).finish_non_exhaustive()
    }
}

impl DataSender {
    pub(crate) fn new(
        socket: TcpStream,
        mut tls: ClientConnection,
        peer: Peer,
        bandwidth: Arc<Bandwidth>,
        stall: Duration,
    ) -> io::Result<Self> {
        // Never more than a quantum is in it, and that goes to the kernel at once.
        tls.set_buffer_limit(None);
        socket.set_read_timeout(None)?;
        socket.set_write_timeout(Some(stall))?;
        Ok(Self {
            socket,
            tls,
            peer,
            pending: Vec::with_capacity(MAX_QUANTUM),
            bandwidth,
            aborted: Arc::default(),
            failed: false,
        })
    }

    /// Who receives, by its certificate.
    #[must_use]
    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    /// For how long the peer may take nothing at all before a write ends with `TimedOut`. `None` is forever. The
    /// default is [`crate::Deadlines::stall`].
    ///
    /// # Errors
    /// If the duration is zero, or the socket refuses.
    pub fn set_write_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.socket.set_write_timeout(timeout)
    }

    /// A handle by which another thread can end a call that blocks here.
    ///
    /// # Errors
    /// If the process has no file descriptors left.
    pub fn abort_handle(&self) -> io::Result<AbortHandle> {
        Ok(AbortHandle {
            socket: self.socket.try_clone()?,
            aborted: Arc::clone(&self.aborted),
            bandwidth: Some(Arc::clone(&self.bandwidth)),
        })
    }

    /// A handle by which another thread can limit how much is under way.
    ///
    /// # Errors
    /// If the process has no file descriptors left.
    pub fn in_flight(&self) -> io::Result<InFlight> {
        Ok(InFlight(self.socket.try_clone()?))
    }

    /// Sends what is left and the mark of an orderly end.
    ///
    /// # Errors
    /// As of a write.
    pub fn shutdown(mut self) -> io::Result<()> {
        self.flush()?;
        self.tls.send_close_notify();
        self.drain()?;
        self.socket.shutdown(Shutdown::Write)
    }

    fn usable(&self) -> io::Result<()> {
        if self.aborted.load(Ordering::Relaxed) {
            return Err(aborted());
        }
        if self.failed {
            return Err(io::Error::new(
                io::ErrorKind::NotConnected,
                "an earlier write to this stream failed",
            ));
        }
        Ok(())
    }

    /// Encrypts and sends what is pending followed by `more`.
    fn emit(&mut self, more: &[u8]) -> io::Result<()> {
        let length = self.pending.len() + more.len();
        if !self.bandwidth.take_unless(wire_length(length), &self.aborted) {
            return Err(aborted());
        }
        let written = self.tls.writer().write_vectored(&[IoSlice::new(&self.pending), IoSlice::new(more)])?;
        debug_assert_eq!(written, length, "the buffer has no limit");
        self.pending.clear();
        self.drain()
    }

    /// Hands everything encrypted to the kernel.
    fn drain(&mut self) -> io::Result<()> {
        while self.tls.wants_write() {
            match self.tls.write_tls(&mut self.socket) {
                Ok(0) => return Err(self.fail(io::ErrorKind::WriteZero.into())),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.fail(error)),
            }
        }
        Ok(())
    }

    fn fail(&mut self, error: io::Error) -> io::Error {
        self.failed = true;
        if self.aborted.load(Ordering::Relaxed) {
            return aborted();
        }
        match error.kind() {
            io::ErrorKind::WouldBlock => {
                io::Error::new(io::ErrorKind::TimedOut, "the peer has stopped taking data")
            }
            _ => error,
        }
    }
}

impl Write for DataSender {
    /// Takes in at least a part of `bytes`, blocking while the bandwidth limit or the peer is not ready for it.
    ///
    /// # Errors
    /// `TimedOut` if the peer takes nothing for the write timeout; `ConnectionAborted` after [`AbortHandle::abort`].
    /// After any error the stream is of no more use.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.usable()?;
        let quantum = self.bandwidth.quantum();
        if self.pending.len() >= quantum {
            // The limit was lowered since.
            self.emit(&[])?;
        }
        if self.pending.len() + bytes.len() < quantum {
            self.pending.extend_from_slice(bytes);
            return Ok(bytes.len());
        }
        // The quantum is whole records: no record is sent half empty in the middle of a large write.
        let taken = quantum - self.pending.len();
        self.emit(&bytes[..taken])?;
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.usable()?;
        if self.pending.is_empty() { Ok(()) } else { self.emit(&[]) }
    }
}

/// How many bytes so much content is on the wire.
fn wire_length(content: usize) -> usize {
    content + content.div_ceil(RECORD) * RECORD_OVERHEAD
}

fn aborted() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "the stream was aborted")
}

/// The receiving end of a data stream.
pub struct DataReceiver {
    socket: TcpStream,
    /// Boxed: it is a kilobyte, and a receiver is moved about.
    tls: Box<ServerConnection>,
    peer: Peer,
    /// Read from the socket, not yet given to TLS: `input[start..end]`.
    input: Box<[u8]>,
    start: usize,
    end: usize,
    aborted: Arc<AtomicBool>,
}

impl fmt::Debug for DataReceiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DataReceiver").field("peer", &self.peer).finish_non_exhaustive()
    }
}

/// What TLS has for us.
enum Plaintext {
    /// At least one byte.
    Some,
    /// Nothing yet.
    None,
    /// The peer has ended the stream in the orderly way.
    End,
}

impl DataReceiver {
    pub(crate) fn new(socket: TcpStream, tls: ServerConnection, peer: Peer) -> io::Result<Self> {
        socket.set_nonblocking(false)?;
        let input = vec![0; INPUT].into_boxed_slice();
        Ok(Self { socket, tls: Box::new(tls), peer, input, start: 0, end: 0, aborted: Arc::default() })
    }

    /// Who sends, by its certificate.
    #[must_use]
    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    /// For how long a read waits for data before it ends with `TimedOut`; it may then be tried again. `None`, the
    /// default, is forever: a peer whose host is gone is found out by TCP.
    ///
    /// # Errors
    /// If the duration is zero, or the socket refuses.
    pub fn set_read_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.socket.set_read_timeout(timeout)
    }

    /// A handle by which another thread can end a call that blocks here.
    ///
    /// # Errors
    /// If the process has no file descriptors left.
    pub fn abort_handle(&self) -> io::Result<AbortHandle> {
        Ok(AbortHandle {
            socket: self.socket.try_clone()?,
            aborted: Arc::clone(&self.aborted),
            bandwidth: None,
        })
    }

    /// Whether something can be read without blocking, waiting at most so long for it. Also true when what is to be
    /// read is the end of the stream, orderly or not.
    ///
    /// # Errors
    /// If the socket or TLS fails.
    pub fn wait_readable(&mut self, timeout: Duration) -> io::Result<bool> {
        let until = Instant::now().checked_add(timeout);
        loop {
            match self.plaintext() {
                Ok(Plaintext::None) => {}
                Ok(Plaintext::Some | Plaintext::End) => return Ok(true),
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(true),
                Err(error) => return Err(error),
            }
            if self.start == self.end && !self.socket_readable(until)? {
                return Ok(false);
            }
            self.advance()?;
        }
    }

    fn socket_readable(&self, until: Option<Instant>) -> io::Result<bool> {
        loop {
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            // A time too long for the kernel is as good as forever.
            let left = left.and_then(|left| Timespec::try_from(left).ok());
            let mut watched = [PollFd::new(&self.socket, PollFlags::IN)];
            match poll(&mut watched, left.as_ref()) {
                Ok(ready) => return Ok(ready > 0),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// What can be read without touching the socket or the input.
    fn plaintext(&mut self) -> io::Result<Plaintext> {
        match self.tls.reader().fill_buf() {
            Ok([]) => Ok(Plaintext::End),
            Ok(_) => Ok(Plaintext::Some),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Plaintext::None),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(self.cut_off()),
            Err(error) => Err(error),
        }
    }

    /// Gives TLS some more of the input, after reading some from the socket if there is none.
    fn advance(&mut self) -> io::Result<()> {
        if self.start == self.end {
            let count = loop {
                match self.socket.read(&mut self.input) {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    other => break other,
                }
            };
            self.start = 0;
            self.end = match count {
                Ok(count) => count,
                Err(error) => {
                    self.end = 0;
                    return Err(self.failure(error));
                }
            };
        }
        // At the end of the stream this hands over nothing, which is how TLS is told of it.
        let given = self.tls.read_tls(&mut &self.input[self.start..self.end])?;
        self.start += given;
        self.tls.process_new_packets().map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
        Ok(())
    }

    fn failure(&self, error: io::Error) -> io::Error {
        if self.aborted.load(Ordering::Relaxed) {
            return aborted();
        }
        match error.kind() {
            io::ErrorKind::WouldBlock => {
                io::Error::new(io::ErrorKind::TimedOut, "no data within the read timeout")
            }
            io::ErrorKind::ConnectionReset => self.cut_off(),
            _ => error,
        }
    }

    fn cut_off(&self) -> io::Error {
        if self.aborted.load(Ordering::Relaxed) {
            return aborted();
        }
        io::Error::new(io::ErrorKind::UnexpectedEof, "the stream was cut off before its end")
    }
}

impl Read for DataReceiver {
    /// Reads what there is, at least one byte; 0 means that the peer has ended the stream in the orderly way.
    ///
    /// # Errors
    /// `UnexpectedEof` if the stream was cut off; `TimedOut` if nothing came within the read timeout (it may be
    /// tried again); `ConnectionAborted` after [`AbortHandle::abort`].
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            match self.plaintext()? {
                Plaintext::End => return Ok(0),
                Plaintext::Some => return self.tls.reader().read(buffer),
                Plaintext::None => self.advance()?,
            }
        }
    }
}

/// Limits, from another thread, how much of a data stream is under way.
#[derive(Debug)]
pub struct InFlight(TcpStream);

impl InFlight {
    /// Lets no more than about so many bytes be under way: not yet acknowledged by the peer's host. A write that would
    /// exceed it waits. What other streams send is then not far behind this one's, however deep the queues between the
    /// hosts are.
    ///
    /// # Errors
    /// If the socket refuses.
    pub fn limit(&self, bytes: usize) -> io::Result<()> {
        // The kernel doubles the figure for its own book-keeping, which large writes need next to nothing of.
        socket2::SockRef::from(&self.0).set_send_buffer_size(bytes / 2)
    }
}

/// Ends, from another thread, whatever blocks on a data stream; the call there returns `ConnectionAborted`.
#[derive(Debug)]
pub struct AbortHandle {
    socket: TcpStream,
    aborted: Arc<AtomicBool>,
    bandwidth: Option<Arc<Bandwidth>>,
}

impl AbortHandle {
    /// Aborts the stream. The peer sees it cut off.
    pub fn abort(&self) {
        self.aborted.store(true, Ordering::Relaxed);
        if let Some(bandwidth) = &self.bandwidth {
            bandwidth.wake();
        }
        // Fails only if it is closed already, which is as good.
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}
