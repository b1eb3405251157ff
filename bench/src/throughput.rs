//! How fast a guest works, before, during and after its migration: seen from the client, by asking the guest how many
//! pages its workload has written, and how many blocks of its disk.

use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, SystemTime};

use guest::service::CONTROL_PORT;
use serde::{Deserialize, Serialize};
use testbed::watch::Watch;
use testbed::{Client, Status};

use crate::error::BenchError;
use crate::record::Sample;

/// How often the guest is asked.
const EVERY: Duration = Duration::from_millis(50);
/// What is said about a shorter time than this says nothing.
const SHORTEST_MS: f64 = 200.0;
/// What counts as after the migration begins this long after the guest runs there, in milliseconds: the answers that
/// waited for it have come by then.
const SETTLED_MS: f64 = 100.0;

/// Pages, or blocks of its disk, that a guest's workload writes per second; both have 4096 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Throughput {
    /// Before it is migrated.
    pub before: Option<f64>,
    /// While it is mirrored, up to the pause; where its disk moves, while that is copied.
    pub during: Option<f64>,
    /// While its disk is mirrored and has been copied once, up to the pause.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copied: Option<f64>,
    /// After it runs at the destination.
    pub after: Option<f64>,
}

impl Throughput {
    /// What the guest keeps of its speed while it is mirrored: 1 is all.
    pub fn kept(&self) -> Option<f64> {
        self.part(self.during?)
    }

    /// What a speed is of that before.
    pub fn part(&self, speed: f64) -> Option<f64> {
        Some(speed / self.before.filter(|before| *before > 0.0)?)
    }
}

/// What a guest said, and when it was heard: milliseconds since 1970, pages and blocks written.
pub type Word = (f64, u64);

/// Asks a guest from now on, again and again.
pub fn watch(client: &Client, guest: Ipv4Addr) -> Result<Watch<Vec<Word>>, BenchError> {
    let socket = client.socket(guest, CONTROL_PORT)?;
    socket.set_read_timeout(Some(EVERY)).map_err(BenchError::file("socket"))?;
    Ok(Watch::start(move |stop| ask(&socket, stop)))
}

fn ask(socket: &UdpSocket, stop: &AtomicBool) -> Vec<Word> {
    let mut words = Vec::new();
    let mut answer = [0; 2048];
    while !stop.load(Relaxed) {
        let heard = socket.send(b"status").and_then(|_| socket.recv(&mut answer));
        let status = heard
            .and_then(|length| serde_json::from_slice::<Status>(&answer[..length]).map_err(io::Error::other));
        if let Ok(status) = status {
            let blocks = status.disks.map_or(0, |disks| disks.writes);
            words.push((unix_ms(SystemTime::now()), status.writes + blocks));
            thread::sleep(EVERY);
        }
    }
    words
}

/// A time in milliseconds since 1970.
pub(crate) fn unix_ms(time: SystemTime) -> f64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64() * 1e3
}

/// How fast the guest was around a migration.
pub fn around(words: &[Word], sample: &Sample) -> Throughput {
    let runs = sample.began_unix_ms + sample.until_running_ms;
    let stops = runs - sample.downtime_ms;
    let within =
        |from_ms: f64, to_ms: f64| speed(words, sample.began_unix_ms + from_ms, sample.began_unix_ms + to_ms);
    Throughput {
        before: speed(words, 0.0, sample.began_unix_ms),
        during: match sample.disk {
            Some(disk) => within(disk.began_ms, disk.copied_ms),
            None => speed(words, sample.began_unix_ms, stops),
        },
        copied: sample.disk.and_then(|disk| within(disk.copied_ms, stops - sample.began_unix_ms)),
        after: speed(words, runs + SETTLED_MS, f64::INFINITY),
    }
}

/// Pages per second between two times; none where too little was heard.
fn speed(words: &[Word], from: f64, to: f64) -> Option<f64> {
    let mut within = words.iter().filter(|(at, _)| (from..to).contains(at));
    let (first, last) = (within.next()?, within.next_back()?);
    let ms = last.0 - first.0;
    (ms >= SHORTEST_MS).then(|| last.1.saturating_sub(first.1) as f64 / ms * 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn speeds_are_told_apart_by_when_the_guest_was_paused() {
        let mut sample = crate::fixtures::run().samples.swap_remove(0);
        (sample.began_unix_ms, sample.until_running_ms, sample.downtime_ms) = (1000.0, 600.0, 100.0);
        // 100 pages per second, then 50, then none, then 100.
        let words: Vec<Word> = vec![
            (0.0, 0),
            (500.0, 50),
            (900.0, 90),
            (1000.0, 100),
            (1200.0, 110),
            (1400.0, 120),
            (1650.0, 125),
            (1700.0, 130),
            (1900.0, 150),
            (2100.0, 170),
        ];
        let seen = around(&words, &sample);
        let expected =
            Throughput { before: Some(100.0), during: Some(50.0), copied: None, after: Some(100.0) };
        assert_eq!(seen, expected);
        assert_eq!(seen.kept(), Some(0.5));
        assert_eq!(around(&words[..1], &sample), Throughput::default());
    }
}
