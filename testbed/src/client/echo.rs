//! TCP connections whose bytes must come back as they went.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Bytes sent at a time: less than a segment and more than one.
const BLOCK: usize = 2000;
/// Rest between two blocks of a connection.
const REST: Duration = Duration::from_millis(10);
/// How long an answer may take before the connection counts as broken.
const PATIENCE: Duration = Duration::from_secs(60);
const CONNECT: Duration = Duration::from_secs(10);

/// Echo connections at work.
#[derive(Debug)]
pub struct Echo {
    stop: Arc<AtomicBool>,
    report: Arc<Mutex<EchoReport>>,
    threads: Vec<JoinHandle<()>>,
}

/// What became of the connections.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EchoReport {
    /// How many connections there are.
    pub connections: usize,
    /// Bytes that came back as they went.
    pub bytes: u64,
    /// Blocks that came back changed.
    pub mismatches: u64,
    /// Connections that broke: what each said.
    pub broken: Vec<String>,
    /// The longest time any block took to come back, since it was [taken](Echo::take_longest_stall).
    pub longest_stall: Duration,
}

impl Echo {
    /// Opens the connections; sockets belong to the network of the calling thread.
    pub(crate) fn start(address: SocketAddr, connections: usize) -> io::Result<Self> {
        let streams: Vec<TcpStream> = (0..connections)
            .map(|_| TcpStream::connect_timeout(&address, CONNECT))
            .collect::<Result<_, _>>()?;
        let report = EchoReport { connections, ..EchoReport::default() };
        let mut echo = Self {
            stop: Arc::default(),
            report: Arc::new(Mutex::new(report)),
            threads: Vec::with_capacity(connections),
        };
        for (number, stream) in streams.into_iter().enumerate() {
            let (stop, report) = (Arc::clone(&echo.stop), Arc::clone(&echo.report));
            let run = move || {
                if let Err(error) = converse(stream, number, &stop, &report) {
                    lock(&report).broken.push(format!("connection {number}: {error}"));
                }
            };
            echo.threads.push(
                thread::Builder::new().name(format!("echo {number}")).stack_size(128 << 10).spawn(run)?,
            );
        }
        Ok(echo)
    }

    /// What became of them up to now.
    pub fn report(&self) -> EchoReport {
        lock(&self.report).clone()
    }

    /// The longest time any block took since this was last asked.
    pub fn take_longest_stall(&self) -> Duration {
        std::mem::take(&mut lock(&self.report).longest_stall)
    }

    /// Lets every connection finish its block, closes it, and reports.
    pub fn stop(mut self) -> EchoReport {
        self.end();
        self.report()
    }

    fn end(&mut self) {
        self.stop.store(true, Relaxed);
        for thread in self.threads.drain(..) {
            if let Err(panic) = thread.join() {
                eprintln!("echo: {panic:?}");
            }
        }
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.end();
    }
}

fn lock(report: &Mutex<EchoReport>) -> std::sync::MutexGuard<'_, EchoReport> {
    report.lock().unwrap_or_else(PoisonError::into_inner)
}

fn converse(
    mut stream: TcpStream,
    number: usize,
    stop: &AtomicBool,
    report: &Mutex<EchoReport>,
) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let (mut sent, mut received) = ([0; BLOCK], [0; BLOCK]);
    let mut position = 0u64;
    while !stop.load(Relaxed) {
        for byte in &mut sent {
            *byte = pattern(number, position);
            position += 1;
        }
        let start = Instant::now();
        stream.write_all(&sent)?;
        stream.read_exact(&mut received)?;
        let stall = start.elapsed();
        let mut report = lock(report);
        report.longest_stall = report.longest_stall.max(stall);
        if sent == received {
            report.bytes += BLOCK as u64;
        } else {
            report.mismatches += 1;
        }
        drop(report);
        thread::sleep(REST);
    }
    Ok(())
}

/// The byte at a position of a connection: its period, 251, is no divisor of anything that might be repeated or skipped.
fn pattern(connection: usize, position: u64) -> u8 {
    ((position + connection as u64 * 7) % 251) as u8
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    /// Serves `connections` connections, passing every block through `change`.
    fn server(connections: usize, change: fn(&mut [u8])) -> (SocketAddr, JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let serve = move || {
            let mut threads = Vec::new();
            for _ in 0..connections {
                let mut stream = listener.accept().unwrap().0;
                threads.push(thread::spawn(move || {
                    let mut block = [0; BLOCK];
                    while stream.read_exact(&mut block).is_ok() {
                        change(&mut block);
                        stream.write_all(&block).unwrap();
                    }
                }));
            }
            threads.into_iter().for_each(|thread| thread.join().unwrap());
        };
        (address, thread::spawn(serve))
    }

    fn run(connections: usize, change: fn(&mut [u8]), enough: impl Fn(&EchoReport) -> bool) -> EchoReport {
        let (address, server) = server(connections, change);
        let echo = Echo::start(address, connections).unwrap();
        while !enough(&echo.report()) {
            thread::sleep(Duration::from_millis(5));
        }
        let report = echo.stop();
        server.join().unwrap();
        report
    }

    #[test]
    fn bytes_that_come_back_are_counted() {
        let report = run(4, |_| {}, |report| report.bytes > 20 * BLOCK as u64);
        assert_eq!((report.connections, report.mismatches, report.broken.len()), (4, 0, 0));
    }

    #[test]
    fn a_changed_byte_is_noticed() {
        let report = run(1, |block| block[7] ^= 1, |report| report.mismatches > 1);
        assert_eq!(report.bytes, 0);
    }
}
