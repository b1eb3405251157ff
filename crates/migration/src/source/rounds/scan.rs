//! Scans: what the guest has written, found while it runs, while it is stopped for that, or while it is paused.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use mirror::layout::PAGE_SIZE;
use mirror::memory::round::Guest;
use mirror::memory::source::{MemorySource, Scanned, SourceError};
use qemu::Qmp;
use tokio::sync::oneshot;

use super::super::peer::Destination;
use super::super::stop::Stop;
use super::{Rounds, broken};
use finding::Finding;

/// How often a guest that was stopped for a scan is told again to go on.
const UNQUIESCE: u32 = 3;
/// How long to watch a guest to see how fast it dirties memory: longer than the pauses of one that works in bursts.
const GLANCE: Duration = Duration::from_millis(100);

impl Rounds {
    /// How fast the guest dirties memory at this moment, in bytes per second: what it dirties in a short while.
    pub(in crate::source) async fn dirty_rate_now(
        &mut self,
        destination: &mut Destination,
    ) -> Result<f64, Stop> {
        let first = self.scan(destination, Guest::Running).await?;
        tokio::time::sleep(GLANCE).await;
        let second = self.scan(destination, Guest::Running).await?;
        self.last_scan = Some(second.begin);
        Ok((second.pages * PAGE_SIZE as u64) as f64 / (second.begin - first.begin).as_secs_f64())
    }

    /// Scans. A guest with devices that write its memory behind the tracking is stopped meanwhile, which drains them.
    pub(super) async fn scan(
        &mut self,
        destination: &mut Destination,
        guest: Guest,
    ) -> Result<Scanned, Stop> {
        let Some(qmp) = self.quiesce.clone().filter(|_| guest == Guest::Running) else {
            return self.with(destination, move |memory| memory.look(guest)).await;
        };
        let memory = self.memory.take().ok_or_else(|| broken(&SourceError::Ended))?;
        let (tell, answer) = oneshot::channel();
        // On a task of its own: whoever waits for it may go, the guest goes on all the same.
        let left_stopped = Arc::clone(&self.left_stopped);
        let busy = tokio::spawn(async move {
            let (memory, scanned) = quiesced_scan(&qmp, memory, &left_stopped).await;
            let _ = tell.send(Ok(scanned));
            memory
        });
        let (scanned, stopped) = self.attend(destination, busy, answer).await??;
        if let Some(quiesced) = &mut self.quiesced {
            let ms = stopped.as_secs_f64() * 1e3;
            quiesced.stops += 1;
            quiesced.total_ms += ms;
            quiesced.longest_ms = quiesced.longest_ms.max(ms);
        }
        Ok(scanned)
    }
}

/// Stops the guest, which drains its disks, scans, and lets it go on. Returns for how long it was stopped, too.
async fn quiesced_scan(
    qmp: &Qmp,
    mut memory: MemorySource,
    left_stopped: &AtomicBool,
) -> (MemorySource, Result<(Scanned, Duration), Stop>) {
    let begin = Instant::now();
    match qmp.quiesce().await {
        Ok(true) => {}
        Ok(false) => {
            let message = "the VM was paused by somebody else";
            let paused = Finding::new("vm-paused", message, "migrate the VM when it runs again");
            return (memory, Err(Stop::Failed(paused)));
        }
        Err(e) => {
            // It may have been stopped all the same.
            left_stopped.store(qmp.unquiesce().await.is_err(), Ordering::Relaxed);
            return (memory, Err(Stop::qemu(e)));
        }
    }
    let scanning = tokio::task::spawn_blocking(move || {
        let scanned = memory.look(Guest::Running);
        (memory, scanned)
    });
    let scanned = scanning.await;
    let mut resumed = qmp.unquiesce().await;
    for _ in 0..UNQUIESCE {
        if resumed.is_ok() {
            break;
        }
        resumed = qmp.unquiesce().await;
    }
    left_stopped.store(resumed.is_err(), Ordering::Relaxed);
    let stopped = begin.elapsed();
    let (memory, scanned) = match scanned {
        Ok(scanned) => scanned,
        Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
    };
    let scanned = scanned.map_err(|e| broken(&e));
    (memory, scanned.and_then(|scanned| resumed.map(|()| (scanned, stopped)).map_err(Stop::qemu)))
}
