//! Measuring: heartbeats around something, medians.

use std::net::Ipv4Addr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use testbed::Client;

use crate::error::BenchError;
use crate::run::Run;

/// Heartbeats per second: they show a pause to the millisecond.
const PER_SECOND: u32 = 1000;
/// Heartbeats sent before what is measured, and after it: QEMU announces the guest for half a second.
const BEFORE: Duration = Duration::from_millis(500);
const AFTER: Duration = Duration::from_millis(600);
/// The end of that, in which an answer must come from a guest that is still heard.
const AT_END: Duration = Duration::from_millis(400);

/// Milliseconds of a time.
pub(crate) fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// A number of bytes that was measured, for people.
pub(crate) fn bytes(bytes: f64) -> String {
    readable::bytes(bytes as u64)
}

/// What the client noticed of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Beats {
    /// Heartbeats sent.
    pub sent: u64,
    /// Heartbeats that never came back.
    pub lost: u64,
    /// The longest time between two answers, in milliseconds.
    pub longest_gap_ms: f64,
    /// Whether answers still came at the end: if not, the guest was not heard again, and the gap is no measure of it.
    pub heard_again: bool,
}

impl Beats {
    /// The gap, where it ended.
    pub fn gap_ms(&self) -> Option<f64> {
        self.heard_again.then_some(self.longest_gap_ms)
    }
}

/// Does something while the client sends a guest heartbeats, from a while before to a while after.
///
/// Without a client there are none, and no waiting.
pub fn with_heartbeats<T>(
    client: Option<&Client>,
    guest: Ipv4Addr,
    run: &Run,
    act: impl FnOnce() -> Result<T, BenchError>,
) -> Result<(T, Option<Beats>), BenchError> {
    let Some(client) = client else { return Ok((act()?, None)) };
    let heartbeats = client.heartbeats(guest, PER_SECOND)?;
    run.sleep(BEFORE)?;
    let done = act()?;
    run.sleep(AFTER)?;
    let before = heartbeats.report().received;
    run.sleep(AT_END)?;
    let report = heartbeats.stop();
    let longest_gap_ms = ms(report.longest_gap);
    let heard_again = report.received > before;
    Ok((done, Some(Beats { sent: report.sent, lost: report.lost, longest_gap_ms, heard_again })))
}

/// A figure measured several times.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// The middle one; of an even number, the mean of the two in the middle.
    pub median: f64,
    /// The smallest.
    pub least: f64,
    /// The largest.
    pub most: f64,
    /// How many.
    pub count: usize,
}

impl Spread {
    /// Of these; none where there are none.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let (least, most) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = if values.len().is_multiple_of(2) {
            values[middle - 1].midpoint(values[middle])
        } else {
            values[middle]
        };
        Some(Self { median, least, most, count: values.len() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_in_the_middle() {
        assert_eq!(Spread::of([]), None);
        assert_eq!(
            Spread::of([3.0, 1.0, 8.0]),
            Some(Spread { median: 3.0, least: 1.0, most: 8.0, count: 3 })
        );
        assert_eq!(Spread::of([4.0, 1.0, 2.0, 100.0]).map(|spread| spread.median), Some(3.0));
    }
}
