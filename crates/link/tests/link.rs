//! Two agents on loopback that know each other, through the public interface alone.

mod authority;

use std::io::{self, Read as _, Write as _};
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;

use authority::{Authority, listen};
use link::{Bandwidth, Control, DataHello, DataReceiver, DataSender, Incoming, LinkError, Peer};
use uuid::Uuid;

/// A message as callers have them.
#[derive(Clone, PartialEq, prost::Message)]
struct Note {
    #[prost(string, tag = "1")]
    text: String,
}

fn note(text: &str) -> Note {
    Note { text: text.into() }
}

async fn pair() -> (Control, Control, Peer) {
    let authority = Authority::new();
    let (listener, address) = listen(&authority.endpoint("host-b")).await;
    let source = authority.endpoint("host-a");
    let (near, far) = tokio::join!(source.connect(&address), listener.accept());
    match far.expect("accepted") {
        Incoming::Control(far, peer) => (near.expect("connected"), far, peer),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn messages_pass_both_ways_between_two_that_know_each_other() {
    let (near, far, peer) = pair().await;
    assert_eq!(peer.name, "host-a");
    assert_eq!(near.peer().name, "host-b");
    assert_eq!((near.version(), far.version()), (1, 1));
    let ((mut near_out, mut near_in), (mut far_out, mut far_in)) = (near.split(), far.split());
    for text in ["one", "two"] {
        near_out.send(&note(text)).await.expect("sent");
        assert_eq!(far_in.receive::<Note>().await.expect("received").text, text);
        far_out.send(&note(text)).await.expect("sent");
        assert_eq!(near_in.receive::<Note>().await.expect("received").text, text);
    }
    drop(near_out);
    assert!(matches!(far_in.receive::<Note>().await, Err(LinkError::Closed)));
}

/// One data stream; the sender is made by a plain thread, as the agents do.
async fn stream(bandwidth: Arc<Bandwidth>) -> (DataSender, DataReceiver) {
    let authority = Authority::new();
    let (listener, address) = listen(&authority.endpoint("host-b")).await;
    let source = authority.endpoint("host-a");
    let session = Uuid::new_v4();
    let opening = tokio::task::spawn_blocking(move || source.open_data(&address, session, 7, bandwidth));
    let receiver = match listener.accept().await.expect("accepted") {
        Incoming::Data(receiver, peer, hello) => {
            assert_eq!((peer.name.as_str(), hello), ("host-a", DataHello { session, stream: 7 }));
            receiver
        }
        other => panic!("{other:?}"),
    };
    (opening.await.expect("no panic").expect("opened"), receiver)
}

#[tokio::test]
async fn a_stream_arrives_as_it_was_written_whatever_the_sizes() {
    let bandwidth = Bandwidth::new(None);
    let (mut sender, mut receiver) = stream(Arc::clone(&bandwidth)).await;
    let sizes = [1, 100, 16 << 10, (16 << 10) + 1, 256 << 10, 1 << 20, (1 << 20) + 12_345, 3, 5 << 20];
    let content: Vec<u8> = (0..sizes.iter().sum::<usize>()).map(|i| (i * 31 + i / 257) as u8).collect();
    let sent = content.clone();
    let writing = std::thread::spawn(move || {
        let mut rest = &sent[..];
        for size in sizes {
            let (now, later) = rest.split_at(size);
            sender.write_all(now).expect("written");
            if size == 3 {
                sender.flush().expect("flushed");
            }
            rest = later;
        }
        sender.shutdown().expect("ended");
    });
    let mut received = Vec::new();
    receiver.read_to_end(&mut received).expect("to the end");
    writing.join().expect("no panic");
    assert!(received == content, "{} bytes of {}", received.len(), content.len());
    assert!(bandwidth.sent() > content.len() as u64);
}

#[tokio::test]
async fn a_stream_that_is_dropped_is_cut_off_not_ended() {
    let (mut sender, mut receiver) = stream(Bandwidth::new(None)).await;
    sender.write_all(b"half").and_then(|()| sender.flush()).expect("written");
    drop(sender);
    let mut received = Vec::new();
    let error = receiver.read_to_end(&mut received).expect_err("cut off");
    assert_eq!((error.kind(), &received[..]), (io::ErrorKind::UnexpectedEof, &b"half"[..]));
}

#[tokio::test]
async fn waiting_for_data_sees_what_tls_has_buffered_and_the_end() {
    let (mut sender, mut receiver) = stream(Bandwidth::new(None)).await;
    assert!(!receiver.wait_readable(Duration::from_millis(1)).expect("waited"), "nothing was sent");
    sender.write_all(b"ab").and_then(|()| sender.flush()).expect("written");
    assert!(receiver.wait_readable(Duration::from_secs(60)).expect("waited"));
    let mut one = [0];
    receiver.read_exact(&mut one).expect("read");
    // The other byte is in no socket any more.
    assert!(receiver.wait_readable(Duration::ZERO).expect("waited"));
    receiver.read_exact(&mut one).expect("read");
    assert_eq!(one, *b"b");
    assert!(!receiver.wait_readable(Duration::ZERO).expect("waited"));
    sender.shutdown().expect("ended");
    assert!(receiver.wait_readable(Duration::from_secs(60)).expect("waited"));
    assert_eq!(receiver.read(&mut one).expect("read"), 0);
}

#[tokio::test]
async fn a_read_timeout_can_be_survived() {
    let (mut sender, mut receiver) = stream(Bandwidth::new(None)).await;
    receiver.set_read_timeout(Some(Duration::from_millis(5))).expect("set");
    let mut byte = [0];
    assert_eq!(receiver.read(&mut byte).expect_err("nothing there").kind(), io::ErrorKind::TimedOut);
    sender.write_all(b"x").and_then(|()| sender.flush()).expect("written");
    receiver.set_read_timeout(None).expect("set");
    receiver.read_exact(&mut byte).expect("read");
    assert_eq!(byte, *b"x");
}

#[tokio::test]
async fn a_destination_that_stops_reading_does_not_hang_the_source() {
    let (mut sender, receiver) = stream(Bandwidth::new(None)).await;
    sender.set_write_timeout(Some(Duration::from_millis(50))).expect("set");
    // More than all buffers of the kernel together may hold.
    let piece = vec![7; 1 << 20];
    let error = (0..1024).find_map(|_| sender.write_all(&piece).err()).expect("it must end");
    assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
    // And the stream is not used again as if nothing had been.
    assert_eq!(sender.write(&piece).expect_err("failed").kind(), io::ErrorKind::NotConnected);
    drop(receiver);
}

#[tokio::test]
async fn a_blocked_reader_can_be_aborted() {
    let (_sender, mut receiver) = stream(Bandwidth::new(None)).await;
    let abort = receiver.abort_handle().expect("a handle");
    let reading = std::thread::spawn(move || receiver.read(&mut [0]).map_err(|e| e.kind()));
    abort.abort();
    assert_eq!(reading.join().expect("no panic"), Err(io::ErrorKind::ConnectionAborted));
}

#[tokio::test]
async fn a_blocked_writer_can_be_aborted_at_the_socket_and_at_the_limit() {
    for limit in [None, NonZeroU64::new(1)] {
        let bandwidth = Bandwidth::new(limit);
        let (mut sender, receiver) = stream(Arc::clone(&bandwidth)).await;
        sender.set_write_timeout(None).expect("set");
        let abort = sender.abort_handle().expect("a handle");
        let writing = std::thread::spawn(move || {
            let piece = vec![7; 1 << 20];
            loop {
                if let Err(error) = sender.write_all(&piece) {
                    break error.kind();
                }
            }
        });
        while bandwidth.sent() == 0 {
            std::thread::yield_now();
        }
        abort.abort();
        assert_eq!(writing.join().expect("no panic"), io::ErrorKind::ConnectionAborted, "{limit:?}");
        drop(receiver);
    }
}
