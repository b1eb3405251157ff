//! Our client against our server.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nbd::BlockSizes;
use nbd::client::{Client, NbdError, Operation};
use nbd::server::{Export, Reply, Request, Server};
use proptest::prelude::*;

use crate::memory_export::MemoryExport;
use crate::place::place;

const SIZE: usize = 200_000;

fn errno(error: &NbdError) -> Option<i32> {
    match error {
        NbdError::Failed { source, .. } => source.raw_os_error(),
        _ => None,
    }
}

#[derive(Debug, Clone)]
enum Step {
    Read(usize, usize),
    Write(usize, usize, u8),
    /// Pieces of these lengths, one after the other with gaps between them.
    WriteAllOf(usize, Vec<(usize, usize, u8)>),
    Zero(usize, usize, bool),
    Trim(usize, usize),
    Flush,
}

fn step() -> impl Strategy<Value = Step> {
    let range = || (0..SIZE).prop_flat_map(|offset| (Just(offset), 0..=(SIZE - offset).min(60_000)));
    prop_oneof![
        range().prop_map(|(offset, length)| Step::Read(offset, length)),
        (range(), any::<u8>()).prop_map(|((offset, length), with)| Step::Write(offset, length, with)),
        (0..SIZE, prop::collection::vec((0usize..3000, 0usize..9000, any::<u8>()), 0..150))
            .prop_map(|(offset, pieces)| Step::WriteAllOf(offset, pieces)),
        (range(), any::<bool>()).prop_map(|((offset, length), unmap)| Step::Zero(offset, length, unmap)),
        range().prop_map(|(offset, length)| Step::Trim(offset, length)),
        Just(Step::Flush),
    ]
}

/// Content that differs from byte to byte.
fn content(with: u8, length: usize) -> Vec<u8> {
    (0..length).map(|i| (i as u8).wrapping_mul(7).wrapping_add((i >> 8) as u8) ^ with).collect()
}

fn perform(step: &Step, client: &mut Client, model: &mut [u8]) {
    match step {
        Step::Read(offset, length) => {
            let mut into = vec![0xaa; *length];
            client.read(*offset as u64, &mut into).unwrap();
            assert_eq!(into, model[*offset..*offset + *length]);
        }
        Step::Write(offset, length, with) => {
            let data = content(*with, *length);
            client.write(*offset as u64, &data).unwrap();
            model[*offset..*offset + *length].copy_from_slice(&data);
        }
        Step::WriteAllOf(offset, pieces) => {
            let (mut at, mut writes) = (*offset, Vec::new());
            for (gap, length, with) in pieces {
                at += gap;
                if at + length > SIZE {
                    break;
                }
                writes.push((at as u64, content(*with, *length)));
                model[at..at + length].copy_from_slice(&writes.last().unwrap().1);
                at += length;
            }
            let writes: Vec<_> = writes.iter().map(|(offset, data)| (*offset, &data[..])).collect();
            client.write_all_of(&writes).unwrap();
        }
        Step::Zero(offset, length, may_unmap) => {
            client.zero(*offset as u64, *length as u64, *may_unmap).unwrap();
            model[*offset..*offset + *length].fill(0);
        }
        Step::Trim(offset, length) => {
            client.trim(*offset as u64, *length as u64).unwrap();
            // The export under test clears it.
            model[*offset..*offset + *length].fill(0);
        }
        Step::Flush => client.flush().unwrap(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn what_was_written_is_read_in_whatever_order_it_is_answered(
        steps in prop::collection::vec(step(), 1..25), in_order: bool, small: bool,
    ) {
        let export = if in_order { MemoryExport::new(SIZE) } else { MemoryExport::out_of_order(SIZE) };
        let place = place();
        let maximum = if small { 4096 } else { 32 << 20 };
        let sizes = BlockSizes { preferred: 4096, maximum, ..BlockSizes::default() };
        let _server = Server::listen_with(UnixListener::bind(&place.socket).unwrap(), &place.socket, "disk", sizes, Arc::clone(&export)).unwrap();
        let mut client = Client::connect(&place.socket, "disk").unwrap();
        assert_eq!((client.size(), client.block_sizes()), (SIZE as u64, sizes));
        let mut model = vec![0; SIZE];
        for step in &steps {
            perform(step, &mut client, &mut model);
        }
        prop_assert!(export.content() == model);
    }
}

#[test]
fn the_socket_is_gone_afterwards() {
    let place = place();
    let server = place.serve(MemoryExport::new(SIZE));
    assert!(server.socket().exists());
    server.end();
    assert!(!place.socket.exists());
}

#[test]
fn requests_beyond_the_size_or_the_limits_never_reach_the_export() {
    let place = place();
    let export = MemoryExport::new(SIZE);
    let sizes = BlockSizes { minimum: 512, preferred: 4096, maximum: 8192 };
    let _server = Server::listen_with(
        UnixListener::bind(&place.socket).unwrap(),
        &place.socket,
        "disk",
        sizes,
        Arc::clone(&export),
    )
    .unwrap();
    let mut client = Client::connect(&place.socket, "disk").unwrap();
    let too_far = client.write(SIZE as u64 / 512 * 512, &[0; 512]).unwrap_err();
    assert!(matches!(too_far, NbdError::Range { operation: Operation::Write, .. }), "{too_far}");
    assert!(matches!(client.read(100, &mut [0; 512]), Err(NbdError::Range { minimum: 512, .. })));
    drop(client);

    // What our client does not even send.
    let mut raw = raw_client(&place.socket);
    let (size, far) = (SIZE as u64, u64::MAX - 100);
    for (command, flags, offset, length, expected) in [
        (0u16, 0u16, size - size % 512, 512u32, 22),
        (0, 0, far, 512, 22),
        (0, 0, 0, 8192 + 512, 22),
        (0, 0, 0, 0, 22),
        (0, 0, 1, 512, 22),
        (0, 2, 0, 512, 22),
        (1, 0, size - size % 512, 512, 28),
        (1, 0, far, 512, 28),
        (1, 0, 0, 100, 22),
        (6, 0, 0, u32::MAX - 511, 28),
        (4, 0, 0, u32::MAX - 511, 22),
        (5, 0, 0, 512, 22),
        (7, 0, 0, 512, 22),
        (99, 0, 0, 512, 22),
        (6, 3, 0, 512, 0),
    ] {
        let mut request = vec![0x25, 0x60, 0x95, 0x13];
        request.extend(flags.to_be_bytes());
        request.extend(command.to_be_bytes());
        request.extend([9; 8]);
        request.extend(offset.to_be_bytes());
        request.extend(length.to_be_bytes());
        if command == 1 {
            request.resize(request.len() + length as usize, 0);
        }
        raw.write_all(&request).unwrap();
        let mut reply = [0; 16];
        raw.read_exact(&mut reply).unwrap();
        let mut expected_reply = vec![0x67, 0x44, 0x66, 0x98, 0, 0, 0, expected];
        expected_reply.extend([9; 8]);
        assert_eq!(&reply[..], expected_reply, "command {command} at {offset}, {length} bytes");
    }
    let last = Request::Zero { offset: 0, length: 512, may_unmap: false, durable: true };
    assert_eq!(export.seen(), [last]);
}

/// A connection after the old handshake, with the export's name and nothing else.
fn raw_client(socket: &std::path::Path) -> UnixStream {
    let mut raw = UnixStream::connect(socket).unwrap();
    raw.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    raw.write_all(b"\0\0\0\x01IHAVEOPT\0\0\0\x01\0\0\0\x04disk").unwrap();
    let mut answer = [0; 18 + 10 + 124];
    raw.read_exact(&mut answer).unwrap();
    assert_eq!(&answer[..18], b"NBDMAGICIHAVEOPT\0\x03");
    assert_eq!(answer[26..28], [0, 0b0110_1101], "flags, flush, FUA, trim, zeroes");
    assert!(answer[28..].iter().all(|&byte| byte == 0));
    raw
}

#[test]
fn options_are_answered_one_by_one() {
    let place = place();
    let _server = place.serve(MemoryExport::new(SIZE));
    let mut raw = UnixStream::connect(&place.socket).unwrap();
    raw.write_all(b"\0\0\0\x03").unwrap();
    raw.read_exact(&mut [0; 18]).unwrap();
    let mut ask = |option: u8, data: &[u8]| {
        raw.write_all(b"IHAVEOPT\0\0\0").unwrap();
        raw.write_all(&[option]).unwrap();
        raw.write_all(&(data.len() as u32).to_be_bytes()).unwrap();
        raw.write_all(data).unwrap();
        let mut replies = Vec::new();
        loop {
            let mut head = [0; 20];
            raw.read_exact(&mut head).unwrap();
            assert_eq!(head[..12], [0, 3, 0xe8, 0x89, 4, 0x55, 0x65, 0xa9, 0, 0, 0, option]);
            let mut data = vec![0; u32::from_be_bytes(*head.last_chunk().unwrap()) as usize];
            raw.read_exact(&mut data).unwrap();
            replies.push((u32::from_be_bytes(*head[12..].first_chunk().unwrap()), data));
            let last = replies.last().unwrap().0;
            if last == 1 || last >= 1 << 31 {
                return replies;
            }
        }
    };
    let error = |code: u32| (1u32 << 31) + code;
    assert_eq!(ask(3, b""), [(2, b"\0\0\0\x04disk".to_vec()), (1, vec![])], "list");
    assert_eq!(ask(3, b"x")[0].0, error(3));
    for unsupported in [5, 8, 9, 10, 11, 77] {
        assert_eq!(ask(unsupported, b"whatever")[0].0, error(1));
    }
    assert_eq!(ask(6, b"\0\0\0\x04disc\0\0")[0].0, error(6), "another name");
    assert_eq!(ask(7, b"\0\0\0\x04dis")[0].0, error(3), "too short");
    assert_eq!(ask(7, b"\0\0\0\x04disk\0\x02\0\0")[0].0, error(3), "fewer than it says");
    let info = ask(6, b"\0\0\0\x04disk\0\x01\0\x03");
    let export = [&[0, 0][..], &(SIZE as u64).to_be_bytes(), &[0, 0b0110_1101]].concat();
    let sizes = vec![0, 3, 0, 0, 0, 1, 0, 1, 0, 0, 2, 0, 0, 0];
    assert_eq!(info, [(3, export), (3, sizes), (1, vec![])]);
    assert_eq!(ask(2, b""), [(1, vec![])], "abort");
    assert_eq!(raw.read(&mut [0]).unwrap(), 0, "and that was that");
}

#[test]
fn a_name_that_is_not_served_is_refused_and_so_is_a_second_client() {
    let place = place();
    let export = MemoryExport::new(SIZE);
    let _server = place.serve(Arc::clone(&export));
    let wrong = Client::connect(&place.socket, "disc").unwrap_err();
    assert!(
        matches!(&wrong, NbdError::Refused { code: 0x8000_0006, message, .. } if message == "no such export")
    );
    assert!(matches!(Client::connect(&place.socket, &"x".repeat(5000)), Err(NbdError::Protocol(_))));
    assert_eq!(export.disconnected(), 0, "they were never served");

    for round in 1..=50 {
        // Right after the one before has gone.
        let mut first = Client::connect(&place.socket, "disk").unwrap();
        let second = Client::connect(&place.socket, "disk").unwrap_err();
        assert!(matches!(second, NbdError::Handshake { .. }), "{second}");
        first.flush().unwrap();
        drop(first);
        let until = Instant::now() + Duration::from_secs(5);
        while export.disconnected() < round {
            assert!(Instant::now() < until, "the export is not told");
            std::thread::yield_now();
        }
        assert_eq!(export.disconnected(), round);
    }
}

/// Answers as it is told.
struct Odd {
    held: Mutex<Vec<Reply>>,
}

impl Export for Odd {
    fn size(&self) -> u64 {
        1 << 20
    }

    fn take(&self, request: Request, reply: Reply) {
        match request {
            Request::Read { offset: 0, .. } => reply.done(Ok(())),
            Request::Read { offset: 1, length } => reply.data(Ok(vec![0; length as usize + 1])),
            Request::Read { offset: 2, .. } => drop(reply),
            Request::Read { offset: 3, .. } => reply.data(Err(io::Error::from_raw_os_error(12))),
            Request::Read { length, .. } => reply.data(Ok(vec![7; length as usize])),
            Request::Write { offset: 0, .. } => reply.done(Err(io::ErrorKind::StorageFull.into())),
            Request::Write { offset: 1, .. } => reply.data(Ok(vec![1])),
            Request::Flush => self.held.lock().unwrap().push(reply),
            _ => reply.done(Ok(())),
        }
    }
}

#[test]
fn errors_name_the_operation_and_leave_the_connection_usable() {
    let place = place();
    let export = Arc::new(Odd { held: Mutex::default() });
    let server = place.serve(Arc::clone(&export));
    let mut client = Client::connect(&place.socket, "disk").unwrap();
    let mut into = [0; 100];
    for (offset, expected) in [(0, 5), (1, 5), (2, 5), (3, 12)] {
        let error = client.read(offset, &mut into).unwrap_err();
        assert_eq!(errno(&error), Some(expected), "{error}");
    }
    assert_eq!(errno(&client.write(1, &[0; 10]).unwrap_err()), Some(5));
    // One of many fails, and all the other replies are taken.
    let piece = [1; 3000];
    let mut writes: Vec<(u64, &[u8])> = (1..200).map(|i| (i * 3000, &piece[..])).collect();
    writes.insert(100, (0, &piece));
    let error = client.write_all_of(&writes).unwrap_err();
    assert_eq!(errno(&error), Some(28));
    assert_eq!(error.to_string(), "the NBD server could not write 3000 bytes at 0");
    client.read(50, &mut into).unwrap();
    assert_eq!(into, [7; 100]);

    // Held back: the client does not wait for ever, and the server's end does not wait for the answer.
    client.set_timeout(Some(Duration::from_millis(50))).unwrap();
    let late = client.flush().unwrap_err();
    assert!(
        matches!(&late, NbdError::Broken { operation: Operation::Flush, source, .. }
        if source.kind() == io::ErrorKind::TimedOut),
        "{late:?}"
    );
    assert!(matches!(client.flush(), Err(NbdError::Unusable)), "the late answer would be taken for another");
    server.end();
    for reply in export.held.lock().unwrap().drain(..) {
        reply.done(Ok(()));
    }
}

#[test]
fn the_end_of_a_server_ends_its_client() {
    let place = place();
    let server = place.serve(MemoryExport::new(SIZE));
    let mut client = Client::connect(&place.socket, "disk").unwrap();
    client.write(0, &[1; 10]).unwrap();
    drop(server);
    assert!(matches!(client.write(0, &[1; 10]), Err(NbdError::Broken { operation: Operation::Write, .. })));
    assert!(matches!(client.read(0, &mut [1; 10]), Err(NbdError::Unusable)));
    assert!(matches!(Client::connect(&place.socket, "disk"), Err(NbdError::Connect { .. })));
}
