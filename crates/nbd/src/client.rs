//! The using end.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, BufReader, IoSlice, Read};
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::haggling::{self, HagglingError, Offer};
use crate::socket::{self, Incoming};
use crate::wire::{
    self, BlockSizes, COMMAND_NO_HOLE, Command, READ_ONLY, RequestHead, SEND_FLUSH, SEND_TRIM,
    SEND_WRITE_ZEROES, WireError,
};

/// How long a server may take for one answer, unless told otherwise: a flush of much data to a slow disk.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(60);

/// Most requests that are unanswered at a time. Their replies, 16 bytes each, fit a socket's buffer even while nobody
/// reads them, so that neither side ever waits to write while the other one does.
const MAX_IN_FLIGHT: usize = 64;
/// Bytes asked for and not answered, beyond which nothing more is sent; a single request may be larger.
const MAX_BYTES_IN_FLIGHT: u64 = 4 << 20;
/// Most that is zeroed or trimmed with one request: what a server without holes can write in good time, and a multiple
/// of any block size.
const MAX_ZEROES: u64 = 64 << 20;
/// Most that is read or written with one request, whatever the server takes.
const MAX_DATA: u64 = 32 << 20;

/// What is asked of a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Reading.
    Read,
    /// Writing.
    Write,
    /// Writing zeros.
    Zero,
    /// Giving up content.
    Trim,
    /// Bringing to stable storage what has been written.
    Flush,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Operation::Read => "read",
            Operation::Write => "write",
            Operation::Zero => "zero",
            Operation::Trim => "trim",
            Operation::Flush => "flush",
        })
    }
}

impl Operation {
    fn command(self) -> Command {
        match self {
            Operation::Read => Command::Read,
            Operation::Write => Command::Write,
            Operation::Zero => Command::WriteZeroes,
            Operation::Trim => Command::Trim,
            Operation::Flush => Command::Flush,
        }
    }
}

/// Why an export cannot be used, or not in this way.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NbdError {
    /// Nobody listens there.
    #[error("no NBD server at {}", socket.display())]
    Connect {
        /// Where.
        socket: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The connection broke during the handshake: a server that serves another client may just close it.
    #[error("the NBD server at {} ended the handshake", socket.display())]
    Handshake {
        /// Where.
        socket: PathBuf,
        /// How.
        #[source]
        source: io::Error,
    },
    /// The server has no such export, or does not give it.
    #[error("the NBD server refuses the export {export:?} with {code:#x}: {message}")]
    Refused {
        /// Which.
        export: String,
        /// The protocol's number of the error.
        code: u32,
        /// In the server's words.
        message: String,
    },
    /// The server does not keep to the protocol.
    #[error("the NBD server sends what it must not")]
    Protocol(#[from] WireError),
    /// The server could not do it. The connection can be used further.
    #[error("the NBD server could not {operation} {length} bytes at {offset}")]
    Failed {
        /// What.
        operation: Operation,
        /// Where the request began, in bytes.
        offset: u64,
        /// Of the request, in bytes.
        length: u64,
        /// Its errno.
        #[source]
        source: io::Error,
    },
    /// The connection broke, or the server took too long (`TimedOut`).
    #[error("the connection to the NBD server broke, waiting to {operation} at {offset}")]
    Broken {
        /// What the oldest unanswered request was to do.
        operation: Operation,
        /// Where, in bytes.
        offset: u64,
        /// How.
        #[source]
        source: io::Error,
    },
    /// An earlier error has left the connection unusable.
    #[error("the connection to the NBD server is not usable any more")]
    Unusable,
    /// The server has not offered it.
    #[error("the NBD server does not know how to {0}")]
    Unsupported(Operation),
    /// It cannot be asked for: beyond the size, or not a multiple of the server's least block size.
    #[error("no {operation} of {length} bytes at {offset} in an export of {size} bytes, blocks of {minimum}")]
    Range {
        /// What.
        operation: Operation,
        /// In bytes.
        offset: u64,
        /// In bytes.
        length: u64,
        /// Of the export, in bytes.
        size: u64,
        /// The server's least block size, in bytes.
        minimum: u32,
    },
}

/// The connection to one export. Dropping it tells the server.
#[derive(Debug)]
pub struct Client {
    incoming: BufReader<Incoming>,
    outgoing: UnixStream,
    offer: Offer,
    timeout: Option<Duration>,
    /// Of the next request.
    cookie: u64,
    in_flight: VecDeque<InFlight>,
    /// Some request was sent, or answered, in part only.
    unusable: bool,
}

/// A request that is not answered yet.
#[derive(Debug, Clone)]
struct InFlight {
    cookie: u64,
    operation: Operation,
    offset: u64,
    length: u64,
    /// Where what is read belongs in the caller's buffer.
    into: Range<usize>,
}

/// A request to be sent.
#[derive(Debug, Clone)]
struct Piece<'a> {
    operation: Operation,
    flags: u16,
    offset: u64,
    length: u32,
    data: &'a [u8],
    into: Range<usize>,
}

impl Client {
    /// Connects and takes the export of this name, with the [`DEFAULT_TIMEOUT`].
    ///
    /// # Errors
    /// [`NbdError`].
    pub fn connect(socket: &Path, export: &str) -> Result<Client, NbdError> {
        Client::connect_within(socket, export, Some(DEFAULT_TIMEOUT))
    }

    /// The same with another timeout: for the whole handshake, and then for every reply. `None` waits for ever.
    ///
    /// # Errors
    /// [`NbdError`].
    pub fn connect_within(
        socket: &Path,
        export: &str,
        timeout: Option<Duration>,
    ) -> Result<Client, NbdError> {
        let connect = |source| NbdError::Connect { socket: socket.to_owned(), source };
        let outgoing = UnixStream::connect(socket).map_err(connect)?;
        let stream = outgoing.try_clone().map_err(connect)?;
        let until = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut incoming = BufReader::with_capacity(64 << 10, Incoming { stream, until });
        outgoing.set_write_timeout(timeout).map_err(connect)?;
        let offer = haggling::ask(&mut incoming, &outgoing, export).map_err(|error| match error {
            HagglingError::Io(source) => NbdError::Handshake { socket: socket.to_owned(), source },
            HagglingError::Wire(error) => NbdError::Protocol(error),
            HagglingError::Refused { code, message } => {
                NbdError::Refused { export: export.to_owned(), code, message }
            }
        })?;
        incoming.get_mut().wait_for_ever().map_err(connect)?;
        Ok(Client {
            incoming,
            outgoing,
            offer,
            timeout,
            cookie: 1,
            in_flight: VecDeque::with_capacity(MAX_IN_FLIGHT),
            unusable: false,
        })
    }

    /// How long the server may take for a reply, and to take in a request; from 1 millisecond. `None`: for ever.
    ///
    /// # Errors
    /// Those of the socket; `InvalidInput` for zero.
    pub fn set_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.outgoing.set_write_timeout(timeout)?;
        self.incoming.get_mut().wait_for_ever()?;
        self.timeout = timeout;
        Ok(())
    }

    /// Bytes of the export.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.offer.size
    }

    /// The block sizes that the server told, or else the protocol's defaults.
    #[must_use]
    pub fn block_sizes(&self) -> BlockSizes {
        self.offer.sizes
    }

    /// Whether the server has offered it.
    #[must_use]
    pub fn supports(&self, operation: Operation) -> bool {
        let flags = self.offer.flags;
        match operation {
            Operation::Read => true,
            Operation::Write => flags & READ_ONLY == 0,
            Operation::Zero => flags & SEND_WRITE_ZEROES != 0,
            Operation::Trim => flags & SEND_TRIM != 0,
            Operation::Flush => flags & SEND_FLUSH != 0,
        }
    }

    /// Fills the buffer with the content from `offset` on.
    ///
    /// # Errors
    /// [`NbdError`]; the buffer then holds anything.
    pub fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<(), NbdError> {
        self.check(Operation::Read, offset, into.len() as u64)?;
        let pieces = split(into.len() as u64, self.most_data()).map(|part| Piece {
            into: to_index(part.start)..to_index(part.end),
            ..Piece::new(Operation::Read, offset + part.start, part.end - part.start)
        });
        self.run(pieces, into)
    }

    /// Writes.
    ///
    /// # Errors
    /// [`NbdError`]; some of it may have been written.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), NbdError> {
        self.write_all_of(&[(offset, data)])
    }

    /// Writes several pieces, each of them to its offset, and waits for the replies only while more than enough is
    /// under way. Where pieces overlap it is open which one is written last.
    ///
    /// # Errors
    /// [`NbdError`], of the first request that failed; any of the pieces may have been written.
    pub fn write_all_of(&mut self, writes: &[(u64, &[u8])]) -> Result<(), NbdError> {
        for (offset, data) in writes {
            self.check(Operation::Write, *offset, data.len() as u64)?;
        }
        let most = self.most_data();
        let pieces = writes.iter().flat_map(|&(offset, data)| {
            split(data.len() as u64, most).map(move |part| Piece {
                data: &data[to_index(part.start)..to_index(part.end)],
                ..Piece::new(Operation::Write, offset + part.start, part.end - part.start)
            })
        });
        self.run(pieces, &mut [])
    }

    /// Writes zeros, which need take up no room if they `may_unmap`.
    ///
    /// # Errors
    /// [`NbdError`]; some of it may have been written.
    pub fn zero(&mut self, offset: u64, length: u64, may_unmap: bool) -> Result<(), NbdError> {
        self.check(Operation::Zero, offset, length)?;
        let flags = if may_unmap { 0 } else { COMMAND_NO_HOLE };
        let pieces = split(length, MAX_ZEROES).map(|part| Piece {
            flags,
            ..Piece::new(Operation::Zero, offset + part.start, part.end - part.start)
        });
        self.run(pieces, &mut [])
    }

    /// Lets the server forget the content; what is read there afterwards is anything.
    ///
    /// # Errors
    /// [`NbdError`].
    pub fn trim(&mut self, offset: u64, length: u64) -> Result<(), NbdError> {
        self.check(Operation::Trim, offset, length)?;
        let pieces = split(length, MAX_ZEROES)
            .map(|part| Piece::new(Operation::Trim, offset + part.start, part.end - part.start));
        self.run(pieces, &mut [])
    }

    /// All that was written is on stable storage when this returns.
    ///
    /// # Errors
    /// [`NbdError`].
    pub fn flush(&mut self) -> Result<(), NbdError> {
        self.check(Operation::Flush, 0, 0)?;
        self.run(std::iter::once(Piece::new(Operation::Flush, 0, 0)), &mut [])
    }

    fn check(&self, operation: Operation, offset: u64, length: u64) -> Result<(), NbdError> {
        if self.unusable {
            return Err(NbdError::Unusable);
        }
        if !self.supports(operation) {
            return Err(NbdError::Unsupported(operation));
        }
        let (size, sizes) = (self.offer.size, self.offer.sizes);
        let within = offset.checked_add(length).is_some_and(|end| end <= size);
        if within && sizes.aligned(offset, length) {
            return Ok(());
        }
        Err(NbdError::Range { operation, offset, length, size, minimum: sizes.minimum })
    }

    /// Most bytes that one request reads or writes: a multiple of the least block size.
    fn most_data(&self) -> u64 {
        let BlockSizes { minimum, maximum, .. } = self.offer.sizes;
        let most = MAX_DATA.min(maximum.into());
        most - most % u64::from(minimum)
    }

    /// Sends the pieces, several at a time, and takes all of their replies.
    fn run<'a>(
        &mut self,
        mut pieces: impl Iterator<Item = Piece<'a>>,
        into: &mut [u8],
    ) -> Result<(), NbdError> {
        // Until all of it has been answered.
        self.unusable = true;
        let mut waiting = pieces.next();
        let mut failed = None;
        let mut batch = Vec::new();
        loop {
            let mut bytes: u64 = self.in_flight.iter().map(|request| request.length).sum();
            while failed.is_none()
                && self.in_flight.len() + batch.len() < MAX_IN_FLIGHT
                && let Some(piece) = waiting
                    .take_if(|piece| bytes == 0 || bytes + u64::from(piece.length) <= MAX_BYTES_IN_FLIGHT)
            {
                bytes += u64::from(piece.length);
                batch.push(piece);
                waiting = pieces.next();
            }
            self.send(&mut batch)?;
            if self.in_flight.is_empty() {
                break;
            }
            // Half of them, so that what is sent next is a batch again.
            let enough = if waiting.is_some() { self.in_flight.len() / 2 } else { 0 };
            while self.in_flight.len() > enough {
                if let Err(error) = self.receive(into)? {
                    failed.get_or_insert(error);
                }
            }
        }
        self.unusable = false;
        failed.map_or(Ok(()), Err)
    }

    fn send(&mut self, batch: &mut Vec<Piece<'_>>) -> Result<(), NbdError> {
        if batch.is_empty() {
            return Ok(());
        }
        let first = self.in_flight.len();
        let heads: Vec<_> = batch
            .iter()
            .map(|piece| {
                let Piece { operation, flags, offset, length, ref into, .. } = *piece;
                let cookie = self.cookie;
                self.cookie = cookie.wrapping_add(1);
                let into = into.clone();
                self.in_flight.push_back(InFlight { cookie, operation, offset, length: length.into(), into });
                RequestHead { flags, command: Ok(operation.command()), cookie, offset, length }.encode()
            })
            .collect();
        let parts = heads.iter().zip(&*batch);
        let mut parts: Vec<_> =
            parts.flat_map(|(head, piece)| [IoSlice::new(head), IoSlice::new(piece.data)]).collect();
        let sent = socket::write_parts(&self.outgoing, &mut parts);
        drop(parts);
        batch.clear();
        sent.map_err(|source| self.broken(first, source))
    }

    /// Takes one reply. The outer error leaves the connection unusable, the inner one is the server's answer.
    fn receive(&mut self, into: &mut [u8]) -> Result<Result<(), NbdError>, NbdError> {
        self.incoming.get_mut().until = self.timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let head = socket::read_array(&mut self.incoming).map_err(|source| self.broken(0, source))?;
        let head = wire::ReplyHead::decode(&head)?;
        let position = self.in_flight.iter().position(|request| request.cookie == head.cookie);
        let request = position.and_then(|position| self.in_flight.remove(position));
        let Some(request) = request else {
            return Err(WireError::Unexpected { what: "a reply to request", found: head.cookie }.into());
        };
        let InFlight { operation, offset, length, .. } = request;
        if head.error != 0 {
            let source = wire::error_of(head.error);
            return Ok(Err(NbdError::Failed { operation, offset, length, source }));
        }
        self.incoming.read_exact(&mut into[request.into]).map_err(|source| NbdError::Broken {
            operation,
            offset,
            source,
        })?;
        Ok(Ok(()))
    }

    fn broken(&self, request: usize, source: io::Error) -> NbdError {
        let request = self.in_flight.get(request).or(self.in_flight.front());
        let (operation, offset) =
            request.map_or((Operation::Flush, 0), |request| (request.operation, request.offset));
        NbdError::Broken { operation, offset, source }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if self.unusable {
            return;
        }
        let command = Ok(Command::Disconnect);
        let head = RequestHead { flags: 0, command, cookie: self.cookie, offset: 0, length: 0 }.encode();
        let _ = socket::write_parts(&self.outgoing, &mut [IoSlice::new(&head)]);
    }
}

impl<'a> Piece<'a> {
    fn new(operation: Operation, offset: u64, length: u64) -> Piece<'a> {
        // What is split is below all limits of the protocol.
        let length = u32::try_from(length).unwrap_or(u32::MAX);
        Piece { operation, flags: 0, offset, length, data: &[], into: 0..0 }
    }
}

/// The parts of so many bytes, none of them larger than `most`.
fn split(length: u64, most: u64) -> impl Iterator<Item = Range<u64>> {
    (0..length.div_ceil(most)).map(move |part| part * most..length.min((part + 1) * most))
}

/// An index into a slice whose length the number comes from.
fn to_index(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}
