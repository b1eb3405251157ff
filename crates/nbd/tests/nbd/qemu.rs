//! Our client against QEMU's server, and QEMU's client against ours, by its storage daemon.

use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nbd::client::{Client, NbdError, Operation};
use nbd::server::{Request, Server};

use crate::memory_export::MemoryExport;

const DAEMON: &str = "qemu-storage-daemon";
const SIZE: u64 = 256 << 20;

/// A storage daemon that exports the node "top" as "disk"; gone when dropped.
struct Daemon {
    child: Child,
    socket: PathBuf,
}

impl Daemon {
    /// `None` where there is no such program.
    fn start(directory: &Path, nodes: &[String]) -> Option<Daemon> {
        let socket = directory.join("daemon");
        let mut command = Command::new(DAEMON);
        for node in nodes {
            command.args(["--blockdev", node]);
        }
        command.arg("--nbd-server").arg(format!("addr.type=unix,addr.path={}", socket.display()));
        command.args(["--export", "type=nbd,id=e,node-name=top,writable=on,name=disk"]);
        match command.stdin(Stdio::null()).spawn() {
            Ok(child) => Some(Daemon { child, socket }),
            Err(error) => {
                eprintln!("SKIPPED a test against {DAEMON}: {error}");
                None
            }
        }
    }

    /// Its socket is there before its export is.
    fn client(&mut self) -> Client {
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            assert!(self.child.try_wait().unwrap().is_none(), "{DAEMON} has ended");
            match Client::connect(&self.socket, "disk") {
                Ok(client) => return client,
                Err(error) => assert!(Instant::now() < until, "{error:?}"),
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // In order, so that a qcow2 image is closed as it should be.
        let pid = rustix::process::Pid::from_child(&self.child);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.socket);
    }
}

fn raw(path: &Path) -> [String; 1] {
    [format!("driver=file,node-name=top,discard=unmap,filename={}", path.display())]
}

fn qcow2(path: &Path) -> [String; 2] {
    [
        format!("driver=file,node-name=file,discard=unmap,filename={}", path.display()),
        "driver=qcow2,node-name=top,discard=unmap,file=file".to_owned(),
    ]
}

/// An empty qcow2 image, version 3: clusters of 64 KiB for header, refcount table, refcount block and L1 table.
fn make_qcow2(path: &Path, size: u64) {
    const CLUSTER: u64 = 65536;
    let mut header = b"QFI\xfb".to_vec();
    let mut put = |bytes: &[u8]| header.extend_from_slice(bytes);
    put(&3u32.to_be_bytes());
    put(&[0; 12]); // no backing file
    put(&16u32.to_be_bytes()); // cluster bits
    put(&size.to_be_bytes());
    put(&0u32.to_be_bytes()); // no encryption
    put(&u32::try_from(size.div_ceil(CLUSTER * (CLUSTER / 8))).unwrap().to_be_bytes());
    put(&(3 * CLUSTER).to_be_bytes()); // L1 table
    put(&CLUSTER.to_be_bytes()); // refcount table
    put(&1u32.to_be_bytes());
    put(&[0; 12]); // no snapshots
    put(&[0; 24]); // no features
    put(&4u32.to_be_bytes()); // refcounts of 16 bits
    put(&104u32.to_be_bytes()); // length of all this
    let mut file = File::create(path).unwrap();
    file.write_all(&header).unwrap();
    file.write_all_at(&(2 * CLUSTER).to_be_bytes(), CLUSTER).unwrap();
    file.write_all_at(&[0, 1, 0, 1, 0, 1, 0, 1], 2 * CLUSTER).unwrap();
    file.set_len(4 * CLUSTER).unwrap();
}

fn pattern(length: usize, seed: u8) -> Vec<u8> {
    (0..length).map(|i| (i as u8) ^ ((i >> 8) as u8).wrapping_mul(3) ^ seed | 1).collect()
}

fn read(client: &mut Client, offset: u64, length: usize) -> Vec<u8> {
    let mut into = vec![0xaa; length];
    client.read(offset, &mut into).unwrap();
    into
}

/// Everything that a client can do; gives back the pieces that must be there in the end.
fn exercise(client: &mut Client) -> Vec<(u64, Vec<u8>)> {
    assert_eq!(client.size(), SIZE);
    for operation in [Operation::Write, Operation::Zero, Operation::Trim, Operation::Flush] {
        assert!(client.supports(operation), "{operation}");
    }
    let maximum = u64::from(client.block_sizes().maximum);
    assert_eq!(maximum, 32 << 20, "what is larger than QEMU takes must have been split");
    let large = pattern(maximum as usize + 12345, 5);
    client.write(1 << 20, &large).unwrap();
    assert!(read(client, 1 << 20, large.len()) == large);

    let small: Vec<_> = (0..1000u64).map(|i| ((100 << 20) + i * 8192, pattern(4096, i as u8))).collect();
    let writes: Vec<_> = small.iter().map(|(offset, data)| (*offset, &data[..])).collect();
    client.write_all_of(&writes).unwrap();
    for (offset, data) in &small {
        assert!(read(client, *offset, data.len()) == *data, "at {offset}");
    }

    client.zero(2 << 20, 3 << 20, true).unwrap();
    assert!(read(client, 2 << 20, 3 << 20).iter().all(|&byte| byte == 0));
    client.zero(10 << 20, 1 << 20, false).unwrap();
    assert!(read(client, 10 << 20, 1 << 20).iter().all(|&byte| byte == 0));
    // More than one request of it.
    client.zero(128 << 20, 128 << 20, true).unwrap();
    client.trim(20 << 20, 1 << 20).unwrap();
    client.flush().unwrap();

    let mut kept = vec![(1 << 20, large[..1 << 20].to_vec()), (2 << 20, vec![0; 3 << 20])];
    kept.push((5 << 20, large[4 << 20..9 << 20].to_vec()));
    kept.push((21 << 20, large[20 << 20..].to_vec()));
    kept.extend(small);
    kept
}

#[test]
fn qemu_serves_a_raw_file_to_our_client() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("raw");
    File::create(&image).unwrap().set_len(SIZE).unwrap();
    let Some(mut daemon) = Daemon::start(directory.path(), &raw(&image)) else { return };
    let mut client = daemon.client();
    let kept = exercise(&mut client);
    let other = Client::connect(&daemon.socket, "other").unwrap_err();
    assert!(matches!(other, NbdError::Refused { code: 0x8000_0006, .. }), "{other:?}");
    drop(client);
    drop(daemon);
    let file = File::open(&image).unwrap();
    for (offset, data) in kept {
        let mut found = vec![0; data.len()];
        file.read_exact_at(&mut found, offset).unwrap();
        assert!(found == data, "at {offset}");
    }
}

#[test]
fn qemu_serves_a_qcow2_image_to_our_client() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("qcow2");
    make_qcow2(&image, SIZE);
    let Some(mut daemon) = Daemon::start(directory.path(), &qcow2(&image)) else { return };
    let kept = exercise(&mut daemon.client());
    drop(daemon);
    let mut again = Daemon::start(directory.path(), &qcow2(&image)).unwrap();
    let mut client = again.client();
    for (offset, data) in kept {
        assert!(read(&mut client, offset, data.len()) == data, "at {offset}");
    }
}

#[test]
fn qemu_uses_what_we_serve() {
    for export in [MemoryExport::new(SIZE as usize), MemoryExport::out_of_order(SIZE as usize)] {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("ours");
        let server =
            Server::listen(UnixListener::bind(&socket).unwrap(), &socket, "disk", Arc::clone(&export))
                .unwrap();
        let node = format!(
            "driver=nbd,node-name=top,discard=unmap,export=disk,server.type=unix,server.path={}",
            socket.display()
        );
        let Some(mut daemon) = Daemon::start(directory.path(), &[node]) else { return };
        let mut client = daemon.client();
        let kept = exercise(&mut client);
        let content = export.content();
        for (offset, data) in kept {
            assert!(content[offset as usize..][..data.len()] == data, "at {offset}");
        }
        let seen = export.seen();
        let unmaps = |within: Range<u64>| -> Vec<bool> {
            let zeros = seen.iter().filter_map(|request| match request {
                Request::Zero { offset, may_unmap, .. } => Some((*offset, *may_unmap)),
                _ => None,
            });
            let mut kinds: Vec<_> = zeros.filter(|(offset, _)| within.contains(offset)).collect();
            kinds.dedup_by_key(|(_, unmap)| *unmap);
            kinds.into_iter().map(|(_, unmap)| unmap).collect()
        };
        assert_eq!(unmaps(2 << 20..5 << 20), [true], "zeros come as zeros, and their kind with them");
        assert_eq!(unmaps(10 << 20..11 << 20), [false]);
        assert!(seen.iter().any(|request| matches!(request, Request::Trim { .. })));
        assert_eq!(seen.last(), Some(&Request::Flush));

        // Requests of any alignment come as they were made.
        client.write(12345, b"odd").unwrap();
        let odd = Request::Write { offset: 12345, data: b"odd".to_vec(), durable: false };
        assert_eq!(export.seen(), [odd]);

        // QEMU goes, and the export is told.
        drop(client);
        drop(daemon);
        let until = Instant::now() + Duration::from_secs(10);
        while export.disconnected() == 0 {
            assert!(Instant::now() < until, "the export is not told");
            std::thread::sleep(Duration::from_millis(5));
        }
        server.end();
    }
}
