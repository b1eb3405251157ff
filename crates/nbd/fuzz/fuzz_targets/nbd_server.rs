//! A client of the NBD server: what reaches the export is within the disk and the limits, and the connection
//! ends when the client has said all.

#![no_main]

use std::io::Write as _;
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use fuzzing as _;
use nbd::BlockSizes;
use nbd::server::{Export, Reply, Request, Server};

/// So small that answers without end are no more than a few MiB.
const SIZE: usize = 8192;
const SIZES: BlockSizes = BlockSizes { minimum: 512, preferred: 4096, maximum: 4096 };

static SERVER: LazyLock<Server> = LazyLock::new(|| {
    let socket = std::env::temp_dir().join(format!("vmirror-fuzz-nbd-{}", std::process::id()));
    let _ = std::fs::remove_file(&socket);
    let disk = Arc::new(Disk(Mutex::new(vec![0; SIZE])));
    Server::listen_with(UnixListener::bind(&socket).expect("a socket"), &socket, "disk", SIZES, disk)
        .expect("a server")
});

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let connection = UnixStream::connect(SERVER.socket()).expect("the server listens");
    std::thread::scope(|scope| {
        let mut writing = &connection;
        scope.spawn(move || {
            let _ = writing.write_all(data);
            let _ = writing.shutdown(Shutdown::Write);
        });
        // To its end, which comes.
        let _ = std::io::copy(&mut &connection, &mut std::io::sink());
    });
});

struct Disk(Mutex<Vec<u8>>);

/// The bytes that a request is about. Beyond the disk this panics.
fn within(content: &mut [u8], offset: u64, length: usize) -> &mut [u8] {
    assert!(length > 0 && offset.is_multiple_of(512) && length.is_multiple_of(512));
    &mut content[offset as usize..][..length]
}

impl Export for Disk {
    fn size(&self) -> u64 {
        SIZE as u64
    }

    fn take(&self, request: Request, reply: Reply) {
        let mut content = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match request {
            Request::Read { offset, length } => {
                assert!(length <= SIZES.maximum, "{length} bytes at once");
                reply.data(Ok(within(&mut content, offset, length as usize).to_vec()));
            }
            Request::Write { offset, data, .. } => {
                assert!(data.len() <= SIZES.maximum as usize, "{} bytes at once", data.len());
                within(&mut content, offset, data.len()).copy_from_slice(&data);
                reply.done(Ok(()));
            }
            Request::Zero { offset, length, .. } => {
                within(&mut content, offset, length as usize).fill(0);
                reply.done(Ok(()));
            }
            Request::Trim { offset, length, .. } => {
                within(&mut content, offset, length as usize);
                reply.done(Ok(()));
            }
            Request::Flush => reply.done(Ok(())),
        }
    }
}
