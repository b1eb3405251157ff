//! The writing half of a connection of the server: the answers, from any thread, in any order.

use std::fmt;
use std::io::{self, IoSlice};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

use crate::socket;
use crate::wire::{self, Command, ReplyHead};

/// Most buffers that a connection keeps for its next requests.
const MAX_SPARE: usize = 16;
/// Most bytes of a buffer that is kept: with all of them, 32 MiB.
const MAX_SPARE_BYTES: usize = 2 << 20;

/// Where the answers of one connection go.
#[derive(Debug)]
pub(super) struct Outgoing {
    stream: Mutex<UnixStream>,
    /// Buffers that are done with.
    spare: Mutex<Vec<Vec<u8>>>,
}

impl Outgoing {
    pub(super) fn new(stream: UnixStream) -> Outgoing {
        Outgoing { stream: Mutex::new(stream), spare: Mutex::default() }
    }

    /// A buffer of this length, holding anything.
    pub(super) fn buffer(&self, length: usize) -> Vec<u8> {
        let spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner).pop();
        match spare {
            // Shortened only, so that what it grows by later is all that has to be cleared.
            Some(mut buffer) if buffer.capacity() >= length => {
                buffer.resize(length, 0);
                buffer
            }
            _ => vec![0; length],
        }
    }

    pub(super) fn give_back(&self, buffer: Vec<u8>) {
        let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        if spare.len() < MAX_SPARE && (1..=MAX_SPARE_BYTES).contains(&buffer.capacity()) {
            spare.push(buffer);
        }
    }

    fn send(&self, head: ReplyHead, data: &[u8]) {
        let head = head.encode();
        let stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        let sent = socket::write_parts(&stream, &mut [IoSlice::new(&head), IoSlice::new(data)]);
        if let Err(error) = sent {
            // Part of it may have gone out: nothing that follows would be understood. The reading half sees its end.
            tracing::debug!(%error, "a reply could not be sent");
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

/// The way to answer one request, now or later, from any thread; answers need no order. One that is dropped
/// unanswered answers EIO.
///
/// Answering blocks while the client does not read its answers.
pub struct Reply {
    connection: Arc<Outgoing>,
    command: Command,
    cookie: u64,
    length: u32,
    answered: bool,
}

impl fmt::Debug for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Reply { command, cookie, .. } = self;
        f.debug_struct("Reply").field("command", command).field("cookie", cookie).finish_non_exhaustive()
    }
}

impl Reply {
    pub(super) fn new(connection: &Arc<Outgoing>, command: Command, cookie: u64, length: u32) -> Reply {
        Reply { connection: Arc::clone(connection), command, cookie, length, answered: false }
    }

    /// Answers any request but a read that succeeded. Errors reach the client as one of the few numbers that the
    /// protocol has; what has none of them is EIO.
    pub fn done(mut self, result: io::Result<()>) {
        match result {
            Ok(()) if self.command == Command::Read => self.broken("without its data"),
            Ok(()) => self.answer(0, &[]),
            Err(error) => self.answer(wire::error_number(&error), &[]),
        }
    }

    /// Answers a read, with as many bytes as were asked for. The buffer is kept for another request.
    pub fn data(mut self, result: io::Result<Vec<u8>>) {
        match result {
            Ok(data) if self.command != Command::Read => {
                self.broken("with data");
                self.connection.give_back(data);
            }
            Ok(data) if u32::try_from(data.len()) != Ok(self.length) => {
                self.broken("with another length than was asked for");
            }
            Ok(data) => {
                self.answer(0, &data);
                self.connection.give_back(data);
            }
            Err(error) => self.answer(wire::error_number(&error), &[]),
        }
    }

    /// A buffer of so many bytes, which hold anything: one that was given back, where there is one that is large
    /// enough. For the data of a read.
    #[must_use]
    pub fn buffer(&self, length: usize) -> Vec<u8> {
        self.connection.buffer(length)
    }

    /// Gives the data of a write back, once it is done with, so that later requests need no fresh memory.
    pub fn give_back(&self, buffer: Vec<u8>) {
        self.connection.give_back(buffer);
    }

    /// The server's own answer.
    pub(super) fn refuse(mut self, error: u32) {
        self.answer(error, &[]);
    }

    /// The client waits for something else: the export is at fault, and the client gets to know that it failed.
    fn broken(&mut self, how: &str) {
        tracing::error!(command = ?self.command, "a request was answered {how}");
        self.answer(wire::EIO, &[]);
    }

    fn answer(&mut self, error: u32, data: &[u8]) {
        self.answered = true;
        self.connection.send(ReplyHead { error, cookie: self.cookie }, data);
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if !self.answered {
            self.answer(wire::EIO, &[]);
        }
    }
}
