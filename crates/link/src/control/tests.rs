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
    assert!(matches!(error, LinkError::Silent { after } if after == Duration::from_secs(10)), "{error:?}");
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
    let last_words = [frame(MESSAGE, &note("last").encode_to_vec()), frame(GOODBYE, b"no\x07 room")].concat();
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
