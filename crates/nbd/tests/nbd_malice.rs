//! Peers of the Network Block Device protocol that do not keep to it: nobody hangs, and nobody allocates what a
//! peer makes up.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nbd::WireError;
use nbd::client::{Client, NbdError};
use nbd::server::{Export, Reply, Request, Server};
use proptest::prelude::*;

#[path = "nbd/place.rs"]
mod place;

use place::{Place, place};

/// Remembers the largest piece of memory that anything asked for.
struct Watched;

static LARGEST: AtomicUsize = AtomicUsize::new(0);

#[global_allocator]
static ALLOCATOR: Watched = Watched;

// SAFETY: everything is the system allocator's work; the counter is all that is added.
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        LARGEST.fetch_max(size, Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.realloc(memory, layout, size) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) }
    }
}

/// The most that one request may bring.
const MAXIMUM: usize = 32 << 20;

fn nothing_large_was_allocated() {
    let largest = LARGEST.load(Ordering::Relaxed);
    assert!(largest <= MAXIMUM, "{largest} bytes in one piece");
}

struct Nothing;

impl Export for Nothing {
    fn size(&self) -> u64 {
        1 << 40
    }

    fn take(&self, request: Request, reply: Reply) {
        match request {
            Request::Read { length, .. } => {
                let data = reply.buffer(length as usize);
                reply.data(Ok(data));
            }
            Request::Write { data, .. } => {
                reply.give_back(data);
                reply.done(Ok(()));
            }
            _ => reply.done(Ok(())),
        }
    }
}

const FLAGS: &[u8] = b"\0\0\0\x03";
const GO: &[u8] = b"IHAVEOPT\0\0\0\x07\0\0\0\x0a\0\0\0\x04disk\0\0";

fn request(magic: u32, command: u16, offset: u64, length: u32) -> Vec<u8> {
    let head = [&magic.to_be_bytes()[..], &[0, 0], &command.to_be_bytes(), &[1; 8]].concat();
    [&head[..], &offset.to_be_bytes(), &length.to_be_bytes()].concat()
}

const MAGIC: u32 = 0x2560_9513;

/// What a client that says this, and then nothing more, hears until the server closes.
fn say(server: &Server, bytes: &[u8]) -> Vec<u8> {
    let mut stream = UnixStream::connect(server.socket()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    stream.set_write_timeout(Some(Duration::from_secs(5))).unwrap();
    // The server may close before it has read everything.
    let _ = stream.write_all(bytes).and_then(|()| stream.shutdown(Shutdown::Write));
    let mut heard = Vec::new();
    match stream.read_to_end(&mut heard) {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {}
        Err(error) => panic!("the server neither answers nor closes: {error}"),
    }
    heard
}

/// A client that keeps to the protocol is served afterwards.
fn still_serves(server: &Server) {
    let mut client = Client::connect(server.socket(), "disk").unwrap();
    client.write(1 << 30, &[1; 5000]).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn no_bytes_of_a_client_harm_the_server(
        garbage in prop::collection::vec(any::<u8>(), 0..400), how_far in 0usize..5, option in 0u32..12,
        command in 0u16..9, length: u32, offset: u64,
    ) {
        let place = place();
        let server = place.serve(Arc::new(Nothing));
        let mut bytes = [&b""[..], FLAGS, FLAGS, &[FLAGS, GO].concat(), &[FLAGS, GO].concat()][how_far].to_vec();
        match how_far {
            2 => {
                bytes.extend(b"IHAVEOPT");
                bytes.extend(option.to_be_bytes());
                bytes.extend((garbage.len() as u32).to_be_bytes());
            }
            4 => bytes.extend(request(MAGIC, command, offset, length)),
            _ => {}
        }
        bytes.extend(garbage);
        say(&server, &bytes);
        still_serves(&server);
        nothing_large_was_allocated();
    }
}

#[test]
fn absurd_lengths_of_a_client_end_its_connection() {
    let place = place();
    let server = place.serve(Arc::new(Nothing));
    for option in [1u8, 3, 6, 7, 99] {
        let bytes = [FLAGS, b"IHAVEOPT\0\0\0", &[option], &[0xff; 4], &[0; 100]].concat();
        assert_eq!(say(&server, &bytes).len(), 18, "option {option}: nothing after the greeting");
    }
    let greeted = say(&server, &[FLAGS, GO].concat()).len();
    for length in [MAXIMUM as u32 + 1, u32::MAX] {
        let bytes = [FLAGS, GO, &request(MAGIC, 1, 0, length), &[0; 100]].concat();
        let heard = say(&server, &bytes);
        assert_eq!(heard[greeted..greeted + 8], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 22]);
        assert_eq!(heard.len(), greeted + 16, "a write of {length} bytes, and nothing after it");
        // A read of the same needs no buffer: it is answered.
        let bytes = [FLAGS, GO, &request(MAGIC, 0, 0, length)].concat();
        assert_eq!(say(&server, &bytes).len(), greeted + 16);
    }
    assert_eq!(say(&server, &[FLAGS, GO, &request(0x1234, 0, 0, 512)].concat()).len(), greeted, "magic");
    assert_eq!(say(&server, b"\xff\xff\xff\xff").len(), 18, "flags");
    let endless = [FLAGS, &b"IHAVEOPT\0\0\0\x09\0\0\0\0".repeat(10_000)].concat();
    assert!(say(&server, &endless).len() < 10_000);
    still_serves(&server);
    nothing_large_was_allocated();
}

#[test]
fn a_client_that_falls_silent_does_not_hold_up_the_end() {
    for said in [vec![], FLAGS.to_vec(), [FLAGS, GO, &request(MAGIC, 1, 0, MAXIMUM as u32)].concat()] {
        let place = place();
        let server = place.serve(Arc::new(Nothing));
        let mut silent = UnixStream::connect(server.socket()).unwrap();
        silent.write_all(&said).unwrap();
        // It is the one that is served.
        silent.read_exact(&mut [0; 18]).unwrap();
        let begun = Instant::now();
        server.end();
        assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    }
}

#[test]
fn a_client_that_does_not_read_its_answers_does_not_hold_up_the_end() {
    let place = place();
    let server = place.serve(Arc::new(Nothing));
    let mut deaf = UnixStream::connect(server.socket()).unwrap();
    deaf.write_all(&[FLAGS, GO, &request(MAGIC, 0, 0, 16 << 20)].concat()).unwrap();
    deaf.read_exact(&mut [0; 200]).unwrap();
    let begun = Instant::now();
    server.end();
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
}

/// A server that says this to the first client, whatever it hears, and then reads until the client leaves, or
/// closes.
fn false_server(place: &Place, bytes: Vec<u8>, close: bool) -> JoinHandle<()> {
    let listener = UnixListener::bind(&place.socket).unwrap();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.write_all(&bytes);
        if !close {
            let _ = io::copy(&mut stream, &mut io::sink());
        }
    })
}

/// How it ends with a client that reads, once it is connected. Not by hanging.
fn meet(bytes: Vec<u8>, close: bool) -> Result<(), NbdError> {
    let place = place();
    let server = false_server(&place, bytes, close);
    let begun = Instant::now();
    let timeout = Some(Duration::from_millis(100));
    let outcome = Client::connect_within(&place.socket, "disk", timeout).and_then(|mut client| {
        let mut into = vec![0; 1000];
        client.write_all_of(&[(0, &[1; 512]), (4096, &[2; 512])])?;
        client.read(0, &mut into)
    });
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    server.join().unwrap();
    nothing_large_was_allocated();
    outcome
}

fn option_reply(kind: u32, data: &[u8]) -> Vec<u8> {
    let head = [&[0, 3, 0xe8, 0x89, 4, 0x55, 0x65, 0xa9, 0, 0, 0, 7][..], &kind.to_be_bytes()].concat();
    [&head[..], &(data.len() as u32).to_be_bytes(), data].concat()
}

const GREETING: &[u8] = b"NBDMAGICIHAVEOPT\0\x03";

/// Everything up to the requests, for an export of this size.
fn welcome(size: u64) -> Vec<u8> {
    let export = [&[0, 0][..], &size.to_be_bytes(), &[0, 0x6d]].concat();
    [GREETING, &option_reply(3, &export), &option_reply(1, &[])].concat()
}

fn simple_reply(error: u32, cookie: u64) -> Vec<u8> {
    [&[0x67, 0x44, 0x66, 0x98][..], &error.to_be_bytes(), &cookie.to_be_bytes()].concat()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn no_bytes_of_a_server_harm_the_client(
        garbage in prop::collection::vec(any::<u8>(), 0..400), how_far in 0usize..5, kind in 0u32..5, size: u64,
    ) {
        let mut bytes = match how_far {
            0 => vec![],
            1 => GREETING.to_vec(),
            2 => [GREETING, &option_reply(kind, &garbage)].concat(),
            3 => welcome(size),
            _ => [welcome(size), simple_reply(0, 1)].concat(),
        };
        bytes.extend(garbage);
        prop_assert!(meet(bytes, true).is_err());
    }
}

#[test]
fn what_a_server_must_not_send_is_named() {
    let protocol = |bytes: &[&[u8]]| match meet(bytes.concat(), false).unwrap_err() {
        NbdError::Protocol(error) => error,
        other => panic!("{other:?}"),
    };
    assert!(matches!(protocol(&[b"SSH-2.0-OpenSSH_9.2p1 and more"]), WireError::Magic { .. }));
    assert_eq!(protocol(&[b"NBDMAGICIHAVEOPT\0\0"]), WireError::Flags(0), "not fixed newstyle");
    let head = &option_reply(3, &[])[..16];
    assert!(matches!(protocol(&[GREETING, head, &[0xff; 4]]), WireError::Length { found: 0xffff_ffff, .. }));
    assert!(matches!(protocol(&[GREETING, &option_reply(1, &[])]), WireError::Unexpected { .. }));
    let endless = option_reply(3, &[0, 9]).repeat(1000);
    assert!(matches!(protocol(&[GREETING, &endless]), WireError::Endless(_)));
    for (minimum, maximum) in [(0u32, 4096u32), (3, 4096), (4096, 0), (1 << 20, 1 << 20)] {
        let sizes = [&[0, 3][..], &minimum.to_be_bytes(), &[0, 0, 16, 0], &maximum.to_be_bytes()].concat();
        assert!(matches!(protocol(&[GREETING, &option_reply(3, &sizes)]), WireError::BlockSizes(_)));
    }
    let welcome = welcome(u64::MAX);
    assert!(matches!(protocol(&[&welcome, &simple_reply(0, 77)]), WireError::Unexpected { found: 77, .. }));
    let twice = [simple_reply(0, 1), simple_reply(0, 1)].concat();
    assert!(matches!(protocol(&[&welcome, &twice]), WireError::Unexpected { found: 1, .. }));
    assert!(matches!(protocol(&[&welcome, &[0x66, 0x8e, 0x33, 0xef], &[0; 28]]), WireError::Magic { .. }));
}

#[test]
fn a_server_that_falls_silent_is_not_waited_for() {
    for bytes in
        [vec![], GREETING.to_vec(), welcome(1 << 20), [welcome(1 << 20), simple_reply(0, 2)].concat()]
    {
        let (NbdError::Handshake { source, .. } | NbdError::Broken { source, .. }) =
            meet(bytes, false).unwrap_err()
        else {
            panic!("another error")
        };
        assert_eq!(source.kind(), io::ErrorKind::TimedOut);
    }
}

#[test]
fn a_server_that_sends_a_byte_now_and_then_is_not_waited_for() {
    let place = place();
    let listener = UnixListener::bind(&place.socket).unwrap();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        for byte in welcome(1 << 20) {
            if stream.write_all(&[byte]).is_err() {
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    });
    let begun = Instant::now();
    let error = Client::connect_within(&place.socket, "disk", Some(Duration::from_millis(300))).unwrap_err();
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}: {error}", begun.elapsed());
    server.join().unwrap();
}
