//! What a guest's journal has acknowledged, as its client knows it: what must be on the disk, whatever becomes of the guest.

use std::io::{self, BufRead, BufReader};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// How long a guest that repeats itself every second may be silent before its connection counts as broken.
const SILENCE: Duration = Duration::from_secs(5);
/// Rest before a broken connection is made anew.
const REST: Duration = Duration::from_millis(100);
/// How often it is looked at whether to stop.
const POLL: Duration = Duration::from_millis(200);

/// A connection to a guest's journals that is made anew whenever it breaks.
#[derive(Debug)]
pub struct Journal {
    stop: Arc<AtomicBool>,
    report: Arc<Mutex<JournalReport>>,
    thread: Option<JoinHandle<()>>,
}

/// What was heard of a journal.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct JournalReport {
    /// The highest sequence number acknowledged: this record and all before it must be on the disk.
    pub acknowledged: u64,
    /// How many times a connection was made.
    pub connections: u64,
    /// Numbers heard after a higher one, with that one: the guest no longer knows of what it had acknowledged.
    pub went_back: Vec<(u64, u64)>,
}

impl Journal {
    /// Listens for the journal of the disk with that serial number; `connect` makes connections that belong to the client.
    pub(crate) fn start(
        serial: &str,
        connect: impl Fn() -> io::Result<TcpStream> + Send + 'static,
    ) -> io::Result<Self> {
        let mut journal = Self { stop: Arc::default(), report: Arc::default(), thread: None };
        let (stop, report) = (Arc::clone(&journal.stop), Arc::clone(&journal.report));
        let serial = serial.to_owned();
        let run = move || {
            while !stop.load(Relaxed) {
                // Whatever breaks a connection, the next one tells where the journal is.
                let _ = connect().and_then(|stream| listen(stream, &serial, &stop, &report));
                thread::sleep(REST);
            }
        };
        journal.thread = Some(thread::Builder::new().name("journal".into()).spawn(run)?);
        Ok(journal)
    }

    /// The highest sequence number acknowledged so far; 0 where none was.
    pub fn acknowledged(&self) -> u64 {
        lock(&self.report).acknowledged
    }

    /// What was heard so far.
    pub fn report(&self) -> JournalReport {
        lock(&self.report).clone()
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        if let Some(Err(panic)) = self.thread.take().map(JoinHandle::join) {
            eprintln!("journal: {panic:?}");
        }
    }
}

/// Hears what one connection has to say, until it breaks.
fn listen(
    stream: TcpStream,
    serial: &str,
    stop: &AtomicBool,
    report: &Mutex<JournalReport>,
) -> io::Result<()> {
    stream.set_read_timeout(Some(POLL))?;
    lock(report).connections += 1;
    let (mut reader, mut line, mut silence) = (BufReader::new(stream), String::new(), Duration::ZERO);
    while !stop.load(Relaxed) {
        // What came of a line before a timeout stays in it.
        match reader.read_line(&mut line) {
            Ok(0) => return Ok(()),
            Ok(_) if line.ends_with('\n') => {
                if let Some(number) = number_in(&line, serial) {
                    lock(report).heard(number);
                }
                line.clear();
                silence = Duration::ZERO;
            }
            // Cut off in the middle of a line: half a number would be another one.
            Ok(_) => return Ok(()),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                silence += POLL;
                if silence >= SILENCE {
                    return Err(error);
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

impl JournalReport {
    fn heard(&mut self, number: u64) {
        if number < self.acknowledged {
            self.went_back.push((number, self.acknowledged));
        }
        self.acknowledged = self.acknowledged.max(number);
    }
}

/// The number in a line of `SERIAL NUMBER`, if it is of that journal.
fn number_in(line: &str, serial: &str) -> Option<u64> {
    let (whose, number) = line.trim_end().split_once(' ')?;
    number.parse().ok().filter(|_| whose == serial)
}

fn lock(report: &Mutex<JournalReport>) -> MutexGuard<'_, JournalReport> {
    report.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::net::TcpListener;
    use std::time::Instant;

    fn until(what: &str, fits: impl Fn() -> bool) {
        let start = Instant::now();
        while !fits() {
            assert!(start.elapsed() < Duration::from_secs(10), "{what}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn numbers_are_heard_over_broken_connections_and_never_half() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let journal = Journal::start("d", move || TcpStream::connect(address)).unwrap();
        let (mut first, _) = listener.accept().unwrap();
        first.write_all(b"d 7\nother 99\nd 8").unwrap();
        until("the first whole line", || journal.acknowledged() == 7);
        drop(first);
        let (mut second, _) = listener.accept().unwrap();
        second.write_all(b"d 1").unwrap();
        thread::sleep(2 * POLL);
        second.write_all(b"2\n").unwrap();
        until("a line in two pieces", || journal.acknowledged() == 12);
        second.write_all(b"d 11\n").unwrap();
        until("the way back", || !journal.report().went_back.is_empty());
        let expected = JournalReport { acknowledged: 12, connections: 2, went_back: vec![(11, 12)] };
        assert_eq!(journal.report(), expected);
    }
}
