//! Control connections: framed messages both ways, with pings underneath.
//!
//! A frame is its payload's length (4 bytes, big-endian, at most [`MAX_FRAME`]), its kind (1 byte), and the payload.
//! Kinds: 1 a message of the caller's, 2 a ping (empty), 3 goodbye (the reason as text). 0 is invalid, so that
//! zeroed memory is never taken for a frame.
//!
//! Two tasks serve a connection. The writer sends what the caller hands it and, when it has sent nothing for a
//! while, a ping. The reader takes frames in as they come, so that a peer counts as silent only if *it* is silent, not
//! when the caller is slow to ask. Both halves can therefore be dropped in the middle of a call without harm.

use std::io;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use prost::Message;
use prost::bytes::{Buf as _, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadHalf, WriteHalf};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::deadlines::Deadlines;
use crate::error::LinkError;
use crate::hello::printable;
use crate::peer::Peer;

/// The longest message, in bytes.
pub const MAX_FRAME: usize = 1 << 20;

const HEADER: usize = 5;
const MESSAGE: u8 = 1;
const PING: u8 = 2;
const GOODBYE: u8 = 3;

/// Frames that wait for the caller; beyond, the peer is made to wait.
const INBOX: usize = 16;
/// Frames that wait for the socket.
const OUTBOX: usize = 16;
/// How long a closed connection still takes in what the peer sends: to close on unread data makes the kernel throw
/// away what we sent last.
const LINGER: Duration = Duration::from_secs(1);

/// An open control connection.
#[derive(Debug)]
pub struct Control {
    sender: ControlSender,
    receiver: ControlReceiver,
    peer: Peer,
    version: u32,
}

/// The half that sends. When it is dropped the peer sees an orderly end, after all that was sent before.
#[derive(Debug)]
pub struct ControlSender {
    outbox: mpsc::Sender<Outgoing>,
    shared: Arc<Shared>,
}

/// The half that receives.
#[derive(Debug)]
pub struct ControlReceiver {
    inbox: mpsc::Receiver<Bytes>,
    shared: Arc<Shared>,
}

/// What both halves hold: when the last lets go, the reader stops.
#[derive(Debug)]
struct Shared {
    ended: Arc<OnceLock<LinkError>>,
    _open: DropGuard,
}

impl Shared {
    fn reason(&self) -> LinkError {
        self.ended.get().cloned().unwrap_or(LinkError::Closed)
    }
}

/// How the two tasks tell each other, and the caller, that it is over.
#[derive(Debug, Clone)]
struct End {
    /// The first reason counts.
    reason: Arc<OnceLock<LinkError>>,
    /// The connection is beyond use, in both directions.
    dead: CancellationToken,
}

#[derive(Debug)]
struct Outgoing {
    kind: u8,
    payload: Vec<u8>,
    done: oneshot::Sender<Result<(), LinkError>>,
}

impl Control {
    /// Takes over a stream on which the hellos are done. Must be called inside a tokio runtime.
    pub(crate) fn start<S>(stream: S, peer: Peer, version: u32, deadlines: Deadlines) -> Self
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let (input, output) = tokio::io::split(stream);
        let (outbox, outgoing) = mpsc::channel(OUTBOX);
        let (incoming, inbox) = mpsc::channel(INBOX);
        let ended = Arc::new(OnceLock::new());
        // `dropped`: neither half is left. `dead`: the connection is beyond use.
        let (dropped, dead) = (CancellationToken::new(), CancellationToken::new());

        let end = End { reason: Arc::clone(&ended), dead };
        let reader = Reader {
            input,
            frames: Frames::default(),
            incoming,
            silence: deadlines.silence,
            dropped: dropped.clone(),
            end: end.clone(),
        };
        tokio::spawn(reader.run(peer.clone()));
        let writer = Writer { output, outgoing, ping: deadlines.ping, stall: deadlines.silence, end };
        tokio::spawn(writer.run());

        let shared = Arc::new(Shared { ended, _open: dropped.drop_guard() });
        Self {
            sender: ControlSender { outbox, shared: Arc::clone(&shared) },
            receiver: ControlReceiver { inbox, shared },
            peer,
            version,
        }
    }

    /// Who is at the other end, by its certificate.
    #[must_use]
    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    /// The protocol version that both agreed on.
    #[must_use]
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Takes the two directions apart, for two tasks.
    #[must_use]
    pub fn split(self) -> (ControlSender, ControlReceiver) {
        (self.sender, self.receiver)
    }
}

impl ControlSender {
    /// Sends a message and waits until it is handed to the kernel.
    ///
    /// Dropping the future leaves the connection whole: the message is then sent completely or not at all.
    ///
    /// # Errors
    /// [`LinkError::TooLongToSend`] if it does not fit a frame; else why the connection is of no more use.
    pub async fn send<M: Message>(&mut self, message: &M) -> Result<(), LinkError> {
        let length = message.encoded_len();
        if length > MAX_FRAME {
            return Err(LinkError::TooLongToSend { length, limit: MAX_FRAME });
        }
        self.submit(MESSAGE, message.encode_to_vec()).await
    }

    /// Closes the connection and tells the peer why; it gets [`LinkError::ClosedBecause`].
    ///
    /// # Errors
    /// If the peer could not be told.
    pub async fn close(mut self, reason: &str) -> Result<(), LinkError> {
        self.submit(GOODBYE, printable(reason).into_bytes()).await
    }

    async fn submit(&mut self, kind: u8, payload: Vec<u8>) -> Result<(), LinkError> {
        let (done, written) = oneshot::channel();
        if self.outbox.send(Outgoing { kind, payload, done }).await.is_err() {
            return Err(self.shared.reason());
        }
        match written.await {
            Ok(Ok(())) => Ok(()),
            // What ended the connection says more than that this write failed.
            Ok(Err(error)) => Err(self.shared.ended.get().cloned().unwrap_or(error)),
            Err(_) => Err(self.shared.reason()),
        }
    }
}

impl ControlReceiver {
    /// The next message. Dropping the future loses nothing.
    ///
    /// # Errors
    /// [`LinkError::Decode`] if it is not such a message (the connection goes on); else why it has ended. What had
    /// come before the end is delivered first.
    pub async fn receive<M: Message + Default>(&mut self) -> Result<M, LinkError> {
        self.receive_if(|_| true).await
    }

    /// The next message, if `fits` says of its bytes that it may be decoded: what is short on the wire may be long in memory. Dropping
    /// the future loses nothing.
    ///
    /// # Errors
    /// As [`ControlReceiver::receive`], and [`LinkError::Crammed`].
    pub async fn receive_if<M: Message + Default>(
        &mut self,
        fits: impl FnOnce(&[u8]) -> bool,
    ) -> Result<M, LinkError> {
        let payload = self.inbox.recv().await.ok_or_else(|| self.shared.reason())?;
        let length = payload.len();
        if !fits(&payload) {
            return Err(LinkError::Crammed { length });
        }
        M::decode(payload).map_err(|source| LinkError::Decode { length, source })
    }
}

/// The task that sends.
struct Writer<S> {
    output: WriteHalf<S>,
    outgoing: mpsc::Receiver<Outgoing>,
    ping: Duration,
    stall: Duration,
    end: End,
}

impl<S: AsyncRead + AsyncWrite> Writer<S> {
    async fn run(mut self) {
        if let Err(reason) = self.send_all().await {
            let _ = self.end.reason.set(reason);
            self.end.dead.cancel();
        }
    }

    async fn send_all(&mut self) -> Result<(), LinkError> {
        let mut next_ping = Instant::now() + self.ping;
        loop {
            tokio::select! {
                () = self.end.dead.cancelled() => return Ok(()),
                message = self.outgoing.recv() => match message {
                    Some(Outgoing { kind, payload, done }) => {
                        let result = self.write(kind, &payload).await;
                        let failed = result.clone();
                        // The caller may have stopped waiting.
                        let _ = done.send(result);
                        failed?;
                    }
                    None => break,
                },
                () = tokio::time::sleep_until(next_ping) => self.write(PING, &[]).await?,
            }
            next_ping = Instant::now() + self.ping;
        }
        // Whether the peer still hears the end makes no difference any more.
        let _ = timeout(LINGER, self.output.shutdown()).await;
        Ok(())
    }

    async fn write(&mut self, kind: u8, payload: &[u8]) -> Result<(), LinkError> {
        let mut frame = Vec::with_capacity(HEADER + payload.len());
        // `send` has checked the length.
        frame.extend_from_slice(&(payload.len() as u32).to_be_bytes());
        frame.push(kind);
        frame.extend_from_slice(payload);
        let (output, dead) = (&mut self.output, &self.end.dead);
        let written = async {
            output.write_all(&frame).await?;
            output.flush().await
        };
        tokio::select! {
            () = dead.cancelled() => Err(LinkError::Closed),
            result = timeout(self.stall, written) => match result {
                Err(_) => Err(LinkError::Stalled { after: self.stall }),
                Ok(result) => Ok(result?),
            },
        }
    }
}

/// The task that receives.
struct Reader<S> {
    input: ReadHalf<S>,
    frames: Frames,
    incoming: mpsc::Sender<Bytes>,
    silence: Duration,
    dropped: CancellationToken,
    end: End,
}

impl<S: AsyncRead + AsyncWrite> Reader<S> {
    async fn run(mut self, peer: Peer) {
        let (dropped, dead) = (self.dropped.clone(), self.end.dead.clone());
        let reason = tokio::select! {
            reason = self.take_in() => reason,
            () = dropped.cancelled() => LinkError::Closed,
            () = dead.cancelled() => return,
        };
        tracing::debug!(%peer, %reason, "control connection ended");
        // A peer that has nothing more to say may still listen; in all other cases sending is pointless too.
        let orderly = matches!(reason, LinkError::Closed);
        // Before the channel closes, so that who sees it closed also sees why.
        let _ = self.end.reason.set(reason);
        if !orderly {
            dead.cancel();
        } else if dropped.is_cancelled() {
            let mut sink = [0; 4096];
            let drain = async { while matches!(self.input.read(&mut sink).await, Ok(1..)) {} };
            let _ = timeout(LINGER, drain).await;
        }
    }

    async fn take_in(&mut self) -> LinkError {
        loop {
            match self.frames.next() {
                Ok(Some(Frame::Message(payload))) => {
                    // Nobody to give it to: the caller only sends. Pings and the end still matter.
                    let _ = self.incoming.send(payload).await;
                    continue;
                }
                Ok(Some(Frame::Ping)) => continue,
                Ok(Some(Frame::Goodbye(reason))) => return LinkError::ClosedBecause { reason },
                Ok(None) => {}
                Err(error) => return error,
            }
            match timeout(self.silence, self.input.read_buf(self.frames.space())).await {
                Err(_) => return LinkError::Silent { after: self.silence },
                Ok(Ok(0)) if self.frames.is_empty() => return LinkError::Closed,
                Ok(Ok(0)) => return LinkError::Truncated,
                Ok(Ok(_)) => {}
                Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return LinkError::Truncated;
                }
                Ok(Err(error)) => return error.into(),
            }
        }
    }
}

/// A frame as it came.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Frame {
    Message(Bytes),
    Ping,
    Goodbye(String),
}

/// Cuts the stream into frames.
#[derive(Debug, Default)]
pub(crate) struct Frames {
    pub(crate) buffer: BytesMut,
}

impl Frames {
    /// Where the next bytes go; always with room, but never with more than a frame that was announced and allowed.
    pub(crate) fn space(&mut self) -> &mut BytesMut {
        let wanted = match self.buffer.first_chunk::<4>() {
            Some(head) => HEADER + (u32::from_be_bytes(*head) as usize).min(MAX_FRAME),
            None => 0,
        };
        self.buffer.reserve(wanted.saturating_sub(self.buffer.len()).max(4096));
        &mut self.buffer
    }

    fn is_empty(&self) -> bool {
        self.buffer.is_empty()
    }

    pub(crate) fn next(&mut self) -> Result<Option<Frame>, LinkError> {
        let Some(&[a, b, c, d, kind]) = self.buffer.first_chunk::<HEADER>() else { return Ok(None) };
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        if length > MAX_FRAME {
            return Err(LinkError::TooLong { length, limit: MAX_FRAME });
        }
        if !matches!(kind, MESSAGE | PING | GOODBYE) {
            return Err(LinkError::UnknownFrame { kind });
        }
        if self.buffer.len() < HEADER + length {
            return Ok(None);
        }
        self.buffer.advance(HEADER);
        let payload = self.buffer.split_to(length).freeze();
        Ok(Some(match kind {
            MESSAGE => Frame::Message(payload),
            PING => Frame::Ping,
            _ => Frame::Goodbye(printable(&String::from_utf8_lossy(&payload))),
        }))
    }
}

#[cfg(test)]
mod tests;
