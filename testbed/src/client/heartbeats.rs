//! Heartbeats: numbered datagrams that the guest sends back.

use std::io;
use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How long the last answers may take after the last heartbeat was sent.
const GRACE: Duration = Duration::from_secs(1);

/// An answer that takes longer than this does not come: the next heartbeat is no longer held back.
const PATIENCE: Duration = Duration::from_secs(1);

/// So many of those that never came are named.
const MISSING: usize = 100;
/// Room for answers that arrive while the receiver has no CPU time: seconds of them.
const BUFFER: usize = 4 << 20;

/// Heartbeats being sent.
#[derive(Debug)]
pub struct Heartbeats {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    socket: UdpSocket,
    start: Instant,
    stop: AtomicBool,
    deaf: AtomicBool,
    sent: AtomicU64,
    /// How many may be on their way.
    most_on_their_way: u64,
    /// The one after the last that came back.
    answered: AtomicU64,
    arrivals: Mutex<Vec<Arrival>>,
}

#[derive(Clone, Copy, Debug)]
struct Arrival {
    number: u64,
    at: Instant,
}

/// What became of the heartbeats.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeartbeatReport {
    /// How many were sent.
    pub sent: u64,
    /// How many of them came back at least once.
    pub received: u64,
    /// How many never came back.
    pub lost: u64,
    /// The first of them, by their numbers, which count from 0.
    pub missing: Vec<u64>,
    /// How many answers came more than once.
    pub repeated: u64,
    /// How many answers came after one to a later heartbeat.
    pub out_of_order: u64,
    /// The longest time without any answer, between two of them.
    pub longest_gap: Duration,
    /// When it began.
    pub gap_began: Option<Instant>,
}

impl Heartbeats {
    pub(crate) fn start(socket: UdpSocket, per_second: u32, most_on_their_way: u64) -> io::Result<Self> {
        socket.set_read_timeout(Some(Duration::from_millis(50)))?;
        // Beyond the limit for ordinary programs where allowed, which a client in a namespace is.
        rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, BUFFER)
            .or_else(|_| rustix::net::sockopt::set_socket_recv_buffer_size(&socket, BUFFER))?;
        let shared = Arc::new(Shared {
            socket,
            start: Instant::now(),
            stop: AtomicBool::new(false),
            deaf: AtomicBool::new(false),
            sent: AtomicU64::new(0),
            most_on_their_way,
            answered: AtomicU64::new(0),
            arrivals: Mutex::new(Vec::new()),
        });
        let mut heartbeats = Self { shared, threads: Vec::new() };
        for run in [Shared::send, Shared::receive] {
            let shared = Arc::clone(&heartbeats.shared);
            heartbeats.threads.push(
                thread::Builder::new().name("heartbeat".into()).spawn(move || run(&shared, per_second))?,
            );
        }
        Ok(heartbeats)
    }

    /// What became of them up to now; the latest may still be on their way and count as lost.
    pub fn report(&self) -> HeartbeatReport {
        let sent = self.shared.sent.load(Relaxed);
        let arrivals = self.shared.arrivals.lock().unwrap_or_else(PoisonError::into_inner);
        evaluate(sent, &arrivals)
    }

    /// Stops sending, waits for the last answers, and reports.
    pub fn stop(mut self) -> HeartbeatReport {
        self.end(GRACE);
        self.report()
    }

    fn end(&mut self, grace: Duration) {
        self.shared.stop.store(true, Relaxed);
        let start = Instant::now();
        while self.report().lost > 0 && start.elapsed() < grace {
            thread::sleep(Duration::from_millis(10));
        }
        self.shared.deaf.store(true, Relaxed);
        for thread in self.threads.drain(..) {
            if let Err(panic) = thread.join() {
                eprintln!("heartbeats: {panic:?}");
            }
        }
    }
}

impl Drop for Heartbeats {
    fn drop(&mut self) {
        self.end(Duration::ZERO);
    }
}

impl Shared {
    fn send(&self, per_second: u32) {
        let interval = Duration::from_secs(1) / per_second.max(1);
        let mut due = self.start;
        while !self.stop.load(Relaxed) {
            if self.wait_for_answers() {
                due = Instant::now();
            }
            let number = self.sent.fetch_add(1, Relaxed);
            // One that cannot be sent, with the cable cut, is lost like any other.
            let _ = self.socket.send(&number.to_le_bytes());
            due += interval;
            thread::sleep(due.saturating_duration_since(Instant::now()));
        }
    }

    /// Waits while too many are on their way. Whether it had to.
    fn wait_for_answers(&self) -> bool {
        let begun = Instant::now();
        let too_many = || {
            let unanswered = self.sent.load(Relaxed).saturating_sub(self.answered.load(Relaxed));
            unanswered >= self.most_on_their_way && begun.elapsed() < PATIENCE
        };
        let waits = too_many();
        while too_many() && !self.stop.load(Relaxed) {
            thread::sleep(Duration::from_millis(1));
        }
        waits
    }

    fn receive(&self, _: u32) {
        let mut datagram = [0; 64];
        while !self.deaf.load(Relaxed) {
            // Errors are timeouts, or refusals while nobody listens there: both mean no heartbeat.
            let Ok(length) = self.socket.recv(&mut datagram) else { continue };
            let at = Instant::now();
            if let Ok(number) = <[u8; 8]>::try_from(&datagram[..length]).map(u64::from_le_bytes) {
                self.answered.fetch_max(number.saturating_add(1), Relaxed);
                let mut arrivals = self.arrivals.lock().unwrap_or_else(PoisonError::into_inner);
                arrivals.push(Arrival { number, at });
            }
        }
    }
}

fn evaluate(sent: u64, arrivals: &[Arrival]) -> HeartbeatReport {
    let mut report = HeartbeatReport {
        sent,
        received: 0,
        lost: 0,
        missing: Vec::new(),
        repeated: 0,
        out_of_order: 0,
        longest_gap: Duration::ZERO,
        gap_began: None,
    };
    let mut seen = vec![false; sent as usize];
    let mut highest = None;
    for arrival in arrivals {
        // A number that was never sent is nobody's heartbeat.
        let Some(seen) = seen.get_mut(arrival.number as usize) else { continue };
        if std::mem::replace(seen, true) {
            report.repeated += 1;
        } else {
            report.received += 1;
        }
        report.out_of_order += u64::from(highest.is_some_and(|highest| arrival.number < highest));
        highest = highest.max(Some(arrival.number));
    }
    for pair in arrivals.windows(2) {
        let gap = pair[1].at.saturating_duration_since(pair[0].at);
        if gap > report.longest_gap {
            (report.longest_gap, report.gap_began) = (gap, Some(pair[0].at));
        }
    }
    report.lost = sent - report.received;
    report.missing =
        (0..sent).zip(&seen).filter(|(_, seen)| !**seen).map(|(number, _)| number).take(MISSING).collect();
    report
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_losses_and_repeats_are_counted() {
        let start = Instant::now();
        let arrival = |number, ms| Arrival { number, at: start + Duration::from_millis(ms) };
        let arrivals =
            [arrival(0, 0), arrival(1, 1), arrival(1, 2), arrival(5, 30), arrival(4, 31), arrival(99, 32)];
        let report = evaluate(7, &arrivals);
        assert_eq!((report.sent, report.received, report.lost), (7, 4, 3));
        assert_eq!(report.missing, [2, 3, 6]);
        assert_eq!((report.repeated, report.out_of_order), (1, 1));
        assert_eq!(report.longest_gap, Duration::from_millis(28));
        assert_eq!(report.gap_began, Some(start + Duration::from_millis(2)));
    }

    #[test]
    fn heartbeats_through_a_pause_show_it() {
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.connect(server.local_addr().unwrap()).unwrap();
        let (pause, stop) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let (paused, stopped) = (Arc::clone(&pause), Arc::clone(&stop));
        server.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        let echo = thread::spawn(move || {
            let mut datagram = [0; 64];
            while !stopped.load(Relaxed) {
                let Ok((length, peer)) = server.recv_from(&mut datagram) else { continue };
                if !paused.load(Relaxed) {
                    server.send_to(&datagram[..length], peer).unwrap();
                }
            }
        });
        let heartbeats = Heartbeats::start(client, 500, u64::MAX).unwrap();
        let wait_for = |enough: u64| {
            while heartbeats.report().received < enough {
                thread::sleep(Duration::from_millis(5));
            }
        };
        wait_for(50);
        pause.store(true, Relaxed);
        thread::sleep(Duration::from_millis(300));
        pause.store(false, Relaxed);
        let before = heartbeats.report().received;
        wait_for(before + 50);
        let report = heartbeats.stop();
        stop.store(true, Relaxed);
        echo.join().unwrap();
        assert!(report.longest_gap >= Duration::from_millis(280), "{report:?}");
        assert!(report.lost > 0 && report.received > 100, "{report:?}");
        assert_eq!(report.sent, report.received + report.lost);
    }
}
