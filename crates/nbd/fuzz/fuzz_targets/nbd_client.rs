//! A server that says what it likes to the NBD client: nothing is asked of it that it has not offered, what it has not sent is not
//! read, and after a breach nothing goes on.

#![no_main]

use std::io::Write as _;
use std::net::Shutdown;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::LazyLock;
use std::time::Duration;

use fuzzing::Input;
use libfuzzer_sys::fuzz_target;
use nbd::client::{Client, NbdError, Operation};

static SOCKET: LazyLock<(PathBuf, UnixListener)> = LazyLock::new(|| {
    let path = std::env::temp_dir().join(format!("vmirror-fuzz-nbd-client-{}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).expect("a socket");
    (path, listener)
});

/// Long enough that a machine under load makes no finding of it, and never waited for: what is said ends.
const PATIENCE: Option<Duration> = Some(Duration::from_secs(30));

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let operations: Vec<u8> = (0..input.byte() % 8).map(|_| input.byte()).collect();
    let (path, listener) = &*SOCKET;
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let (mut connection, _) = listener.accept().expect("the client that connects below");
            let _ = connection.write_all(input.0);
            let _ = connection.shutdown(Shutdown::Write);
            let _ = std::io::copy(&mut connection, &mut std::io::sink());
        });
        if let Ok(client) = Client::connect_within(path, "disk", PATIENCE) {
            use_it(client, &operations, data.len());
        }
    });
});

fn use_it(mut client: Client, operations: &[u8], said: usize) {
    let sizes = client.block_sizes();
    assert!(sizes.minimum.is_power_of_two() && sizes.maximum >= sizes.minimum, "{sizes:?}");
    let least = u64::from(sizes.minimum);
    let mut ended = false;
    for operation in operations {
        let offset = u64::from(operation >> 3) * least;
        // No more than was asked for is there to be read, and none of it that was not sent.
        let mut content = vec![0x5A; (least as usize * 2).min(64 << 10)];
        let (operation, done) = match operation % 5 {
            0 => (Operation::Read, client.read(offset, &mut content)),
            1 => (Operation::Write, client.write(offset, &content)),
            2 => (Operation::Zero, client.zero(offset, content.len() as u64, true)),
            3 => (Operation::Trim, client.trim(offset, content.len() as u64)),
            _ => (Operation::Flush, client.flush()),
        };
        if done.is_ok() {
            assert!(!ended, "it goes on after a breach");
            assert!(client.supports(operation), "{operation} was not offered");
            assert!(operation != Operation::Read || content.len() < said, "more was read than was sent");
            let within = offset + content.len() as u64 <= client.size();
            assert!(operation == Operation::Flush || within, "{operation} beyond the end");
        }
        ended |= matches!(done, Err(NbdError::Protocol(_) | NbdError::Broken { .. } | NbdError::Unusable));
    }
}
