//! Engine `qemu`: what comes on the first data stream is fed to QEMU as it is.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use link::{AbortHandle, DataReceiver};
use tokio::sync::broadcast::error::RecvError;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::arrivals::Arrivals;
use crate::copy::not_loaded;
use crate::end::{End, failed, qemu_gone, violation};
use crate::reservation::Reservation;
use crate::source::Source;
use protocol::deadlines::LOAD;
use protocol::wire::Request as Asked;

/// Bytes that are read from the stream at a time.
const PIECE: usize = 256 << 10;
/// A deadline for what has none.
const FAR: Duration = Duration::from_secs(86_400);

/// QEMU's stream on its way to the QEMU here.
pub(super) struct Relay {
    reservation: Reservation,
    carrying: Option<Carrying>,
    /// The stream has come to its end.
    carried: bool,
    /// QEMU has loaded it.
    loaded: bool,
}

/// The thread that carries it. The stream ends when this is dropped.
struct Carrying {
    thread: JoinHandle<io::Result<()>>,
    abort: AbortHandle,
}

impl Drop for Carrying {
    fn drop(&mut self) {
        self.abort.abort();
    }
}

impl Relay {
    pub(super) fn new(reservation: Reservation) -> Relay {
        Relay { reservation, carrying: None, carried: false, loaded: false }
    }

    /// Feeds QEMU until it has loaded everything and the source has said that this was all.
    pub(super) async fn run(
        mut self,
        source: &mut Source,
        arrivals: &mut Arrivals,
    ) -> Result<Reservation, End> {
        let mut events = self.reservation.qmp.events();
        let mut complete_by = None;
        while complete_by.is_none() || !self.carried || !self.loaded {
            let late = tokio::time::sleep_until(complete_by.unwrap_or_else(|| Instant::now() + FAR));
            tokio::select! {
                biased;
                event = events.recv() => self.event(event).await?,
                Some((stream, receiver)) = arrivals.queue.recv() => self.attach(stream, receiver)?,
                ended = ended(&mut self.carrying) => {
                    ended?;
                    self.carried = true;
                }
                word = source.next_request() => {
                    match word? {
                        Asked::Load(_) => complete_by = Some(Instant::now() + LOAD),
                        Asked::Cancel(_) => return Err(End::Cancelled),
                        other => return Err(violation(&format!("sent {other} out of order"))),
                    }
                }
                () = late, if complete_by.is_some() => {
                    return Err(not_loaded("QEMU at the destination did not load the stream in time"));
                }
            }
        }
        Ok(self.reservation)
    }

    fn attach(&mut self, stream: u16, from: DataReceiver) -> Result<(), End> {
        if stream != 0 || self.carried || self.carrying.is_some() {
            return Err(violation("opened a data stream too many"));
        }
        let abort = from.abort_handle().map_err(|e| failed("data-stream", &e))?;
        let to = self.reservation.device.take_stream().map_err(|e| failed("qemu", &e))?;
        let thread = tokio::task::spawn_blocking(move || carry(from, to));
        self.carrying = Some(Carrying { thread, abort });
        Ok(())
    }

    async fn event(&mut self, event: Result<qemu::Event, RecvError>) -> Result<(), End> {
        let status = match event {
            Ok(event) if event.name == "MIGRATION" => {
                event.data.get("status").and_then(|status| status.as_str()).map(str::to_owned)
            }
            Ok(_) => None,
            // Events were missed: ask.
            Err(RecvError::Lagged(_)) => {
                self.reservation.qmp.query_migrate().await.map_err(|e| failed("qemu", &e))?.status
            }
            Err(RecvError::Closed) => return Err(qemu_gone()),
        };
        match status.as_deref() {
            Some("completed") => self.loaded = true,
            Some("failed") => return Err(not_loaded("QEMU at the destination did not take the stream")),
            _ => {}
        }
        Ok(())
    }
}

/// Waits until the stream has been carried to its end; for ever where none is being carried.
async fn ended(carrying: &mut Option<Carrying>) -> Result<(), End> {
    let Some(Carrying { thread, .. }) = carrying else { return std::future::pending().await };
    let ended = thread.await;
    *carrying = None;
    ended.map_err(|e| failed("data-stream", &e))?.map_err(|e| failed("data-stream", &e))
}

/// Carries QEMU's stream to its end. One that was cut off is an error, and QEMU does not take it for the end either.
fn carry(mut from: DataReceiver, mut to: UnixStream) -> io::Result<()> {
    let mut piece = vec![0; PIECE];
    loop {
        match from.read(&mut piece)? {
            0 => return Ok(()),
            read => to.write_all(&piece[..read])?,
        }
    }
}
