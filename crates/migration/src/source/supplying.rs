//! Memory that a machine lacks where it runs, on its way there: what is asked for first, the rest as far ahead of that as goes unnoticed.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use link::{AbortHandle, Bandwidth, DataSender, Endpoint, InFlight};
use mirror::memory::post_copy::PostCopySource;
use uuid::Uuid;

use super::peer::{Destination, violation};
use super::stop::Stop;
use finding::chain;
use protocol::wire::{self, Reply};

/// How often the streams are looked at.
const LOOK: Duration = Duration::from_millis(50);
/// What is pushed may be ahead of what is asked for by as much as goes through in this time, beside what is under way on the link.
const AHEAD: Duration = Duration::from_millis(1);
/// Bounds of that, in bytes, for all streams together.
const AHEAD_BYTES: (usize, usize) = (32 << 10, 32 << 20);
/// So many times what went over a link is taken to go over it.
const FASTER: f64 = 1.1;
/// What a link is taken to carry where nobody knows, in bytes per second: 1 Gbit/s.
const ASSUMED: f64 = 125e6;
/// How often something crosses the link, there and back, until a stream is open: TCP's handshake, TLS's, and ours.
const ROUND_TRIPS: u32 = 3;

/// The connections by which memory is supplied.
pub(super) struct Streams {
    urgent: DataSender,
    bulk: Vec<DataSender>,
    aborts: Vec<AbortHandle>,
    ahead: Ahead,
}

/// Memory being supplied. The streams end when it is dropped.
pub(super) struct Supplying {
    source: Arc<PostCopySource>,
    aborts: Vec<AbortHandle>,
    ahead: Ahead,
}

/// How far what is pushed is ahead of what is asked for.
struct Ahead {
    bulk: Vec<InFlight>,
    round_trip: Duration,
    /// What goes through, in bytes per second.
    rate: f64,
}

impl Ahead {
    /// Lets the bulk streams be ahead by what goes through in [`AHEAD`] and a round trip.
    fn apply(&self) -> io::Result<()> {
        let ahead = (self.rate * (AHEAD + self.round_trip).as_secs_f64()) as usize;
        let ahead = ahead.clamp(AHEAD_BYTES.0, AHEAD_BYTES.1);
        self.bulk.iter().try_for_each(|stream| stream.limit(ahead / self.bulk.len().max(1)))
    }

    /// So much went through since the last look. What is under way limits what goes through: where it may be more, it shows only
    /// if it is tried.
    fn learn(&mut self, bytes: u64, time: Duration) -> io::Result<()> {
        let seen = bytes as f64 / time.as_secs_f64().max(1e-3) * FASTER;
        if seen > self.rate {
            self.rate = seen;
            self.apply()?;
        }
        Ok(())
    }
}

impl Drop for Supplying {
    fn drop(&mut self) {
        self.aborts.iter().for_each(AbortHandle::abort);
    }
}

impl Streams {
    /// Opens them: one for what is asked for, so many for the rest. `throughput` is what the link carries, in bytes per
    /// second, where that is known.
    pub(super) async fn open(
        endpoint: &Endpoint,
        address: &str,
        session: Uuid,
        streams: u16,
        bandwidth: &Arc<Bandwidth>,
        throughput: Option<f64>,
    ) -> Result<Streams, Stop> {
        let (endpoint, address) = (endpoint.clone(), address.to_owned());
        let bandwidth = Arc::clone(bandwidth);
        let opened = tokio::task::spawn_blocking(move || {
            let broken = |e: &dyn std::error::Error| {
                Stop::because("data-stream", e, "see the log of the destination's agent")
            };
            let mut quickest = Duration::MAX;
            let mut open = |stream: u16| {
                let begin = Instant::now();
                let opened = endpoint
                    .open_data(&address, session, streams.saturating_add(stream), Arc::clone(&bandwidth))
                    .map_err(|e| broken(&e));
                quickest = quickest.min(begin.elapsed());
                opened
            };
            let urgent = open(0)?;
            let bulk = (1..=streams).map(open).collect::<Result<Vec<_>, Stop>>()?;
            let mut aborts = vec![urgent.abort_handle().map_err(|e| broken(&e))?];
            let rate = throughput.unwrap_or(ASSUMED);
            let mut ahead = Ahead { bulk: Vec::new(), round_trip: quickest / ROUND_TRIPS, rate };
            for stream in &bulk {
                aborts.push(stream.abort_handle().map_err(|e| broken(&e))?);
                ahead.bulk.push(stream.in_flight().map_err(|e| broken(&e))?);
            }
            ahead.apply().map_err(|e| broken(&e))?;
            Ok(Streams { urgent, bulk, aborts, ahead })
        });
        opened.await.map_err(|e| Stop::because("agent", &e, "see the source agent's log"))?
    }

    /// Begins to supply by them.
    pub(super) fn supply(
        self,
        begin: impl FnOnce(DataSender, Vec<DataSender>) -> Result<PostCopySource, Stop>,
    ) -> Result<Supplying, Stop> {
        let Streams { urgent, bulk, aborts, ahead } = self;
        Ok(Supplying { source: Arc::new(begin(urgent, bulk)?), aborts, ahead })
    }
}

impl Supplying {
    /// What is asked for is supplied whenever the destination is listened to.
    pub(super) fn answer(&self, destination: &mut Destination) {
        let source = Arc::clone(&self.source);
        destination.supply(move |pages| source.supply(pages));
    }

    /// Pushes the rest, until the destination says that nothing is missing, or the link is lost.
    pub(super) async fn push(
        &mut self,
        destination: &mut Destination,
        mut left: impl FnMut(u64),
    ) -> Result<wire::Supplied, Stop> {
        self.answer(destination);
        self.source.push();
        let (mut looked, mut sent) = (Instant::now(), self.source.sent());
        loop {
            tokio::select! {
                reply = destination.receive() => match reply? {
                    Reply::Supplied(supplied) => {
                        // What is here may be all there is of them: nothing is let go of on such a word. One that has them all the
                        // same says so when it is asked again.
                        match self.source.unsent() {
                            0 => return Ok(supplied),
                            unsent => return Err(violation(&format!("said that nothing is missing, and {unsent} pages were not sent to it"))),
                        }
                    }
                    other => return Err(violation(&format!("said {other} while memory was supplied"))),
                },
                () = tokio::time::sleep(LOOK) => {
                    left(self.source.unsent());
                    let (now, all) = (Instant::now(), self.source.sent());
                    if let Err(error) = self.ahead.learn(all - sent, now - looked) {
                        tracing::debug!(error = chain(&error), "a stream is as far ahead as before");
                    }
                    (looked, sent) = (now, all);
                    if let Some(error) = self.source.failure() {
                        return Err(Stop::because("data-stream", &error, "see to the network between the hosts"));
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_that_carries_more_than_was_thought_is_given_more() {
        let mut ahead = Ahead { bulk: Vec::new(), round_trip: Duration::ZERO, rate: 1e6 };
        ahead.learn(50_000, Duration::from_millis(100)).expect("no stream");
        assert!((ahead.rate - 1e6).abs() < 1.0, "less goes through when there is less to push");
        ahead.learn(200_000, Duration::from_millis(100)).expect("no stream");
        assert!((ahead.rate - 2e6 * FASTER).abs() < 1.0);
    }
}
