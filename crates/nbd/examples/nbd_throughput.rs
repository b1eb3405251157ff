//! What the Network Block Device protocol costs: our client writes to our server over a unix socket.
//!
//! `cargo run --release -p nbd --example nbd_throughput [MIB]`

use std::error::Error;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nbd::client::Client;
use nbd::server::{Export, Reply, Request, Server};
use rustix::time::{ClockId, clock_gettime};

/// Takes everything and keeps nothing.
struct Sink;

impl Export for Sink {
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

/// Processor time of this process, both ends.
fn spent() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn measure(
    what: &str,
    bytes: u64,
    work: impl FnOnce() -> Result<(), Box<dyn Error>>,
) -> Result<(), Box<dyn Error>> {
    let (begun, before) = (Instant::now(), spent());
    work()?;
    let (took, cpu) = (begun.elapsed(), spent() - before);
    let mib = bytes as f64 / f64::from(1 << 20);
    println!(
        "{what:<28} {:>7.0} MiB/s  {:>6.2} CPU seconds per GiB",
        mib / took.as_secs_f64(),
        cpu.as_secs_f64() / mib * 1024.0
    );
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let total = std::env::args().nth(1).map(|text| text.parse::<u64>()).transpose()?.unwrap_or(4096) << 20;
    let directory = tempfile::tempdir()?;
    let socket = directory.path().join("nbd");
    let _server = Server::listen(UnixListener::bind(&socket)?, &socket, "disk", Arc::new(Sink))?;
    let mut client = Client::connect(&socket, "disk")?;
    let mut buffer: Vec<u8> = (0..1 << 20).map(|i| (i * 31) as u8).collect();

    for (what, length, share) in [("1 MiB", 1 << 20, 1), ("64 KiB", 64 << 10, 4), ("4 KiB", 4096, 16)] {
        let (data, bytes) = (&buffer[..length], total / share);
        let offsets: Vec<u64> = (0..bytes / length as u64).map(|i| i * length as u64).collect();
        measure(&format!("{what} writes, one by one"), bytes, || {
            offsets.iter().try_for_each(|&offset| client.write(offset, data)).map_err(Into::into)
        })?;
        let writes: Vec<_> = offsets.iter().map(|&offset| (offset, data)).collect();
        measure(&format!("{what} writes, many at once"), bytes, || {
            writes.chunks(4096).try_for_each(|writes| client.write_all_of(writes)).map_err(Into::into)
        })?;
    }
    measure("1 MiB reads, one by one", total, || {
        let mut offsets = (0..total).step_by(1 << 20);
        offsets.try_for_each(|offset| client.read(offset, &mut buffer)).map_err(Into::into)
    })
}
