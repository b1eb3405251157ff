//! What a data stream costs: one stream over loopback, and the processor time of either side.
//!
//! `cargo run --release -p link --example throughput [GIB [WRITE_KIB]]`

use std::error::Error;
use std::io::{Read as _, Write as _};
use std::time::{Duration, Instant};

use link::{Bandwidth, Deadlines, Endpoint, Identity, Incoming, Listener, certificates};
use rustix::time::{ClockId, clock_gettime};
use uuid::Uuid;

/// Processor time of the calling thread.
fn spent() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let mut numbers = std::env::args().skip(1).map(|text| text.parse::<usize>());
    let total = numbers.next().transpose()?.unwrap_or(4) << 30;
    let piece = numbers.next().transpose()?.unwrap_or(1024) << 10;

    let dir = tempfile::tempdir()?;
    certificates::init(dir.path())?;
    let files = certificates::issue(dir.path(), "localhost", &["127.0.0.1".into()])?;
    let identity = Identity::load(&dir.path().join("ca.pem"), &files.certificate, &files.key)?;
    let endpoint = Endpoint::new(&identity, Deadlines::default())?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let listener = runtime.block_on(Listener::bind(&endpoint, "127.0.0.1:0"))?;
    let address = listener.local_addr().to_string();

    let sending = std::thread::spawn(move || -> Result<Duration, Box<dyn Error + Send + Sync>> {
        let mut sender = endpoint.open_data(&address, Uuid::new_v4(), 0, Bandwidth::new(None))?;
        let content: Vec<u8> = (0..piece).map(|i| (i * 31) as u8).collect();
        let before = spent();
        let mut left = total;
        while left > 0 {
            let now = left.min(piece);
            sender.write_all(&content[..now])?;
            left -= now;
        }
        sender.shutdown()?;
        Ok(spent() - before)
    });
    let Incoming::Data(mut receiver, ..) = runtime.block_on(listener.accept())? else {
        return Err("that was no data connection".into());
    };
    let mut buffer = vec![0; piece];
    let (start, before) = (Instant::now(), spent());
    let mut received = 0;
    loop {
        match receiver.read(&mut buffer)? {
            0 => break,
            count => received += count,
        }
    }
    let (wall, receiving) = (start.elapsed(), spent() - before);
    let sending = sending.join().map_err(|_| "the sender panicked")??;
    if received != total {
        return Err(format!("{received} bytes of {total} arrived").into());
    }
    let rate = |time: Duration| total as f64 / 1e6 / time.as_secs_f64();
    println!(
        "{} MiB in pieces of {} KiB: {:.0} MB/s; per core {:.0} MB/s sending, {:.0} MB/s receiving",
        total >> 20,
        piece >> 10,
        rate(wall),
        rate(sending),
        rate(receiving),
    );
    Ok(())
}
