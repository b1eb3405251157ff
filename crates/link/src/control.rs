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

use crate::endpoint::{Deadlines, Peer};
use crate::error::LinkError;
use crate::hello::printable;

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
        let payload = self.inbox.recv().await.ok_or_else(|| self.shared.reason())?;
        let length = payload.len();
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
enum Frame {
    Message(Bytes),
    Ping,
    Goodbye(String),
}

/// Cuts the stream into frames.
#[derive(Debug, Default)]
struct Frames {
    buffer: BytesMut,
}

impl Frames {
    /// Where the next bytes go; always with room, but never with more than a frame that was announced and allowed.
    fn space(&mut self) -> &mut BytesMut {
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

    fn next(&mut self) -> Result<Option<Frame>, LinkError> {
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
mod tests {
    use std::net::{Ipv4Addr, SocketAddr};

    use proptest::prelude::*;
    use tokio::io::DuplexStream;

    use super::*;

    #[derive(Clone, PartialEq, prost::Message)]
    struct Note {
        #[prost(string, tag = "1")]
        text: String,
    }

    fn note(text: &str) -> Note {
        Note { text: text.into() }
    }

    fn peer() -> Peer {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 1));
        Peer { name: "host-b".into(), address, local: address }
    }

    fn deadlines() -> Deadlines {
        Deadlines { ping: Duration::from_secs(2), silence: Duration::from_secs(10), ..Deadlines::default() }
    }

    fn start(stream: DuplexStream) -> (ControlSender, ControlReceiver) {
        Control::start(stream, peer(), 1, deadlines()).split()
    }

    /// A connection whose other end is raw bytes.
    fn with_raw_peer() -> (ControlSender, ControlReceiver, DuplexStream) {
        let (near, far) = tokio::io::duplex(64 << 10);
        let (sender, receiver) = start(near);
        (sender, receiver, far)
    }

    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        let mut bytes = u32::try_from(payload.len()).expect("short").to_be_bytes().to_vec();
        bytes.push(kind);
        bytes.extend_from_slice(payload);
        bytes
    }

    /// All frames in `bytes`, which come in pieces of the given sizes.
    fn cut(bytes: &[u8], pieces: &[usize]) -> Result<Vec<Frame>, LinkError> {
        let (mut frames, mut found, mut rest) = (Frames::default(), Vec::new(), bytes);
        let mut sizes = pieces.iter().copied().chain(std::iter::repeat(usize::MAX));
        while !rest.is_empty() {
            let (now, later) = rest.split_at(sizes.next().expect("endless").min(rest.len()));
            frames.space().extend_from_slice(now);
            rest = later;
            while let Some(frame) = frames.next()? {
                found.push(frame);
            }
        }
        Ok(found)
    }

    proptest! {
        #[test]
        fn frames_are_found_however_the_stream_is_cut(
            payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..8),
            pieces in prop::collection::vec(1usize..64, 0..64),
        ) {
            let bytes: Vec<u8> = payloads.iter().flat_map(|p| [frame(MESSAGE, p), frame(PING, &[])].concat()).collect();
            let expected: Vec<Frame> =
                payloads.into_iter().flat_map(|p| [Frame::Message(p.into()), Frame::Ping]).collect();
            prop_assert_eq!(cut(&bytes, &pieces).expect("own frames"), expected);
        }

        #[test]
        fn arbitrary_bytes_neither_panic_nor_allocate_without_bound(
            bytes in prop::collection::vec(any::<u8>(), 0..400),
            pieces in prop::collection::vec(1usize..64, 0..32),
        ) {
            let mut frames = Frames::default();
            let mut rest = &bytes[..];
            for piece in pieces {
                let (now, later) = rest.split_at(piece.min(rest.len()));
                frames.space().extend_from_slice(now);
                prop_assert!(frames.buffer.capacity() <= 2 * (HEADER + MAX_FRAME));
                rest = later;
                while let Ok(Some(_)) = frames.next() {}
            }
        }
    }

    #[test]
    fn a_frame_too_long_is_refused_at_its_header() {
        let mut bytes = u32::try_from(MAX_FRAME + 1).expect("fits").to_be_bytes().to_vec();
        bytes.push(MESSAGE);
        assert!(
            matches!(cut(&bytes, &[]), Err(LinkError::TooLong { length, limit: MAX_FRAME }) if length == MAX_FRAME + 1)
        );
    }

    #[test]
    fn zeroed_memory_is_no_frame() {
        assert!(matches!(cut(&[0; HEADER], &[]), Err(LinkError::UnknownFrame { kind: 0 })));
    }

    // Time is paused in these tests: it passes only when nothing else can happen, so none depends on speed.

    #[tokio::test(start_paused = true)]
    async fn pings_keep_two_idle_sides_together() {
        let (near, far) = tokio::io::duplex(1024);
        let ((mut near_out, mut near_in), (_far_out, mut far_in)) = (start(near), start(far));
        let nothing = timeout(Duration::from_secs(3600), near_in.receive::<Note>()).await;
        assert!(nothing.is_err(), "an idle connection ended: {nothing:?}");
        near_out.send(&note("still here")).await.expect("sent");
        assert_eq!(far_in.receive::<Note>().await.expect("received"), note("still here"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_caller_slow_to_ask_does_not_make_the_peer_silent() {
        let (near, far) = tokio::io::duplex(1024);
        let ((mut near_out, _near_in), (_far_out, mut far_in)) = (start(near), start(far));
        for _ in 0..INBOX {
            near_out.send(&note("early")).await.expect("sent");
        }
        tokio::time::sleep(Duration::from_secs(600)).await;
        for _ in 0..INBOX {
            assert_eq!(far_in.receive::<Note>().await.expect("received"), note("early"));
        }
        near_out.send(&note("late")).await.expect("sent");
        assert_eq!(far_in.receive::<Note>().await.expect("received"), note("late"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_says_nothing_is_found_silent_by_both_halves() {
        let (mut sender, mut receiver, _far) = with_raw_peer();
        let begun = Instant::now();
        let error = receiver.receive::<Note>().await.expect_err("silence");
        assert!(
            matches!(error, LinkError::Silent { after } if after == Duration::from_secs(10)),
            "{error:?}"
        );
        assert_eq!(begun.elapsed().as_secs(), 10);
        assert!(matches!(sender.send(&note("too late")).await, Err(LinkError::Silent { .. })));
        assert!(matches!(receiver.receive::<Note>().await, Err(LinkError::Silent { .. })));
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_takes_nothing_ends_the_sending() {
        let (near, mut far) = tokio::io::duplex(16);
        let (mut sender, mut receiver) = start(near);
        // It does ping, but it does not read.
        let pinging = tokio::spawn(async move {
            loop {
                tokio::time::sleep(Duration::from_secs(1)).await;
                if far.write_all(&frame(PING, &[])).await.is_err() {
                    break;
                }
            }
        });
        let error = sender.send(&note("more than sixteen bytes of text")).await.expect_err("stalled");
        assert!(matches!(error, LinkError::Stalled { .. }), "{error:?}");
        assert!(matches!(receiver.receive::<Note>().await, Err(LinkError::Stalled { .. })));
        pinging.abort();
    }

    #[tokio::test(start_paused = true)]
    async fn what_came_before_the_end_is_delivered_before_it() {
        let (_sender, mut receiver, mut far) = with_raw_peer();
        let last_words =
            [frame(MESSAGE, &note("last").encode_to_vec()), frame(GOODBYE, b"no\x07 room")].concat();
        far.write_all(&last_words).await.expect("written");
        assert_eq!(receiver.receive::<Note>().await.expect("received"), note("last"));
        match receiver.receive::<Note>().await {
            Err(LinkError::ClosedBecause { reason }) => assert_eq!(reason, "no\u{fffd} room"),
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_frame_cut_off_is_not_an_orderly_end() {
        let (_sender, mut receiver, mut far) = with_raw_peer();
        far.write_all(&frame(MESSAGE, &[1, 2, 3])[..6]).await.expect("written");
        drop(far);
        assert!(matches!(receiver.receive::<Note>().await, Err(LinkError::Truncated)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_message_that_cannot_be_decoded_does_not_end_the_connection() {
        let (_sender, mut receiver, mut far) = with_raw_peer();
        far.write_all(&[frame(MESSAGE, &[0xff; 3]), frame(MESSAGE, &note("good").encode_to_vec())].concat())
            .await
            .expect("written");
        assert!(matches!(receiver.receive::<Note>().await, Err(LinkError::Decode { length: 3, .. })));
        assert_eq!(receiver.receive::<Note>().await.expect("received"), note("good"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_message_too_long_to_send_is_refused_here_and_harms_nothing() {
        let (near, far) = tokio::io::duplex(64 << 10);
        let ((mut near_out, _near_in), (_far_out, mut far_in)) = (start(near), start(far));
        let error = near_out.send(&note(&"x".repeat(MAX_FRAME + 1))).await.expect_err("too long");
        assert!(matches!(error, LinkError::TooLongToSend { limit: MAX_FRAME, .. }));
        let longest = note(&"x".repeat(MAX_FRAME - 4));
        assert_eq!(longest.encoded_len(), MAX_FRAME);
        near_out.send(&longest).await.expect("sent");
        assert!(far_in.receive::<Note>().await.expect("received") == longest);
    }

    #[tokio::test(start_paused = true)]
    async fn dropped_calls_lose_and_tear_nothing() {
        let (near, far) = tokio::io::duplex(64);
        let (mut near_out, _near_in) = start(near);
        let big = note(&"y".repeat(10_000));
        // Given up in the middle: far more than the stream holds, and nobody reads yet.
        let given_up = timeout(Duration::from_millis(1), near_out.send(&big)).await;
        assert!(given_up.is_err(), "{given_up:?}");
        let (_far_out, mut far_in) = start(far);
        let asked_in_vain = timeout(Duration::ZERO, far_in.receive::<Note>()).await;
        assert!(asked_in_vain.is_err(), "{asked_in_vain:?}");
        let next = note("next");
        let (sent, first) = tokio::join!(near_out.send(&next), far_in.receive::<Note>());
        sent.expect("sent");
        assert!(first.expect("received") == big);
        assert_eq!(far_in.receive::<Note>().await.expect("received"), note("next"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_dropped_connection_is_released_though_the_peer_stays() {
        let (near, mut far) = tokio::io::duplex(1024);
        drop(start(near));
        let mut rest = Vec::new();
        let begun = Instant::now();
        far.read_to_end(&mut rest).await.expect("ended");
        far.write_all(&[0; 64]).await.ok();
        // All tasks of the near side are gone when writing fails.
        while far.write_all(&[0; 64]).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(100)).await;
            assert!(begun.elapsed() < Duration::from_secs(60), "the connection is still held");
        }
    }
}
